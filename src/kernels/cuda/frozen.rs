//! Products with frozen weights, the adapter's share in the same product where there is room.
//!
//! # One product for base and adapter
//!
//! A 4-bit weight `[N, K]` is widened to a buffer before each product anyway, so an adapter of rank R
//! can lie in the same matrix, and what it multiplies beside the activations:
//!
//! ```text
//! y  = [x | ax]·[W | s·B]ᵀ    K + R columns: s·B behind the rows of W, ax = x·Aᵀ behind those of x
//! dx = [dy | t]·[W ; A]       N + R rows:    A below W, t = s·dy·B behind the rows of dy
//! ```
//!
//! Both are the sums of the two products with one rounding to bf16 instead of two; s·B is rounded
//! once more unless s is a power of two. In elements moved for a token:
//!
//! | | adapter by itself | in the same product |
//! |---|---|---|
//! | y | R + 2·N: reads ax, reads and writes y again | 3·R: ax copied, and read |
//! | dx | R + 2·K: reads t, reads and writes dx again | R: t is made where it is read |
//! | once a product | N·R, R·K: B, A read | 3·N·R, 3·R·K: copied beside W, and read |
//!
//! so it pays from about R tokens on. The 16 columns of a rank-16 adapter cost 0.4 % of the
//! multiplications at K = 4,096, as they do by themselves. Buffers of activations that such products
//! read are planned with room behind their rows ([`super::plan`]): a copy of x instead would move
//! 2·K elements a token, more than is saved for the down projection, where K = 3.5·N. `ax` is
//! copied, 2·R elements a token, because `x` does not outlive the block and `ax` does: the input of
//! the down projection is made again for the backward pass, `ax` is not.
//!
//! Separate products remain with dropout, which A sees and W does not, and for dense weights, which
//! are operands where they lie. [`super::together`] has linears that read the same rows.

use super::Cuda;
use super::ahead::{Ahead, Source, Wanted, WeightRows};
use super::driver::{Address, Argument, Driver, Launch, Operand, Product};
use super::host::DeviceVector;
use super::launch::{FLAT_THREADS, columns as columns_grid, launch, row_threads, rows as row_grid};
use super::memory::{Buffer, Rows};
use super::weight::{DeviceWeight, Packed};
use crate::error::Result;
use crate::kernels::{Columns, LoraShape, LoraTerm};

/// Strides of extended operands are multiples of this: 16 bytes, as tensor cores like them.
pub(super) const STRIDE_ELEMENTS: usize = 8;

/// Columns that `ranks` take behind a row.
pub(super) fn tail_columns(ranks: usize) -> usize {
    ranks.next_multiple_of(STRIDE_ELEMENTS)
}

/// Elements of a widened weight `[N, K]` with an adapter of `rank`, in either direction.
pub(super) fn extended_elements([rows, columns]: [usize; 2], rank: usize) -> usize {
    (rows * (columns + tail_columns(rank))).max((rows + rank) * columns)
}

/// A matrix as it lies.
pub(super) fn operand(Rows { address, stride }: Rows) -> Operand {
    Operand { address, stride, transposed: false, batch_stride: 0 }
}

/// A matrix whose rows are the operand's columns.
pub(super) fn transposed(rows: Rows) -> Operand {
    Operand { transposed: true, ..operand(rows) }
}

/// Where a product in bf16 goes.
pub(super) fn product(Rows { address, stride }: Rows) -> Product {
    Product { address, stride, wide: false, batch_stride: 0 }
}

/// Where a product in f32 goes.
pub(super) fn product_in_f32(rows: Rows) -> Product {
    Product { wide: true, ..product(rows) }
}

/// Rows of a weight in bf16.
struct Panel {
    first: usize,
    count: usize,
    rows: Rows,
}

/// Where `t` lies: behind the rows of the gradient that it is made of, if its band ends them and
/// there is room.
pub(super) fn gradient_tail<D: Driver>(
    (dy, band): (&Buffer<D>, Columns),
    rows: usize,
    rank: usize,
) -> Option<Rows> {
    let ends = band.offset + band.width == band.stride;
    if ends { dy.tail(rows, rank) } else { None }
}

/// `y += bias` for each row.
pub(super) fn add_bias<D: Driver>(
    cuda: &Cuda<D>,
    bias: &DeviceVector<D>,
    to: Rows,
    width: usize,
    rows: usize,
) {
    launch!(cuda, "add_bias", row_grid(rows), row_threads(width);
        to.argument(), to.stride, bias.argument(), width);
}

/// `y = x · Wᵀ + scale · ax · Bᵀ`, or `+=`, in one product; `None`, and nothing done, where there is
/// no room.
pub(super) fn forward_extended<D: Driver>(
    cuda: &Cuda<D>,
    weight: &DeviceWeight<D>,
    LoraTerm { shape, pair, inner: (ax, columns) }: &LoraTerm<Buffer<D>>,
    x: &Buffer<D>,
    to: Rows,
    rows: usize,
    beta: f32,
) -> Option<()> {
    let ([outer, inner], rank) = (weight.shape, shape.rank);
    let tail = x.tail(rows, rank)?;
    let stride = inner + tail_columns(rank);
    let wide = cuda.widened(&[weight], stride, extended_elements(weight.shape, rank))?;
    copy_columns(cuda, ax.band(*columns, rows), tail, (rows, rank), 1.0);
    copy_columns(cuda, b_of(pair, shape), wide.column(inner), (outer, rank), shape.scale);
    let operands = (operand(x.rows(rows, inner)), transposed(wide));
    cuda.gemm([rows, outer, inner + rank], (1.0, beta), operands, product(to));
    Some(())
}

/// The same in a product for each part, and each panel of a weight.
pub(super) fn forward_separate<D: Driver>(
    cuda: &Cuda<D>,
    weight: &DeviceWeight<D>,
    lora: Option<&LoraTerm<Buffer<D>>>,
    x: &Buffer<D>,
    to: Rows,
    rows: usize,
    beta: f32,
) {
    let [outer, inner] = weight.shape;
    let from = operand(x.rows(rows, inner));
    cuda.for_panels(weight, |panel| {
        let operands = (from, transposed(panel.rows));
        let to = product(to.column(panel.first));
        cuda.gemm([rows, panel.count, inner], (1.0, beta), operands, to);
    });
    if let Some(LoraTerm { shape, pair, inner: (ax, columns) }) = lora {
        let operands = (operand(ax.band(*columns, rows)), transposed(b_of(pair, shape)));
        cuda.gemm([rows, outer, shape.rank], (shape.scale, 1.0), operands, product(to));
    }
}

/// An adapter's part of a gradient: `t · A`.
pub(super) struct LoraInput<'a, D: Driver> {
    pub shape: &'a LoraShape,
    pub pair: &'a Buffer<D>,
    pub t: Rows,
}

/// `dx = from · W + t · A`, or `+=`; the adapter has its part in the product if t is right behind `from`,
/// the rows of dy.
pub(super) fn input_gradient<D: Driver>(
    cuda: &Cuda<D>,
    weight: &DeviceWeight<D>,
    lora: Option<LoraInput<D>>,
    from: Rows,
    dx: &Buffer<D>,
    rows: usize,
    accumulate: bool,
) {
    let [outer, inner] = weight.shape;
    let to = product(dx.rows(rows, inner));
    if let Some(LoraInput { shape, pair, .. }) =
        lora.as_ref().filter(|lora| lora.t == from.column(outer))
        && let Some(wide) =
            cuda.widened(&[weight], inner, extended_elements(weight.shape, shape.rank))
    {
        let a = pair.at(0..shape.a_elements());
        let below = wide.row(outer).address;
        cuda.note(cuda.driver().copy(a, below, 2 * shape.a_elements()));
        let operands = (operand(from), operand(wide));
        let factors = (1.0, beta(accumulate));
        return cuda.gemm([rows, inner, outer + shape.rank], factors, operands, to);
    }
    cuda.for_panels(weight, |panel| {
        let operands = (operand(from.column(panel.first)), operand(panel.rows));
        let factors = (1.0, beta(accumulate || panel.first > 0));
        cuda.gemm([rows, inner, panel.count], factors, operands, to);
    });
    if let Some(LoraInput { shape, pair, t }) = lora {
        let operands = (operand(t), operand(a_of(pair, shape)));
        cuda.gemm([rows, inner, shape.rank], (1.0, 1.0), operands, to);
    }
}

/// A `[R, in]` of a pair.
pub(super) fn a_of<D: Driver>(pair: &Buffer<D>, shape: &LoraShape) -> Rows {
    Rows { address: pair.at(0..shape.a_elements()), stride: shape.in_features }
}

/// B `[out, R]` of a pair.
pub(super) fn b_of<D: Driver>(pair: &Buffer<D>, shape: &LoraShape) -> Rows {
    Rows { address: pair.at(shape.a_elements()..shape.elements()), stride: shape.rank }
}

/// `to = scale · from`, a few columns of many rows.
pub(super) fn copy_columns<D: Driver>(
    cuda: &Cuda<D>,
    from: Rows,
    to: Rows,
    (rows, width): (usize, usize),
    scale: f32,
) {
    launch!(cuda, "scale_columns_bf16", columns_grid(rows, width), FLAT_THREADS;
        from.argument(), from.stride, to.argument(), to.stride, rows, width, scale);
}

pub(super) fn beta(accumulate: bool) -> f32 {
    if accumulate { 1.0 } else { 0.0 }
}

impl<D: Driver> Cuda<D> {
    /// 4-bit weights in bf16, one below the other, their rows `stride` apart, in a buffer of at least
    /// `elements`; `None` where one is dense, and where the buffers are smaller.
    pub(super) fn widened(
        &self,
        weights: &[&DeviceWeight<D>],
        stride: usize,
        elements: usize,
    ) -> Option<Rows> {
        let wanted = Wanted::new(weights, stride)?;
        (elements <= self.room_for_widened()).then(|| self.in_a_buffer(wanted))
    }

    /// Elements of a buffer for widened weights.
    pub(super) fn room_for_widened(&self) -> usize {
        self.state().ahead.as_ref().expect("a plan is allocated").elements()
    }

    /// What is wanted, in a buffer. What follows it in a pass is brought meanwhile, see
    /// [`super::ahead`].
    pub(super) fn in_a_buffer(&self, wanted: Wanted) -> Rows {
        let turn = self.state().ahead.as_mut().expect("a plan is allocated").turn(wanted);
        self.await_ahead(turn.pending);
        if !turn.ready {
            let result = self.fill(&wanted, turn.to, None);
            self.note_or_forget(result);
        }
        if let Some((next, slot, address)) = turn.next {
            let result = self.fill(&next, address, Some(slot));
            self.note_or_forget(result);
        }
        Rows { address: turn.to, stride: wanted.stride }
    }

    /// What a buffer holds is not known where it could not be filled.
    fn note_or_forget(&self, result: Result<()>) {
        if result.is_err() {
            self.forget_ahead();
        }
        self.note(result);
    }

    /// Fills a buffer in its turn, or ahead into a slot.
    fn fill(&self, wanted: &Wanted, to: Address, slot: Option<usize>) -> Result<()> {
        let driver = self.driver();
        wanted.parts().try_for_each(|(WeightRows { source, rows }, first)| {
            let to = Rows { address: to, stride: wanted.stride }.row(first);
            match source {
                Source::Packed(packed, first) => {
                    let rows = (first, rows);
                    dequantize(packed, rows, wanted.columns, to, |launch| match slot {
                        None => driver.launch(launch),
                        Some(slot) => driver.launch_ahead(launch, slot),
                    })
                }
                Source::Pinned(from) => {
                    let (from, bytes) = (from as *const u8, 2 * rows * wanted.columns);
                    match slot {
                        None => driver.upload_staged(from, to.address, bytes),
                        Some(slot) => driver.copy_ahead(from, to.address, bytes, slot),
                    }
                }
            }
        })
    }

    /// What is queued from now on waits for what was brought ahead into these slots.
    fn await_ahead(&self, slots: impl IntoIterator<Item = usize>) {
        slots.into_iter().for_each(|slot| self.note(self.driver().await_ahead(slot)));
    }

    /// Before streamed weights change: what was widened ahead of them is of no use.
    pub(super) fn forget_ahead(&self) {
        let slots = self.state().ahead.as_mut().map(Ahead::forget);
        self.await_ahead(slots.into_iter().flatten());
    }

    /// Calls `product` with the whole weight in bf16, or with one panel of rows after another where
    /// the buffers for widened weights are smaller than this one.
    fn for_panels(&self, weight: &DeviceWeight<D>, mut product: impl FnMut(Panel)) {
        let [rows, columns] = weight.shape;
        if let Some(whole) = weight.operand() {
            return product(Panel { first: 0, count: rows, rows: whole });
        }
        let height = panel_rows(self.room_for_widened() / columns, rows);
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
    let aligned = most / STRIDE_ELEMENTS * STRIDE_ELEMENTS;
    let rows = if most >= all { all } else { aligned };
    rows.max(1)
}

/// Widens `count` rows of a 4-bit weight from row `first` on.
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
