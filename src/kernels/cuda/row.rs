//! One row times a frozen weight: what each linear of a block does for a token of generated text.

use super::Cuda;
use super::driver::{Address, Argument, Driver};
use super::frozen::{self, b_of};
use super::host::DeviceVector;
use super::memory::Buffer;
use super::weight::{DeviceWeight, Form};
use crate::kernels::{Columns, LoraTerm};

/// Rows of a weight that a block multiplies, a warp each.
const BLOCK_ROWS: usize = 8;
const THREADS: u32 = 256;

/// `y[:, band] = x · Wᵀ + bias + scale · ax · Bᵀ`, or `+=`, of one row. A 4-bit weight is multiplied
/// where it is decoded: half a byte a weight is read, where widening it first moves four and a half.
pub(super) fn forward<D: Driver>(
    cuda: &Cuda<D>,
    (weight, bias): (&DeviceWeight<D>, Option<&DeviceVector<D>>),
    lora: Option<LoraTerm<Buffer<D>>>,
    x: &Buffer<D>,
    (y, band): (&Buffer<D>, Columns),
    accumulate: bool,
) {
    let Form::Packed(packed) = weight.form else {
        return frozen::forward(cuda, (weight, bias), lora, x, (y, band), 1, accumulate);
    };
    const NULL: Address = 0;
    let [outer, inner] = weight.shape;
    let (ax, b, rank, scale) = match &lora {
        Some(LoraTerm { shape, pair, inner: (ax, columns) }) => {
            (ax.band(*columns, 1).address, b_of(pair, shape).address, shape.rank, shape.scale)
        }
        None => (NULL, NULL, 0, 0.0),
    };
    let bias = bias.map_or(Argument::Pointer(NULL), DeviceVector::argument);
    let grid = [outer.div_ceil(BLOCK_ROWS) as u32, 1, 1];
    let mut arguments = packed.arguments().to_vec();
    arguments.extend([
        Argument::I64(outer as i64),
        inner.into(),
        x.rows(1, inner).argument(),
        bias,
        Argument::Pointer(ax),
        Argument::Pointer(b),
        rank.into(),
        scale.into(),
        y.band(band, 1).argument(),
        accumulate.into(),
    ]);
    cuda.launch("linear_row_4bit", grid, THREADS, &mut arguments);
}
