//! The CPU backend: f32 arithmetic, vectorised loops, rayon over rows, products from
//! [`nibble_quant::product`], which can be of bf16.

pub mod arena;
mod attention;
mod cross_entropy;
mod head_norms;
mod linears;
mod lora;
mod mlp;
mod norm;
mod rotary;
mod rows;
mod scratch;
mod simd;
mod storage;
mod weight;

use super::{Columns, Kernels};
use crate::error::Result;
use crate::model::spec::ModelSpec;
use nibble_quant::product::{Matrix, MatrixMut, Precision};
pub use scratch::Scratch;
pub use weight::FrozenMatrix;

/// Rows that one task of the row-wise loops handles.
const ROWS: usize = 16;
/// Elements that one task of the elementwise loops handles: what it reads and writes stays in L2.
const CHUNK: usize = 1 << 13;

/// The CPU backend; threads are rayon's.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu {
    /// What products with frozen weights, with the adapters' additions to them, and those of attention
    /// are computed in. `x·Aᵀ`, LoRA gradients, all that is no product, and tokens that are generated one
    /// by one are f32.
    pub precision: Precision,
}

impl Kernels for Cpu {
    fn check_model(&self, _spec: &ModelSpec) -> Result<()> {
        Ok(())
    }
}

/// Rows `[rows, band]` of a matrix.
fn view<'a>(data: &'a [f32], band: Columns, rows: usize) -> Matrix<'a> {
    Matrix::new(&data[band.offset..], (rows, band.width, band.stride))
}

/// Writable rows `[rows, band]` of a matrix.
fn view_mut<'a>(data: &'a mut [f32], band: Columns, rows: usize) -> MatrixMut<'a> {
    MatrixMut::new(&mut data[band.offset..], (rows, band.width, band.stride))
}
