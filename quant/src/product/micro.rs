//! The innermost loop: a tile of C in registers, one multiply-add for each of its lanes and k.
//!
//! A tile is `rows × (vectors · LANES)`. A's panel is packed either row by row (`[rows][KC]`, one
//! broadcast per row and k) or k by k (`[KC][rows]`); B's rows of a tile are contiguous. Every
//! element of C is the same chain of fused multiply-adds over k, whatever tile it falls into.
#![allow(unsafe_code)]

/// Elements between the rows of a packed panel of A: the block of k and a cache line, so that rows
/// do not fall into the same cache sets.
pub(super) const A_ROW_STRIDE: usize = super::driver::K_BLOCK + 16;

/// One tile's operands.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// Length of the chains.
    pub k: usize,
    /// Packed panel of A.
    pub a: *const f32,
    /// Whether A is packed k by k.
    pub a_by_k: bool,
    /// First row of the tile's columns of B.
    pub b: *const f32,
    /// Elements between rows of B.
    pub b_stride: usize,
    /// First element of the tile in C.
    pub c: *mut f32,
    /// Elements between rows of C.
    pub c_stride: usize,
    /// Rows of the tile.
    pub rows: usize,
    /// Columns of C that exist.
    pub columns: usize,
    /// Factor of the product.
    pub alpha: f32,
    /// Factor of C; 0 does not read C.
    pub beta: f32,
}

/// A register of floats.
///
/// # Safety
/// The processor has the instructions, and pointers reach `LANES` elements.
trait Vector: Copy {
    const LANES: usize;
    unsafe fn zero() -> Self;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn multiply_add(self, factor: Self, sum: Self) -> Self;
    unsafe fn multiply(self, factor: Self) -> Self;
}

/// The instruction set that tiles run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Isa {
    /// Arrays of eight.
    Portable,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The widest that the processor has.
    pub(super) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return Isa::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Isa::Avx2;
            }
        }
        Isa::Portable
    }

    /// Most rows of a tile.
    pub(super) fn rows(self) -> usize {
        match self {
            Isa::Portable => 4,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => 6,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => 14,
        }
    }

    /// Columns of a full tile: two vectors.
    pub(super) fn columns(self) -> usize {
        match self {
            Isa::Portable => 16,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => 16,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => 32,
        }
    }

    /// Computes a tile.
    ///
    /// # Safety
    /// The processor has the instructions; `tile`'s pointers reach all that its fields say, and B
    /// is readable for whole vectors.
    pub(super) unsafe fn run(self, tile: &Tile) {
        // SAFETY: passed on.
        unsafe {
            match self {
                Isa::Portable => dispatch::<Eight>(tile),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => x86::avx2(tile),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => x86::avx512(tile),
            }
        }
    }
}

/// Picks the instance for the tile's size.
#[inline(always)]
unsafe fn dispatch<V: Vector>(tile: &Tile) {
    macro_rules! rows {
        ($($rows:literal)*) => {
            match (tile.rows, tile.columns > V::LANES, tile.a_by_k) {
                // SAFETY: passed on.
                $(($rows, true, false) => unsafe { compute::<V, $rows, 2, false>(tile) },
                ($rows, false, false) => unsafe { compute::<V, $rows, 1, false>(tile) },
                ($rows, true, true) => unsafe { compute::<V, $rows, 2, true>(tile) },
                ($rows, false, true) => unsafe { compute::<V, $rows, 1, true>(tile) },)*
                _ => unreachable!("tiles have 1 to 14 rows"),
            }
        };
    }
    rows!(1 2 3 4 5 6 7 8 9 10 11 12 13 14)
}

#[inline(always)]
unsafe fn compute<V: Vector, const ROWS: usize, const VECTORS: usize, const BY_K: bool>(
    tile: &Tile,
) {
    // SAFETY: the caller's promise covers every pointer below.
    unsafe {
        let mut sums = [[V::zero(); VECTORS]; ROWS];
        let (mut a, mut b) = (tile.a, tile.b);
        for _ in 0..tile.k {
            let mut row = [V::zero(); VECTORS];
            for (vector, row) in row.iter_mut().enumerate() {
                *row = V::load(b.add(vector * V::LANES));
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let factor = V::splat(*a.add(if BY_K { i } else { i * A_ROW_STRIDE }));
                for (sum, row) in sums.iter_mut().zip(row) {
                    *sum = factor.multiply_add(row, *sum);
                }
            }
            a = a.add(if BY_K { ROWS } else { 1 });
            b = b.add(tile.b_stride);
        }
        for (i, sums) in sums.iter().enumerate() {
            write_row(tile, sums, tile.c.add(i * tile.c_stride));
        }
    }
}

#[inline(always)]
unsafe fn write_row<V: Vector, const VECTORS: usize>(
    tile: &Tile,
    sums: &[V; VECTORS],
    c: *mut f32,
) {
    // SAFETY: whole vectors only where the columns exist; the rest goes through a buffer.
    unsafe {
        let (alpha, beta) = (V::splat(tile.alpha), V::splat(tile.beta));
        if tile.columns == VECTORS * V::LANES {
            for (vector, sum) in sums.iter().enumerate() {
                let to = c.add(vector * V::LANES);
                let product = sum.multiply(alpha);
                let value = if tile.beta == 0.0 {
                    product
                } else {
                    beta.multiply_add(V::load(to), product)
                };
                value.store(to);
            }
            return;
        }
        let mut buffer = [0.0f32; 32];
        for (vector, sum) in sums.iter().enumerate() {
            sum.multiply(alpha).store(buffer.as_mut_ptr().add(vector * V::LANES));
        }
        for (column, &product) in buffer[..tile.columns].iter().enumerate() {
            let to = c.add(column);
            *to = if tile.beta == 0.0 { product } else { tile.beta.mul_add(*to, product) };
        }
    }
}

/// The portable vector.
#[derive(Clone, Copy)]
struct Eight([f32; 8]);

impl Vector for Eight {
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Eight([0.0; 8])
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Eight([value; 8])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        Eight(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn multiply_add(self, factor: Self, sum: Self) -> Self {
        Eight(std::array::from_fn(|i| self.0[i] * factor.0[i] + sum.0[i]))
    }

    #[inline(always)]
    unsafe fn multiply(self, factor: Self) -> Self {
        Eight(std::array::from_fn(|i| self.0[i] * factor.0[i]))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Tile, Vector, dispatch};

    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512(tile: &Tile) {
        // SAFETY: passed on.
        unsafe { dispatch::<__m512>(tile) }
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2(tile: &Tile) {
        // SAFETY: passed on.
        unsafe { dispatch::<__m256>(tile) }
    }

    macro_rules! vector {
        ($type:ty, $lanes:literal, $zero:ident, $splat:ident, $load:ident, $store:ident, $fma:ident,
         $multiply:ident) => {
            // SAFETY (all blocks): the trait's callers promise the instructions and the memory.
            impl Vector for $type {
                const LANES: usize = $lanes;

                #[inline(always)]
                unsafe fn zero() -> Self {
                    unsafe { $zero() }
                }

                #[inline(always)]
                unsafe fn splat(value: f32) -> Self {
                    unsafe { $splat(value) }
                }

                #[inline(always)]
                unsafe fn load(from: *const f32) -> Self {
                    unsafe { $load(from) }
                }

                #[inline(always)]
                unsafe fn store(self, to: *mut f32) {
                    unsafe { $store(to, self) }
                }

                #[inline(always)]
                unsafe fn multiply_add(self, factor: Self, sum: Self) -> Self {
                    unsafe { $fma(self, factor, sum) }
                }

                #[inline(always)]
                unsafe fn multiply(self, factor: Self) -> Self {
                    unsafe { $multiply(self, factor) }
                }
            }
        };
    }

    vector!(
        __m512,
        16,
        _mm512_setzero_ps,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_fmadd_ps,
        _mm512_mul_ps
    );
    vector!(
        __m256,
        8,
        _mm256_setzero_ps,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_fmadd_ps,
        _mm256_mul_ps
    );
}
