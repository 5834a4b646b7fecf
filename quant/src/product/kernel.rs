//! The call into the `gemm` crate.
#![allow(unsafe_code)]

use gemm::Parallelism;

use super::view::{Matrix, MatrixMut};

/// Below this many multiply-adds, starting threads costs more than it saves.
const SERIAL_LIMIT: usize = 1 << 16;

/// `c = alpha·a·b + beta·c`.
pub(super) fn gemm(alpha: f32, a: Matrix, b: Matrix, beta: f32, c: MatrixMut, parallel: bool) {
    let (m, n, k) = (c.rows, c.columns, a.columns);
    assert_eq!((a.rows, b.rows, b.columns), (m, k, n), "shapes of a product agree");
    let threads = rayon::current_num_threads();
    let parallelism = if parallel && threads > 1 && m * n * k > SERIAL_LIMIT {
        Parallelism::Rayon(threads)
    } else {
        Parallelism::None
    };
    let stride = |stride: usize| stride as isize;
    // SAFETY: views were checked when made: every element that the strides reach lies inside its
    // slice, and c's rows do not overlap.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.data.as_mut_ptr(),
            1,
            stride(c.row_stride),
            beta != 0.0,
            a.data.as_ptr(),
            stride(a.column_stride),
            stride(a.row_stride),
            b.data.as_ptr(),
            stride(b.column_stride),
            stride(b.row_stride),
            beta,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}
