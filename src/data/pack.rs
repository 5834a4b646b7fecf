//! Packing: short documents share rows of the maximal length.
//!
//! Each document goes into the fullest row that still has room for it (best fit): first those of half
//! a row and more, longest first, then the others in an order drawn from the seed. Best fit over all
//! documents by falling length would leave no more than 1 % less empty, but it puts documents of
//! equal length into the same row, and with them the tasks of a mixed data set: rows, and gradients,
//! would be of one kind each. Documents in a row do not see each other.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use crate::random::Stream;

/// Rows of indices of documents with these `lengths`, each row of at most `max_length` tokens; in the
/// order of the first document that they hold.
pub fn pack(lengths: &[usize], max_length: usize, seed: u64) -> Vec<Vec<usize>> {
    let length = |index: usize| lengths[index];
    let drawn = Stream::new(seed, "data.packing").permutation(lengths.len());
    let (mut order, short): (Vec<usize>, Vec<usize>) =
        drawn.into_iter().partition(|&index| 2 * length(index) >= max_length);
    order.sort_by_key(|&index| (Reverse(length(index)), index));
    order.extend(short);
    let mut rows: Vec<Vec<usize>> = Vec::new();
    // Room that is left → rows that have exactly that much.
    let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for index in order {
        let length = length(index);
        let best = open.range(length..).next().map(|(&room, _)| room);
        let (row, room) = match best {
            Some(room) => {
                let rows_with_room = open.get_mut(&room).expect("found by range");
                let row = rows_with_room.pop().expect("entries are never empty");
                if rows_with_room.is_empty() {
                    open.remove(&room);
                }
                (row, room)
            }
            None => {
                rows.push(Vec::new());
                (rows.len() - 1, max_length.max(length))
            }
        };
        rows[row].push(index);
        if room > length {
            open.entry(room - length).or_default().push(row);
        }
    }
    for row in &mut rows {
        row.sort_unstable();
    }
    rows.sort_unstable_by_key(|row| row[0]);
    rows
}

/// Rows of one document each, for `count` documents.
pub fn one_per_row(count: usize) -> Vec<Vec<usize>> {
    (0..count).map(|index| vec![index]).collect()
}

/// Share of the rows' tokens that are documents.
pub fn efficiency(lengths: &[usize], rows: &[Vec<usize>], max_length: usize) -> f64 {
    lengths.iter().sum::<usize>() as f64 / (rows.len() * max_length).max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    #[test]
    fn every_document_is_in_one_row_that_fits() {
        let random = Stream::new(7, "lengths");
        let lengths: Vec<usize> = (0..2000).map(|i| 20 + random.below(i, 700) as usize).collect();
        let rows = pack(&lengths, 2048, 1);
        let mut seen: Vec<usize> = rows.iter().flatten().copied().collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..2000).collect::<Vec<_>>());
        for row in &rows {
            assert!(row.iter().map(|&i| lengths[i]).sum::<usize>() <= 2048);
        }
        assert!(efficiency(&lengths, &rows, 2048) > 0.98);
    }

    /// Log-normal lengths, as those of collected text are: `median`, and `spread` in units of ln.
    fn collected(count: u64, median: f64, spread: f64, most: usize) -> Vec<usize> {
        let random = Stream::new(11, "lengths");
        let length = |i: u64| {
            let uniform = |j| (random.below(2 * i + j, 1 << 20) as f64 + 0.5) / f64::from(1 << 20);
            let normal =
                (-2.0 * uniform(0).ln()).sqrt() * (std::f64::consts::TAU * uniform(1)).cos();
            (median * (spread * normal).exp()) as usize
        };
        (0..count).map(|i| length(i).clamp(8, most)).collect()
    }

    /// Instructions, chats cut at the maximum, a small set in long rows, and rows of hardly more than a document.
    #[test]
    fn rows_are_98_percent_full_on_lengths_as_they_occur() {
        for (count, median, spread, most) in [
            (5000, 120.0, 0.7, 2048),
            (5000, 600.0, 1.0, 2048),
            (1000, 300.0, 1.0, 4096),
            (5000, 200.0, 0.8, 512),
        ] {
            let lengths = collected(count, median, spread, most);
            let full = efficiency(&lengths, &pack(&lengths, most, 1), most);
            assert!(full > 0.98, "{count} documents of {median} in rows of {most}: {full}");
        }
    }

    #[test]
    fn the_fullest_row_with_room_wins() {
        // 7 and 6 open a row each; 3 and 4 fit only one of them exactly, in either order.
        for seed in 0..8 {
            assert_eq!(pack(&[6, 3, 4, 7], 10, seed), vec![vec![0, 2], vec![1, 3]]);
        }
    }

    #[test]
    fn rows_mix_documents_of_all_lengths() {
        // Two kinds of documents: packed by falling length alone, a row would hold one kind.
        let lengths: Vec<usize> = (0..2000).map(|i| if i % 2 == 0 { 90 } else { 60 }).collect();
        let rows = pack(&lengths, 512, 3);
        let mixed = |row: &&Vec<usize>| row.iter().filter(|&&i| i % 2 == 0).count() % row.len() > 0;
        assert!(rows.iter().filter(mixed).count() * 10 > rows.len() * 9);
        assert_ne!(rows, pack(&lengths, 512, 4), "another seed, other rows");
        assert_eq!(rows, pack(&lengths, 512, 3));
    }
}
