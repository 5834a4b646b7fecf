//! Sums.

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
