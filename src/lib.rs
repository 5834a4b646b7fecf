//! Nibble: QLoRA fine-tuning from one binary.

pub mod error;
pub mod model;

pub use error::{Error, Result};
