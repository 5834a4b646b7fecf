//! The order in which blocks of the flash kernels start.
//!
//! A tile of queries costs as many tiles of keys as lie before it, in documents of any length. Blocks
//! start in the order of the grid: those that last longest first, over all heads and documents, so
//! that none is left alone at the end; and no block is started for what a shorter document lacks.
//! A launch has all of them, unless it would last for seconds on a card whose driver stops such kernels.

use crate::kernels::AttentionShape;

/// Tokens that a block of the flash kernels handles.
const FLASH_TOKENS: usize = 64;

/// Document, and tile from its first on: of all documents those with the most keys first.
///
/// Counted from the last tile on, they are tiles of keys, and those come first that most queries see.
pub fn heaviest_first(boundaries: &[usize]) -> Vec<[u32; 2]> {
    let documents = boundaries.windows(2).enumerate();
    let tiles = documents.flat_map(|(document, bounds)| {
        let tiles = (bounds[1] - bounds[0]).div_ceil(FLASH_TOKENS);
        (0..tiles).map(move |tile| [document as u32, tile as u32])
    });
    let mut tiles: Vec<_> = tiles.collect();
    tiles.sort_by_key(|[_, tile]| std::cmp::Reverse(*tile));
    tiles
}

/// What a launch of flash attention computes at most, in floating-point operations, for each
/// multiprocessor: a third of a second where each reaches 0.45 TFLOP/s, half of what the slowest cards can.
const LAUNCH_FLOPS_OF_A_MULTIPROCESSOR: u64 = 150_000_000_000;
/// That of all multiprocessors of a large card, where nobody has said which card it is.
pub const LAUNCH_FLOPS: u64 = 132 * LAUNCH_FLOPS_OF_A_MULTIPROCESSOR;
/// Operations for a query, a key and a column, in the pass that owns keys: four products, more than in the
/// others.
const PAIR_FLOPS: u64 = 8;

/// What a launch may compute on a card: all there is, unless its driver stops kernels that hold up a desktop for
/// seconds. Blocks of one launch leave multiprocessors idle at its end alone.
pub fn launch_flops(multiprocessors: i32, has_kernel_timeout: bool) -> u64 {
    match has_kernel_timeout {
        true => multiprocessors.max(1) as u64 * LAUNCH_FLOPS_OF_A_MULTIPROCESSOR,
        false => u64::MAX,
    }
}

/// Tiles of queries, or of keys, with all their heads in a launch of `flops` at most; one at least.
pub fn tiles_of_launch(shape: &AttentionShape, longest: usize, flops: u64) -> usize {
    let seen = shape.window.map_or(longest, |window| window.min(longest));
    let pairs = (FLASH_TOKENS * seen * shape.q_width()) as u64;
    (flops / (PAIR_FLOPS * pairs).max(1)).max(1) as usize
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;
    use std::collections::BinaryHeap;

    use super::*;

    /// The time of blocks on a GPU that runs `places` at once, over that of a perfect division.
    fn time_over_ideal(blocks: &[usize], places: usize) -> f64 {
        let mut free: BinaryHeap<_> = (0..places).map(|_| Reverse(0)).collect();
        for block in blocks {
            let Reverse(start) = free.pop().unwrap();
            free.push(Reverse(start + block));
        }
        let last = free.into_iter().map(|Reverse(end)| end).max().unwrap();
        last as f64 / (blocks.iter().sum::<usize>() as f64 / places as f64)
    }

    /// What the blocks of `heads` heads cost, in their order.
    fn blocks(boundaries: &[usize], heads: usize) -> Vec<usize> {
        let tiles = heaviest_first(boundaries).into_iter();
        tiles.flat_map(|[_, tile]| std::iter::repeat_n(tile as usize + 1, heads)).collect()
    }

    #[test]
    fn every_tile_of_every_document_is_there_once() {
        let tiles = heaviest_first(&[0, 0, 130, 131, 195, 195]);
        assert_eq!(tiles, [[1, 2], [1, 1], [1, 0], [2, 0], [3, 0]]);
        assert!(heaviest_first(&[]).is_empty());
    }

    /// Llama-3.1-8B's attention.
    #[test]
    fn only_long_contexts_take_several_launches() {
        let mut shape = AttentionShape::new(32, 8, 128);
        let tiles = |shape: &AttentionShape, tokens| tiles_of_launch(shape, tokens, LAUNCH_FLOPS);
        assert!(tiles(&shape, 16_384) > 16_384 / FLASH_TOKENS);
        // Still several blocks for each place of a GPU.
        assert_eq!(tiles(&shape, 120_000), 78);
        assert_eq!(tiles_of_launch(&shape, 120_000, 1), 1);
        assert_eq!(launch_flops(132, true), LAUNCH_FLOPS);
        assert!(
            tiles_of_launch(&shape, 1 << 20, launch_flops(132, false)) > (1 << 20) / FLASH_TOKENS
        );
        shape.window = Some(4096);
        assert!(tiles(&shape, 120_000) > 120_000 / FLASH_TOKENS);
    }

    /// Two blocks on each multiprocessor of an H100, and one on each of an RTX 4090.
    #[test]
    fn multiprocessors_end_together() {
        let ragged: Vec<usize> =
            (0..40).scan(0, |end, i| Some(std::mem::replace(end, *end + 37 * i % 4096))).collect();
        for (boundaries, heads) in [(&[0, 4096][..], 8), (&[0, 4096], 32), (&ragged, 8)] {
            for places in [264, 128] {
                let over = time_over_ideal(&blocks(boundaries, heads), places);
                assert!(over < 1.02, "{heads} heads, {places} places: {over}");
            }
        }
    }
}
