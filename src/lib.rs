//! Nibble: QLoRA fine-tuning from one binary.

pub mod cli;
pub mod commands;
pub mod error;
pub mod model;

pub use error::{Error, Result};
