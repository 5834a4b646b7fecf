//! Nibble: QLoRA fine-tuning from one binary.

pub mod adapter;
pub mod cli;
pub mod commands;
pub mod error;
pub mod model;
pub mod nearest;
pub mod random;
pub mod train;

pub use error::{Error, Result};
