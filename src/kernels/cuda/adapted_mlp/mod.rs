//! A gated MLP with adapters, its passes each in one pass over its widest matrices.
//!
//! With F the width of the MLP, what lies between the products with frozen weights reads and writes,
//! in elements of a token:
//!
//! | forward | one by one | `mlp_adapters_forward` |
//! |---|---|---|
//! | h = a(g) ∘ u | 3·F | 3·F; 2·F where a block's activations are made again |
//! | h·Aᵀ of down | F | |
//!
//! | backward | one by one | `mlp_adapters_backward` |
//! |---|---|---|
//! | h = a(g) ∘ u | 3·F | |
//! | dg, du from dh | 5·F | 5·F |
//! | gA of down: tᵀ·h | F | |
//! | t of gate and up: dg·B, du·B | 2·F | |
//! | gB of gate and up: dgᵀ·ax, duᵀ·ax | 2·F | |
//!
//! Sums over the columns and rows of a block go through memory in f32, for rank 16 a tenth of what is
//! saved, for 32 a sixth. What the adapters multiply is in shared memory when it is made; the products
//! themselves are few enough to hide behind the reading.

mod backward;
mod forward;

pub(super) use backward::{backward, goes_backward, sum_elements};
pub(super) use forward::forward;

use super::memory::Rows;

/// Blocks of a pass at most, one or two for each multiprocessor; a strip has several where it can. Each
/// leaves sums over its rows, so these have `TILE_ROWS` at least four times.
const BLOCKS: usize = 256;
const CHUNK_ROWS: usize = 4 * TILE_ROWS;
/// Rows that a block works on at a time.
const TILE_ROWS: usize = 16;
/// What pieces of 16 bytes are made of.
const PIECE: usize = 8;

/// The kernels that work in shared memory, and its bytes.
pub(super) fn shared_bytes() -> impl Iterator<Item = (&'static str, u32)> {
    backward::KERNELS
        .into_iter()
        .map(|(_, kernel, bytes)| (kernel, bytes))
        .chain(forward::KERNELS.into_iter().map(|(_, kernel)| (kernel, forward::SHARED_BYTES)))
}

/// Chunks of the rows of a strip, at most.
fn most_chunks(strips: usize) -> usize {
    (BLOCKS / strips).max(1)
}

/// Rows of a chunk of a pass whose columns are so many strips.
fn chunk_rows(rows: usize, strips: usize) -> usize {
    rows.div_ceil(most_chunks(strips)).next_multiple_of(TILE_ROWS).max(CHUNK_ROWS)
}

/// What the kernel reads 16 bytes at a time lies on 16 bytes.
fn aligned(rows: &Rows) -> bool {
    rows.address.is_multiple_of(16) && rows.stride.is_multiple_of(PIECE)
}
