//! From files of examples to streams of tokens with a loss mask.
//!
//! ```text
//! files      one, those of a folder, or those that a pattern fits
//! source     a file's records: JSONL, JSON, CSV, Parquet, packed or not
//! format     what kind of example they are;  record: one of them;  chat: messages of all shapes;
//!            renames: how to read others
//! fitted     a conversation as one template takes it
//! template   conversation → text, in the Jinja of jinja; spans: who said what, up to its ends
//! encode     text → ids and labels, by the tokenizer
//! truncate   what happens to the long ones
//! load       all of these in parallel, with an account of every record
//! split      some are held out;  pack: the others share rows
//! batch      what a forward pass takes;  audit: figures for a reader
//! ```

pub mod audit;
pub mod batch;
pub mod chat;
mod columns;
pub mod encode;
mod ends;
mod fields;
pub mod files;
mod fitted;
mod format;
mod gguf_tokens;
mod jinja;
mod json_text;
mod known_templates;
mod left_out;
pub mod load;
mod load_report;
mod message;
mod options;
pub mod pack;
mod pre_tokenizers;
mod python_float;
mod python_json;
mod python_methods;
pub mod record;
mod rejection;
mod renames;
mod sentence_piece;
mod source;
mod spans;
pub mod split;
mod strftime;
pub mod template;
mod template_choice;
mod template_sources;
mod token_kinds;
mod token_record;
pub mod tokenizer;
mod tokenizer_files;
mod truncate;

pub use batch::{Batch, Document, targets};
pub use encode::{Encoder, TrainOn};
pub use files::DataFiles;
pub use format::Format;
pub use load::{Dataset, load};
pub use load_report::{LoadReport, Rejected, RoleUse};
pub use options::{BadRecords, DataOptions};
pub use rejection::Rejection;
pub use spans::{Rendered, Turn};
pub use template_choice::{TemplateChoice, TemplateKwargs};
pub use template_sources::TemplateSources;
pub use tokenizer::ChatTokenizer;
pub use tokenizer_files::{TOKENIZER_FILES, TokenizerFiles};
pub use truncate::Truncation;
