//! How the elements of a product are shared out among threads.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

/// Most tiles of rows in a task: a chunk of A stays in the second-level cache.
pub(super) const TILES_PER_CHUNK: usize = 22;
/// Tasks for each thread, so that a thread that was held up loses little.
const TASKS_PER_THREAD: usize = 16;
/// Tiles of the smallest of those chunks.
const LEAST_TILES: usize = 2;
/// Tiles for each thread from which on rows alone are shared out.
const TILES_FOR_CHUNKS: usize = 16;

/// Rows and panels of a task.
pub(super) type Part = (Range<usize>, Range<usize>);

/// Parts of `rows × panels`, rows in tiles of `tile`. Many rows are cut into ever smaller chunks: the
/// first ones read B for as many rows as a chunk may have, the last ones leave no thread waiting for
/// another. Few rows are shared out by panels, too.
pub(super) fn parts(rows: usize, panels: usize, tile: usize, threads: usize) -> Vec<Part> {
    let mut parts = Vec::new();
    if threads == 1 || rows >= TILES_FOR_CHUNKS * threads * tile {
        let sharers = if threads == 1 { 1 } else { 2 * threads };
        let mut begin = 0;
        while begin < rows {
            let share = (rows - begin).div_ceil(tile) / sharers;
            let end = rows.min(begin + tile * share.clamp(LEAST_TILES, TILES_PER_CHUNK));
            parts.push((begin..end, 0..panels));
            begin = end;
        }
        return parts;
    }
    let tasks = TASKS_PER_THREAD * threads;
    let chunk = rows.div_ceil(tasks).next_multiple_of(tile);
    let group = panels.div_ceil(tasks.div_ceil(rows.div_ceil(chunk)).min(panels));
    for begin in (0..rows).step_by(chunk) {
        let rows = begin..(begin + chunk).min(rows);
        let of = |first: usize| (rows.clone(), first..(first + group).min(panels));
        parts.extend((0..panels).step_by(group).map(of));
    }
    parts
}

/// Does `work` for each part, in order; whichever of `threads` is free takes the next one.
pub(super) fn share_out(parts: Vec<Part>, threads: usize, work: impl Fn(Part) + Sync) {
    let next = AtomicUsize::new(0);
    let take = || {
        while let Some(part) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
            work(part.clone());
        }
    };
    if threads == 1 {
        return take();
    }
    (0..threads).into_par_iter().with_max_len(1).for_each(|_| take());
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn every_element_is_in_one_part() {
        for threads in [1, 2, 3, 16] {
            for (rows, panels) in [(1, 1), (7, 40), (31, 3), (2048, 9), (2047, 24), (5000, 1)] {
                let mut seen = vec![0u8; rows * panels];
                for (rows, columns) in parts(rows, panels, 6, threads) {
                    for row in rows {
                        columns.clone().for_each(|panel| seen[row * panels + panel] += 1);
                    }
                }
                assert!(seen.iter().all(|&count| count == 1), "{threads}: {rows} x {panels}");
            }
        }
    }

    #[test]
    fn chunks_shrink_to_the_end() {
        let tiles = |(rows, _): &Part| rows.len().div_ceil(6);
        let tiles: Vec<usize> = parts(2048, 9, 6, 2).iter().map(tiles).collect();
        assert!(tiles.is_sorted_by(|a, b| a >= b), "{tiles:?}");
        assert!(tiles[0] == TILES_PER_CHUNK && tiles[tiles.len() - 1] <= LEAST_TILES, "{tiles:?}");
    }

    #[test]
    fn parts_are_taken_once() {
        let taken = Mutex::new(Vec::new());
        share_out(parts(900, 4, 6, 2), 2, |(rows, _)| taken.lock().unwrap().push(rows.start));
        let mut taken = taken.into_inner().unwrap();
        taken.sort_unstable();
        let starts: Vec<usize> = parts(900, 4, 6, 2).into_iter().map(|(r, _)| r.start).collect();
        assert_eq!(taken, starts);
    }
}
