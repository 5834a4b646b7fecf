//! How data is read, for every command that reads any.

use clap::Args;

use crate::data::{DataOptions, Format, TrainOn, Truncation};

/// How records become trained tokens.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Data")]
pub struct DataFormatArgs {
    /// Shape of the records; found from the first one by default
    #[arg(long, value_enum)]
    pub format: Option<Format>,
    /// Which tokens count in the loss
    #[arg(long, value_enum, value_name = "PART", default_value_t = TrainOn::Assistant)]
    pub train_on: TrainOn,
    /// What happens to documents longer than `--max-length`
    #[arg(long, value_enum, value_name = "HOW", default_value_t = Truncation::Error)]
    pub truncation: Truncation,
}

impl DataFormatArgs {
    /// With a longest document of `max_length` tokens.
    pub fn options(&self, max_length: usize) -> DataOptions {
        DataOptions {
            format: self.format,
            train_on: self.train_on,
            truncation: self.truncation,
            max_length,
        }
    }
}
