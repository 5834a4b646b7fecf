//! Flags of `nibble generate` and `nibble chat`.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{ArgAction, Args};

use super::device::DeviceArgs;
use super::numbers;
use super::train::BaseModelArgs;
use crate::sample::SamplingOptions;

/// A PEFT adapter folder and what it is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedAdapter {
    /// What the user calls it.
    pub name: String,
    /// Where it is.
    pub folder: PathBuf,
}

/// `NAME=DIR`, or `DIR` whose last part is the name.
impl FromStr for NamedAdapter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((name, folder)) = text.split_once('=') {
            return Ok(NamedAdapter { name: name.to_string(), folder: folder.into() });
        }
        let folder = PathBuf::from(text);
        let name = folder.file_name().and_then(|name| name.to_str()).map(str::to_string);
        let name = name.ok_or("expected NAME=DIR, or a folder that has a name")?;
        Ok(NamedAdapter { name, folder })
    }
}

/// How answers are made; names as in transformers' `GenerationConfig`.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Generation")]
pub struct GenerationArgs {
    /// Longest answer, in tokens
    #[arg(long, value_name = "TOKENS", default_value = "256", value_parser = numbers::at_least_one)]
    pub max_new_tokens: NonZeroUsize,
    /// Room for prompt and answer together, in tokens
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, value_parser = numbers::length)]
    pub context_length: usize,
    /// Divides the logits: higher is more random, 0 always takes the likeliest token
    #[arg(long, value_name = "NUMBER", default_value_t = 0.0, value_parser = numbers::any)]
    pub temperature: f32,
    /// Draw from the k likeliest tokens; 0 is all
    #[arg(long, value_name = "K", default_value_t = 50, value_parser = numbers::whole::<usize>)]
    pub top_k: usize,
    /// Draw from the likeliest tokens that together reach this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = numbers::any)]
    pub top_p: f32,
    /// Draw from tokens at least this likely, relative to the likeliest
    #[arg(long, value_name = "P", default_value_t = 0.0, value_parser = numbers::any)]
    pub min_p: f32,
    /// Make tokens that occurred less likely; 1 is off
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = numbers::any)]
    pub repetition_penalty: f32,
    /// Seed of the draws
    #[arg(long, value_name = "NUMBER", default_value_t = 42, value_parser = numbers::whole::<u64>)]
    pub seed: u64,
    /// Where it computes.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Worker threads [default: one for each core]
    #[arg(long, help_heading = "Memory and threads", value_name = "THREADS", value_parser = numbers::threads)]
    pub threads: Option<NonZeroUsize>,
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

const GENERATE_EXAMPLES: &str = "Examples:
  nibble generate --model smollm2-nf4 --adapter run --prompt \"Who are you?\"
  nibble generate --model smollm2-nf4 --adapter early=run/checkpoint-100 --adapter late=run \\
      --prompt \"Who are you?\"
  nibble generate --model smollm2-nf4 --raw --temperature 0.8 --prompt \"Once upon a time\"";

const CHAT_EXAMPLES: &str = "Examples:
  nibble chat --model smollm2-nf4
  nibble chat --model smollm2-nf4 --adapter sample=run --adapter earlier=run/checkpoint-100";

/// Answer a prompt
#[derive(Debug, Args)]
#[command(after_help = GENERATE_EXAMPLES)]
pub struct GenerateArgs {
    /// The base model.
    #[command(flatten)]
    pub base: BaseModelArgs,
    /// PEFT adapter folder; may be repeated: each one answers, under its name
    #[arg(long, help_heading = "Prompt", value_name = "[NAME=]DIR")]
    pub adapter: Vec<NamedAdapter>,
    /// What to answer; read from standard input if absent
    #[arg(long, help_heading = "Prompt", value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// System message before the prompt
    #[arg(
        long,
        help_heading = "Prompt",
        value_name = "TEXT",
        allow_hyphen_values = true,
        conflicts_with = "raw"
    )]
    pub system: Option<String>,
    /// Continue the prompt as plain text, without the chat template
    #[arg(long, help_heading = "Prompt", action = ArgAction::SetTrue)]
    pub raw: bool,
    /// How to answer.
    #[command(flatten)]
    pub generation: GenerationArgs,
}

/// Talk to a model; adapters can be swapped while talking, `/help` says how
#[derive(Debug, Args)]
#[command(after_help = CHAT_EXAMPLES)]
pub struct ChatArgs {
    /// The base model.
    #[command(flatten)]
    pub base: BaseModelArgs,
    /// PEFT adapter folder, with a name to call it by; may be repeated, the first one starts
    #[arg(long, help_heading = "Conversation", value_name = "[NAME=]DIR")]
    pub adapter: Vec<NamedAdapter>,
    /// System message
    #[arg(long, help_heading = "Conversation", value_name = "TEXT", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// How to answer.
    #[command(flatten)]
    pub generation: GenerationArgs,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_is_called_by_name_or_by_its_folder() {
        let named = |text: &str| text.parse::<NamedAdapter>();
        let adapter =
            |name: &str, folder: &str| NamedAdapter { name: name.into(), folder: folder.into() };
        assert_eq!(named("a=b/c"), Ok(adapter("a", "b/c")));
        assert_eq!(named("b/c"), Ok(adapter("c", "b/c")));
        assert!(named("..").is_err());
    }
}
