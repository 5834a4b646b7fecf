//! Random inputs, rounding and comparison.

use half::bf16;
use nibble::random::Stream;

use crate::emulator::{Device, devices};

/// Runs `test` on every device in every order of threads, or not at all where there is no g++.
pub fn in_every_order(test: impl Fn(&Device)) {
    for device in devices() {
        for &order in device.orders() {
            device.order(order);
            test(device);
        }
    }
}

/// Rows, width and stride: aligned for vectors, odd, wider than a block, and random.
pub fn shapes() -> Vec<(usize, usize, usize)> {
    let fixed = [(3, 64, 64), (5, 96, 112), (4, 77, 91), (1, 1, 1), (2, 1032, 1048)];
    let stream = Stream::new(3, "shapes");
    let random = (0..6u64).map(|i| {
        let below = |index, bound| stream.below(4 * i + index, bound) as usize;
        let unit = if i % 2 == 0 { 8 } else { 1 };
        let width = unit * (1 + below(0, 700 / unit as u64));
        (1 + below(1, 6), width, width + unit * below(2, 5))
    });
    fixed.into_iter().chain(random).collect()
}

/// Normal numbers.
pub fn normal(len: usize, name: &str) -> Vec<f32> {
    let mut out = vec![0.0; len];
    Stream::new(17, name).fill_normal(0, 1.0, &mut out);
    out
}

/// Normal numbers, rounded.
pub fn normal_bf16(len: usize, name: &str) -> Vec<bf16> {
    normal(len, name).into_iter().map(bf16::from_f32).collect()
}

/// What outputs hold before a kernel runs.
pub const POISON: bf16 = bf16::NAN;

/// A matrix in rows of `stride`, whose other columns are poison.
pub fn with_stride(values: &[bf16], width: usize, stride: usize) -> Vec<bf16> {
    let mut out = vec![POISON; values.len() / width * stride];
    for (to, from) in out.chunks_exact_mut(stride).zip(values.chunks_exact(width)) {
        to[..width].copy_from_slice(from);
    }
    out
}

/// The first `width` columns of rows of `stride`; the others must still be poison.
pub fn band(values: &[bf16], width: usize, stride: usize) -> Vec<f64> {
    assert!(values.chunks_exact(stride).all(|row| row[width..].iter().all(|x| x.is_nan())));
    let rows = values.chunks_exact(stride);
    rows.flat_map(|row| row[..width].iter().map(|x| x.to_f64())).collect()
}

/// Widened.
pub fn wide(values: &[bf16]) -> Vec<f64> {
    values.iter().map(|x| x.to_f64()).collect()
}

/// Asserts `|got − expected| ≤ absolute + relative·|expected|` for each element.
#[track_caller]
pub fn assert_close(got: &[f64], expected: &[f64], absolute: f64, relative: f64) {
    assert_eq!(got.len(), expected.len());
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (got - expected).abs();
        assert!(error <= absolute + relative * expected.abs(), "[{i}]: {got:e}, not {expected:e}");
    }
}

/// One rounding to bf16: half a unit in the last of 8 bits, and a little for f32.
pub const BF16_ROUNDING: f64 = 1.0 / 256.0 + 1e-5;
