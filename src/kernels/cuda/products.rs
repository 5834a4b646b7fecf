//! cuBLAS' calls for a [`Gemm`].
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::fmt::{self, Display, Formatter};
use std::ptr;

use super::driver::{Gemm, Operand};
use super::functions::{Cublas, Handle};
use crate::error::{Error, Result};
use crate::plan::RegionType;

// library_types.h, cublas_api.h
const CUDA_R_32F: c_int = 0;
const CUDA_R_16BF: c_int = 14;
const COMPUTE_32F: c_int = 68;
const GEMM_DEFAULT: c_int = -1;

/// Elements that a matrix spans at most: some of cuBLAS' kernels fail from 2³¹ on.
const MOST_ELEMENTS: usize = (1 << 31) - 1;

/// Queues the product on the library's stream; returns its status.
///
/// # Errors
/// `Gpu` for sizes that it does not take.
pub(super) fn gemm(cublas: &Cublas, blas: Handle, gemm: &Gemm) -> Result<c_int> {
    for piece in gemm.pieces(MOST_ELEMENTS) {
        let status = at_once(cublas, blas, &piece)?;
        if status != 0 {
            return Ok(status);
        }
    }
    Ok(0)
}

fn at_once(cublas: &Cublas, blas: Handle, gemm: &Gemm) -> Result<c_int> {
    let Gemm { shape: [m, n, k], alpha, a, b, beta, c, batches } = gemm;
    // Row-major C is column-major Cᵀ = Bᵀ·Aᵀ: operands change places, and a stored matrix is
    // its own transpose there.
    let (m, n, k) = (int(*m)?, int(*n)?, int(*k)?);
    let (first, second) = (c_int::from(b.transposed), c_int::from(a.transposed));
    let (lda, ldb, ldc) = (int(a.stride)?, int(b.stride)?, int(c.stride)?);
    let result = match c.dtype {
        RegionType::F32 => CUDA_R_32F,
        RegionType::Bf16 => CUDA_R_16BF,
    };
    let (alpha, beta) = (ptr::from_ref(alpha).cast(), ptr::from_ref(beta).cast());
    let (pa, pb, pc) = (a.address as *const _, b.address as *const _, c.address as *mut _);
    let (half, compute, algorithm) = (CUDA_R_16BF, COMPUTE_32F, GEMM_DEFAULT);
    // SAFETY: dimensions and strides stay inside the operands' allocations, as `memory` checks;
    // alpha and beta are read during the call.
    Ok(unsafe {
        if *batches == 1 {
            (cublas.gemm)(
                blas, first, second, n, m, k, alpha, pb, half, ldb, pa, half, lda, beta, pc,
                result, ldc, compute, algorithm,
            )
        } else {
            let stride = |elements: usize| elements as i64;
            (cublas.gemm_batched)(
                blas,
                first,
                second,
                n,
                m,
                k,
                alpha,
                pb,
                half,
                ldb,
                stride(b.batch_stride),
                pa,
                half,
                lda,
                stride(a.batch_stride),
                beta,
                pc,
                result,
                ldc,
                stride(c.batch_stride),
                int(*batches)?,
                compute,
                algorithm,
            )
        }
    })
}

/// What cuBLAS is asked for, for whoever has to find out why it refuses.
impl Display for Gemm {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let Gemm { shape, alpha, a, b, beta, c, batches } = self;
        let operand = |it: &Operand| {
            let turned = if it.transposed { "ᵀ" } else { "" };
            format!("bf16{turned} {} apart at {} of 16", it.stride, it.address % 16)
        };
        let (a, b) = (operand(a), operand(b));
        let result = match c.dtype {
            RegionType::F32 => "f32",
            RegionType::Bf16 => "bf16",
        };
        let c = format!("{result} {} apart at {} of 16", c.stride, c.address % 16);
        write!(f, "{shape:?} x {batches}: A {a}, B {b}, C {c}, α {alpha}, β {beta}")
    }
}

fn int(x: usize) -> Result<c_int> {
    x.try_into().map_err(|_| Error::gpu(format_args!("{x} is too large for cuBLAS")))
}
