//! Flags of `nibble generate` and `nibble chat`.

use std::num::NonZeroUsize;

use clap::{ArgAction, Args, ValueHint};

use super::adapters::NamedAdapter;
use super::device::DeviceArgs;
use super::numbers;
use super::train::BaseModelArgs;
use crate::data::TemplateKwargs;
use crate::sample::SamplingOptions;

/// `--max-new-tokens` by default.
pub const MAX_NEW_TOKENS: &str = "256";
// Defaults of random draws.
const TOP_K: usize = 50;
const TOP_P: f32 = 1.0;
const MIN_P: f32 = 0.0;
const SEED: u64 = 42;

/// A text that is not empty.
pub(super) fn some_text(text: &str) -> Result<String, String> {
    if text.is_empty() { Err("expected some text".to_string()) } else { Ok(text.to_string()) }
}

/// How answers are made; names as in transformers' `GenerationConfig`.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Generation")]
pub struct GenerationArgs {
    /// Maximum length of an answer, in tokens
    #[arg(long, value_name = "TOKENS", default_value = MAX_NEW_TOKENS, value_parser = numbers::at_least_one)]
    pub max_new_tokens: NonZeroUsize,
    /// Text that ends an answer, and is no part of it; may be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = some_text)]
    pub stop_strings: Vec<String>,
    /// Context length: prompt and answer together, in tokens
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, value_parser = numbers::length)]
    pub context_length: usize,
    /// Sampling temperature; 0 is greedy decoding
    #[arg(long, value_name = "NUMBER", default_value_t = 0.0, value_parser = numbers::any)]
    pub temperature: f32,
    /// Sample from the k most likely tokens; 0 is all
    #[arg(long, value_name = "K", default_value_t = TOP_K, value_parser = numbers::whole::<usize>)]
    pub top_k: usize,
    /// Nucleus sampling: sample from the most likely tokens that together reach this probability
    #[arg(long, value_name = "P", default_value_t = TOP_P, value_parser = numbers::any)]
    pub top_p: f32,
    /// Minimum probability of a sampled token, relative to the most likely one
    #[arg(long, value_name = "P", default_value_t = MIN_P, value_parser = numbers::any)]
    pub min_p: f32,
    /// Penalty on tokens that already occurred; 1 is none
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = numbers::any)]
    pub repetition_penalty: f32,
    /// Sampling seed
    #[arg(long, value_name = "NUMBER", default_value_t = SEED, value_parser = numbers::whole::<u64>)]
    pub seed: u64,
    /// Where it computes.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Worker threads [default: one per core]
    #[arg(long, help_heading = "Memory and threads", value_name = "THREADS", value_parser = numbers::threads)]
    pub threads: Option<NonZeroUsize>,
}

impl GenerationArgs {
    /// Flags of random draws where none are made.
    pub fn idle_flags(&self) -> Option<String> {
        let set = [
            ("--top-k", self.top_k != TOP_K),
            ("--top-p", self.top_p != TOP_P),
            ("--min-p", self.min_p != MIN_P),
            ("--seed", self.seed != SEED),
        ];
        let names: Vec<String> =
            set.iter().filter(|(_, set)| *set).map(|(name, _)| format!("`{name}`")).collect();
        (self.temperature == 0.0 && !names.is_empty()).then(|| names.join(", "))
    }

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
    /// PEFT adapter folder; may be repeated, each adapter answers under its name
    #[arg(long, help_heading = "Prompt", value_name = "[NAME=]DIR", value_hint = ValueHint::AnyPath)]
    pub adapter: Vec<NamedAdapter>,
    /// Prompt to answer; read from stdin if absent
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
    /// Chat template, by name or Jinja file [default: the adapter's, else the model's]
    #[arg(long, help_heading = "Prompt", value_name = "NAME|FILE", value_hint = ValueHint::FilePath,
          conflicts_with = "raw")]
    pub chat_template: Option<String>,
    /// Variables for the chat template, as a JSON object such as `{"enable_thinking": false}`
    #[arg(long, help_heading = "Prompt", value_name = "JSON", conflicts_with = "raw")]
    pub chat_template_kwargs: Option<TemplateKwargs>,
    /// Continue the prompt as plain text, without the chat template
    #[arg(long, help_heading = "Prompt", action = ArgAction::SetTrue)]
    pub raw: bool,
    /// How to answer.
    #[command(flatten)]
    pub generation: GenerationArgs,
}

/// Chat with a model and switch adapters in the conversation; `/help` lists the commands
#[derive(Debug, Args)]
#[command(after_help = CHAT_EXAMPLES)]
pub struct ChatArgs {
    /// The base model.
    #[command(flatten)]
    pub base: BaseModelArgs,
    /// PEFT adapter folder, with a name to call it by; may be repeated, the first one is used first
    #[arg(long, help_heading = "Conversation", value_name = "[NAME=]DIR",
          value_hint = ValueHint::AnyPath)]
    pub adapter: Vec<NamedAdapter>,
    /// System message
    #[arg(long, help_heading = "Conversation", value_name = "TEXT", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// Chat template, by name or Jinja file [default: the adapter's, else the model's]
    #[arg(long, help_heading = "Conversation", value_name = "NAME|FILE",
          value_hint = ValueHint::FilePath)]
    pub chat_template: Option<String>,
    /// Variables for the chat template, as a JSON object such as `{"enable_thinking": false}`
    #[arg(long, help_heading = "Conversation", value_name = "JSON")]
    pub chat_template_kwargs: Option<TemplateKwargs>,
    /// How to answer.
    #[command(flatten)]
    pub generation: GenerationArgs,
}
