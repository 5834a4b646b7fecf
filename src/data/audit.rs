//! What a data set looks like to a model: lengths, what is trained, what is wrong.

use std::path::PathBuf;

use serde::Serialize;

use super::Document;
use super::encode::Encoder;
use super::load::read;
use super::load_report::LoadReport;
use super::options::DataOptions;
use super::pack::{efficiency, pack};
use crate::error::Result;

/// Bars of the length histogram.
const BARS: u32 = 12;
/// Any seed fills the rows alike; training packs with its own.
const PACKING_SEED: u64 = 42;

/// Figures of one data set.
#[derive(Debug, Clone, Serialize)]
pub struct Audit {
    /// What became of each record.
    #[serde(flatten)]
    pub report: LoadReport,
    /// What `nibble train` would stop with, if it would.
    pub would_stop: Option<String>,
    /// Lengths in tokens, before truncation.
    pub length: Lengths,
    /// Longest sequence in tokens that the model was trained on, where documents may be longer.
    pub trained_length: Option<usize>,
    /// The line of each document that is longer.
    pub beyond_trained_length: Vec<usize>,
    /// Rows of the maximal length when packed.
    pub packed_rows: usize,
    /// Share of those rows that is documents.
    pub packing_efficiency: f64,
}

/// How long the documents are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Lengths {
    /// The shortest.
    pub shortest: u32,
    /// Half are no longer.
    pub median: u32,
    /// 95 % are no longer.
    pub percentile_95: u32,
    /// The longest.
    pub longest: u32,
    /// Counts of lengths, in bars of equal width.
    pub histogram: Vec<Bar>,
}

/// How many documents have a length from `from` to `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Bar {
    /// Shortest length, in tokens.
    pub from: u32,
    /// Longest length, in tokens.
    pub to: u32,
    /// Documents.
    pub count: usize,
}

impl Audit {
    /// Reads `data`, and returns its first `shown` documents too. `watch` hears of bytes read, and
    /// of how many there are;
    /// `trained_length` is [`ModelSpec::trained_length`](crate::model::spec::ModelSpec::trained_length).
    ///
    /// # Errors
    /// As [`read`].
    pub fn of(
        data: &[PathBuf],
        encoder: &Encoder,
        options: &DataOptions,
        trained_length: Option<usize>,
        shown: usize,
        watch: impl FnMut(u64, u64),
    ) -> Result<(Self, Vec<Document>)> {
        let trained_length = trained_length.filter(|&most| most < options.max_length);
        let (mut lengths, mut first, mut beyond) = (Vec::new(), Vec::new(), Vec::new());
        let keep = |document: Document| {
            let length = document.input_ids.len();
            lengths.push(length);
            if trained_length.is_some_and(|most| length > most) {
                beyond.push(document.line);
            }
            if first.len() < shown {
                first.push(document);
            }
        };
        let report = read(data, encoder, options, keep, watch)?;
        let rows = pack(&lengths, options.max_length, PACKING_SEED);
        let audit = Audit {
            would_stop: report.check(data, options).err().map(|e| e.message().what.clone()),
            length: Lengths::of(report.lengths.clone()),
            trained_length,
            beyond_trained_length: beyond,
            packed_rows: rows.len(),
            packing_efficiency: efficiency(&lengths, &rows, options.max_length),
            report,
        };
        Ok((audit, first))
    }
}

impl Lengths {
    fn of(mut lengths: Vec<u32>) -> Self {
        lengths.sort_unstable();
        let at = |share: f64| {
            let index = (share * lengths.len().saturating_sub(1) as f64).round() as usize;
            lengths.get(index).copied().unwrap_or(0)
        };
        Lengths {
            shortest: at(0.0),
            median: at(0.5),
            percentile_95: at(0.95),
            longest: at(1.0),
            histogram: histogram(&lengths),
        }
    }
}

/// Counts of sorted lengths in bars of equal width.
fn histogram(lengths: &[u32]) -> Vec<Bar> {
    let (Some(&shortest), Some(&longest)) = (lengths.first(), lengths.last()) else {
        return Vec::new();
    };
    let width = (longest - shortest + 1).div_ceil(BARS);
    let bar = |from| Bar { from, to: from + width - 1, count: 0 };
    let mut bars: Vec<Bar> = (shortest..=longest).step_by(width as usize).map(bar).collect();
    for &length in lengths {
        bars[((length - shortest) / width) as usize].count += 1;
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
        assert_eq!(bars[0], Bar { from: 1, to: 10, count: 2 });
        assert_eq!(bars[1], Bar { from: 11, to: 20, count: 2 });
        assert_eq!(bars[11], Bar { from: 111, to: 120, count: 1 });
        assert_eq!(histogram(&[7, 7]), [Bar { from: 7, to: 7, count: 2 }]);
        assert!(histogram(&[]).is_empty());
    }

    #[test]
    fn percentiles_are_lengths_that_occur() {
        let lengths = Lengths::of((1..=100).rev().collect());
        let Lengths { shortest, median, percentile_95, longest, .. } = lengths;
        assert_eq!((shortest, median, percentile_95, longest), (1, 51, 95, 100));
        assert_eq!(Lengths::of(Vec::new()), Lengths::default());
    }
}
