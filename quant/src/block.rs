//! Quantizing: one absmax and one run of codes for each block.
//!
//! `absmax = max|w|`; `s = w · (1/absmax)` in a full block, `w / absmax` in a short last one;
//! a code stands for the number of thresholds below s. A zero block has codes of value 0 (NF4: 7).
//! Source: bitsandbytes' CPU backend, `backends/default/ops.py`; tested bit for bit.

use half::slice::HalfFloatSliceExt;
use pulp::{Simd, WithSimd};

use crate::codebook::FP4_ORDER;
use crate::dot::Element;
use crate::float::Floats;
use crate::format::{BlockFormat, QuantType};

/// bitsandbytes' floor of absmax: keeps the quotient of a zero block finite.
const SMALLEST_ABSMAX: f32 = 1e-38;

/// A whole number of vectors on every processor; so is every block but a short last one.
const RUN: usize = 32;

/// FP4 codes of two ranks in a byte.
static FP4_BYTES: [u8; 256] = {
    let (mut bytes, mut i) = ([0; 256], 0);
    while i < 256 {
        bytes[i] = FP4_ORDER[i >> 4] << 4 | FP4_ORDER[i & 15];
        i += 1;
    }
    bytes
};

/// Quantizes consecutive blocks; `codes` are two to a byte, the earlier in the high nibble. Returns
/// the index of the first non-finite value, if there is one.
pub(crate) fn quantize_blocks(
    values: Floats,
    format: &BlockFormat,
    codes: &mut [u8],
    absmax: &mut [f32],
) -> Option<usize> {
    let quant_type = format.quant_type;
    let buffer = vec![0.0f32; format.block_size];
    pulp::Arch::new().dispatch(Blocks { values, quant_type, buffer, codes, absmax })
}

/// The arguments of [`quantize_blocks`], compiled for each instruction set. A struct, not a closure:
/// a closure's `call_once` is not inlined, and would be compiled for the oldest processor alone.
struct Blocks<'a> {
    values: Floats<'a>,
    quant_type: QuantType,
    /// The block at work, widened to f32.
    buffer: Vec<f32>,
    codes: &'a mut [u8],
    absmax: &'a mut [f32],
}

impl WithSimd for Blocks<'_> {
    type Output = Option<usize>;

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) -> Option<usize> {
        let mut bad = None;
        let block_size = self.buffer.len();
        let blocks = self.codes.chunks_mut(block_size / 2).zip(self.absmax);
        for (block, (codes, absmax)) in blocks.enumerate() {
            let begin = block * block_size;
            let count = block_size.min(self.values.len() - begin);
            let block = &mut self.buffer[..count];
            widen(self.values, begin, block);
            *absmax = largest_magnitude(block);
            if !absmax.is_finite() && bad.is_none() {
                bad = block.iter().position(|value| !value.is_finite()).map(|i| begin + i);
            }
            *absmax = normalize(block, *absmax, block_size);
            // The second nibble of an odd last byte is the code of zero.
            let padded = &mut self.buffer[..count.next_multiple_of(RUN)];
            padded[count..].fill(0.0);
            let ranks = rank(simd, self.quant_type.thresholds(), padded);
            pack(self.quant_type, ranks, codes);
        }
        bad
    }
}

/// Copies `to.len()` values from `begin` on, widened.
#[inline(always)]
fn widen(values: Floats, begin: usize, to: &mut [f32]) {
    let range = begin..begin + to.len();
    match values {
        Floats::F32(from) => to.copy_from_slice(&from[range]),
        Floats::F16(from) => from[range].convert_to_f32_slice(to),
        Floats::Bf16(from) => {
            for (to, from) in to.iter_mut().zip(&from[range]) {
                *to = from.widen();
            }
        }
    }
}

/// `max|v|`; NaN or infinite when an element is.
#[inline(always)]
fn largest_magnitude(values: &[f32]) -> f32 {
    // Magnitudes order like their bits; NaN is above infinity.
    let bits = values.iter().fold(0u32, |largest, v| largest.max(v.to_bits() & 0x7fff_ffff));
    f32::from_bits(bits)
}

/// Scales to [-1, 1] and returns the absmax to store.
#[inline(always)]
fn normalize(values: &mut [f32], absmax: f32, block_size: usize) -> f32 {
    let divisor = absmax.max(SMALLEST_ABSMAX);
    if values.len() == block_size {
        let inverse = 1.0 / divisor;
        values.iter_mut().for_each(|value| *value *= inverse);
        return absmax;
    }
    values.iter_mut().for_each(|value| *value /= divisor);
    // bitsandbytes stores the floor itself for a short block.
    divisor
}

/// How many thresholds are below each value, in place of the values.
#[inline(always)]
fn rank<'a, S: Simd>(simd: S, thresholds: &[f32; 15], values: &'a mut [f32]) -> &'a [u32] {
    let (vectors, rest) = S::as_mut_simd_f32s(values);
    debug_assert!(rest.is_empty(), "a run is a whole number of vectors");
    let one = simd.splat_u32s(1);
    for value in vectors {
        let mut rank = simd.splat_u32s(0);
        for threshold in thresholds {
            let above = simd.greater_than_f32s(*value, simd.splat_f32s(*threshold));
            rank = simd.select_u32s(above, simd.add_u32s(rank, one), rank);
        }
        *value = simd.transmute_f32s_u32s(rank);
    }
    bytemuck::cast_slice(values)
}

/// Two ranks to a byte, then the codes of those ranks.
#[inline(always)]
fn pack(quant_type: QuantType, ranks: &[u32], bytes: &mut [u8]) {
    for (byte, [high, low]) in bytes.iter_mut().zip(ranks.as_chunks().0) {
        *byte = (high << 4 | low) as u8;
    }
    if quant_type == QuantType::Fp4 {
        bytes.iter_mut().for_each(|byte| *byte = FP4_BYTES[usize::from(*byte)]);
    }
}
