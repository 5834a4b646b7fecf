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

/// Elements quantized at a time: a block is a whole number of these, or shorter.
const RUN: usize = 32;

/// Quantizes consecutive blocks that start at `first` of `values`; `codes` are two to a byte, the
/// earlier in the high nibble. Returns the index of the first non-finite value, if there is one.
pub(crate) fn quantize_blocks(
    values: Floats,
    quant_type: QuantType,
    block_size: usize,
    codes: &mut [u8],
    absmax: &mut [f32],
) -> Option<usize> {
    let mut buffer = vec![0.0f32; block_size];
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
        encode(quant_type, buffer, codes);
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

#[inline(always)]
fn encode(quant_type: QuantType, values: &[f32], packed: &mut [u8]) {
    let (runs, rest) = values.as_chunks::<RUN>();
    let (full, last) = packed.split_at_mut(runs.len() * RUN / 2);
    for (run, bytes) in runs.iter().zip(full.chunks_exact_mut(RUN / 2)) {
        pack(&codes_of(quant_type, run), bytes);
    }
    if !rest.is_empty() {
        let mut run = [0.0; RUN];
        run[..rest.len()].copy_from_slice(rest);
        let mut bytes = [0; RUN / 2];
        pack(&codes_of(quant_type, &run), &mut bytes);
        last.copy_from_slice(&bytes[..last.len()]);
    }
}

#[inline(always)]
fn codes_of(quant_type: QuantType, values: &[f32; RUN]) -> [u8; RUN] {
    let mut counts = [0i32; RUN];
    match quant_type {
        QuantType::Nf4 => {
            for threshold in NF4_THRESHOLDS {
                for (count, value) in counts.iter_mut().zip(values) {
                    *count += i32::from(*value > threshold);
                }
            }
            counts.map(|count| count as u8)
        }
        QuantType::Fp4 => {
            for threshold in FP4_THRESHOLDS {
                for (count, value) in counts.iter_mut().zip(values) {
                    *count += i32::from(value.abs() > threshold);
                }
            }
            std::array::from_fn(|i| {
                FP4_CODES[counts[i] as usize] | if values[i] < 0.0 { 8 } else { 0 }
            })
        }
    }
}

#[inline(always)]
fn pack(codes: &[u8; RUN], bytes: &mut [u8]) {
    let (pairs, _) = codes.as_chunks::<2>();
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = (high << 4) | low;
    }
}
