//! From files of examples to streams of tokens with a loss mask.

pub mod batch;

pub use batch::{Batch, Document};
