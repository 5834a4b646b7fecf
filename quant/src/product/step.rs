//! Steps along k: one f32, or a pair of bf16 of two neighbours in k.
//!
//! Either is four bytes, so tiles, panels and buffers are the same for both. What a step holds travels
//! as an f32, whose bits nothing but [`Dot`] looks into.
#![allow(unsafe_code)]

use half::bf16;

use super::vector::Vector;

/// What products are computed in; sums are f32 in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// Products of f32.
    #[default]
    F32,
    /// Both operands are rounded to bf16, to the nearest. Processors with AVX-512 BF16 do two of these
    /// products in the time of one of f32, those with ARM's BF16 up to four, and take subnormal operands
    /// for 0; on others it is slower than f32, and sums differ in their last bits.
    Bf16,
}

impl Precision {
    /// The extension of processors of this kind that has instructions for bf16.
    pub const BF16_EXTENSION: &str =
        if cfg!(target_arch = "aarch64") { "ARM's BF16" } else { "AVX-512 BF16" };

    /// Whether this processor is faster in it than in f32.
    pub fn is_fast(self) -> bool {
        self == Precision::Bf16 && has_pairs()
    }

    /// Neighbours in k that are one step.
    pub(super) fn per_step(self) -> usize {
        match self {
            Precision::F32 => 1,
            Precision::Bf16 => 2,
        }
    }
}

/// Whether the processor multiplies pairs of bf16.
#[cfg(target_arch = "x86_64")]
pub(super) fn has_pairs() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}

/// Whether the processor multiplies pairs of bf16.
#[cfg(target_arch = "aarch64")]
pub(super) fn has_pairs() -> bool {
    std::arch::is_aarch64_feature_detected!("neon")
        && std::arch::is_aarch64_feature_detected!("bf16")
}

/// Whether there are instructions for pairs: those of other architectures are not used.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(super) fn has_pairs() -> bool {
    false
}

/// A step's products, added to the sums.
///
/// # Safety
/// The processor has the instructions.
pub(super) trait Dot<V> {
    unsafe fn dot(a: V, b: V, sum: V) -> V;
}

/// One f32: a multiply-add, fused where the processor does that.
pub(super) struct Float;
/// A pair, widened: two multiply-adds, the upper one first.
pub(super) struct Widened;
/// A pair, by the processor's instruction for it.
#[cfg(target_arch = "x86_64")]
pub(super) struct Pair;

// SAFETY (both blocks): the trait's callers promise the instructions.
impl<V: Vector> Dot<V> for Float {
    #[inline(always)]
    unsafe fn dot(a: V, b: V, sum: V) -> V {
        unsafe { a.multiply_add(b, sum) }
    }
}

impl<V: Vector> Dot<V> for Widened {
    #[inline(always)]
    unsafe fn dot(a: V, b: V, sum: V) -> V {
        unsafe {
            let sum = a.upper_half().multiply_add(b.upper_half(), sum);
            a.lower_half().multiply_add(b.lower_half(), sum)
        }
    }
}

/// The step of two neighbours: `low` has the smaller k.
#[inline(always)]
fn pair(low: f32, high: f32) -> f32 {
    let bits = |value| u32::from(bf16::from_f32(value).to_bits());
    f32::from_bits(bits(low) | bits(high) << 16)
}

/// Rounds a line along k to pairs; the last one is filled up with 0.
///
/// # Panics
/// When `to` does not have a step for every two elements.
pub(super) fn round_line(from: &[f32], to: &mut [f32]) {
    assert_eq!(to.len(), from.len().div_ceil(2), "a step for two elements");
    let done = vectors_of_line(from, to);
    for (pairs, to) in from[2 * done..].chunks(2).zip(&mut to[done..]) {
        *to = pair(pairs[0], pairs.get(1).copied().unwrap_or(0.0));
    }
}

/// Rounds two lines across k to pairs; where k ends there is no second one.
///
/// # Panics
/// When the lengths differ.
pub(super) fn round_lines(low: &[f32], high: Option<&[f32]>, to: &mut [f32]) {
    let lengths = (low.len(), high.map_or(to.len(), <[f32]>::len));
    assert_eq!(lengths, (to.len(), to.len()), "lines are as long");
    let done = vectors_of_lines(low, high, to);
    for index in done..to.len() {
        to[index] = pair(low[index], high.map_or(0.0, |high| high[index]));
    }
}

/// Steps of a line that are made by whole registers; none without the instructions.
fn vectors_of_line(from: &[f32], to: &mut [f32]) -> usize {
    #[cfg(target_arch = "x86_64")]
    if has_pairs() {
        // SAFETY: the processor has the instructions.
        return unsafe { x86::round_line(from, to) };
    }
    #[cfg(target_arch = "aarch64")]
    if has_pairs() {
        // SAFETY: the processor has the instructions.
        return unsafe { neon::round_line(from, to) };
    }
    let _ = (from, to);
    0
}

/// Steps of two lines that are made by whole registers; none without the instructions.
fn vectors_of_lines(low: &[f32], high: Option<&[f32]>, to: &mut [f32]) -> usize {
    #[cfg(target_arch = "x86_64")]
    if has_pairs() {
        // SAFETY: the processor has the instructions.
        return unsafe { x86::round_lines(low, high, to) };
    }
    #[cfg(target_arch = "aarch64")]
    if has_pairs() {
        // SAFETY: the processor has the instructions.
        return unsafe { neon::round_lines(low, high, to) };
    }
    let _ = (low, high, to);
    0
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::mem::transmute;

    use super::{Dot, Pair};

    const LANES: usize = 16;

    impl Dot<__m512> for Pair {
        #[inline(always)]
        unsafe fn dot(a: __m512, b: __m512, sum: __m512) -> __m512 {
            // SAFETY: the trait's callers promise the instruction; the types differ in name alone.
            unsafe {
                let [a, b] = [a, b].map(|pairs| transmute::<__m512, __m512bh>(pairs));
                _mm512_dpbf16_ps(sum, a, b)
            }
        }
    }

    /// Rounds a line along k; returns the steps that were made, a multiple of a register's.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) fn round_line(from: &[f32], to: &mut [f32]) -> usize {
        let (from, _) = from.as_chunks::<{ 2 * LANES }>();
        let (to, _) = to.as_chunks_mut::<LANES>();
        for (from, to) in from.iter().zip(to.iter_mut()) {
            // SAFETY: 32 floats are read, 16 written; the types differ in name alone.
            unsafe {
                let low = _mm512_loadu_ps(from.as_ptr());
                let high = _mm512_loadu_ps(from.as_ptr().add(LANES));
                let pairs: __m512 = transmute(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_ps(to.as_mut_ptr(), pairs);
            }
        }
        from.len() * LANES
    }

    /// Rounds two lines across k; returns the steps that were made, a multiple of a register's.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) fn round_lines(low: &[f32], high: Option<&[f32]>, to: &mut [f32]) -> usize {
        let (low, _) = low.as_chunks::<LANES>();
        let high = high.map(|high| high.as_chunks::<LANES>().0);
        let (to, _) = to.as_chunks_mut::<LANES>();
        let zeros = [0.0; LANES];
        for (index, (low, to)) in low.iter().zip(to.iter_mut()).enumerate() {
            let high = high.map_or(&zeros, |high| &high[index]);
            // SAFETY: 16 floats each; the types differ in name alone.
            unsafe {
                let low: __m256i = transmute(_mm512_cvtneps_pbh(_mm512_loadu_ps(low.as_ptr())));
                let high: __m256i = transmute(_mm512_cvtneps_pbh(_mm512_loadu_ps(high.as_ptr())));
                let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high));
                let pairs = _mm512_or_si512(high, _mm512_cvtepu16_epi32(low));
                _mm512_storeu_ps(to.as_mut_ptr(), _mm512_castsi512_ps(pairs));
            }
        }
        to.len() * LANES
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::*;
    use std::arch::asm;

    const LANES: usize = 4;

    /// Eight floats as bf16, in their order. There is no intrinsic.
    #[inline]
    #[target_feature(enable = "neon,bf16")]
    fn rounded(first: float32x4_t, second: float32x4_t) -> uint16x8_t {
        let rounded;
        // SAFETY: registers alone; the feature is enabled.
        unsafe {
            asm!(
                ".arch_extension bf16",
                "bfcvtn {rounded:v}.4h, {first:v}.4s",
                "bfcvtn2 {rounded:v}.8h, {second:v}.4s",
                rounded = out(vreg) rounded,
                first = in(vreg) first,
                second = in(vreg) second,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        rounded
    }

    /// Rounds a line along k; returns the steps that were made, a multiple of a register's.
    #[target_feature(enable = "neon,bf16")]
    pub(super) fn round_line(from: &[f32], to: &mut [f32]) -> usize {
        let (from, _) = from.as_chunks::<{ 2 * LANES }>();
        let (to, _) = to.as_chunks_mut::<LANES>();
        for (from, to) in from.iter().zip(to.iter_mut()) {
            // SAFETY: 8 floats are read, 4 written.
            unsafe {
                let pairs = rounded(vld1q_f32(from.as_ptr()), vld1q_f32(from.as_ptr().add(LANES)));
                vst1q_f32(to.as_mut_ptr(), vreinterpretq_f32_u16(pairs));
            }
        }
        from.len() * LANES
    }

    /// Rounds two lines across k; returns the steps that were made, a multiple of a register's.
    #[target_feature(enable = "neon,bf16")]
    pub(super) fn round_lines(low: &[f32], high: Option<&[f32]>, to: &mut [f32]) -> usize {
        let (low, _) = low.as_chunks::<LANES>();
        let high = high.map(|high| high.as_chunks::<LANES>().0);
        let (to, _) = to.as_chunks_mut::<LANES>();
        let zeros = [0.0; LANES];
        for (index, (low, to)) in low.iter().zip(to.iter_mut()).enumerate() {
            let high = high.map_or(&zeros, |high| &high[index]);
            // SAFETY: 4 floats each.
            unsafe {
                let both = rounded(vld1q_f32(low.as_ptr()), vld1q_f32(high.as_ptr()));
                let pairs = vzip1q_u16(both, vextq_u16::<4>(both, both));
                vst1q_f32(to.as_mut_ptr(), vreinterpretq_f32_u16(pairs));
            }
        }
        to.len() * LANES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize) -> Vec<f32> {
        (0..count).map(|i| (i as f32 * 0.37).sin() * 10f32.powi(i as i32 % 7 - 3)).collect()
    }

    fn halves(step: f32) -> [f32; 2] {
        let bits = step.to_bits();
        [f32::from_bits(bits << 16), f32::from_bits(bits & 0xffff_0000)]
    }

    #[test]
    fn lines_are_rounded_to_the_nearest_in_pairs() {
        for count in [0, 1, 2, 31, 32, 33, 100, 257] {
            let from = values(count);
            let mut to = vec![f32::NAN; count.div_ceil(2)];
            round_line(&from, &mut to);
            let got: Vec<f32> = to.iter().flat_map(|&step| halves(step)).collect();
            for (i, got) in got.into_iter().enumerate() {
                let expected = bf16::from_f32(from.get(i).copied().unwrap_or(0.0)).to_f32();
                assert_eq!(got, expected, "{count}: {i}");
            }
        }
    }

    #[test]
    fn two_lines_are_rounded_side_by_side() {
        for count in [0, 1, 15, 16, 17, 64] {
            let (both, mut to) = (values(2 * count), vec![f32::NAN; count]);
            let (low, high) = both.split_at(count);
            for high in [Some(high), None] {
                round_lines(low, high, &mut to);
                for (i, &step) in to.iter().enumerate() {
                    let expected = [low[i], high.map_or(0.0, |high| high[i])];
                    let expected = expected.map(|value| bf16::from_f32(value).to_f32());
                    assert_eq!(halves(step), expected, "{count}: {i}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        let from: Vec<f32> = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.0].repeat(16);
        let mut to = vec![0.0; from.len() / 2];
        round_line(&from, &mut to);
        for (got, from) in to.iter().flat_map(|&step| halves(step)).zip(&from) {
            assert!(got == *from || got.is_nan() && from.is_nan(), "{got} {from}");
        }
    }
}
