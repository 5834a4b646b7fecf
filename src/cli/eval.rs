//! Flags of `nibble eval`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{ArgAction, Args, ValueHint};

use super::adapters::NamedAdapter;
use super::data::DataFormatArgs;
use super::device::DeviceArgs;
use super::generate::{MAX_NEW_TOKENS, some_text};
use super::numbers;
use super::train::{BaseModelArgs, MAX_LENGTH};

const EXAMPLES: &str = "Examples:
  nibble eval --model smollm2-nf4 --adapter run --data eval.jsonl
  nibble eval --model smollm2-nf4 --adapter run --data eval.jsonl --predictions answers.jsonl
  nibble eval --model smollm2-nf4 --adapter early=run/checkpoint-55 --adapter late=run --data eval.jsonl
  nibble eval --config run/settings.toml --adapter run
  nibble eval --model smollm2-nf4 --data eval.jsonl --json";

/// Measure loss, perplexity, token accuracy and exact match, without and with adapters
///
/// Token accuracy: how many of the trained tokens are the most likely ones. Exact match: documents of
/// which all are, so that greedy decoding gives exactly that answer.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct EvalArgs {
    /// Read the settings that are flags here from this TOML file, a file for `nibble train --config` or
    /// OUT/settings.toml of a run, whose evaluation data are the data here; flags on the command line win
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The base model.
    #[command(flatten)]
    pub base: BaseModelArgs,
    /// PEFT adapter folder; may be repeated: of several, each has a row under its name
    #[arg(long, help_heading = "Adapter", value_name = "[NAME=]DIR", value_hint = ValueHint::AnyPath)]
    pub adapter: Vec<NamedAdapter>,
    /// JSONL, JSON, CSV or Parquet: files, folders, or patterns in quotes
    #[arg(long, help_heading = "Data", value_name = "FILE", num_args = 1.., required = true)]
    pub data: Vec<PathBuf>,
    /// Of the data, the fraction that `nibble train` holds out with this `--validation-split` and `--seed` [default: all]
    #[arg(long, help_heading = "Data", value_name = "FRACTION", value_parser = numbers::below_one)]
    pub validation_split: Option<f64>,
    /// Seed of the run whose `--validation-split` it is [default: 42]
    #[arg(long, help_heading = "Data", value_name = "NUMBER", value_parser = numbers::whole::<u64>)]
    pub seed: Option<u64>,
    /// Maximum length of a document, in tokens
    #[arg(long, help_heading = "Data", value_name = "TOKENS", default_value = MAX_LENGTH, value_parser = numbers::length)]
    pub max_length: usize,
    /// How records are read.
    #[command(flatten)]
    pub format: DataFormatArgs,
    /// Where it computes.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Write all logits to a safetensors file: f32 `logits` [sequences, length, vocabulary] and
    /// `input_ids`, for pre-tokenized sequences of equal length
    #[arg(long, help_heading = "Output", value_name = "FILE")]
    pub save_logits: Option<PathBuf>,
    /// Write the answers of greedy decoding to a new JSONL file: for each document its `prompt`, its last
    /// answer as `label`, that of the model, with the adapter if there is one, as `predict`, and as
    /// `finish_reason` whether it came to an end (`stop`) or was cut off (`length`), with its `line`. Until it
    /// is complete, or Ctrl-C ends it, it is `.FILE.partial`
    #[arg(long, help_heading = "Output", value_name = "FILE")]
    pub predictions: Option<PathBuf>,
    /// Maximum length of these answers, in tokens
    #[arg(long, help_heading = "Output", value_name = "TOKENS", default_value = MAX_NEW_TOKENS,
          requires = "predictions", value_parser = numbers::at_least_one)]
    pub max_new_tokens: NonZeroUsize,
    /// Text that ends these answers, and is no part of them; may be repeated
    #[arg(long, help_heading = "Output", value_name = "TEXT", allow_hyphen_values = true,
          requires = "predictions", value_parser = some_text)]
    pub stop_strings: Vec<String>,
    /// Print the figures as JSON
    #[arg(long, help_heading = "Output", action = ArgAction::SetTrue)]
    pub json: bool,
    /// Worker threads [default: one per core]
    #[arg(long, help_heading = "Memory and threads", value_name = "THREADS", value_parser = numbers::threads)]
    pub threads: Option<NonZeroUsize>,
}
