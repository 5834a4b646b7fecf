//! Products of the adapters alone: `x·Aᵀ`, t, and the gradients of A and B.

use super::Cuda;
use super::driver::{Driver, Product};
use super::frozen::{gradient_tail, operand, product, transposed};
use super::memory::{Buffer, Rows};
use crate::kernels::{Columns, LoraShape};

/// A `[R, in]` and B `[out, R]` of a pair.
fn matrices<D: Driver>(pair: &Buffer<D>, shape: &LoraShape) -> [Rows; 2] {
    let a = Rows { address: pair.at(0..shape.a_elements()), stride: shape.in_features };
    let b = pair.at(shape.a_elements()..shape.elements());
    [a, Rows { address: b, stride: shape.rank }]
}

/// `ax[:, band] = x · Aᵀ`.
pub(super) fn project<D: Driver>(
    cuda: &Cuda<D>,
    shape: &LoraShape,
    pair: &Buffer<D>,
    x: &Buffer<D>,
    (ax, band): (&Buffer<D>, Columns),
    rows: usize,
) {
    let ([a, _], inner) = (matrices(pair, shape), shape.in_features);
    let operands = (operand(x.rows(rows, inner)), transposed(a));
    let to = product(ax.band(band, rows));
    cuda.gemm([rows, shape.rank, inner], (1.0, 0.0), operands, to);
}

/// With `t = scale · dy[:, band] · B`: `gA += tᵀ x`, `gB += scale · dyᵀ ax`. t is left behind the
/// rows of dy where there is room, else in `t`.
#[allow(clippy::too_many_arguments)]
pub(super) fn backward<D: Driver>(
    cuda: &Cuda<D>,
    shape: &LoraShape,
    pair: &Buffer<D>,
    (dy, band): (&Buffer<D>, Columns),
    x: &Buffer<D>,
    (ax, ax_band): (&Buffer<D>, Columns),
    t: &Buffer<D>,
    (gradients, offset): (&Buffer<D>, usize),
    rows: usize,
) {
    let (rank, inner, outer) = (shape.rank, shape.in_features, shape.out_features);
    let [_, b] = matrices(pair, shape);
    let t = gradient_tail((dy, band), rows, rank).unwrap_or_else(|| t.rows(rows, rank));
    let dy = dy.band(band, rows);
    let operands = (operand(dy), operand(b));
    cuda.gemm([rows, rank, outer], (shape.scale, 0.0), operands, product(t));
    let wide = |range, stride| Product {
        address: gradients.at(range),
        stride,
        wide: true,
        batch_stride: 0,
    };
    let middle = offset + shape.a_elements();
    let operands = (transposed(t), operand(x.rows(rows, inner)));
    cuda.gemm([rank, inner, rows], (1.0, 1.0), operands, wide(offset..middle, inner));
    let gb = wide(middle..offset + shape.elements(), rank);
    let operands = (transposed(dy), operand(ax.band(ax_band, rows)));
    cuda.gemm([outer, rank, rows], (shape.scale, 1.0), operands, gb);
}

/// `dx = t · A`.
pub(super) fn input_gradient<D: Driver>(
    cuda: &Cuda<D>,
    shape: &LoraShape,
    pair: &Buffer<D>,
    t: &Buffer<D>,
    dx: &Buffer<D>,
    rows: usize,
) {
    let ([a, _], inner) = (matrices(pair, shape), shape.in_features);
    let operands = (operand(t.rows(rows, shape.rank)), operand(a));
    cuda.gemm([rows, inner, shape.rank], (1.0, 0.0), operands, product(dx.rows(rows, inner)));
}
