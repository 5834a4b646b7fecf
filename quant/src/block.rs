//! Quantizing: one absmax and one run of codes for each block.
//!
//! `absmax = max|w|`; `s = w · (1/absmax)` in a full block, `w / absmax` in a short last one;
//! the code is the number of thresholds below s. A zero block has codes of value 0 (NF4: 7).
//! Source: bitsandbytes' CPU backend, restated in `nf4_spec.py`; tested bit for bit.

use half::{bf16, f16};

use crate::codebook::{FP4_CODES, FP4_THRESHOLDS, NF4_THRESHOLDS};
use crate::packed::{Floats, QuantType};

/// bitsandbytes' floor of absmax: keeps the quotient of a zero block finite.
const SMALLEST_ABSMAX: f32 = 1e-38;

/// Quantizes consecutive blocks that start at `first` of `values`; `codes` are two to a byte, the
/// earlier in the high nibble. Returns the index of the first non-finite value, if there is one.
#[inline(always)]
pub(crate) fn quantize_blocks(
    values: Floats,
    quant_type: QuantType,
    block_size: usize,
    codes: &mut [u8],
    absmax: &mut [f32],
) -> Option<usize> {
    let mut buffer = vec![0.0f32; block_size];
    let mut unpacked = vec![0u8; block_size];
    let mut bad = None;
    for (block, (codes, absmax)) in
        codes.chunks_mut(block_size / 2).zip(absmax.iter_mut()).enumerate()
    {
        let begin = block * block_size;
        let count = block_size.min(values.len() - begin);
        let buffer = &mut buffer[..count];
        widen(values, begin, buffer);
        *absmax = largest_magnitude(buffer);
        if !absmax.is_finite() && bad.is_none() {
            bad = buffer.iter().position(|v| !v.is_finite()).map(|i| begin + i);
        }
        if count < block_size {
            // bitsandbytes stores the floor itself for a short block.
            *absmax = absmax.max(SMALLEST_ABSMAX);
        }
        normalize(buffer, *absmax, block_size);
        encode(quant_type, buffer, &mut unpacked, codes);
    }
    bad
}

/// Copies `to.len()` values from `begin` on, widened.
#[inline(always)]
fn widen(values: Floats, begin: usize, to: &mut [f32]) {
    let range = begin..begin + to.len();
    match values {
        Floats::F32(v) => to.copy_from_slice(&v[range]),
        Floats::F16(v) => widen_f16(&v[range], to),
        Floats::Bf16(v) => widen_bf16(&v[range], to),
    }
}

#[inline(always)]
fn widen_bf16(from: &[bf16], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = f32::from_bits(u32::from(from.to_bits()) << 16);
    }
}

#[inline(always)]
fn widen_f16(from: &[f16], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.to_f32();
    }
}

/// `max|v|`; NaN or infinite when an element is.
#[inline(always)]
fn largest_magnitude(values: &[f32]) -> f32 {
    // Magnitudes order like their bits; NaN is above infinity.
    let bits = values.iter().fold(0u32, |largest, v| largest.max(v.to_bits() & 0x7fff_ffff));
    f32::from_bits(bits)
}

#[inline(always)]
fn normalize(values: &mut [f32], absmax: f32, block_size: usize) {
    let absmax = absmax.max(SMALLEST_ABSMAX);
    if values.len() == block_size {
        let inverse = 1.0 / absmax;
        values.iter_mut().for_each(|v| *v *= inverse);
    } else {
        values.iter_mut().for_each(|v| *v /= absmax);
    }
}

/// Codes of normalized values, two to a byte; an odd last one is followed by the code of 0.
#[inline(always)]
fn encode(quant_type: QuantType, values: &[f32], codes: &mut [u8], packed: &mut [u8]) {
    match quant_type {
        QuantType::Nf4 => encode_nf4(values, codes),
        QuantType::Fp4 => encode_fp4(values, codes),
    }
    let zero = if quant_type == QuantType::Nf4 { 7 } else { 0 };
    codes[values.len()..].fill(zero);
    for (byte, [high, low]) in packed.iter_mut().zip(codes.as_chunks::<2>().0) {
        *byte = (high << 4) | low;
    }
}

// The loops over values have no constant length, so that the compiler vectorises them and not the
// short loops over thresholds, which it unrolls.

/// The number of thresholds below each value.
#[inline(always)]
fn encode_nf4(values: &[f32], codes: &mut [u8]) {
    for (code, &value) in codes.iter_mut().zip(values) {
        let mut count = 0i32;
        for threshold in NF4_THRESHOLDS {
            count += i32::from(value > threshold);
        }
        *code = count as u8;
    }
}

/// The code of the magnitude, reached from threshold to threshold, and the sign in bit 3.
#[inline(always)]
fn encode_fp4(values: &[f32], codes: &mut [u8]) {
    for (code, &value) in codes.iter_mut().zip(values) {
        let magnitude = value.abs();
        let mut chosen = i32::from(FP4_CODES[0]);
        for (index, threshold) in FP4_THRESHOLDS.into_iter().enumerate() {
            let step = i32::from(FP4_CODES[index + 1]) - i32::from(FP4_CODES[index]);
            chosen += if magnitude > threshold { step } else { 0 };
        }
        *code = (chosen + if value < 0.0 { 8 } else { 0 }) as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `dQuantizeFP4` of bitsandbytes' `csrc/kernels.cu`, branch by branch.
    fn fp4_tree(x: f32) -> u8 {
        let sign = if x < 0.0 { 0b1000 } else { 0 };
        let x = x.abs();
        #[allow(clippy::excessive_precision, reason = "as written there")]
        let magnitude = if x > 0.29166667 {
            if x > 0.583333 {
                if x > 0.8333333 { 0b0011 } else { 0b0010 }
            } else if x > 0.4166667 {
                0b0101
            } else {
                0b0100
            }
        } else if x > 0.0859375 {
            if x > 0.20833333 { 0b0111 } else { 0b0110 }
        } else if x > 0.00260417 {
            0b0001
        } else {
            0b0000
        };
        magnitude + sign
    }

    #[test]
    fn fp4_codes_follow_the_cuda_tree() {
        let mut values = vec![1.0f32, -1.0, 0.0, -0.0];
        for threshold in FP4_THRESHOLDS {
            for value in [threshold.next_down(), threshold, threshold.next_up()] {
                values.extend([value, -value]);
            }
        }
        values.extend((0..2000).map(|i| i as f32 / 1000.0 - 1.0));
        let mut codes = vec![0; values.len()];
        encode_fp4(&values, &mut codes);
        for (value, code) in values.iter().zip(codes) {
            assert_eq!(code, fp4_tree(*value), "{value}");
        }
    }
}
