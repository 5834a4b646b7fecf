//! Registers of floats: what the tiles are written in.
#![allow(unsafe_code)]

/// The bits of the upper one of two bf16.
const UPPER_HALF: u32 = 0xffff_0000;

/// A register of floats.
///
/// # Safety
/// Every function needs the processor's instructions, and pointers that reach `LANES` elements (or
/// `count`, where there is one).
pub(super) trait Vector: Copy {
    const LANES: usize;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// Writes past the caches to an address of the register's alignment; needs a fence later.
    unsafe fn stream(self, to: *mut f32);
    /// The first `count` lanes, the others 0; `count` below `LANES`.
    unsafe fn load_some(from: *const f32, count: usize) -> Self;
    /// The first `count` lanes; `count` below `LANES`.
    unsafe fn store_some(self, to: *mut f32, count: usize);
    unsafe fn multiply_add(self, factor: Self, sum: Self) -> Self;
    unsafe fn multiply(self, factor: Self) -> Self;
    /// Lanes taken as pairs of bf16: those with the lower bits, as floats.
    unsafe fn lower_half(self) -> Self;
    /// The lanes' upper 16 bits, as f32.
    unsafe fn upper_half(self) -> Self;
    /// Asks for a cache line that will be written soon.
    unsafe fn prefetch(line: *const f32);
}

/// The portable register.
#[derive(Clone, Copy)]
pub(super) struct Eight([f32; 8]);

// SAFETY (all blocks): the trait's callers promise the memory.
impl Vector for Eight {
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Eight([value; 8])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Eight(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn stream(self, to: *mut f32) {
        unsafe { self.store(to) }
    }

    #[inline(always)]
    unsafe fn load_some(from: *const f32, count: usize) -> Self {
        Eight(std::array::from_fn(|i| if i < count { unsafe { *from.add(i) } } else { 0.0 }))
    }

    #[inline(always)]
    unsafe fn store_some(self, to: *mut f32, count: usize) {
        for (i, value) in self.0.into_iter().enumerate().take(count) {
            unsafe { *to.add(i) = value }
        }
    }

    #[inline(always)]
    unsafe fn multiply_add(self, factor: Self, sum: Self) -> Self {
        Eight(std::array::from_fn(|i| self.0[i] * factor.0[i] + sum.0[i]))
    }

    #[inline(always)]
    unsafe fn multiply(self, factor: Self) -> Self {
        Eight(std::array::from_fn(|i| self.0[i] * factor.0[i]))
    }

    #[inline(always)]
    unsafe fn lower_half(self) -> Self {
        Eight(self.0.map(|lane| f32::from_bits(lane.to_bits() << 16)))
    }

    #[inline(always)]
    unsafe fn upper_half(self) -> Self {
        Eight(self.0.map(|lane| f32::from_bits(lane.to_bits() & UPPER_HALF)))
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const f32) {}
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{UPPER_HALF, Vector};

    /// Loads and stores of some lanes: eight lanes from the right offset are the mask.
    static AVX2_MASKS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

    // SAFETY (all blocks): the trait's callers promise the instructions and the memory.
    impl Vector for __m512 {
        const LANES: usize = 16;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { _mm512_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm512_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self) }
        }

        #[inline(always)]
        unsafe fn stream(self, to: *mut f32) {
            unsafe { _mm512_stream_ps(to, self) }
        }

        #[inline(always)]
        unsafe fn load_some(from: *const f32, count: usize) -> Self {
            unsafe { _mm512_maskz_loadu_ps((1 << count) - 1, from) }
        }

        #[inline(always)]
        unsafe fn store_some(self, to: *mut f32, count: usize) {
            unsafe { _mm512_mask_storeu_ps(to, (1 << count) - 1, self) }
        }

        #[inline(always)]
        unsafe fn multiply_add(self, factor: Self, sum: Self) -> Self {
            unsafe { _mm512_fmadd_ps(self, factor, sum) }
        }

        #[inline(always)]
        unsafe fn multiply(self, factor: Self) -> Self {
            unsafe { _mm512_mul_ps(self, factor) }
        }

        #[inline(always)]
        unsafe fn lower_half(self) -> Self {
            unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(self))) }
        }

        #[inline(always)]
        unsafe fn upper_half(self) -> Self {
            unsafe {
                let mask = _mm512_set1_epi32(UPPER_HALF.cast_signed());
                _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(self), mask))
            }
        }

        #[inline(always)]
        unsafe fn prefetch(line: *const f32) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
        }
    }

    // SAFETY (all blocks): as above; the mask has 8 lanes from every offset up to 8 on.
    impl Vector for __m256 {
        const LANES: usize = 8;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { _mm256_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm256_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm256_storeu_ps(to, self) }
        }

        #[inline(always)]
        unsafe fn stream(self, to: *mut f32) {
            unsafe { _mm256_stream_ps(to, self) }
        }

        #[inline(always)]
        unsafe fn load_some(from: *const f32, count: usize) -> Self {
            unsafe {
                let mask = _mm256_loadu_si256(AVX2_MASKS.as_ptr().add(8 - count).cast());
                _mm256_maskload_ps(from, mask)
            }
        }

        #[inline(always)]
        unsafe fn store_some(self, to: *mut f32, count: usize) {
            unsafe {
                let mask = _mm256_loadu_si256(AVX2_MASKS.as_ptr().add(8 - count).cast());
                _mm256_maskstore_ps(to, mask, self)
            }
        }

        #[inline(always)]
        unsafe fn multiply_add(self, factor: Self, sum: Self) -> Self {
            unsafe { _mm256_fmadd_ps(self, factor, sum) }
        }

        #[inline(always)]
        unsafe fn multiply(self, factor: Self) -> Self {
            unsafe { _mm256_mul_ps(self, factor) }
        }

        #[inline(always)]
        unsafe fn lower_half(self) -> Self {
            unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(self))) }
        }

        #[inline(always)]
        unsafe fn upper_half(self) -> Self {
            unsafe {
                let mask = _mm256_set1_epi32(UPPER_HALF.cast_signed());
                _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(self), mask))
            }
        }

        #[inline(always)]
        unsafe fn prefetch(line: *const f32) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::*;

    use super::{UPPER_HALF, Vector};

    // SAFETY (all blocks): the trait's callers promise the instructions and the memory.
    impl Vector for float32x4_t {
        const LANES: usize = 4;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { vdupq_n_f32(value) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { vld1q_f32(from) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { vst1q_f32(to, self) }
        }

        /// There is no intrinsic for a store past the caches.
        #[inline(always)]
        unsafe fn stream(self, to: *mut f32) {
            unsafe { self.store(to) }
        }

        #[inline(always)]
        unsafe fn load_some(from: *const f32, count: usize) -> Self {
            let mut lanes = [0.0; Self::LANES];
            unsafe {
                std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), count);
                Self::load(lanes.as_ptr())
            }
        }

        #[inline(always)]
        unsafe fn store_some(self, to: *mut f32, count: usize) {
            let mut lanes = [0.0; Self::LANES];
            unsafe {
                self.store(lanes.as_mut_ptr());
                std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, count);
            }
        }

        #[inline(always)]
        unsafe fn multiply_add(self, factor: Self, sum: Self) -> Self {
            unsafe { vfmaq_f32(sum, self, factor) }
        }

        #[inline(always)]
        unsafe fn multiply(self, factor: Self) -> Self {
            unsafe { vmulq_f32(self, factor) }
        }

        #[inline(always)]
        unsafe fn lower_half(self) -> Self {
            unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<16>(vreinterpretq_u32_f32(self))) }
        }

        #[inline(always)]
        unsafe fn upper_half(self) -> Self {
            unsafe {
                let lanes = vandq_u32(vreinterpretq_u32_f32(self), vdupq_n_u32(UPPER_HALF));
                vreinterpretq_f32_u32(lanes)
            }
        }

        #[inline(always)]
        unsafe fn prefetch(_: *const f32) {}
    }
}
