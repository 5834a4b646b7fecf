//! Holding out a share of the data for evaluation.

use std::collections::BTreeSet;

use super::batch::Document;
use crate::random::Stream;

/// Splits off `share` of the records, chosen by `seed`: at least one, and not all. Documents that
/// were cut from one record stay together. Returns training and evaluation documents, in order.
pub fn hold_out(documents: Vec<Document>, share: f64, seed: u64) -> (Vec<Document>, Vec<Document>) {
    let lines: Vec<usize> = documents
        .iter()
        .map(|document| document.line)
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    let most = lines.len().saturating_sub(1);
    let count = ((lines.len() as f64 * share).round() as usize).clamp(1.min(most), most);
    let order = Stream::new(seed, "data.validation_split").permutation(lines.len());
    let held: BTreeSet<usize> = order[..count].iter().map(|&index| lines[index]).collect();
    documents.into_iter().partition(|document| !held.contains(&document.line))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(lines: &[usize]) -> Vec<Document> {
        lines.iter().map(|&line| Document { line, ..Document::default() }).collect()
    }

    fn lines(documents: &[Document]) -> Vec<usize> {
        documents.iter().map(|document| document.line).collect()
    }

    #[test]
    fn records_go_to_one_side_whole() {
        let all = documents(&[1, 1, 2, 3, 4, 4, 4, 5, 6, 7, 8, 9, 10]);
        let (train, eval) = hold_out(all.clone(), 0.3, 1);
        let (train, eval) = (lines(&train), lines(&eval));
        assert_eq!(eval.iter().collect::<BTreeSet<_>>().len(), 3);
        assert!(eval.iter().all(|line| !train.contains(line)));
        assert_eq!(train.len() + eval.len(), 13);
        assert!(train.is_sorted() && eval.is_sorted());
        assert_ne!(eval, lines(&hold_out(all, 0.3, 2).1), "another seed, other records");
    }

    #[test]
    fn neither_side_is_empty_if_there_are_two_records() {
        for (share, sizes) in [(0.001, (3, 1)), (0.999, (1, 3))] {
            let (train, eval) = hold_out(documents(&[1, 2, 3, 4]), share, 1);
            assert_eq!((train.len(), eval.len()), sizes);
        }
        let (train, eval) = hold_out(documents(&[1]), 0.5, 1);
        assert_eq!((train.len(), eval.len()), (1, 0));
    }
}
