//! Packing: short documents share rows of the maximal length.
//!
//! Best-fit decreasing: the longest document that is left goes into the fullest row that still has
//! room for it. Documents in a row do not see each other; only the count of rows changes.

use std::collections::BTreeMap;

use super::batch::Document;

/// Rows of document indices, each of at most `max_length` tokens; in the order of the first
/// document that they hold.
pub fn pack(documents: &[Document], max_length: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..documents.len()).collect();
    order.sort_by_key(|&index| (std::cmp::Reverse(documents[index].input_ids.len()), index));
    let mut rows: Vec<Vec<usize>> = Vec::new();
    // Room that is left → rows that have exactly that much.
    let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for index in order {
        let length = documents[index].input_ids.len();
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

/// One row for each document.
pub fn one_per_row(documents: &[Document]) -> Vec<Vec<usize>> {
    (0..documents.len()).map(|index| vec![index]).collect()
}

/// Share of the rows' tokens that are documents.
pub fn efficiency(documents: &[Document], rows: &[Vec<usize>], max_length: usize) -> f64 {
    let tokens: usize = documents.iter().map(|document| document.input_ids.len()).sum();
    tokens as f64 / (rows.len() * max_length).max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    fn documents(lengths: impl IntoIterator<Item = usize>) -> Vec<Document> {
        let document = |length| Document { input_ids: vec![1; length], ..Document::default() };
        lengths.into_iter().map(document).collect()
    }

    #[test]
    fn every_document_is_in_one_row_that_fits() {
        let random = Stream::new(7, "lengths");
        let documents = documents((0..2000).map(|i| 20 + random.below(i, 700) as usize));
        let rows = pack(&documents, 2048);
        let mut seen: Vec<usize> = rows.iter().flatten().copied().collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..2000).collect::<Vec<_>>());
        for row in &rows {
            assert!(row.iter().map(|&i| documents[i].input_ids.len()).sum::<usize>() <= 2048);
        }
        assert!(efficiency(&documents, &rows, 2048) > 0.98);
    }

    #[test]
    fn the_fullest_row_with_room_wins() {
        let documents = documents([6, 3, 4, 7, 2]);
        // 7+3 and 6+4 fill two rows of ten; 2 needs a third.
        assert_eq!(pack(&documents, 10), vec![vec![0, 2], vec![1, 3], vec![4]]);
    }
}
