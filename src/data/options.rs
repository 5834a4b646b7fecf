//! How data is read.

use super::encode::TrainOn;
use super::format::Format;
use super::truncate::Truncation;

/// How to read data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataOptions {
    /// Shape of the records; found from the first one of each file if absent.
    pub format: Option<Format>,
    /// Which tokens are trained.
    pub train_on: TrainOn,
    /// What happens to long documents.
    pub truncation: Truncation,
    /// Longest document in tokens.
    pub max_length: usize,
    /// Positions of a model that has no more than so many.
    pub positions: Option<usize>,
    /// Fields that have another name in the records: theirs, and that of the format.
    pub rename_columns: Vec<(String, String)>,
}
