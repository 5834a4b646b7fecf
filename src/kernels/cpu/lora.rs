//! The low-rank products: `ax = x Aᵀ`, `y += s·ax Bᵀ` and their gradients; those that stand alone are
//! f32 in any case, since rounding what they read would take as long as bf16 saves.
//!
//! Source: LoRA, arXiv 2106.09685, section 4.1.

use nibble_quant::product::{LowRank, Matrix, MatrixMut, Precision, WeightRef, gemm, product_row};

use super::arena::Buffer;
use super::{Cpu, view, view_mut};
use crate::kernels::{Columns, LoraInputs, LoraKernels, LoraShape, LoraTerm};
use crate::model::parameters::Parameters;

impl LoraKernels for Cpu {
    fn load_pair(&self, parameters: &Parameters, index: usize, pair: &mut Buffer<f32>) {
        parameters.widen_pair(index, pair);
    }

    fn lora_project(
        &self,
        shape: &LoraShape,
        pair: &Buffer<f32>,
        x: &Buffer<f32>,
        (ax, band): (&mut Buffer<f32>, Columns),
        rows: usize,
    ) {
        let x = view(x, Columns::all(shape.in_features), rows);
        project(shape, pair, x, view_mut(ax, band, rows));
    }

    fn lora_project_row(
        &self,
        shape: &LoraShape,
        pair: &Buffer<f32>,
        x: &Buffer<f32>,
        (ax, band): (&mut Buffer<f32>, Columns),
    ) {
        let ax = &mut ax[band.offset..band.offset + band.width];
        project_row(shape, pair, &x[..shape.in_features], ax);
    }

    fn lora_backward(
        &self,
        shape: &LoraShape,
        pair: &Buffer<f32>,
        LoraInputs { dy: (dy, band), x, ax: (ax, ax_band) }: LoraInputs<Buffer<f32>>,
        t: &mut Buffer<f32>,
        (gradients, offset): (&mut Buffer<f32>, usize),
        rows: usize,
    ) {
        let inputs = BackwardInputs {
            dy: view(dy, band, rows),
            x: view(x, Columns::all(shape.in_features), rows),
            ax: view(ax, ax_band, rows),
        };
        let gradients = &mut gradients[offset..offset + shape.elements()];
        backward(shape, pair, inputs, &mut t[..rows * shape.rank], gradients);
    }

    fn lora_input_gradient(
        &self,
        shape: &LoraShape,
        pair: &Buffer<f32>,
        t: &Buffer<f32>,
        dx: &mut Buffer<f32>,
        rows: usize,
    ) {
        let t = view(t, Columns::all(shape.rank), rows);
        let dx = view_mut(dx, Columns::all(shape.in_features), rows);
        input_gradient(shape, pair, t, dx);
    }
}

/// A `[R, in]` and B `[out, R]` of a pair.
fn split<'a>(shape: &LoraShape, pair: &'a [f32]) -> (Matrix<'a>, Matrix<'a>) {
    let (a, b) = pair[..shape.elements()].split_at(shape.a_elements());
    let (r, input, output) = (shape.rank, shape.in_features, shape.out_features);
    (Matrix::new(a, (r, input, input)), Matrix::new(b, (output, r, r)))
}

/// `ax = x Aᵀ`.
fn project(shape: &LoraShape, pair: &[f32], x: Matrix, ax: MatrixMut) {
    let (a, _) = split(shape, pair);
    gemm(1.0, x, a.transposed(), 0.0, ax, Precision::F32);
}

/// `ax = x Aᵀ` of one row, A as it lies.
fn project_row(shape: &LoraShape, pair: &[f32], x: &[f32], ax: &mut [f32]) {
    let a = WeightRef::F32(&pair[..shape.a_elements()], [shape.rank, shape.in_features]);
    product_row(x, a, None, 0.0, ax);
}

/// `s·ax Bᵀ`: what the adapter adds to a linear's output.
pub fn output_term<'a>(term: &LoraTerm<'a, Buffer<f32>>, rows: usize) -> LowRank<'a> {
    let (_, b) = split(term.shape, term.pair);
    let (ax, band) = term.inner;
    LowRank { scale: term.shape.scale, a: view(ax, band, rows), b: b.transposed() }
}

/// `t A`: what it adds to the gradient of a linear's input; t has the scale already.
pub fn input_term<'a>(term: &LoraTerm<'a, Buffer<f32>>, rows: usize) -> LowRank<'a> {
    let (a, _) = split(term.shape, term.pair);
    let (t, band) = term.inner;
    LowRank { scale: 1.0, a: view(t, band, rows), b: a }
}

/// What the gradients are computed from.
struct BackwardInputs<'a> {
    /// `[T, out]`.
    dy: Matrix<'a>,
    /// `[T, in]`, after dropout.
    x: Matrix<'a>,
    /// `[T, R]`.
    ax: Matrix<'a>,
}

/// `t = s·dy B`, `gA += tᵀ x`, `gB += s·dyᵀ ax`.
fn backward(
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
    gemm(shape.scale, dy, b, 0.0, MatrixMut::new(t, (rows, r, r)), Precision::F32);
    let t = Matrix::new(t, (rows, r, r));
    let (ga, gb) = (MatrixMut::new(ga, (r, input, input)), MatrixMut::new(gb, (output, r, r)));
    gemm(1.0, t.transposed(), x, 1.0, ga, Precision::F32);
    gemm(shape.scale, dy.transposed(), ax, 1.0, gb, Precision::F32);
}

/// `dx = t A`.
fn input_gradient(shape: &LoraShape, pair: &[f32], t: Matrix, dx: MatrixMut) {
    let (a, _) = split(shape, pair);
    gemm(1.0, t, a, 0.0, dx, Precision::F32);
}
