//! Flags that say how data files are read.

use clap::Args;

use crate::data::{DataOptions, Format, TrainOn, Truncation};

/// From records to documents.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Data")]
pub struct RecordArgs {
    /// Shape of the records [default: found from the first one]
    #[arg(long, value_name = "FORMAT", value_enum)]
    pub format: Option<Format>,
    /// Tokens that carry loss
    #[arg(long, value_name = "TOKENS", value_enum, default_value_t = TrainOn::Assistant)]
    pub train_on: TrainOn,
    /// What becomes of documents longer than `--max-length`
    #[arg(long, value_name = "HOW", value_enum, default_value_t = Truncation::Error)]
    pub truncation: Truncation,
    /// Longest document, in tokens
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, value_parser = at_least_two)]
    pub max_length: usize,
}

/// A document of one token has nothing to predict.
fn at_least_two(text: &str) -> Result<usize, String> {
    let length = text.parse().ok().filter(|&length: &usize| length >= 2);
    length.ok_or_else(|| "expected a whole number, 2 or more".to_string())
}

impl RecordArgs {
    /// As the loader takes them.
    pub fn options(&self) -> DataOptions {
        DataOptions {
            format: self.format,
            train_on: self.train_on,
            truncation: self.truncation,
            max_length: self.max_length,
        }
    }
}
