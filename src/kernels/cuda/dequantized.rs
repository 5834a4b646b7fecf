//! Where products read 4-bit weights: in bf16, in buffers that weights take in turns.
//!
//! What a buffer is filled with, and when, is for [`super::weight_buffers`] to say.

use super::Cuda;
use super::driver::{Address, Argument, Driver, Launch};
use super::frozen::PIECE_ELEMENTS;
use super::launch::FLAT_THREADS;
use super::memory::Rows;
use super::weight::{DeviceWeight, Packed};
use super::weight_buffers::{Source, Wanted, WeightRows};
use crate::error::Result;

/// Rows of a weight in bf16.
pub(super) struct Panel {
    pub first: usize,
    pub count: usize,
    pub rows: Rows,
}

/// When a buffer is filled, and so on which stream.
#[derive(Clone, Copy)]
enum When {
    InTurn,
    Ahead,
}

impl<D: Driver> Cuda<D> {
    /// 4-bit weights in bf16, one below the other, with room for adapters of `rank` in all; `None` where one is
    /// dense, and where the buffers are smaller.
    pub(super) fn dequantized(&self, weights: &[&DeviceWeight<D>], rank: usize) -> Option<Rows> {
        let wanted = Wanted::new(weights, rank)?;
        (wanted.elements <= self.room_for_dequantized()).then(|| self.in_a_buffer(wanted))
    }

    /// Elements of a buffer for dequantized weights.
    pub(super) fn room_for_dequantized(&self) -> usize {
        self.state().lent().weights.elements()
    }

    /// What is wanted, in a buffer. What follows it in a pass is brought meanwhile, see
    /// [`super::weight_buffers`].
    pub(super) fn in_a_buffer(&self, wanted: Wanted) -> Rows {
        let turn = self.state().lent().weights.turn(wanted);
        if turn.pending {
            self.note(self.driver().await_ahead());
        }
        if !turn.ready {
            let result = self.fill(&wanted, turn.to, When::InTurn);
            self.note_or_forget(result);
        }
        if let Some((next, address)) = turn.next {
            let result = self.fill(&next, address, When::Ahead);
            self.note_or_forget(result);
        }
        Rows { address: turn.to, stride: wanted.stride }
    }

    /// What a buffer holds is not known where it could not be filled.
    fn note_or_forget(&self, result: Result<()>) {
        if result.is_err() {
            self.forget_dequantized();
        }
        self.note(result);
    }

    fn fill(&self, wanted: &Wanted, to: Address, when: When) -> Result<()> {
        let driver = self.driver();
        wanted.parts().try_for_each(|(WeightRows { source, rows }, first)| {
            let to = Rows { address: to, stride: wanted.stride }.row(first);
            match source {
                Source::Packed(packed, first) => {
                    let rows = (first, rows);
                    dequantize(packed, rows, wanted.columns, to, |launch| match when {
                        When::InTurn => driver.launch(launch),
                        When::Ahead => driver.launch_ahead(launch),
                    })
                }
                Source::Pinned(from) => {
                    let (from, bytes) = (from as *const u8, 2 * rows * wanted.columns);
                    match when {
                        When::InTurn => driver.upload_staged(from, to.address, bytes),
                        When::Ahead => driver.copy_ahead(from, to.address, bytes),
                    }
                }
            }
        })
    }

    /// Before streamed weights change: what was dequantized of them is of no use.
    pub(super) fn forget_dequantized(&self) {
        let pending = self.state().lent.as_mut().is_some_and(|lent| lent.weights.forget());
        if pending {
            self.note(self.driver().await_ahead());
        }
    }

    /// Calls `product` with the whole weight in bf16, or with one panel of rows after another where
    /// the buffers for dequantized weights are smaller than this one.
    pub(super) fn for_panels(&self, weight: &DeviceWeight<D>, mut product: impl FnMut(Panel)) {
        let [rows, columns] = weight.shape;
        if let Some(whole) = weight.operand() {
            return product(Panel { first: 0, count: rows, rows: whole });
        }
        let height = panel_rows(self.room_for_dequantized() / columns, rows);
        for first in (0..rows).step_by(height) {
            let count = height.min(rows - first);
            let wanted = Wanted::of_rows(weight, first..first + count);
            product(Panel { first, count, rows: self.in_a_buffer(wanted) });
        }
    }
}

/// Rows of a panel, if `most` have room and there are `all`: then columns of what a panel makes begin
/// on 16 bytes.
pub(super) fn panel_rows(most: usize, all: usize) -> usize {
    let aligned = most / PIECE_ELEMENTS * PIECE_ELEMENTS;
    let rows = if most >= all { all } else { aligned };
    rows.max(1)
}

/// Dequantizes `count` rows of a 4-bit weight from row `first` on.
fn dequantize(
    packed: Packed,
    (first, count): (usize, usize),
    columns: usize,
    to: Rows,
    launch: impl Fn(Launch) -> Result<()>,
) -> Result<()> {
    /// Elements that a block of eight warps takes in one turn.
    const TURN: usize = 8192;
    let mut arguments = packed.arguments().to_vec();
    arguments.extend([
        Argument::I64(first as i64),
        Argument::I64(count as i64),
        Argument::from(columns),
        to.argument(),
        Argument::from(to.stride),
    ]);
    let (kernel, threads) = ("dequantize_4bit", FLAT_THREADS);
    let grid = [(count * columns).div_ceil(TURN) as u32, 1, 1];
    launch(Launch { kernel, grid, threads, shared_bytes: 0, arguments: &mut arguments })
}
