//! The loss of logits that are there, and losses a tile of the vocabulary at a time: under a head that is
//! in the host's memory, and where it is asked which tokens are likeliest.
//!
//! ```text
//! forward   for each tile W_t:  z = x·W_tᵀ;  m, Σ e^{z − m} and the target's z of each row go on
//! backward  from the last one:  z again;  dz = scale · (e^{z − m} / Σ − [target]);  dx += dz·W_t
//! ```
//!
//! A head on the host is read twice for a chunk of rows, 2·V·D bytes each time, beside 3 · 2·V·D
//! floating-point operations a row. Tiles lie in the buffers of dequantized weights, which nobody needs
//! meanwhile, and the next one is copied while the products with this one run ([`super::weight_buffers`]);
//! between both directions the last two stay. dx is summed in f32, and rounded once. A head on the
//! device is one tile.

use std::ops::Range;

use super::Cuda;
use super::dequantized::panel_rows;
use super::driver::{Argument, Driver, Gemm};
use super::frozen::{PIECE_ELEMENTS, operand, output, output_in_f32, transposed};
use super::launch::{FLAT_THREADS, flat, launch, rows as row_grid};
use super::loss::{LossSum, TILE_STATISTICS, logit_threads};
use super::memory::{Buffer, Rows};
use super::rows::convert;
use super::weight::DeviceWeight;
use super::weight_buffers::Wanted;
use crate::error::Result;
use crate::kernels::head::loss_at_once;
use crate::kernels::{HeadChunk, HeadKernels, LogitShape};

impl<D: Driver> HeadKernels for Cuda<D> {
    fn cross_entropy(
        &self,
        logits: &mut Buffer<D>,
        targets: &[u32],
        LogitShape { vocab_size, soft_cap }: LogitShape,
        scale: Option<f32>,
        loss: &mut LossSum<D>,
    ) {
        let rows = targets.len();
        let Some(targets) = self.stage(targets) else { return };
        let [losses, hits] = loss.of_rows(rows).map(Argument::Pointer);
        let logits = logits.rows(rows, vocab_size);
        launch!(self, "cross_entropy_bf16", row_grid(rows), logit_threads(vocab_size);
            logits.argument(), logits.stride, targets, vocab_size,
            scale.unwrap_or(0.0), scale.is_some(), soft_cap.unwrap_or(0.0), losses,
            hits);
        loss.add_rows(self, rows);
    }

    fn head_loss(
        &self,
        chunk: HeadChunk<Self>,
        x: &mut Buffer<D>,
        sum: Option<&mut Buffer<D>>,
        scale: Option<f32>,
        loss: &mut LossSum<D>,
    ) {
        if !chunk.head.on_host {
            return loss_at_once(self, chunk, x, scale, loss);
        }
        loss_in_tiles(self, chunk, x, scale.zip(sum.as_deref()), loss);
    }

    fn head_score(
        &self,
        chunk: HeadChunk<Self>,
        x: &Buffer<D>,
        loss: &mut LossSum<D>,
    ) -> Result<Vec<bool>> {
        let rows = chunk.targets.len();
        let mut statistics = vec![0f32; TILE_STATISTICS * rows];
        if let Some(chunk) = TiledChunk::new(self, chunk, x, loss) {
            chunk.add_losses();
        }
        let bytes = bytemuck::cast_slice_mut(&mut statistics);
        self.download(loss.tile_statistics(rows), bytes)?;
        // A maximum knows no NaN, a sum does.
        let likeliest = |row: &[f32]| row[1].is_finite() && row[0] <= row[2];
        Ok(statistics.chunks_exact(TILE_STATISTICS).map(likeliest).collect())
    }
}

/// What a chunk of rows works with, tile after tile of the head.
struct TiledChunk<'a, D: Driver> {
    cuda: &'a Cuda<D>,
    head: &'a DeviceWeight<D>,
    rows: usize,
    x: Rows,
    /// Logits of a row that have room, whatever the rows of this chunk: tiles are the same in each.
    room: usize,
    logits: &'a Buffer<D>,
    targets: Argument,
    /// c of `c·tanh(logit / c)`; 0 for none.
    soft_cap: f32,
    loss: &'a LossSum<D>,
}

/// Rows of the head, and where they lie.
#[derive(Clone, Copy)]
struct Tile {
    first: usize,
    count: usize,
    rows: Rows,
}

/// Adds the losses; with `gradient`, a factor on it and where to sum it, x becomes that of x.
fn loss_in_tiles<D: Driver>(
    cuda: &Cuda<D>,
    chunk: HeadChunk<Cuda<D>>,
    x: &Buffer<D>,
    gradient: Option<(f32, &Buffer<D>)>,
    loss: &LossSum<D>,
) {
    let Some(chunk) = TiledChunk::new(cuda, chunk, x, loss) else { return };
    let Some(last) = chunk.add_losses() else { return };
    let Some((scale, sum)) = gradient else { return };
    chunk.add_gradient(&last, scale, sum, 0.0);
    for tile in chunk.tiles().rev().skip(1) {
        let tile = chunk.tile(tile);
        chunk.logits(&tile);
        chunk.add_gradient(&tile, scale, sum, 1.0);
    }
    convert(cuda, sum, x, chunk.rows * chunk.head.shape[1]);
}

impl<'a, D: Driver> TiledChunk<'a, D> {
    /// `None` where the targets cannot be copied.
    fn new(
        cuda: &'a Cuda<D>,
        HeadChunk { head, logits, targets, shape }: HeadChunk<'a, Cuda<D>>,
        x: &Buffer<D>,
        loss: &'a LossSum<D>,
    ) -> Option<Self> {
        let (rows, width) = (targets.len(), head.shape[1]);
        let room = logits.elements / (x.elements / width);
        let (x, targets) = (x.rows(rows, width), cuda.stage(targets)?);
        let soft_cap = shape.soft_cap.unwrap_or(0.0);
        Some(TiledChunk { cuda, head, rows, x, room, logits, targets, soft_cap, loss })
    }

    /// Rows of the head, as many at a time as their buffer and their logits have room.
    fn tiles(&self) -> impl DoubleEndedIterator<Item = Range<usize>> + use<D> {
        let [vocab_size, width] = self.head.shape;
        let most = match self.head.operand() {
            Some(_) => self.room,
            None => self.room.min(self.cuda.room_for_dequantized() / width),
        };
        let height = panel_rows(most, stride(vocab_size)).min(vocab_size);
        (0..vocab_size).step_by(height).map(move |first| first..vocab_size.min(first + height))
    }

    fn tile(&self, rows: Range<usize>) -> Tile {
        let (first, count) = (rows.start, rows.len());
        let rows = match self.head.operand() {
            Some(whole) => whole.row(first),
            None => self.cuda.in_a_buffer(Wanted::of_rows(self.head, rows)),
        };
        Tile { first, count, rows }
    }

    fn statistics(&self) -> Argument {
        Argument::Pointer(self.loss.tile_statistics(self.rows))
    }

    /// Leaves the last tile, and its logits.
    fn add_losses(&self) -> Option<Tile> {
        let (cuda, [vocab_size, _]) = (self.cuda, self.head.shape);
        let last = self.tiles().fold(None, |_, tile| {
            let tile = self.tile(tile);
            self.add_statistics(&tile);
            Some(tile)
        });
        let [losses, hits] = self.loss.of_rows(self.rows).map(Argument::Pointer);
        launch!(cuda, "tile_losses", flat(self.rows), FLAT_THREADS;
            self.statistics(), self.targets, vocab_size, self.rows, losses, hits);
        self.loss.add_rows(cuda, self.rows);
        last
    }

    /// Where logits of a tile are.
    fn place(&self, tile: &Tile) -> Rows {
        self.logits.as_matrix(self.rows, stride(tile.count))
    }

    /// Makes the logits of a tile.
    fn logits(&self, tile: &Tile) -> Rows {
        let z = self.place(tile);
        let shape = [self.rows, tile.count, self.head.shape[1]];
        let (a, b) = (operand(self.x), transposed(tile.rows));
        self.cuda.gemm(Gemm::new(shape, a, b, output(z)));
        z
    }

    fn add_statistics(&self, tile: &Tile) {
        let (cuda, z) = (self.cuda, self.logits(tile));
        launch!(cuda, "tile_statistics", row_grid(self.rows), logit_threads(tile.count);
            z.argument(), z.stride, tile.count, self.targets, tile.first, tile.first == 0,
            self.soft_cap, self.statistics());
    }

    /// The logits become their gradient.
    fn add_gradient(&self, tile: &Tile, scale: f32, sum: &Buffer<D>, beta: f32) {
        let (cuda, [vocab_size, width]) = (self.cuda, self.head.shape);
        let z = self.place(tile);
        launch!(cuda, "tile_gradient", row_grid(self.rows), logit_threads(tile.count);
            z.argument(), z.stride, tile.count, self.targets, tile.first, vocab_size, scale,
            self.soft_cap, self.statistics());
        let to = sum.rows(self.rows, width);
        let (a, b) = (operand(z), operand(tile.rows));
        cuda.gemm(Gemm {
            beta,
            ..Gemm::new([self.rows, width, tile.count], a, b, output_in_f32(to))
        });
    }
}

/// Elements from one row of `count` logits to the next.
fn stride(count: usize) -> usize {
    count.next_multiple_of(PIECE_ELEMENTS)
}
