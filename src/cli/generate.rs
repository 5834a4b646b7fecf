//! Flags of `nibble generate` and `nibble chat`.

use std::path::PathBuf;

use clap::{ArgAction, Args};

use super::train::BaseModelArgs;
use crate::sample::SamplingOptions;

/// How answers are made; names as in transformers' `GenerationConfig`.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Generation")]
pub struct GenerationArgs {
    /// Longest answer, in tokens
    #[arg(long, value_name = "TOKENS", default_value_t = 256)]
    pub max_new_tokens: usize,
    /// Context for prompt and answers, in tokens
    #[arg(long, value_name = "TOKENS", default_value_t = 2048)]
    pub context_length: usize,
    /// Divides the logits; 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Draw from the k likeliest tokens; 0 is all
    #[arg(long, value_name = "K", default_value_t = 50)]
    pub top_k: usize,
    /// Draw from the likeliest tokens that together reach this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f32,
    /// Draw from tokens at least this likely, relative to the likeliest
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    pub min_p: f32,
    /// Make tokens that occurred less likely; 1 is off
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// Seed of the draws
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Worker threads; all cores by default
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

impl GenerationArgs {
    /// The sampler's part.
    pub fn sampling(&self) -> SamplingOptions {
        SamplingOptions {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
        }
    }
}

/// Answer a prompt
#[derive(Debug, Args)]
#[command(allow_negative_numbers = true)]
pub struct GenerateArgs {
    /// The base model.
    #[command(flatten)]
    pub base: BaseModelArgs,
    /// PEFT adapter folder
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// What to answer; read from standard input if absent
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// System message before the prompt
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Continue the prompt as plain text, without the chat template
    #[arg(long, action = ArgAction::SetTrue)]
    pub raw: bool,
    /// How to answer.
    #[command(flatten)]
    pub generation: GenerationArgs,
}

/// Talk to a model; `/adapter NAME`, `/base`, `/reset` and `/exit` steer
#[derive(Debug, Args)]
#[command(allow_negative_numbers = true)]
pub struct ChatArgs {
    /// The base model.
    #[command(flatten)]
    pub base: BaseModelArgs,
    /// PEFT adapter folder, with a name to call it by; may be repeated, the first one starts
    #[arg(long, value_name = "NAME=DIR")]
    pub adapter: Vec<String>,
    /// System message
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// How to answer.
    #[command(flatten)]
    pub generation: GenerationArgs,
}
