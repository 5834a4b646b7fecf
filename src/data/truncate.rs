//! Documents that are longer than the maximum.

use std::ops::Range;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::batch::Document;

/// What to do with a document that is longer than the maximum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Truncation {
    /// Stop and say how many there are
    Error,
    /// Leave the document out
    Drop,
    /// Keep the beginning
    Right,
    /// Keep the end
    Left,
    /// Cut it into several documents
    Split,
}

impl Truncation {
    /// The parts of a document of `length` tokens that are kept, each of at most `max_length`.
    pub fn parts(self, length: usize, max_length: usize) -> Vec<Range<usize>> {
        if length <= max_length {
            return std::iter::once(0..length).collect();
        }
        let one = |range: Range<usize>| std::iter::once(range).collect();
        match self {
            Truncation::Error | Truncation::Drop => Vec::new(),
            Truncation::Right => one(0..max_length),
            Truncation::Left => one(length - max_length..length),
            Truncation::Split => (0..length)
                .step_by(max_length)
                .map(|begin| begin..length.min(begin + max_length))
                .collect(),
        }
    }
}

impl Document {
    /// Some of its tokens.
    pub(super) fn part(&self, range: Range<usize>) -> Document {
        Document {
            input_ids: self.input_ids[range.clone()].to_vec(),
            labels: self.labels[range].to_vec(),
            line: self.line,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_what_the_name_says() {
        let parts = |how: Truncation, length| -> Vec<(usize, usize)> {
            how.parts(length, 3).into_iter().map(|part| (part.start, part.end)).collect()
        };
        assert!(parts(Truncation::Error, 7).is_empty());
        assert!(parts(Truncation::Drop, 7).is_empty());
        assert_eq!(parts(Truncation::Right, 7), [(0, 3)]);
        assert_eq!(parts(Truncation::Left, 7), [(4, 7)]);
        assert_eq!(parts(Truncation::Split, 7), [(0, 3), (3, 6), (6, 7)]);
        assert_eq!(parts(Truncation::Split, 6), [(0, 3), (3, 6)]);
        for &how in Truncation::value_variants() {
            assert_eq!(parts(how, 3), [(0, 3)], "{how:?}");
        }
    }
}
