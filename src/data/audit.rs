//! What a data set looks like to a model: lengths, what is trained, what is wrong.

use serde::Serialize;

use super::load::{DataOptions, Dataset};
use super::pack::{efficiency, pack};
use super::record::Rejection;

/// Bars of the length histogram.
const BARS: usize = 12;
/// Any seed fills the rows alike; training packs with its own.
const PACKING_SEED: u64 = 42;

/// Figures of one data set.
#[derive(Debug, Clone, Serialize)]
pub struct Audit {
    /// Shape of the records.
    pub format: Option<super::Format>,
    /// Records in the file.
    pub records: usize,
    /// Documents that training would see, after truncation.
    pub documents: usize,
    /// Their tokens.
    pub tokens: usize,
    /// Tokens that count in the loss.
    pub targets: usize,
    /// Length in tokens: shortest, median, 95 %, longest, before truncation.
    pub lengths: [usize; 4],
    /// Bars of equal width: upper bound in tokens and count.
    pub histogram: Vec<(usize, usize)>,
    /// Documents longer than the maximum.
    pub too_long: usize,
    /// Tokens that truncation removed.
    pub tokens_removed: usize,
    /// Lines without a token to train on.
    pub without_targets: Vec<usize>,
    /// Lines with an answer whose end-of-sequence is not trained.
    pub untrained_eos: Vec<usize>,
    /// Lines that repeat an earlier record.
    pub duplicates: Vec<usize>,
    /// Bad records: line and reason.
    pub rejected: Vec<(usize, Rejection)>,
    /// Rows of the maximal length when packed.
    pub packed_rows: usize,
    /// Share of those rows that is documents.
    pub packing_efficiency: f64,
}

impl Audit {
    /// Looks at a loaded data set.
    pub fn of(dataset: &Dataset, options: &DataOptions) -> Self {
        let report = &dataset.report;
        let documents = &dataset.documents;
        let mut lengths = report.lengths.clone();
        lengths.sort_unstable();
        let at = |share: f64| {
            let index = (share * lengths.len().saturating_sub(1) as f64).round() as usize;
            lengths.get(index).copied().unwrap_or(0)
        };
        let rows = pack(documents, options.max_length, PACKING_SEED);
        Audit {
            format: report.format,
            records: report.records,
            documents: documents.len(),
            tokens: documents.iter().map(|document| document.input_ids.len()).sum(),
            targets: documents.iter().map(super::Document::num_targets).sum(),
            lengths: [at(0.0), at(0.5), at(0.95), at(1.0)],
            histogram: histogram(&lengths),
            too_long: report.too_long,
            tokens_removed: report.tokens_removed,
            without_targets: report.without_targets.clone(),
            untrained_eos: report.untrained_eos.clone(),
            duplicates: report.duplicates.clone(),
            rejected: report.rejected.clone(),
            packed_rows: rows.len(),
            packing_efficiency: efficiency(documents, &rows, options.max_length),
        }
    }
}

/// Counts of sorted lengths in bars of equal width.
fn histogram(lengths: &[usize]) -> Vec<(usize, usize)> {
    let Some(&longest) = lengths.last() else { return Vec::new() };
    let width = longest.div_ceil(BARS).max(1);
    let mut bars: Vec<(usize, usize)> =
        (1..=longest.div_ceil(width)).map(|bar| (bar * width, 0)).collect();
    for &length in lengths {
        bars[length.saturating_sub(1) / width].1 += 1;
    }
    bars
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_falls_into_one_bar() {
        let bars = histogram(&[1, 2, 12, 13, 120]);
        assert_eq!(bars.len(), 12);
        assert_eq!(bars[0], (10, 2));
        assert_eq!(bars[1], (20, 2));
        assert_eq!(bars[11], (120, 1));
        assert!(histogram(&[]).is_empty());
    }
}
