//! The low-rank products: `ax = x Aᵀ`, `y += s·ax Bᵀ` and their gradients.
//!
//! Source: LoRA, arXiv 2106.09685, section 4.1.

use nibble_quant::product::{Matrix, MatrixMut, gemm};

use crate::kernels::LoraShape;

/// A `[R, in]` and B `[out, R]` of a pair.
fn split<'a>(shape: &LoraShape, pair: &'a [f32]) -> (Matrix<'a>, Matrix<'a>) {
    let (a, b) = pair[..shape.elements()].split_at(shape.a_elements());
    let (r, input, output) = (shape.rank, shape.in_features, shape.out_features);
    (Matrix::new(a, (r, input, input)), Matrix::new(b, (output, r, r)))
}

/// `ax = x Aᵀ`.
pub fn project(shape: &LoraShape, pair: &[f32], x: Matrix, ax: MatrixMut) {
    let (a, _) = split(shape, pair);
    gemm(1.0, x, a.transposed(), 0.0, ax);
}

/// `y += s·ax Bᵀ`.
pub fn expand(shape: &LoraShape, pair: &[f32], ax: Matrix, y: MatrixMut) {
    let (_, b) = split(shape, pair);
    gemm(shape.scale, ax, b.transposed(), 1.0, y);
}

/// What the gradients are computed from.
pub struct BackwardInputs<'a> {
    /// `[T, out]`.
    pub dy: Matrix<'a>,
    /// `[T, in]`, after dropout.
    pub x: Matrix<'a>,
    /// `[T, R]`.
    pub ax: Matrix<'a>,
}

/// `t = s·dy B`, `gA += tᵀ x`, `gB += s·dyᵀ ax`.
pub fn backward(
    shape: &LoraShape,
    pair: &[f32],
    inputs: BackwardInputs,
    t: &mut [f32],
    gradients: &mut [f32],
) {
    let (_, b) = split(shape, pair);
    let (r, input, output) = (shape.rank, shape.in_features, shape.out_features);
    let rows = t.len() / r;
    let (ga, gb) = gradients.split_at_mut(shape.a_elements());
    let BackwardInputs { dy, x, ax } = inputs;
    gemm(shape.scale, dy, b, 0.0, MatrixMut::new(t, (rows, r, r)));
    let t = Matrix::new(t, (rows, r, r));
    gemm(1.0, t.transposed(), x, 1.0, MatrixMut::new(ga, (r, input, input)));
    gemm(shape.scale, dy.transposed(), ax, 1.0, MatrixMut::new(gb, (output, r, r)));
}

/// `dx = t A + beta·dx`.
pub fn input_gradient(shape: &LoraShape, pair: &[f32], t: Matrix, dx: MatrixMut, beta: f32) {
    let (a, _) = split(shape, pair);
    gemm(1.0, t, a, beta, dx);
}
