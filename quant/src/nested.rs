//! Double quantization: absmax values in 8 bits.
//!
//! `offset = mean(absmax)`; blocks of 256 of `d = absmax − offset` store `n = max|d|` in f32 and
//! for each value the code of `d/n` in the signed dynamic map. Reading: `map[code]·n + offset`.
//!
//! The code search is the tree of `dQuantize` in bitsandbytes' `csrc/kernels.cu`; its CPU backend
//! uses a coarse lookup that is not exact nearest, so codes may differ from files written there.

use rayon::prelude::*;

use crate::codebook::dynamic_map;
use crate::format::NESTED_BLOCK_SIZE;

/// Nested blocks that one parallel task handles.
const BLOCKS_PER_TASK: usize = 16;

/// Codes and block maxima of `absmax − offset`.
pub fn quantize_absmax(absmax: &[f32], offset: f32) -> (Vec<u8>, Vec<f32>) {
    let mut codes = vec![0; absmax.len()];
    let mut nested = vec![0.0; absmax.len().div_ceil(NESTED_BLOCK_SIZE)];
    let task = BLOCKS_PER_TASK * NESTED_BLOCK_SIZE;
    let tasks = codes.par_chunks_mut(task).zip(nested.par_chunks_mut(BLOCKS_PER_TASK));
    tasks.zip(absmax.par_chunks(task)).for_each(|((codes, nested), absmax)| {
        let blocks = codes.chunks_mut(NESTED_BLOCK_SIZE).zip(absmax.chunks(NESTED_BLOCK_SIZE));
        for (largest, (codes, absmax)) in nested.iter_mut().zip(blocks) {
            *largest = absmax.iter().fold(0.0f32, |m, a| m.max((a - offset).abs()));
            let inverse = 1.0 / *largest;
            for (code, absmax) in codes.iter_mut().zip(absmax) {
                *code = nearest_code((absmax - offset) * inverse);
            }
        }
    });
    (codes, nested)
}

/// `map[code]·nested + offset` for the scales from `first` on.
///
/// # Panics
/// When there are no such scales.
pub fn dequantize_absmax(codes: &[u8], nested: &[f32], offset: f32, first: usize, out: &mut [f32]) {
    let map = dynamic_map();
    let (mut index, mut rest) = (first, out);
    while !rest.is_empty() {
        let block = index / NESTED_BLOCK_SIZE;
        let count = rest.len().min((block + 1) * NESTED_BLOCK_SIZE - index);
        let (now, later) = rest.split_at_mut(count);
        for (out, code) in now.iter_mut().zip(&codes[index..index + count]) {
            *out = map[usize::from(*code)] * nested[block] + offset;
        }
        (index, rest) = (index + count, later);
    }
}

/// Mean, summed in f64 and rounded once; torch's own f32 mean depends on its number of threads.
pub(crate) fn mean(values: &[f32]) -> f32 {
    let sum: f64 = values.iter().map(|&v| f64::from(v)).sum();
    (sum / values.len().max(1) as f64) as f32
}

/// The tree search of `dQuantize`; NaN (a block of equal values) gives code 0.
fn nearest_code(x: f32) -> u8 {
    let map = dynamic_map();
    let at = |pivot: u8| map[usize::from(pivot)];
    let (mut pivot, mut upper, mut lower) = (127, 255, 0);
    for step in [64, 32, 16, 8, 4, 2, 1] {
        // Selections, not branches: every comparison is a coin toss to the processor.
        let above = x > at(pivot);
        lower = if above { pivot } else { lower };
        upper = if above { upper } else { pivot };
        pivot = if above { pivot + step } else { pivot - step };
    }
    let (value, above) = (at(pivot), x > at(pivot));
    let other = if above { upper } else { lower };
    let middle = (at(other) + value) * 0.5;
    let beyond = if above { x > middle } else { x < middle };
    if beyond { other } else { pivot }
}
