//! Sums, clipping and the search for values that are not finite.

use half::bf16;
use nibble::train::clip;

use crate::emulator::{Device, launch};
use crate::support::*;

fn sum(device: &Device, kernel: &str, x: &[f32], blocks: u32) -> f64 {
    let (mut partial, mut result) = (vec![f64::NAN; blocks as usize], [f64::NAN]);
    launch!(device, kernel, [blocks, 1, 1], 128; x, x.len() as i64, &mut partial[..]);
    launch!(device, "sum_partials", [1, 1, 1], 64; &partial[..], blocks as i32, &mut result[..], 0);
    launch!(device, "sum_partials", [1, 1, 1], 32; &partial[..], blocks as i32, &mut result[..], 1);
    result[0] / 2.0
}

#[test]
fn sums_count_every_element_once_in_one_order() {
    let results = std::cell::RefCell::new(Vec::new());
    in_every_order(|device| {
        for (len, blocks) in [(1, 1), (1000, 3), (4097, 5), (70_001, 100)] {
            let x = normal(len, "sum");
            let expected: f64 = x.iter().map(|&x| f64::from(x)).sum();
            let got = sum(device, "sum_f32", &x, blocks);
            assert_close(&[got], &[expected], 1e-9, 1e-12);
            let squares = sum(device, "sum_squares_f32", &x, blocks);
            assert_close(&[squares.sqrt()], &[clip::global_norm(&x)], 0.0, 1e-13);
            results.borrow_mut().push(squares.to_bits());
        }
    });
    let results = results.into_inner();
    assert!(
        results.chunks(4).all(|bits| bits == &results[..4]),
        "the order of threads is no matter"
    );
}

#[test]
fn clipping_is_the_cpus() {
    in_every_order(|device| {
        for (norm, limit) in [(2.0f64, 1.0f64), (0.5, 1.0), (50.0, 0.0), (f64::NAN, 1.0)] {
            let (mut out, mut scale) = ([0.0f64], [f32::NAN]);
            launch!(device, "clip_scale", [1, 1, 1], 1; &[norm * norm][..], limit, &mut out[..],
                &mut scale[..]);
            assert_eq!(scale[0], clip::gradient_scale(norm, limit));
            assert!(out[0] == norm || norm.is_nan() && out[0].is_nan());
        }
    });
}

#[test]
fn one_bad_value_is_found() {
    in_every_order(|device| {
        for bad in [None, Some(f32::NAN), Some(f32::INFINITY), Some(f32::NEG_INFINITY)] {
            let mut x = normal(3001, "finite");
            x[77] = f32::MAX;
            if let Some(bad) = bad {
                x[2999] = bad;
            }
            let narrow: Vec<bf16> =
                x.iter().map(|x| bf16::from_f32(x.clamp(-1e38, 1e38) + x * 0.0)).collect();
            let (mut found, mut found_narrow) = ([0u32], [0u32]);
            launch!(device, "find_non_finite_f32", [3, 1, 1], 64; &x[..], 3001i64, &mut found[..]);
            launch!(device, "find_non_finite_bf16", [3, 1, 1], 64; &narrow[..], 3001i64, &mut found_narrow[..]);
            assert_eq!(
                (found[0], found_narrow[0]),
                (u32::from(bad.is_some()), u32::from(bad.is_some()))
            );
        }
    });
}
