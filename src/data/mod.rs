//! From files of examples to streams of tokens with a loss mask.

pub mod batch;
pub mod tokenizer;

pub use batch::{Batch, Document};
pub use tokenizer::ChatTokenizer;
