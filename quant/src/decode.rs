//! Decoding blocks of codes: `out = values[code] · absmax`.
//!
//! The 16-entry table is scaled once per block, then looked up 16 codes at a time (AVX-512's
//! 16-lane permute), 8 at a time (two AVX2 permutes and a blend), or one by one. Intrinsics, since
//! pulp has no 16-entry lookup. A sum of products takes what it decodes from registers where it can.
#![allow(unsafe_code)]

use crate::dot::dot;

/// Weights that are decoded before they are multiplied: they stay in the first-level cache.
const PIECE: usize = 1024;

/// Codes decoded at a time by the vector paths.
pub(crate) const RUN: usize = 32;

/// Which decoder this processor gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decoder {
    /// One table lookup for each code.
    Scalar,
    /// AVX2.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F and BW.
    #[cfg(target_arch = "x86_64")]
    Avx512,
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
        }
    }
}

impl Decoder {
    /// `Σ w·x` over the weights w that [`decode`](Decoder::decode) gives.
    pub(crate) fn dot(self, bytes: &[u8], values: &[f32; 16], scales: &[f32], x: &[f32]) -> f32 {
        debug_assert_eq!(x.len() % (scales.len() * RUN), 0, "whole runs for each scale");
        debug_assert_eq!(bytes.len() * 2, x.len(), "two codes to a byte");
        #[cfg(target_arch = "x86_64")]
        if self == Decoder::Avx512 {
            // SAFETY: `detect` saw the features; the function checks its slices.
            return unsafe { x86::avx512_dot(bytes, values, scales, x) };
        }
        let mut decoded = [0.0; PIECE];
        let block_size = x.len() / scales.len();
        let blocks = scales.iter().zip(bytes.chunks(block_size / 2)).zip(x.chunks(block_size));
        let of_block = |((scale, bytes), x): ((&f32, &[u8]), &[f32])| -> f32 {
            let pieces = bytes.chunks(PIECE / 2).zip(x.chunks(PIECE));
            let of_piece = pieces.map(|(bytes, x)| {
                self.decode(bytes, values, std::slice::from_ref(scale), &mut decoded[..x.len()]);
                dot(&decoded[..x.len()], x)
            });
            of_piece.sum()
        };
        blocks.map(of_block).sum()
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

    use super::{RUN, blocks};

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

    /// `sums + w·x` of a run.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2")]
    fn add_run(
        sums: [__m512; 2],
        table: __m512,
        bytes: &[u8; RUN / 2],
        x: &[f32; RUN],
    ) -> [__m512; 2] {
        let (first, second) = nibbles(bytes);
        let [first, second] =
            [first, second].map(|codes| _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), table));
        // SAFETY: two loads of 16 floats from an array of 32.
        let (x, y) = unsafe { (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16))) };
        [_mm512_fmadd_ps(first, x, sums[0]), _mm512_fmadd_ps(second, y, sums[1])]
    }

    #[target_feature(enable = "avx512f,avx512bw,avx2")]
    pub(super) fn avx512_dot(bytes: &[u8], values: &[f32; 16], scales: &[f32], x: &[f32]) -> f32 {
        // SAFETY: 16 floats.
        let values = unsafe { _mm512_loadu_ps(values.as_ptr()) };
        // Runs take turns, to hide the latency of additions.
        let [mut even, mut odd] = [[_mm512_setzero_ps(); 2]; 2];
        let (byte_runs, _) = bytes.as_chunks::<{ RUN / 2 }>();
        let (x_runs, _) = x.as_chunks::<RUN>();
        let runs = x_runs.len() / scales.len();
        let blocks = byte_runs.chunks_exact(runs).zip(x_runs.chunks_exact(runs));
        for (scale, (bytes, x)) in scales.iter().zip(blocks) {
            let table = _mm512_mul_ps(values, _mm512_set1_ps(*scale));
            let (byte_pairs, last_bytes) = bytes.as_chunks::<2>();
            let (x_pairs, last_x) = x.as_chunks::<2>();
            for (bytes, x) in byte_pairs.iter().zip(x_pairs) {
                even = add_run(even, table, &bytes[0], &x[0]);
                odd = add_run(odd, table, &bytes[1], &x[1]);
            }
            if let ([bytes], [x]) = (last_bytes, last_x) {
                even = add_run(even, table, bytes, x);
            }
        }
        let [even, odd] = [even, odd].map(|[first, second]| _mm512_add_ps(first, second));
        _mm512_reduce_add_ps(_mm512_add_ps(even, odd))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codebook::NF4;

    #[test]
    fn every_byte_decodes_alike_on_every_decoder() {
        let bytes: Vec<u8> = (0..=255).collect();
        let mut decoders = vec![Decoder::Scalar, Decoder::detect()];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            decoders.push(Decoder::Avx2);
        }
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
