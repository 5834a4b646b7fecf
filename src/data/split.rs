//! Holding out a share of the data for evaluation.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::batch::Document;
use crate::random::Stream;

/// Splits off `share` of the records, chosen by `seed`: at least one, and not all. Documents that
/// were cut from one record stay together, and so do records that are the same, unless they are more than the
/// share: what is trained on would not tell what was learned. Returns training and evaluation documents, in order.
pub fn hold_out(documents: Vec<Document>, share: f64, seed: u64) -> (Vec<Document>, Vec<Document>) {
    let records = records(&documents);
    let lines: usize = records.iter().map(Vec::len).sum();
    let most = if records.len() > 1 { lines - 1 } else { 0 };
    let count = ((lines as f64 * share).round() as usize).clamp(1.min(most), most);
    let order = Stream::new(seed, "data.validation_split").permutation(records.len());
    let mut held: BTreeSet<usize> = BTreeSet::new();
    for &index in &order {
        if held.len() + records[index].len() <= count {
            held.extend(&records[index]);
        }
    }
    if held.is_empty() && most > 0 {
        // All of them are repeated more often than that.
        held.extend(records.iter().min_by_key(|lines| lines.len()).into_iter().flatten());
    }
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
        // One that is most of the data is trained on, whatever is drawn.
        let mut most = all[..20].to_vec();
        most[2..].iter_mut().for_each(|document| document.input_ids = vec![7]);
        for seed in 0..20 {
            assert_eq!(hold_out(most.clone(), 0.1, seed).1.len(), 2, "two of twenty");
        }
        let twice = [&most[1..2], &most[1..2], &most[2..5]].concat();
        let twice: Vec<Document> =
            twice.into_iter().enumerate().map(|(line, d)| Document { line, ..d }).collect();
        assert_eq!(
            lines(&hold_out(twice, 0.1, 1).1),
            [0, 1],
            "the smallest, where none is as small"
        );
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
