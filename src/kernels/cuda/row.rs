//! One row times a matrix: what each linear of a block, its adapter and the head do for a token of
//! generated text.

use super::Cuda;
use super::driver::{Address, Argument, Driver};
use super::frozen::{a_of, b_of};
use super::host::DeviceVector;
use super::memory::{Buffer, Rows};
use super::weight::Form;
use crate::kernels::{Columns, LinearKernels, LinearTerms, LoraShape, LoraTerm, Write};

/// Rows of a matrix that a block multiplies, a warp each.
const BLOCK_ROWS: usize = 8;
const THREADS: u32 = 256;
const NULL: Address = 0;

/// `y[:, band] = x · Wᵀ + bias + scale · ax · Bᵀ`, or `+=`, of one row. A 4-bit weight is multiplied
/// where it is decoded: half a byte a weight is read, where dequantizing it first moves four and a half.
pub(super) fn forward<D: Driver>(
    cuda: &Cuda<D>,
    terms: LinearTerms<Cuda<D>>,
    x: &Buffer<D>,
    (y, band): (&mut Buffer<D>, Columns),
    write: Write,
) {
    let (weight, shape) = (terms.weight, terms.weight.shape);
    let (kernel, matrix) = match (&weight.form, weight.operand()) {
        (Form::Packed(packed), _) => ("linear_row_4bit", packed.arguments().to_vec()),
        (Form::Dense(_), Some(rows)) => ("linear_row_bf16", vec![rows.argument()]),
        (Form::Dense(_), None) => {
            return cuda.linear_forward(terms, x, (y, band), 1, write);
        }
    };
    let added = Added {
        bias: terms.bias.map_or(Argument::Pointer(NULL), DeviceVector::argument),
        lora: terms.lora,
        write,
    };
    multiply(cuda, (kernel, matrix), shape, x, y.band(band, 1), added);
}

/// `ax[:, band] = x · Aᵀ` of one row.
pub(super) fn project<D: Driver>(
    cuda: &Cuda<D>,
    shape: &LoraShape,
    pair: &Buffer<D>,
    x: &Buffer<D>,
    (ax, band): (&Buffer<D>, Columns),
) {
    let a = a_of(pair, shape).argument();
    let added = Added { bias: Argument::Pointer(NULL), lora: None, write: Write::Over };
    let size = [shape.rank, shape.in_features];
    multiply(cuda, ("linear_row_bf16", vec![a]), size, x, ax.band(band, 1), added);
}

/// What is added to a product.
struct Added<'a, D: Driver> {
    bias: Argument,
    lora: Option<LoraTerm<'a, Buffer<D>>>,
    write: Write,
}

fn multiply<D: Driver>(
    cuda: &Cuda<D>,
    (kernel, mut arguments): (&'static str, Vec<Argument>),
    [outer, inner]: [usize; 2],
    x: &Buffer<D>,
    y: Rows,
    Added { bias, lora, write }: Added<D>,
) {
    let (ax, b, rank, scale) = match &lora {
        Some(LoraTerm { shape, pair, inner: (ax, columns) }) => {
            (ax.band(*columns, 1).address, b_of(pair, shape).address, shape.rank, shape.scale)
        }
        None => (NULL, NULL, 0, 0.0),
    };
    arguments.extend([
        Argument::I64(outer as i64),
        inner.into(),
        x.rows(1, inner).argument(),
        bias,
        Argument::Pointer(ax),
        Argument::Pointer(b),
        rank.into(),
        scale.into(),
        y.argument(),
        write.into(),
    ]);
    let grid = [outer.div_ceil(BLOCK_ROWS) as u32, 1, 1];
    cuda.launch(kernel, grid, THREADS, &mut arguments);
}
