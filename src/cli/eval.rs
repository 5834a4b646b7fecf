//! Flags of `nibble eval`.

use std::path::PathBuf;

use clap::{ArgAction, Args};

use super::data::DataFormatArgs;
use super::train::BaseModelArgs;

/// Loss and perplexity on a file, of the base and with an adapter
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// The base model.
    #[command(flatten)]
    pub base: BaseModelArgs,
    /// PEFT adapter folder
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// JSONL or JSON file
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// Longest document, in tokens
    #[arg(long, value_name = "TOKENS", default_value_t = 2048)]
    pub max_length: usize,
    /// How records are read.
    #[command(flatten)]
    pub format: DataFormatArgs,
    /// Write all logits to a safetensors file: f32 `logits` [rows, length, vocab], for
    /// pre-tokenized rows of equal length
    #[arg(long, value_name = "FILE")]
    pub save_logits: Option<PathBuf>,
    /// Print the figures as JSON
    #[arg(long, action = ArgAction::SetTrue)]
    pub json: bool,
    /// Worker threads; all cores by default
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}
