//! Products with frozen weights, the adapter's share in the same product where there is room.
//!
//! # One product for base and adapter
//!
//! A 4-bit weight `[N, K]` is dequantized to a buffer before each product anyway, so an adapter of rank R
//! can lie in the same matrix, and what it multiplies beside the activations:
//!
//! ```text
//! y  = [x | ax]·[W | s·B]ᵀ    K + R columns: s·B behind the rows of W, ax = x·Aᵀ behind those of x
//! dx = [dy | t]·[W ; A]       N + R rows:    A below W, t = s·dy·B behind the rows of dy
//! ```
//!
//! W lies the same way for both, with room behind its rows and below them: what one product read is there
//! for the other one ([`super::weight_buffers`]).
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
//! so it pays from about R tokens on. The 16 columns of a rank-16 adapter are 0.4 % of the multiplications
//! at K = 4,096, as they are by themselves; a tensor-core product that goes through K in steps of 64 takes
//! one more step for them, 1.6 %. Buffers of activations that such products
//! read are planned with room behind their rows ([`super::plan`]): a copy of x instead would move
//! 2·K elements a token, more than is saved for the down projection, where K = 3.5·N. `ax` is
//! copied, 2·R elements a token, because `x` does not outlive the block and `ax` does: the input of
//! the down projection is made again for the backward pass, `ax` is not.
//!
//! Separate products remain with dropout, which A sees and W does not, and for dense weights, which
//! are operands where they lie. [`super::together`] has linears that read the same rows.

use super::Cuda;
use super::driver::{Driver, Gemm, Operand, Output};
use super::host::DeviceVector;
use super::launch::{FLAT_THREADS, columns as columns_grid, launch, row_threads, rows as row_grid};
use super::memory::{Buffer, Rows};
use super::weight::DeviceWeight;
use crate::kernels::{Columns, LoraShape, LoraTerm, Write};
use crate::plan::RegionType;

/// Rows and columns at which a piece of a matrix begins are multiples of this: 16 bytes, which tensor cores need
/// to be fast.
pub(super) const PIECE_ELEMENTS: usize = 8;

/// Strides of operands with room for adapters, and of logits, are multiples of this, 128 bytes, where the width
/// is: what a tile reads of a row is then whole lines of the cache. Source: NVIDIA, "Matrix Multiplication
/// Background", on the A100 and later.
pub(super) const STRIDE_ELEMENTS: usize = 64;

/// Columns that `ranks` take behind a row.
pub(super) fn tail_columns(ranks: usize) -> usize {
    ranks.next_multiple_of(STRIDE_ELEMENTS)
}

/// A dequantized weight, or several one below the other, with room for adapters behind its rows and below
/// them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Extended {
    /// N.
    pub rows: usize,
    /// K.
    pub columns: usize,
    /// R of all adapters.
    pub rank: usize,
}

impl Extended {
    /// Elements from one row to the next.
    pub fn stride(self) -> usize {
        self.columns + tail_columns(self.rank)
    }

    /// Elements of all.
    pub fn elements(self) -> usize {
        (self.rows + self.rank) * self.stride()
    }
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
pub(super) fn output(Rows { address, stride }: Rows) -> Output {
    Output { address, stride, dtype: RegionType::Bf16, batch_stride: 0 }
}

/// Where a product in f32 goes.
pub(super) fn output_in_f32(rows: Rows) -> Output {
    Output { dtype: RegionType::F32, ..output(rows) }
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
    let wide = cuda.dequantized(&[weight], rank)?;
    copy_columns(cuda, ax.band(*columns, rows), tail, (rows, rank), 1.0);
    copy_columns(cuda, b_of(pair, shape), wide.column(inner), (outer, rank), shape.scale);
    let (a, b) = (operand(x.rows(rows, inner)), transposed(wide));
    cuda.gemm(Gemm { beta, ..Gemm::new([rows, outer, inner + rank], a, b, output(to)) });
    Some(())
}

/// `y = x · Wᵀ + scale · ax · Bᵀ`, or `+=`, in a product for each part, and each panel of a weight.
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
        let (a, b) = (from, transposed(panel.rows));
        let to = output(to.column(panel.first));
        cuda.gemm(Gemm { beta, ..Gemm::new([rows, panel.count, inner], a, b, to) });
    });
    if let Some(LoraTerm { shape, pair, inner: (ax, columns) }) = lora {
        let (a, b) = (operand(ax.band(*columns, rows)), transposed(b_of(pair, shape)));
        cuda.gemm(Gemm {
            alpha: shape.scale,
            beta: 1.0,
            ..Gemm::new([rows, outer, shape.rank], a, b, output(to))
        });
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
    write: Write,
) {
    let [outer, inner] = weight.shape;
    let to = output(dx.rows(rows, inner));
    if let Some(LoraInput { shape, pair, .. }) =
        lora.as_ref().filter(|lora| lora.t == from.column(outer))
        && let Some(wide) = cuda.dequantized(&[weight], shape.rank)
    {
        copy_columns(cuda, a_of(pair, shape), wide.row(outer), (shape.rank, inner), 1.0);
        let (a, b) = (operand(from), operand(wide));
        return cuda.gemm(Gemm {
            beta: write.beta(),
            ..Gemm::new([rows, inner, outer + shape.rank], a, b, to)
        });
    }
    cuda.for_panels(weight, |panel| {
        let (a, b) = (operand(from.column(panel.first)), operand(panel.rows));
        let write = if panel.first > 0 { Write::Add } else { write };
        cuda.gemm(Gemm { beta: write.beta(), ..Gemm::new([rows, inner, panel.count], a, b, to) });
    });
    if let Some(LoraInput { shape, pair, t }) = lora {
        let (a, b) = (operand(t), operand(a_of(pair, shape)));
        cuda.gemm(Gemm { beta: 1.0, ..Gemm::new([rows, inner, shape.rank], a, b, to) });
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

/// `to = scale · from`, a few columns of many rows, or a few rows.
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
