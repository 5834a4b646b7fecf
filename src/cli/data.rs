//! How data is read, for every command that reads any, and the flags of `nibble data`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{ArgAction, Args, ValueHint};

use super::numbers;
use super::train::MAX_LENGTH;
use crate::data::{
    BadRecords, DataOptions, Format, TemplateChoice, TemplateKwargs, TrainOn, Truncation,
};
use crate::model::spec::ModelSpec;

/// How records become trained tokens.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Data")]
pub struct DataFormatArgs {
    /// Format of the records [default: detected from the first one of each file]
    #[arg(long, value_enum)]
    pub format: Option<Format>,
    /// Rename a field of the file, such as `question=instruction`; may be repeated
    #[arg(long, value_name = "OLD=NEW", value_parser = rename)]
    pub rename_columns: Vec<(String, String)>,
    /// Chat template: alpaca, chatml, gemma, llama-3, zephyr, or a Jinja file [default: the model's]
    #[arg(long, value_name = "NAME|FILE", value_hint = ValueHint::FilePath)]
    pub chat_template: Option<String>,
    /// Variables for the chat template, as a JSON object such as `{"enable_thinking": false}`; a record's own
    /// `chat_template_kwargs` come before them
    #[arg(long, value_name = "JSON")]
    pub chat_template_kwargs: Option<TemplateKwargs>,
    /// Tokens that count in the loss
    #[arg(long, value_enum, value_name = "PART", default_value_t = TrainOn::Assistant)]
    pub train_on: TrainOn,
    /// What to do with documents longer than `--max-length`
    #[arg(long, value_enum, value_name = "HOW", default_value_t = Truncation::Error)]
    pub truncation: Truncation,
    /// What to do with records that cannot be used
    #[arg(long, value_enum, value_name = "HOW", default_value_t = BadRecords::Error)]
    pub bad_records: BadRecords,
}

impl DataFormatArgs {
    /// The chat template that is asked for.
    pub fn template_choice(&self) -> TemplateChoice {
        TemplateChoice::new(self.chat_template.as_ref(), self.chat_template_kwargs.as_ref())
    }

    /// With a longest document of `max_length` tokens, or of as many as the model has learned positions for.
    pub fn options(&self, max_length: usize, spec: &ModelSpec) -> DataOptions {
        DataOptions {
            format: self.format,
            train_on: self.train_on,
            truncation: self.truncation,
            bad_records: self.bad_records,
            max_length: spec.possible_length(max_length),
            positions: spec.learned_positions,
            rename_columns: self.rename_columns.clone(),
        }
    }
}

fn rename(text: &str) -> std::result::Result<(String, String), String> {
    // The name that is meant has neither; the file's may have both.
    match text.rsplit_once('=') {
        Some((old, new)) if !old.is_empty() && !new.is_empty() && !new.contains(',') => {
            Ok((old.into(), new.into()))
        }
        _ => Err("expected one `OLD=NEW`, such as `question=instruction`\nhint: the flag is given once for each \
                  field: `--rename-columns a=b --rename-columns c=d`"
            .into()),
    }
}

const EXAMPLES: &str = "Examples:
  nibble data --model smollm2-nf4 --data train.jsonl
  nibble data --model smollm2-nf4 --data train.jsonl --max-length 512 --show 3
  nibble data --config run.toml";

/// Check a dataset with a model's tokenizer and chat template, without training
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct DataArgs {
    /// Read the settings that are flags here from this TOML file, a file for `nibble train --config` or
    /// OUT/settings.toml of a run; flags on the command line win
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Hugging Face folder or GGUF file whose tokenizer and chat template are used
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,
    /// PEFT adapter folder whose tokenizer and chat template, if it has any, replace the model's, as in
    /// a run with `--init-adapter`
    #[arg(long, value_name = "DIR", visible_alias = "init-adapter")]
    pub adapter: Option<PathBuf>,
    /// JSONL, JSON, CSV or Parquet: files, folders, or patterns in quotes
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    pub data: Vec<PathBuf>,
    /// Maximum length of a document, in tokens
    #[arg(long, value_name = "TOKENS", default_value = MAX_LENGTH, value_parser = numbers::length)]
    pub max_length: usize,
    /// How records are read.
    #[command(flatten)]
    pub format: DataFormatArgs,
    /// Print the first N documents token by token, with trained tokens marked
    #[arg(long, help_heading = "Output", value_name = "N", default_value_t = 0, value_parser = numbers::whole::<usize>)]
    pub show: usize,
    /// Print everything as JSON, without documents
    #[arg(long, help_heading = "Output", action = ArgAction::SetTrue, conflicts_with = "show")]
    pub json: bool,
    /// Worker threads [default: one per core]
    #[arg(long, help_heading = "Memory and threads", value_name = "THREADS", value_parser = numbers::threads)]
    pub threads: Option<NonZeroUsize>,
}
