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
    /// Drop the document
    Drop,
    /// Keep the beginning
    Right,
    /// Keep the end
    Left,
    /// Split it into several documents
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

    /// How many of its answers lose their end where `parts` are all that is left of it: some of an
    /// answer is trained, but neither its last token nor, as the last of these, one that `ends` a turn.
    /// The first token of a part is not trained: nothing predicts it.
    pub(super) fn cut_answers(&self, parts: &[Range<usize>], ends: impl Fn(u32) -> bool) -> usize {
        let trained = |token: &usize| {
            let part = parts.get(parts.partition_point(|part| part.end <= *token));
            part.is_some_and(|part| part.start < *token)
        };
        let is_cut = |answer: &Range<usize>| {
            let last = answer.clone().rfind(trained);
            last.is_some_and(|last| last + 1 < answer.end && !ends(self.input_ids[last]))
        };
        self.answers().filter(is_cut).count()
    }

    /// Tokens that are trained, run by run.
    fn answers(&self) -> impl Iterator<Item = Range<usize>> {
        let runs = self.labels.chunk_by(|a, b| (*a >= 0) == (*b >= 0));
        let ranges = runs.scan(0, |end, run| {
            *end += run.len();
            Some((run[0] >= 0, *end - run.len()..*end))
        });
        ranges.filter_map(|(is_trained, range)| is_trained.then_some(range))
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

    #[test]
    fn answers_that_go_on_without_their_end_are_counted() {
        const END: u32 = 9;
        // A question, an answer of three tokens, another question, an answer of two.
        let labels = vec![-100, -100, 1, 2, 9, -100, 3, 9, -100];
        let input_ids = labels.iter().map(|&label: &i32| label.max(0) as u32).collect();
        let document = Document { input_ids, labels, line: 1 };
        let cut = |how: Truncation, max_length| {
            let parts = how.parts(document.labels.len(), max_length);
            document.cut_answers(&parts, |id| id == END)
        };
        let right: Vec<usize> = (2..9).map(|length| cut(Truncation::Right, length)).collect();
        assert_eq!(right, [0, 1, 1, 0, 0, 1, 0]);
        for length in 2..9 {
            assert_eq!(cut(Truncation::Left, length), 0, "the ends stay");
            assert_eq!(cut(Truncation::Drop, length), 0, "nothing goes on");
        }
        // An end that begins a part is predicted from nothing.
        assert_eq!(
            [2, 3, 4, 5, 6, 7].map(|length| cut(Truncation::Split, length)),
            [1, 0, 1, 0, 0, 1]
        );
        let all = Document { labels: vec![0; 9], ..document.clone() };
        let cut = |length| {
            let parts = Truncation::Right.parts(9, length);
            all.cut_answers(&parts, |id| id == END)
        };
        assert_eq!([4, 5, 6].map(cut), [1, 0, 1], "a turn's own end is an end");
    }
}
