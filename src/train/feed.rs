//! Which documents go into which forward pass, for every epoch.
//!
//! A *row* is one document, or several packed ones. The order of the rows in an epoch depends on
//! the seed and the epoch's number only, so any batch can be made at any time: resuming is asking
//! for the next one.

use std::collections::BTreeSet;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::data::{Batch, DataFiles, Document};
use crate::error::{Error, Result};
use crate::random::Stream;

/// The training data as rows, and their order.
pub struct Feed {
    documents: Vec<Document>,
    rows: Vec<Vec<usize>>,
    rows_per_batch: usize,
    seed: Option<u64>,
    largest_first: bool,
    order: Order,
    files: Arc<DataFiles>,
}

/// The order of the rows in one epoch, kept until another one is asked for.
struct Order {
    epoch: u64,
    rows: Vec<usize>,
}

impl Feed {
    /// `rows` hold indices of `documents`; `seed` shuffles the rows anew in every epoch.
    ///
    /// # Errors
    /// `Input` when there is nothing to learn from.
    pub fn new(
        documents: Vec<Document>,
        rows: Vec<Vec<usize>>,
        rows_per_batch: usize,
        seed: Option<u64>,
    ) -> Result<Self> {
        if rows.is_empty() || documents.iter().all(|document| document.num_targets() == 0) {
            return Err(Error::input("the training data has no token to learn from")
                .hint("`nibble data` shows what became of every record"));
        }
        let order = Order { epoch: 0, rows: order(seed, 0, rows.len()) };
        let largest_first = false;
        Ok(Feed {
            documents,
            rows,
            rows_per_batch,
            seed,
            largest_first,
            order,
            files: Arc::default(),
        })
    }

    /// Puts the largest batch that can be first in the first epoch, if rows are shuffled at all:
    /// a run that lacks memory for its data then stops at once.
    pub fn with_largest_first(mut self, largest_first: bool) -> Self {
        self.largest_first = largest_first;
        self.order = self.order_of(0);
        self
    }

    /// Names the files that the documents come from, for messages.
    pub fn with_files(mut self, files: DataFiles) -> Self {
        self.files = files.into();
        self
    }

    /// Forward passes in an epoch; the last one may be short.
    pub fn num_batches(&self) -> usize {
        self.rows.len().div_ceil(self.rows_per_batch)
    }

    /// Forward pass `index` of `epoch`.
    pub fn batch(&mut self, epoch: u64, index: usize) -> Batch {
        if self.order.epoch != epoch {
            self.order = self.order_of(epoch);
        }
        let first = index * self.rows_per_batch;
        let rows = &self.order.rows[first..self.rows.len().min(first + self.rows_per_batch)];
        self.batch_of(rows)
    }

    fn order_of(&self, epoch: u64) -> Order {
        let mut rows = order(self.seed, epoch, self.rows.len());
        if self.largest_first && self.seed.is_some() && epoch == 0 {
            let largest: BTreeSet<usize> = self.largest_rows().into_iter().collect();
            rows.sort_by_key(|row| !largest.contains(row));
        }
        Order { epoch, rows }
    }

    /// Tokens of the largest batch that any epoch can have.
    pub fn largest_batch_tokens(&self) -> usize {
        self.largest_rows().iter().map(|&row| self.row_tokens(row)).sum()
    }

    /// The largest batch that any epoch can have.
    pub fn largest_batch(&self) -> Batch {
        self.batch_of(&self.largest_rows())
    }

    /// Trained tokens of the batch with the most of them that any epoch can have.
    pub fn most_batch_targets(&self) -> usize {
        let targets = |row: usize| self.row_sum(row, Document::num_targets);
        self.greatest_rows(targets).into_iter().map(targets).sum()
    }

    fn largest_rows(&self) -> Vec<usize> {
        self.greatest_rows(|row| self.row_tokens(row))
    }

    /// Rows of the batch with the greatest sum of `size`: any can meet when they are shuffled, else
    /// they come as they lie.
    fn greatest_rows(&self, size: impl Fn(usize) -> usize) -> Vec<usize> {
        let mut rows: Vec<usize> = (0..self.rows.len()).collect();
        if self.seed.is_some() {
            rows.sort_by_cached_key(|&row| std::cmp::Reverse(size(row)));
        }
        let sum = |batch: &&[usize]| batch.iter().map(|&row| size(row)).sum::<usize>();
        let greatest = rows.chunks(self.rows_per_batch).max_by_key(sum);
        greatest.unwrap_or_default().to_vec()
    }

    fn row_tokens(&self, row: usize) -> usize {
        self.row_sum(row, |document| document.input_ids.len())
    }

    fn row_sum(&self, row: usize, size: impl Fn(&Document) -> usize) -> usize {
        self.rows[row].iter().map(|&document| size(&self.documents[document])).sum()
    }

    fn batch_of(&self, rows: &[usize]) -> Batch {
        let documents = rows.iter().flat_map(|&row| &self.rows[row]);
        let documents = documents.map(|&document| &self.documents[document]);
        Batch { files: self.files.clone(), ..Batch::from_documents(documents) }
    }

    /// Tokens of the longest document.
    pub fn longest_document_tokens(&self) -> usize {
        self.documents.iter().map(|document| document.input_ids.len()).max().unwrap_or(0)
    }

    /// The documents.
    pub fn documents(&self) -> &[Document] {
        &self.documents
    }

    /// SHA-256 of ids, labels and rows, in hex: whether this is the data that a run began with.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for row in &self.rows {
            hash.update((row.len() as u64).to_le_bytes());
            for &index in row {
                let document = &self.documents[index];
                hash.update((document.input_ids.len() as u64).to_le_bytes());
                hash.update(bytemuck::cast_slice::<u32, u8>(&document.input_ids));
                hash.update(bytemuck::cast_slice::<i32, u8>(&document.labels));
            }
        }
        super::digest::hex(&hash.finalize())
    }
}

fn order(seed: Option<u64>, epoch: u64, rows: usize) -> Vec<usize> {
    match seed {
        Some(seed) => Stream::new(seed, "data.order").at(epoch).permutation(rows),
        None => (0..rows).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn document(line: usize, length: usize) -> Document {
        let ids = (0..length as u32).map(|i| i + 100 * line as u32).collect::<Vec<_>>();
        Document { labels: ids.iter().map(|&id| id as i32).collect(), input_ids: ids, line }
    }

    fn feed(seed: Option<u64>) -> Feed {
        let documents: Vec<_> = (0..7).map(|line| document(line, 2 + line)).collect();
        let rows = vec![vec![0, 1], vec![2], vec![3], vec![4], vec![5, 6]];
        Feed::new(documents, rows, 2, seed).unwrap()
    }

    #[test]
    fn in_file_order_without_shuffling() {
        let mut feed = feed(None);
        assert_eq!(feed.num_batches(), 3);
        let lines: Vec<_> = (0..3).map(|index| feed.batch(4, index).lines).collect();
        assert_eq!(lines, [vec![0, 1, 2], vec![3, 4], vec![5, 6]]);
        assert_eq!(feed.batch(0, 0).cu_seqlens, [0, 2, 5, 9]);
        assert_eq!(feed.batch(0, 0).places(), "lines 0, 1, 2");
        assert_eq!(feed.largest_batch_tokens(), 15, "the short last batch: documents 5 and 6");
        assert_eq!(feed.longest_document_tokens(), 8);
        let mut feed = feed.with_files(DataFiles::find(Path::new("train.jsonl")).unwrap());
        assert_eq!(feed.batch(0, 1).places(), "train.jsonl:3, 4");
    }

    #[test]
    fn every_epoch_has_each_row_once_in_an_order_of_its_own() {
        let mut feed = feed(Some(1));
        let mut epoch = |epoch| -> Vec<usize> {
            (0..3).flat_map(|index| feed.batch(epoch, index).lines).collect()
        };
        let (first, second, again) = (epoch(0), epoch(1), epoch(0));
        assert_ne!(first, second);
        assert_eq!(first, again);
        for mut lines in [first, second] {
            lines.sort_unstable();
            assert_eq!(lines, [0, 1, 2, 3, 4, 5, 6]);
        }
        assert_eq!(feed.largest_batch_tokens(), 15 + 6, "the two longest rows can meet");
    }

    #[test]
    fn the_largest_batch_is_as_large_as_any_that_comes() {
        for seed in [None, Some(3)] {
            let mut feed = feed(seed);
            let largest = feed.largest_batch();
            assert_eq!(largest.tokens(), feed.largest_batch_tokens());
            let mut most = 0;
            for epoch in 0..5 {
                for index in 0..feed.num_batches() {
                    assert!(feed.batch(epoch, index).tokens() <= largest.tokens());
                    most = most.max(feed.batch(epoch, index).num_targets());
                }
            }
            assert!(most <= feed.most_batch_targets());
            // In file order, it does come.
            assert!(seed.is_some() || most == feed.most_batch_targets());
        }
    }

    #[test]
    fn the_first_epoch_begins_with_the_largest_batch() {
        for seed in 0..5 {
            let mut plain = feed(Some(seed));
            let mut feed = feed(Some(seed)).with_largest_first(true);
            assert_eq!(feed.batch(0, 0).tokens(), feed.largest_batch_tokens());
            let mut lines: Vec<_> = (0..3).flat_map(|index| feed.batch(0, index).lines).collect();
            lines.sort_unstable();
            assert_eq!(lines, [0, 1, 2, 3, 4, 5, 6]);
            assert_eq!(feed.batch(1, 0).lines, plain.batch(1, 0).lines);
        }
        let mut in_file_order = feed(None).with_largest_first(true);
        assert_eq!(in_file_order.batch(0, 0).lines, [0, 1, 2]);
    }

    #[test]
    fn the_fingerprint_sees_ids_labels_and_packing() {
        let mut other = feed(None);
        let original = other.fingerprint();
        assert_eq!(original, feed(Some(3)).fingerprint());
        other.documents[3].labels[1] = -100;
        assert_ne!(original, other.fingerprint());
        let mut other = feed(None);
        other.rows = vec![vec![0], vec![1, 2], vec![3], vec![4], vec![5, 6]];
        assert_ne!(original, other.fingerprint());
    }

    #[test]
    fn nothing_to_learn_is_an_error() {
        assert!(Feed::new(vec![], vec![], 1, None).is_err());
        let masked = Document { input_ids: vec![1, 2], labels: vec![-100, -100], line: 1 };
        assert!(Feed::new(vec![masked], vec![vec![0]], 1, None).is_err());
    }
}
