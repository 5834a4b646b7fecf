//! Holding out a share of the data for evaluation.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::batch::Document;
use crate::random::Stream;

/// Splits off `share` of the records, chosen by `seed`: at least one, and not all. Documents that
/// were cut from one record stay together, and so do records that are the same: what is trained on would
/// not tell what was learned. Returns training and evaluation documents, in order.
pub fn hold_out(documents: Vec<Document>, share: f64, seed: u64) -> (Vec<Document>, Vec<Document>) {
    let records = records(&documents);
    let most = records.len().saturating_sub(1);
    let count = ((records.len() as f64 * share).round() as usize).clamp(1.min(most), most);
    let order = Stream::new(seed, "data.validation_split").permutation(records.len());
    let held: BTreeSet<usize> =
        order[..count].iter().flat_map(|&index| records[index].iter().copied()).collect();
    documents.into_iter().partition(|document| !held.contains(&document.line))
}

/// The lines of each record and of those that repeat it, in the order of the first ones.
fn records(documents: &[Document]) -> Vec<Vec<usize>> {
    let mut known: HashMap<Vec<Contents>, usize> = HashMap::new();
    let mut records: Vec<Vec<usize>> = Vec::new();
    for record in documents.chunk_by(|a, b| a.line == b.line) {
        let index = *known.entry(record.iter().map(contents).collect()).or_insert(records.len());
        match records.get_mut(index) {
            Some(lines) => lines.push(record[0].line),
            None => records.push(vec![record[0].line]),
        }
    }
    records
}

/// Tokens and labels.
type Contents<'a> = (&'a [u32], &'a [i32]);

fn contents(document: &Document) -> Contents<'_> {
    (&document.input_ids, &document.labels)
}

/// How many of `evaluation` are among `training`, token by token.
pub fn also_trained(evaluation: &[Document], training: &[Document]) -> usize {
    let training: HashSet<_> = training.iter().map(contents).collect();
    evaluation.iter().filter(|document| training.contains(&contents(document))).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every document is another.
    fn documents(lines: &[usize]) -> Vec<Document> {
        let document = |(index, &line): (usize, &usize)| Document {
            line,
            input_ids: vec![index as u32],
            labels: vec![-100],
        };
        lines.iter().enumerate().map(document).collect()
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
    fn records_that_are_the_same_go_to_one_side() {
        let mut all = documents(&(0..30).collect::<Vec<_>>());
        for index in 10..30 {
            all[index].input_ids = all[index % 10].input_ids.clone();
        }
        for seed in 0..20 {
            let (train, eval) = hold_out(all.clone(), 0.3, seed);
            assert_eq!((train.len(), eval.len()), (21, 9), "three records of ten");
            assert_eq!(also_trained(&eval, &train), 0);
        }
        // A record in pieces is not one of its pieces.
        let (first, second) = (all[0].clone(), all[1].clone());
        let pieces =
            [first.clone(), Document { line: 0, ..second }, Document { line: 40, ..first }];
        assert_eq!(records(&pieces), [[0], [40]]);
        assert_eq!(also_trained(&pieces, &all[..1]), 2);
        let masked = Document { labels: vec![0], ..all[0].clone() };
        assert_eq!(also_trained(&[masked], &all), 0);
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
