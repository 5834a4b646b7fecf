//! Flags of `nibble generate` and `nibble chat`.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf, is_separator};
use std::str::FromStr;

use clap::{ArgAction, Args, ValueHint};

use super::device::DeviceArgs;
use super::numbers;
use super::train::BaseModelArgs;
use crate::error::Error;
use crate::sample::SamplingOptions;

/// A PEFT adapter folder and what it is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedAdapter {
    /// What the user calls it.
    pub name: String,
    /// Where it is.
    pub folder: PathBuf,
}

/// `NAME=DIR`, or `DIR` whose last part is the name. A path may hold `=` itself: one that exists, or
/// has a separator before its first `=`, is taken whole.
impl FromStr for NamedAdapter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let split = text.split_once('=').filter(|(name, _)| !name.contains(is_separator));
        match split.filter(|_| !Path::new(text).exists()) {
            Some((_, "")) => Err("no folder stands behind the `=`, expected NAME=DIR".into()),
            Some(("", _)) => Err("no name stands before the `=`, expected NAME=DIR".into()),
            Some((name, folder)) => {
                Ok(NamedAdapter { name: name.to_string(), folder: folder.into() })
            }
            None => NamedAdapter::from_folder(text),
        }
    }
}

impl NamedAdapter {
    fn from_folder(text: &str) -> Result<Self, String> {
        let folder = PathBuf::from(text);
        let name = folder.file_name().and_then(|name| name.to_str()).map(str::to_string);
        let name = name.ok_or("expected NAME=DIR, or a folder that has a name")?;
        Ok(NamedAdapter { name, folder })
    }
}

/// That no two adapters have the same name: what one of them says could not be told from the other.
///
/// # Errors
/// `Usage` with the name and both folders.
pub fn check_names(adapters: &[NamedAdapter]) -> crate::error::Result<()> {
    for (index, NamedAdapter { name, folder }) in adapters.iter().enumerate() {
        let Some(first) = adapters[..index].iter().find(|first| first.name == *name) else {
            continue;
        };
        let (first, folder) = (first.folder.display(), folder.display());
        let what = format_args!("two adapters are called `{name}`: {first} and {folder}");
        let hint = format_args!("name one of them: `--adapter NAME={folder}`");
        return Err(Error::usage(what).hint(hint));
    }
    Ok(())
}

// Defaults of random draws.
const TOP_K: usize = 50;
const TOP_P: f32 = 1.0;
const MIN_P: f32 = 0.0;
const SEED: u64 = 42;

/// How answers are made; names as in transformers' `GenerationConfig`.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Generation")]
pub struct GenerationArgs {
    /// Maximum length of an answer, in tokens
    #[arg(long, value_name = "TOKENS", default_value = "256", value_parser = numbers::at_least_one)]
    pub max_new_tokens: NonZeroUsize,
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

    #[test]
    fn a_path_may_hold_the_sign_behind_a_name() {
        let named = |text: &str| text.parse::<NamedAdapter>();
        let adapter =
            |name: &str, folder: &str| NamedAdapter { name: name.into(), folder: folder.into() };
        assert_eq!(named("./od=d"), Ok(adapter("od=d", "./od=d")));
        assert_eq!(named("runs/lr=1e-4"), Ok(adapter("lr=1e-4", "runs/lr=1e-4")));
        assert_eq!(named("a=runs/lr=1e-4"), Ok(adapter("a", "runs/lr=1e-4")));
        assert!(named("a=").unwrap_err().starts_with("no folder"));
        assert!(named("=a").unwrap_err().starts_with("no name"));
    }
}
