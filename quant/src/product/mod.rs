//! Products of f32 activations with frozen weights and with each other, of operands as they are or
//! rounded to bf16 ([`Precision`]).
//!
//! `product_forward`: `y = x·Wᵀ + beta·y`; `product_input_gradient`: `dx = dy·W + beta·dx`. W stays
//! in its stored form: it is decoded into the panels that a matrix product packs anyway. Both take
//! a low-rank addition along, which then costs no second pass over the result. `beta` 0 overwrites
//! without reading. Structure: Goto and van de Geijn, "Anatomy of High-Performance Matrix
//! Multiplication", 2008.

mod driver;
mod micro;
#[cfg(target_arch = "aarch64")]
mod mmla;
mod pack;
mod row;
mod step;
mod tile;
mod transpose;
mod vector;
mod view;

use half::bf16;

use crate::PackedWeight;
use driver::Product;
pub use driver::{PackedOperand, buffer_bytes};
use micro::Isa;
use pack::Operand;
pub use row::product_row;
pub use step::Precision;
pub use view::{Matrix, MatrixMut};

/// A frozen operand `[out, in]`.
#[derive(Debug, Clone, Copy)]
pub enum WeightRef<'a> {
    /// Dense f32 with its shape.
    F32(&'a [f32], [usize; 2]),
    /// Dense bf16 with its shape.
    Bf16(&'a [bf16], [usize; 2]),
    /// 4-bit blocks.
    Packed(&'a PackedWeight),
}

impl WeightRef<'_> {
    /// `[out, in]`, as large as the weights: products read them without looking again.
    ///
    /// # Panics
    /// When they are fewer or more.
    pub fn shape(&self) -> [usize; 2] {
        let (length, shape) = match self {
            WeightRef::F32(weights, shape) => (weights.len(), *shape),
            WeightRef::Bf16(weights, shape) => (weights.len(), *shape),
            WeightRef::Packed(packed) => return packed.shape(),
        };
        assert_eq!(
            shape[0].checked_mul(shape[1]),
            Some(length),
            "a weight is as large as {shape:?}"
        );
        shape
    }
}

impl Precision {
    /// The extension that products use of this processor, such as `AVX-512`; none where it has none of those
    /// that there are kernels for, and products are several times slower.
    pub fn instructions(self) -> Option<&'static str> {
        Isa::detect(self).name()
    }
}

/// `c = alpha·a·b + beta·c` on all threads.
///
/// # Panics
/// When the shapes do not agree.
pub fn gemm(alpha: f32, a: Matrix, b: Matrix, beta: f32, c: MatrixMut, precision: Precision) {
    Product { alpha, a, b: Operand::Dense(b), extra: None, beta }.run(
        Isa::detect(precision),
        c,
        true,
    );
}

/// `c = alpha·a·b + beta·c` on this thread.
///
/// # Panics
/// When the shapes do not agree.
pub fn gemm_serial(
    alpha: f32,
    a: Matrix,
    b: Matrix,
    beta: f32,
    c: MatrixMut,
    precision: Precision,
) {
    Product { alpha, a, b: Operand::Dense(b), extra: None, beta }.run(
        Isa::detect(precision),
        c,
        false,
    );
}

/// A low-rank addition to a product: `+ scale · a · b`.
#[derive(Debug, Clone, Copy)]
pub struct LowRank<'a> {
    /// Factor.
    pub scale: f32,
    /// `[T, R]`.
    pub a: Matrix<'a>,
    /// `[R, N]`.
    pub b: Matrix<'a>,
}

/// `y = x·Wᵀ + low_rank + beta·y`; x `[T, in]`, y `[T, out]`. The addition is made while a part of
/// y is in cache.
///
/// # Panics
/// When the shapes do not agree.
pub fn product_forward(
    x: Matrix,
    weight: WeightRef,
    low_rank: Option<LowRank>,
    beta: f32,
    y: MatrixMut,
    precision: Precision,
) {
    let b = Operand::Transposed(weight);
    Product { alpha: 1.0, a: x, b, extra: low_rank, beta }.run(Isa::detect(precision), y, true);
}

/// `dx = dy·W + low_rank + beta·dx`; dy `[T, out]`, dx `[T, in]`.
///
/// # Panics
/// When the shapes do not agree.
pub fn product_input_gradient(
    dy: Matrix,
    weight: WeightRef,
    low_rank: Option<LowRank>,
    beta: f32,
    dx: MatrixMut,
    precision: Precision,
) {
    let b = Operand::Plain(weight);
    Product { alpha: 1.0, a: dy, b, extra: low_rank, beta }.run(Isa::detect(precision), dx, true);
}
