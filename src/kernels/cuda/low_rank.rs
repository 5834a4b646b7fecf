//! Products of the adapters alone: `x·Aᵀ`, t, and the gradients of A and B.

use super::Cuda;
use super::driver::{Address, Driver};
use super::frozen::{a_of, b_of, gradient_tail, operand, product, product_in_f32, transposed};
use super::memory::{Buffer, Rows};
use crate::kernels::{Columns, LoraShape};

/// `ax[:, band] = x · Aᵀ`.
pub(super) fn project<D: Driver>(
    cuda: &Cuda<D>,
    shape: &LoraShape,
    pair: &Buffer<D>,
    x: &Buffer<D>,
    (ax, band): (&Buffer<D>, Columns),
    rows: usize,
) {
    let inner = shape.in_features;
    let operands = (operand(x.rows(rows, inner)), transposed(a_of(pair, shape)));
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
    let (rank, inner) = (shape.rank, shape.in_features);
    let t = gradient_tail((dy, band), rows, rank).unwrap_or_else(|| t.rows(rows, rank));
    let dy = dy.band(band, rows);
    inner_gradient(cuda, shape, pair, dy, t, rows);
    let middle = offset + shape.a_elements();
    let operands = (transposed(t), operand(x.rows(rows, inner)));
    let ga = product_in_f32(Rows { address: gradients.at(offset..middle), stride: inner });
    cuda.gemm([rank, inner, rows], (1.0, 1.0), operands, ga);
    let gb = gradients.at(middle..offset + shape.elements());
    gradient_of_b(cuda, shape, (dy, ax.band(ax_band, rows)), gb, rows);
}

/// `t = scale · dy · B`.
pub(super) fn inner_gradient<D: Driver>(
    cuda: &Cuda<D>,
    shape: &LoraShape,
    pair: &Buffer<D>,
    dy: Rows,
    t: Rows,
    rows: usize,
) {
    let operands = (operand(dy), operand(b_of(pair, shape)));
    cuda.gemm([rows, shape.rank, shape.out_features], (shape.scale, 0.0), operands, product(t));
}

/// `gB += scale · dyᵀ ax`.
pub(super) fn gradient_of_b<D: Driver>(
    cuda: &Cuda<D>,
    shape: &LoraShape,
    (dy, ax): (Rows, Rows),
    gb: Address,
    rows: usize,
) {
    let operands = (transposed(dy), operand(ax));
    let to = product_in_f32(Rows { address: gb, stride: shape.rank });
    cuda.gemm([shape.out_features, shape.rank, rows], (shape.scale, 1.0), operands, to);
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
    let inner = shape.in_features;
    let operands = (operand(t.rows(rows, shape.rank)), operand(a_of(pair, shape)));
    cuda.gemm([rows, inner, shape.rank], (1.0, 0.0), operands, product(dx.rows(rows, inner)));
}
