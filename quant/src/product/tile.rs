//! A tile of C: where its operands lie, and how its rows are written.
#![allow(unsafe_code)]

use super::vector::Vector;

/// Most rows of a tile.
pub(super) const TILE_ROWS: usize = 6;
/// Most columns of a tile on any instruction set.
pub(super) const MOST_COLUMNS: usize = 64;

/// A stretch of k: where a tile's operands begin and how far steps are; an element is a step.
#[derive(Clone, Copy)]
pub(super) struct Segment {
    /// Length of the chains.
    pub steps: usize,
    /// First element of the tile's rows of A.
    pub a: *const f32,
    /// Elements between rows of A.
    pub a_row_stride: usize,
    /// Elements between steps of A.
    pub a_step_stride: usize,
    /// First element of the tile's columns of B; readable for whole vectors.
    pub b: *const f32,
    /// Elements between steps of B.
    pub b_stride: usize,
}

/// One tile: `c = alpha · (sum of the segments' products) + beta · c`.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// What is summed up.
    pub first: Segment,
    /// What is added next.
    pub second: Option<Segment>,
    /// First element of the tile in C.
    pub c: *mut f32,
    /// Elements between rows of C.
    pub c_stride: usize,
    /// Rows, at most `Isa::rows`.
    pub rows: usize,
    /// Columns, at most `Isa::columns`.
    pub columns: usize,
    /// Factor of the product.
    pub alpha: f32,
    /// Factor of C; 0 does not read C.
    pub beta: f32,
    /// C is written past the caches: whole vectors at their alignment, beta 0.
    pub stream: bool,
}

/// Writes a row of the tile to `c`.
///
/// # Safety
/// The processor has the instructions; the row's columns exist.
#[inline(always)]
pub(super) unsafe fn write_row<V: Vector, const VECTORS: usize>(
    tile: &Tile,
    sums: &[V; VECTORS],
    c: *mut f32,
) {
    // SAFETY: the tile's columns exist; the last vector may have fewer lanes.
    unsafe {
        let (alpha, beta) = (V::splat(tile.alpha), V::splat(tile.beta));
        for (vector, sum) in sums.iter().enumerate() {
            let to = c.add(vector * V::LANES);
            let count = (tile.columns - vector * V::LANES).min(V::LANES);
            let mut value = sum.multiply(alpha);
            if tile.beta != 0.0 {
                let old = if count == V::LANES { V::load(to) } else { V::load_some(to, count) };
                value = beta.multiply_add(old, value);
            }
            if tile.stream {
                value.stream(to);
            } else if count == V::LANES {
                value.store(to);
            } else {
                value.store_some(to, count);
            }
        }
    }
}
