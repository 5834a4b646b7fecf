//! The sum of the losses of all chunks.

use super::Cuda;
use super::driver::{Address, Argument, Driver};
use super::launch::{FLAT_THREADS, launch, partial_sums, threads_for};
use super::memory::{Buffer, PARTIALS};
use crate::error::Result;

/// What is kept of a row whose logits come in tiles: their maximum, Σ e^{z − maximum}, the target's.
pub(super) const TILE_STATISTICS: usize = 3;

/// Partial sums and the sum, losses of a chunk's rows, and where these come in tiles what is kept of
/// each, in one region: the f64 values first.
pub struct LossSum<D: Driver>(pub(super) Buffer<D>);

/// Threads that a row of logits has.
pub(super) fn logit_threads(columns: usize) -> u32 {
    threads_for(columns, 512)
}

impl<D: Driver> LossSum<D> {
    fn partials(&self) -> Address {
        self.0.at(0..2 * PARTIALS)
    }

    fn sum(&self) -> Address {
        self.0.at(2 * PARTIALS..2 * PARTIALS + 2)
    }

    pub(super) fn losses(&self, rows: usize) -> Address {
        self.0.at(2 * PARTIALS + 2..2 * PARTIALS + 2 + rows)
    }

    /// Statistics of `rows` over the tiles of the head, behind the rows' losses.
    pub(super) fn tile_statistics(&self, rows: usize) -> Address {
        let start = 2 * PARTIALS + 2 + rows;
        self.0.at(start..start + TILE_STATISTICS * rows)
    }

    /// Adds the losses of `rows`.
    pub(super) fn add_losses(&self, cuda: &Cuda<D>, rows: usize) {
        let losses = Argument::Pointer(self.losses(rows));
        let partials = Argument::Pointer(self.partials());
        let grid = partial_sums(rows);
        launch!(cuda, "sum_f32", grid, FLAT_THREADS; losses, rows as i64, partials);
        launch!(cuda, "sum_partials", [1, 1, 1], FLAT_THREADS;
            partials, grid[0], Argument::Pointer(self.sum()), true);
    }
}

pub(super) fn clear<D: Driver>(cuda: &Cuda<D>, sum: &LossSum<D>) {
    cuda.note(cuda.driver().zero(sum.sum(), 8));
}

pub(super) fn read<D: Driver>(cuda: &Cuda<D>, sum: &LossSum<D>) -> Result<f64> {
    let mut bytes = [0; 8];
    cuda.download(sum.sum(), &mut bytes)?;
    Ok(f64::from_le_bytes(bytes))
}
