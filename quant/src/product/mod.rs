//! Products of f32 activations with frozen weights and with each other.
//!
//! `product_forward`: `y = alpha·x·Wᵀ + beta·y`; `product_input_gradient`:
//! `dx = alpha·dy·W + beta·dx`. W stays in its stored form: a panel of rows at a time is widened into
//! a buffer that stays in cache. `beta` 0 overwrites without reading.

mod kernel;
mod view;

use half::bf16;
use rayon::prelude::*;

use crate::PackedWeight;
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

/// Elements of a widened panel: 1 MiB of f32 stays in L2.
const PANEL_ELEMENTS: usize = 1 << 18;

impl WeightRef<'_> {
    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            WeightRef::F32(_, shape) | WeightRef::Bf16(_, shape) => *shape,
            WeightRef::Packed(packed) => packed.shape(),
        }
    }

    /// Calls `work(rows, panel)` for consecutive panels of rows, widened.
    fn for_each_panel(&self, mut work: impl FnMut(std::ops::Range<usize>, &[f32])) {
        let [rows, columns] = self.shape();
        if let WeightRef::F32(data, _) = self {
            return work(0..rows, data);
        }
        let step = (PANEL_ELEMENTS / columns).clamp(1, rows);
        let mut panel = vec![0.0; step * columns];
        for begin in (0..rows).step_by(step) {
            let end = (begin + step).min(rows);
            let panel = &mut panel[..(end - begin) * columns];
            self.widen_rows(begin, panel);
            work(begin..end, panel);
        }
    }

    fn widen_rows(&self, begin: usize, panel: &mut [f32]) {
        let columns = self.shape()[1];
        let task = panel.len().div_ceil(4 * rayon::current_num_threads()).next_multiple_of(64);
        panel.par_chunks_mut(task).enumerate().for_each(|(index, out)| {
            let first = begin * columns + index * task;
            match self {
                WeightRef::Packed(packed) => packed.dequantize_range(first, out),
                WeightRef::Bf16(data, _) => {
                    let data = &data[first..first + out.len()];
                    out.iter_mut().zip(data).for_each(|(out, from)| *out = from.to_f32());
                }
                WeightRef::F32(data, _) => {
                    out.copy_from_slice(&data[first..first + out.len()]);
                }
            }
        });
    }
}

/// `c = alpha·a·b + beta·c` on all threads.
///
/// # Panics
/// When the shapes do not agree.
pub fn gemm(alpha: f32, a: Matrix, b: Matrix, beta: f32, c: MatrixMut) {
    kernel::gemm(alpha, a, b, beta, c, true);
}

/// `c = alpha·a·b + beta·c` on this thread.
///
/// # Panics
/// When the shapes do not agree.
pub fn gemm_serial(alpha: f32, a: Matrix, b: Matrix, beta: f32, c: MatrixMut) {
    kernel::gemm(alpha, a, b, beta, c, false);
}

/// `y = alpha·x·Wᵀ + beta·y`; x `[T, in]`, y `[T, out]`.
///
/// # Panics
/// When the shapes do not agree.
pub fn product_forward(alpha: f32, x: Matrix, weight: WeightRef, beta: f32, mut y: MatrixMut) {
    let columns = weight.shape()[1];
    weight.for_each_panel(|rows, panel| {
        let w = Matrix::new(panel, (rows.len(), columns, columns));
        gemm(alpha, x, w.transposed(), beta, y.columns(rows));
    });
}

/// `dx = alpha·dy·W + beta·dx`; dy `[T, out]`, dx `[T, in]`.
///
/// # Panics
/// When the shapes do not agree.
pub fn product_input_gradient(
    alpha: f32,
    dy: Matrix,
    weight: WeightRef,
    beta: f32,
    mut dx: MatrixMut,
) {
    let columns = weight.shape()[1];
    weight.for_each_panel(|rows, panel| {
        let beta = if rows.start == 0 { beta } else { 1.0 };
        let w = Matrix::new(panel, (rows.len(), columns, columns));
        gemm(alpha, dy.columns(rows), w, beta, dx.all());
    });
}
