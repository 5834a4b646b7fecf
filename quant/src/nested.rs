//! Double quantization: absmax values in 8 bits.
//!
//! `offset = mean(absmax)`; blocks of 256 of `d = absmax − offset` store `n = max|d|` in f32 and
//! for each value the code of `d/n` in the signed dynamic map. Reading: `map[code]·n + offset`.
//!
//! The code search is the tree of `dQuantize` in bitsandbytes' `csrc/kernels.cu`; its CPU backend
//! uses a coarse lookup that is not exact nearest, so codes may differ from files written there.

use rayon::prelude::*;

use crate::codebook::dynamic_map;
use crate::packed::NESTED_BLOCK_SIZE;

/// Codes and block maxima of `absmax − offset`.
pub fn quantize_absmax(absmax: &[f32], offset: f32) -> (Vec<u8>, Vec<f32>) {
    let mut codes = vec![0; absmax.len()];
    let blocks = codes.par_chunks_mut(NESTED_BLOCK_SIZE).zip(absmax.par_chunks(NESTED_BLOCK_SIZE));
    let quantize_block = |(codes, block): (&mut [u8], &[f32])| {
        let largest = block.iter().fold(0.0f32, |m, a| m.max((a - offset).abs()));
        let inverse = 1.0 / largest;
        for (code, absmax) in codes.iter_mut().zip(block) {
            *code = nearest_code((absmax - offset) * inverse);
        }
        largest
    };
    let nested = blocks.map(quantize_block).collect();
    (codes, nested)
}

/// `map[code]·nested + offset` for the scales from `first` on.
pub fn dequantize_absmax(codes: &[u8], nested: &[f32], offset: f32, first: usize, out: &mut [f32]) {
    let map = dynamic_map();
    for (i, out) in out.iter_mut().enumerate() {
        let index = first + i;
        *out = map[codes[index] as usize] * nested[index / NESTED_BLOCK_SIZE] + offset;
    }
}

/// Mean in f32, summed in f64.
pub(crate) fn mean(values: &[f32]) -> f32 {
    let sum: f64 = values.iter().map(|&v| f64::from(v)).sum();
    (sum / values.len().max(1) as f64) as f32
}

/// The tree search of `dQuantize`; NaN (a block of equal values) gives code 0.
fn nearest_code(x: f32) -> u8 {
    let map = dynamic_map();
    let (mut pivot, mut upper_pivot, mut lower_pivot) = (127usize, 255usize, 0usize);
    let (mut lower, mut upper) = (-1.0f32, 1.0f32);
    let mut value = map[pivot];
    for step in [64, 32, 16, 8, 4, 2, 1] {
        if x > value {
            (lower_pivot, lower) = (pivot, value);
            pivot += step;
        } else {
            (upper_pivot, upper) = (pivot, value);
            pivot -= step;
        }
        value = map[pivot];
    }
    if upper_pivot == 255 {
        upper = map[255];
    }
    if lower_pivot == 0 {
        lower = map[0];
    }
    let chosen = if x > value {
        if x > (upper + value) * 0.5 { upper_pivot } else { pivot }
    } else if x < (lower + value) * 0.5 {
        lower_pivot
    } else {
        pivot
    };
    chosen as u8
}
