//! Norms against f64.

use half::bf16;

use crate::emulator::{NULL, launch};
use crate::support::*;

fn statistics(x: &[f64], layer: bool, epsilon: f64) -> (f64, f64) {
    let d = x.len() as f64;
    let mean = if layer { x.iter().sum::<f64>() / d } else { 0.0 };
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / d;
    (mean, 1.0 / (variance + epsilon).sqrt())
}

#[test]
fn forward_is_the_norm_of_each_row() {
    in_every_order(|device| {
        for (rows, width, stride) in shapes() {
            for (layer, accumulate) in [(false, false), (true, false), (false, true)] {
                let x = normal_bf16(rows * width, "x")
                    .iter()
                    .map(|x| *x + bf16::ONE)
                    .collect::<Vec<_>>();
                let (weight, bias) = (normal(width, "weight"), normal(width, "bias"));
                let strided = with_stride(&x, width, stride);
                let before = normal_bf16(rows * width, "y");
                let mut stats = vec![f32::NAN; 2 * rows];
                let mut y = vec![POISON; rows * (stride + 8)];
                if accumulate {
                    y = with_stride(&before, width, stride + 8);
                }
                let bias_argument = if layer { bias[..].into() } else { NULL };
                launch!(device, "norm_forward", [rows as u32, 1, 1], 256;
                    &strided[..], stride as i32, &weight[..], bias_argument, 1e-5f32, &mut y[..],
                    stride as i32 + 8, &mut stats[..], width as i32, i32::from(layer),
                    i32::from(accumulate));
                let mut expected = Vec::new();
                for (row, x) in wide(&x).chunks_exact(width).enumerate() {
                    let (mean, rstd) = statistics(x, layer, 1e-5);
                    let got = [f64::from(stats[2 * row]), f64::from(stats[2 * row + 1])];
                    assert_close(&got, &[mean, rstd], 1e-6, 1e-5);
                    expected.extend(x.iter().enumerate().map(|(i, x)| {
                        let b = if layer { f64::from(bias[i]) } else { 0.0 };
                        (x - mean) * rstd * f64::from(weight[i]) + b
                    }));
                }
                if accumulate {
                    expected.iter_mut().zip(wide(&before)).for_each(|(y, before)| *y += before);
                }
                assert_close(&band(&y, width, stride + 8), &expected, 1e-5, BF16_ROUNDING);
            }
        }
    });
}

#[test]
fn backward_adds_the_gradient() {
    in_every_order(|device| {
        for (rows, width, stride) in shapes() {
            for layer in [false, true] {
                let (x, dy) = (normal_bf16(rows * width, "x"), normal_bf16(rows * width, "dy"));
                let (weight, before) = (normal(width, "weight"), normal_bf16(rows * width, "dx"));
                let mut stats = Vec::new();
                for x in wide(&x).chunks_exact(width) {
                    let (mean, rstd) = statistics(x, layer, 1e-5);
                    stats.extend([mean as f32, rstd as f32]);
                }
                let mut dx = with_stride(&before, width, stride);
                launch!(device, "norm_backward", [rows as u32, 1, 1], 128;
                    &with_stride(&dy, width, stride + 16)[..], stride as i32 + 16, &x[..],
                    width as i32, &weight[..], &stats[..], &mut dx[..], stride as i32, width as i32,
                    i32::from(layer));
                let (x, dy) = (wide(&x), wide(&dy));
                let mut expected = wide(&before);
                for (row, dx) in expected.chunks_exact_mut(width).enumerate() {
                    let (x, dy) = (&x[row * width..][..width], &dy[row * width..][..width]);
                    let (mean, rstd) = statistics(x, layer, 1e-5);
                    let g: Vec<f64> =
                        dy.iter().zip(&weight).map(|(d, w)| d * f64::from(*w)).collect();
                    let d = width as f64;
                    let along =
                        g.iter().zip(x).map(|(g, x)| g * (x - mean) * rstd).sum::<f64>() / d;
                    let level = if layer { g.iter().sum::<f64>() / d } else { 0.0 };
                    for i in 0..width {
                        dx[i] += rstd * (g[i] - level - (x[i] - mean) * rstd * along);
                    }
                }
                assert_close(&band(&dx, width, stride), &expected, 1e-5, BF16_ROUNDING);
            }
        }
    });
}

/// Query heads, key heads, width of a head and room behind a row: aligned, odd, wider than a warp's
/// vectors, more heads than warps.
const HEADS: [(usize, usize, usize, usize); 5] =
    [(4, 2, 24, 16), (3, 1, 16, 8), (2, 1, 7, 3), (2, 2, 320, 0), (5, 5, 64, 8)];

#[test]
fn each_head_of_q_and_k_is_normed_by_itself() {
    in_every_order(|device| {
        for (heads, kv_heads, head, room) in HEADS {
            let (rows, width) = (3, (heads + 2 * kv_heads) * head);
            let qkv = normal_bf16(rows * width, "qkv");
            let weights = [normal(head, "q weight"), normal(head, "k weight")];
            let mut to = vec![POISON; rows * (width + room)];
            launch!(device, "head_norms", [rows as u32, 1, 1], 64;
                &with_stride(&qkv, width, width + 8)[..], width as i32 + 8, &weights[0][..],
                &weights[1][..], 1e-5f32, &mut to[..], (width + room) as i32, heads as i32,
                kv_heads as i32, head as i32);
            let mut expected = Vec::new();
            for (number, x) in wide(&qkv).chunks_exact(head).enumerate() {
                let weight = match number % (heads + 2 * kv_heads) {
                    at if at < heads => &weights[0],
                    at if at < heads + kv_heads => &weights[1],
                    _ => {
                        expected.extend_from_slice(x);
                        continue;
                    }
                };
                let (_, rstd) = statistics(x, false, 1e-5);
                expected.extend(x.iter().zip(weight).map(|(x, w)| x * rstd * f64::from(*w)));
            }
            assert_close(&band(&to, width, width + room), &expected, 1e-5, BF16_ROUNDING);
        }
    });
}

#[test]
fn gradients_behind_the_norms_of_heads_become_those_before_them() {
    in_every_order(|device| {
        for (heads, kv_heads, head, room) in HEADS {
            let (rows, width) = (3, (heads + 2 * kv_heads) * head);
            let qkv = normal_bf16(rows * width, "qkv");
            let before = normal_bf16(rows * width, "dqkv");
            let weights = [normal(head, "q weight"), normal(head, "k weight")];
            let mut dqkv = with_stride(&before, width, width + room);
            launch!(device, "head_norms_backward", [rows as u32, 1, 1], 64;
                &with_stride(&qkv, width, width + 8)[..], width as i32 + 8, &weights[0][..],
                &weights[1][..], 1e-5f32, &mut dqkv[..], (width + room) as i32, heads as i32,
                kv_heads as i32, head as i32);
            let (qkv, mut expected) = (wide(&qkv), wide(&before));
            for (number, d) in expected.chunks_exact_mut(head).enumerate() {
                let x = &qkv[number * head..][..head];
                let weight = match number % (heads + 2 * kv_heads) {
                    at if at < heads => &weights[0],
                    at if at < heads + kv_heads => &weights[1],
                    _ => continue,
                };
                let (_, rstd) = statistics(x, false, 1e-5);
                let g: Vec<f64> = d.iter().zip(weight).map(|(d, w)| d * f64::from(*w)).collect();
                let along = g.iter().zip(x).map(|(g, x)| g * x * rstd).sum::<f64>() / head as f64;
                for (i, d) in d.iter_mut().enumerate() {
                    *d = rstd * (g[i] - x[i] * rstd * along);
                }
            }
            assert_close(&band(&dqkv, width, width + room), &expected, 1e-5, BF16_ROUNDING);
        }
    });
}
