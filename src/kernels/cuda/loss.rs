//! The sums over all chunks: of losses, and of the rows whose target is hits.

use super::Cuda;
use super::driver::{Address, Argument, Driver};
use super::launch::{FLAT_THREADS, launch, partial_sums, threads_for};
use super::memory::{Buffer, PARTIALS};
use crate::error::Result;
use crate::kernels::TokenLosses;

/// What is kept of a row whose logits come in tiles: their maximum, Σ e^{z − maximum}, the target's.
pub(super) const TILE_STATISTICS: usize = 3;

/// Partial sums and both sums, of a chunk's rows the losses and 1 where the target is hits, and where
/// logits come in tiles what is kept of each row, in one region: the f64 values first.
pub struct LossSum<D: Driver>(pub(super) Buffer<D>);

/// Threads that a row of logits has.
pub(super) fn logit_threads(columns: usize) -> u32 {
    threads_for(columns, 512)
}

impl<D: Driver> LossSum<D> {
    fn partials(&self) -> Address {
        self.0.at(0..2 * PARTIALS)
    }

    /// Of the losses, of the hits.
    fn sums(&self) -> [Address; 2] {
        [0, 1].map(|sum| self.0.at(2 * (PARTIALS + sum)..2 * (PARTIALS + sum + 1)))
    }

    /// Losses of `rows`, and behind them their hits.
    pub(super) fn of_rows(&self, rows: usize) -> [Address; 2] {
        let start = 2 * (PARTIALS + 2);
        [0, 1].map(|number| self.0.at(start + number * rows..start + (number + 1) * rows))
    }

    /// Statistics of `rows` over the tiles of the head, behind what is known of the rows.
    pub(super) fn tile_statistics(&self, rows: usize) -> Address {
        let start = 2 * (PARTIALS + 2) + 2 * rows;
        self.0.at(start..start + TILE_STATISTICS * rows)
    }

    /// Adds the losses and hits of `rows`.
    pub(super) fn add_rows(&self, cuda: &Cuda<D>, rows: usize) {
        let partials = Argument::Pointer(self.partials());
        let grid = partial_sums(rows);
        for (values, sum) in self.of_rows(rows).into_iter().zip(self.sums()) {
            let (values, sum) = (Argument::Pointer(values), Argument::Pointer(sum));
            launch!(cuda, "sum_f32", grid, FLAT_THREADS; values, rows as i64, partials);
            launch!(cuda, "sum_partials", [1, 1, 1], FLAT_THREADS; partials, grid[0], sum, true);
        }
    }
}

/// Elements of f32, two for each f64, of a region that serves `rows` at a time.
pub(super) fn elements(rows: usize) -> usize {
    2 * (PARTIALS + 2) + (2 + TILE_STATISTICS) * rows
}

pub(super) fn clear<D: Driver>(cuda: &Cuda<D>, sum: &LossSum<D>) {
    cuda.note(cuda.driver().zero(sum.sums()[0], 16));
}

pub(super) fn read<D: Driver>(cuda: &Cuda<D>, sum: &LossSum<D>) -> Result<TokenLosses> {
    let mut sums = [0f64; 2];
    cuda.download(sum.sums()[0], bytemuck::cast_slice_mut(&mut sums))?;
    let [sum, hits] = sums;
    Ok(TokenLosses { sum, hits: hits as u64 })
}
