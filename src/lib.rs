//! Nibble: QLoRA fine-tuning from one binary.

pub mod cli;
pub mod commands;
pub mod error;
pub mod model;
pub mod random;

pub use error::{Error, Result};
