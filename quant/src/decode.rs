//! Decoding blocks of codes: `out = values[code] · absmax`.
//!
//! The 16-entry table is scaled once per block, then looked up 16 codes at a time (AVX-512's
//! 16-lane permute), 8 at a time (two AVX2 permutes and a blend), 16 at a time byte by byte (NEON's
//! table lookup), or one by one. Intrinsics, since pulp has no 16-entry lookup. A sum of products takes
//! what it decodes from registers where it can.
#![allow(unsafe_code)]

use std::borrow::Cow;

use crate::dot::dot_in_pieces;

/// Lanes of the widest register, and codes in each.
const LANES: usize = 16;
const SHIFTS: usize = 8;
/// Codes in a register.
const TURN: usize = LANES * SHIFTS;

/// Codes decoded at a time by the vector paths.
pub(crate) const RUN: usize = 32;

/// Which decoder this processor gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decoder {
    /// Table lookups, one for each code: what every processor can do.
    Scalar,
    /// AVX2.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F and BW.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// NEON.
    #[cfg(target_arch = "aarch64")]
    Neon,
}

impl Decoder {
    /// The widest that the processor has.
    pub(crate) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
                return Decoder::Avx512;
            }
            if is_x86_feature_detected!("avx2") {
                return Decoder::Avx2;
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("neon") {
            return Decoder::Neon;
        }
        Decoder::Scalar
    }

    /// Decodes `out.len()` codes from `bytes`: `scales` are those of blocks of equal length, a
    /// multiple of [`RUN`].
    #[inline]
    pub(crate) fn decode(self, bytes: &[u8], values: &[f32; 16], scales: &[f32], out: &mut [f32]) {
        debug_assert_eq!(out.len() % (scales.len() * RUN), 0, "whole runs for each scale");
        debug_assert_eq!(bytes.len() * 2, out.len(), "two codes to a byte");
        if out.is_empty() {
            return;
        }
        match self {
            Decoder::Scalar => scalar(bytes, values, scales, out),
            // SAFETY: `detect` saw the features; both functions check their slices.
            #[cfg(target_arch = "x86_64")]
            Decoder::Avx2 => unsafe { x86::avx2(bytes, values, scales, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Decoder::Avx512 => unsafe { x86::avx512(bytes, values, scales, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            Decoder::Neon => unsafe { neon::decode(bytes, values, scales, out) },
        }
    }

    /// x as [`dot`](Decoder::dot) reads it, for blocks of `block_size`: where a register's codes are
    /// taken in shifts, x lies in the same order, filled up with zeros.
    pub(crate) fn arrange(self, x: &[f32], block_size: usize) -> Cow<'_, [f32]> {
        if !self.shifts(block_size) {
            return Cow::Borrowed(x);
        }
        let mut arranged = vec![0.0; x.len().next_multiple_of(TURN)];
        for (arranged, x) in arranged.chunks_exact_mut(TURN).zip(x.chunks(TURN)) {
            for (i, x) in x.iter().enumerate() {
                arranged[i % SHIFTS * LANES + i / SHIFTS] = *x;
            }
        }
        Cow::Owned(arranged)
    }

    /// `Σ w·x` of some rows of weights w, as [`decode`](Decoder::decode) gives them; x is
    /// [arranged](Decoder::arrange). Rows and their scales are as long.
    pub(crate) fn dot<const ROWS: usize>(
        self,
        bytes: [&[u8]; ROWS],
        values: &[f32; 16],
        scales: [&[f32]; ROWS],
        x: &[f32],
    ) -> [f32; ROWS] {
        let block_size = 2 * bytes[0].len() / scales[0].len();
        #[cfg(target_arch = "x86_64")]
        if self.shifts(block_size) {
            // SAFETY: `detect` saw the features; the function checks its slices.
            return unsafe { x86::avx512_dot(bytes, values, scales, x) };
        }
        // Sizes of blocks are powers of two: a piece is of whole blocks, or lies in one.
        std::array::from_fn(|row| {
            dot_in_pieces(x, |begin, out| {
                let end = begin + out.len();
                let scales = &scales[row][begin / block_size..end.div_ceil(block_size)];
                self.decode(&bytes[row][begin / 2..end / 2], values, scales, out);
            })
        })
    }

    /// Whether codes are taken in shifts: no half of a register may lie in two blocks.
    fn shifts(self, block_size: usize) -> bool {
        #[cfg(target_arch = "x86_64")]
        if self == Decoder::Avx512 {
            return block_size.is_multiple_of(TURN / 2) && block_size.is_power_of_two();
        }
        let _ = block_size;
        false
    }
}

/// `(codes, scale, out)` of each block.
#[inline(always)]
fn blocks<'a>(
    bytes: &'a [u8],
    scales: &'a [f32],
    out: &'a mut [f32],
) -> impl Iterator<Item = (&'a [u8], f32, &'a mut [f32])> {
    let block_size = out.len() / scales.len();
    let codes = bytes.chunks_exact(block_size / 2);
    let blocks = codes.zip(scales).zip(out.chunks_exact_mut(block_size));
    blocks.map(|((codes, scale), out)| (codes, *scale, out))
}

fn scalar(bytes: &[u8], values: &[f32; 16], scales: &[f32], out: &mut [f32]) {
    for (bytes, scale, out) in blocks(bytes, scales, out) {
        let table = values.map(|value| value * scale);
        let (pairs, _) = out.as_chunks_mut::<2>();
        for (pair, byte) in pairs.iter_mut().zip(bytes) {
            *pair = [table[usize::from(byte >> 4)], table[usize::from(byte & 15)]];
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{LANES, RUN, SHIFTS, TURN, blocks};

    #[inline]
    #[target_feature(enable = "avx2")]
    fn nibbles(bytes: &[u8; RUN / 2]) -> (__m128i, __m128i) {
        // SAFETY: the array holds 16 bytes; the load needs no alignment.
        let x = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
        let mask = _mm_set1_epi8(15);
        let (low, high) = (_mm_and_si128(x, mask), _mm_and_si128(_mm_srli_epi16(x, 4), mask));
        (_mm_unpacklo_epi8(high, low), _mm_unpackhi_epi8(high, low))
    }

    #[target_feature(enable = "avx512f,avx512bw,avx2")]
    pub(super) fn avx512(bytes: &[u8], values: &[f32; 16], scales: &[f32], out: &mut [f32]) {
        // SAFETY: 16 floats.
        let values = unsafe { _mm512_loadu_ps(values.as_ptr()) };
        for (bytes, scale, out) in blocks(bytes, scales, out) {
            let table = _mm512_mul_ps(values, _mm512_set1_ps(scale));
            let (byte_runs, _) = bytes.as_chunks::<{ RUN / 2 }>();
            let (out_runs, _) = out.as_chunks_mut::<RUN>();
            for (bytes, out) in byte_runs.iter().zip(out_runs) {
                let (first, second) = nibbles(bytes);
                for (half, codes) in [first, second].into_iter().enumerate() {
                    let decoded = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), table);
                    // SAFETY: two stores of 16 floats in an array of 32.
                    unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(16 * half), decoded) };
                }
            }
        }
    }

    /// A register holds [`TURN`] codes, eight in a lane. The permute looks at the lower four bits of a
    /// lane alone, so a shift is all that it takes to get to the next code of each. Rows share x, which
    /// is eight times as long as their codes.
    #[target_feature(enable = "avx512f,avx512bw,avx2")]
    pub(super) fn avx512_dot<const ROWS: usize>(
        bytes: [&[u8]; ROWS],
        values: &[f32; 16],
        scales: [&[f32]; ROWS],
        x: &[f32],
    ) -> [f32; ROWS] {
        let (length, blocks) = (bytes[0].len(), scales[0].len());
        assert!(bytes.iter().all(|bytes| bytes.len() == length), "rows are as long");
        assert!(scales.iter().all(|scales| scales.len() == blocks), "their scales, too");
        assert_eq!(x.len(), (2 * length).next_multiple_of(TURN), "a factor for each weight");
        // Blocks have a power of two of halves: a division would take as long as a turn.
        let halves = (2 * length / blocks / (TURN / 2)).trailing_zeros();
        // SAFETY: 16 floats.
        let table = unsafe { _mm512_loadu_ps(values.as_ptr()) };
        let mut totals = [_mm512_setzero_ps(); ROWS];
        for (turn, x) in x.chunks_exact(TURN).enumerate() {
            let begin = turn * TURN / 2;
            let left = (length - begin).min(TURN / 2);
            let there = u64::MAX >> (TURN / 2 - left);
            let blocks_here = [2 * turn, 2 * turn + 1].map(|half| (half >> halves).min(blocks - 1));
            // SAFETY: 128 floats.
            let x: [__m512; SHIFTS] =
                std::array::from_fn(|i| unsafe { _mm512_loadu_ps(x.as_ptr().add(LANES * i)) });
            for row in 0..ROWS {
                // SAFETY: x has no turn that begins behind a row's end, and the mask leaves out what of a
                // turn lies behind it.
                let codes = unsafe {
                    _mm512_maskz_loadu_epi8(there, bytes[row].as_ptr().add(begin).cast())
                };
                let weight = |codes| _mm512_permutexvar_ps(codes, table);
                // The upper half of a byte comes first.
                let even = _mm512_mul_ps(weight(_mm512_srli_epi32::<4>(codes)), x[0]);
                let odd = _mm512_mul_ps(weight(codes), x[1]);
                let even = _mm512_fmadd_ps(weight(_mm512_srli_epi32::<12>(codes)), x[2], even);
                let odd = _mm512_fmadd_ps(weight(_mm512_srli_epi32::<8>(codes)), x[3], odd);
                let even = _mm512_fmadd_ps(weight(_mm512_srli_epi32::<20>(codes)), x[4], even);
                let odd = _mm512_fmadd_ps(weight(_mm512_srli_epi32::<16>(codes)), x[5], odd);
                let even = _mm512_fmadd_ps(weight(_mm512_srli_epi32::<28>(codes)), x[6], even);
                let odd = _mm512_fmadd_ps(weight(_mm512_srli_epi32::<24>(codes)), x[7], odd);
                let [first, second] = blocks_here.map(|block| _mm512_set1_ps(scales[row][block]));
                let scale = _mm512_mask_blend_ps(0xff00, first, second);
                totals[row] = _mm512_fmadd_ps(_mm512_add_ps(even, odd), scale, totals[row]);
            }
        }
        totals.map(|total| _mm512_reduce_add_ps(total))
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn avx2(bytes: &[u8], values: &[f32; 16], scales: &[f32], out: &mut [f32]) {
        // SAFETY: two loads of 8 floats from an array of 16.
        let (low, high) =
            unsafe { (_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8))) };
        for (bytes, scale, out) in blocks(bytes, scales, out) {
            let scale = _mm256_set1_ps(scale);
            let (low, high) = (_mm256_mul_ps(low, scale), _mm256_mul_ps(high, scale));
            let (byte_runs, _) = bytes.as_chunks::<{ RUN / 2 }>();
            let (out_runs, _) = out.as_chunks_mut::<RUN>();
            for (bytes, out) in byte_runs.iter().zip(out_runs) {
                let (first, second) = nibbles(bytes);
                let eights = [first, _mm_srli_si128(first, 8), second, _mm_srli_si128(second, 8)];
                for (eighth, codes) in eights.into_iter().enumerate() {
                    let index = _mm256_cvtepu8_epi32(codes);
                    let from_low = _mm256_permutevar8x32_ps(low, index);
                    let from_high = _mm256_permutevar8x32_ps(high, index);
                    // Bit 3 of the code, moved to the sign, picks the upper half of the table.
                    let upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
                    let decoded = _mm256_blendv_ps(from_low, from_high, upper);
                    // SAFETY: four stores of 8 floats in an array of 32.
                    unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(8 * eighth), decoded) };
                }
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::*;

    use super::{RUN, blocks};

    /// The table lies in four registers, one for each byte of its floats, and so do 16 results until
    /// a store puts their bytes side by side.
    #[target_feature(enable = "neon")]
    pub(super) fn decode(bytes: &[u8], values: &[f32; 16], scales: &[f32], out: &mut [f32]) {
        for (bytes, scale, out) in blocks(bytes, scales, out) {
            let table = values.map(|value| value * scale);
            // SAFETY: 16 floats, 64 bytes.
            let planes = unsafe { vld4q_u8(table.as_ptr().cast()) };
            let (byte_runs, _) = bytes.as_chunks::<{ RUN / 2 }>();
            let (out_runs, _) = out.as_chunks_mut::<RUN>();
            for (bytes, out) in byte_runs.iter().zip(out_runs) {
                // SAFETY: the array holds 16 bytes.
                let codes = unsafe { vld1q_u8(bytes.as_ptr()) };
                let (high, low) = (vshrq_n_u8::<4>(codes), vandq_u8(codes, vdupq_n_u8(15)));
                let halves = [vzip1q_u8(high, low), vzip2q_u8(high, low)];
                for (half, codes) in halves.into_iter().enumerate() {
                    let decoded = uint8x16x4_t(
                        vqtbl1q_u8(planes.0, codes),
                        vqtbl1q_u8(planes.1, codes),
                        vqtbl1q_u8(planes.2, codes),
                        vqtbl1q_u8(planes.3, codes),
                    );
                    // SAFETY: two stores of 16 floats in an array of 32.
                    unsafe { vst4q_u8(out.as_mut_ptr().add(16 * half).cast(), decoded) };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codebook::NF4;

    /// The decoders whose instructions this processor has.
    fn decoders() -> Vec<Decoder> {
        let all = [Decoder::Scalar, Decoder::detect()];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            return all.into_iter().chain([Decoder::Avx2]).collect();
        }
        all.to_vec()
    }

    #[test]
    fn sums_are_those_of_decoded_weights() {
        let decoders = decoders();
        for (blocks, block_size) in [(1, 32), (5, 32), (1, 64), (9, 64), (3, 128), (2, 4096)] {
            let count = blocks * block_size;
            let bytes: Vec<u8> = (0..count / 2).map(|i| (i * 89 % 256) as u8).collect();
            let scales: Vec<f32> = (0..blocks).map(|i| 0.1 + i as f32).collect();
            let x: Vec<f32> = (0..count).map(|i| (i as f32 * 0.37).sin()).collect();
            let mut w = vec![f32::NAN; count];
            Decoder::Scalar.decode(&bytes, &NF4, &scales, &mut w);
            let products = w.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x));
            let (expected, size) = products.fold((0.0, 0.0), |(s, m), p| (s + p, m + p.abs()));
            for decoder in &decoders {
                let arranged = decoder.arrange(&x, block_size);
                let rows = ([&bytes[..]; 3], [&scales[..]; 3]);
                for got in decoder.dot(rows.0, &NF4, rows.1, &arranged) {
                    let error = (f64::from(got) - expected).abs() / size;
                    assert!(error < 1e-6, "{decoder:?}: {blocks} of {block_size}: {error:e}");
                }
            }
        }
    }

    #[test]
    fn every_byte_decodes_alike_on_every_decoder() {
        let bytes: Vec<u8> = (0..=255).collect();
        let decoders = decoders();
        for scales in [vec![0.37], vec![0.37, -2.5], (1..=16).map(|s| s as f32 * 0.1).collect()] {
            let mut expected = vec![0.0; 512];
            for (i, pair) in expected.chunks_exact_mut(2).enumerate() {
                let scale = scales[i * scales.len() / 256];
                pair.copy_from_slice(&[NF4[i >> 4] * scale, NF4[i & 15] * scale]);
            }
            for decoder in &decoders {
                let mut out = vec![f32::NAN; 512];
                decoder.decode(&bytes, &NF4, &scales, &mut out);
                assert_eq!(out, expected, "{decoder:?}, {} scales", scales.len());
            }
        }
    }
}
