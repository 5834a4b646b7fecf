//! From files of examples to streams of tokens with a loss mask.
//!
//! `record` reads shapes of JSON, `template` renders chats, `encode` makes ids and labels, `load`
//! reads files and truncates, `pack` fills rows, `batch` is what a forward pass takes.

pub mod audit;
pub mod batch;
pub mod chat;
pub mod encode;
mod ends;
mod jinja;
pub mod load;
pub mod pack;
pub mod record;
mod source;
mod spans;
pub mod split;
mod strftime;
pub mod template;
pub mod tokenizer;
mod truncate;

pub use batch::{Batch, Document};
pub use encode::{Encoder, TrainOn};
pub use load::{DataOptions, Dataset, LoadReport, Rejected, load};
pub use record::Format;
pub use spans::Rendered;
pub use tokenizer::ChatTokenizer;
pub use truncate::Truncation;
