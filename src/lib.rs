//! Nibble: QLoRA fine-tuning from one binary.

#[macro_use]
pub mod printed;

pub mod adapter;
pub mod byte_size;
pub mod checkpoint;
pub mod cli;
pub mod commands;
pub mod data;
pub mod error;
pub mod kernels;
pub mod ledger;
pub mod model;
pub mod nearest;
pub mod plan;
pub mod plural;
pub mod random;
pub mod report;
pub mod sample;
pub mod system;
pub mod train;

pub use error::{Error, Result};
