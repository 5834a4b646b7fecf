//! How data is read.

use clap::ValueEnum;

use super::encode::TrainOn;
use super::format::Format;
use super::truncate::Truncation;

/// What to do with a record that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BadRecords {
    /// Stop and name the first one
    Error,
    /// Leave it out, and say how many there are
    Skip,
}

/// How to read data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataOptions {
    /// Shape of the records; found from the first one of each file if absent.
    pub format: Option<Format>,
    /// Which tokens are trained.
    pub train_on: TrainOn,
    /// What happens to long documents.
    pub truncation: Truncation,
    /// What happens to records that cannot be used.
    pub bad_records: BadRecords,
    /// Longest document in tokens.
    pub max_length: usize,
    /// Positions of a model that has no more than so many.
    pub positions: Option<usize>,
    /// Fields that have another name in the records: theirs, and that of the format.
    pub rename_columns: Vec<(String, String)>,
}
