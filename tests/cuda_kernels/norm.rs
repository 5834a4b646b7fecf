//! Norms against f64.

use std::ops::Range;

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

/// The norms of q and k, and room behind a row.
struct Norms {
    q: (usize, usize),
    k: (usize, usize),
    v_width: usize,
    room: usize,
}

impl Norms {
    /// Heads of q and of k that are normed by themselves.
    const fn heads(heads: usize, kv_heads: usize, head: usize, room: usize) -> Self {
        Norms { q: (heads, head), k: (kv_heads, head), v_width: kv_heads * head, room }
    }

    /// A norm of all of q, and one of all of k.
    const fn whole(q: usize, k: usize, room: usize) -> Self {
        Norms { q: (1, q), k: (1, k), v_width: k, room }
    }

    fn width(&self) -> usize {
        self.q.0 * self.q.1 + self.k.0 * self.k.1 + self.v_width
    }

    fn weights(&self) -> [Vec<f32>; 2] {
        [normal(self.q.1, "q weight"), normal(self.k.1, "k weight")]
    }

    /// Where the norms of a row are, and whether they are of k.
    fn bands(&self) -> Vec<(Range<usize>, usize)> {
        let widths = [vec![self.q.1; self.q.0], vec![self.k.1; self.k.0]];
        let mut first = 0;
        let mut next = |of, width| {
            first += width;
            (first - width..first, of)
        };
        let widths = widths.into_iter().enumerate();
        let bands = widths.flat_map(|(of, widths)| widths.into_iter().map(move |it| (of, it)));
        bands.map(|(of, width)| next(of, width)).collect()
    }

    fn sizes(&self) -> [i32; 5] {
        [self.q.0, self.k.0, self.q.1, self.k.1, self.v_width].map(|size| size as i32)
    }
}

/// Aligned, odd, wider than a warp's vectors, more heads than warps; of all heads, aligned and odd.
const NORMS: [Norms; 8] = [
    Norms::heads(4, 2, 24, 16),
    Norms::heads(3, 1, 16, 8),
    Norms::heads(2, 1, 7, 3),
    Norms::heads(2, 2, 320, 0),
    Norms::heads(5, 5, 64, 8),
    Norms::whole(520, 264, 16),
    Norms::whole(256, 256, 0),
    Norms::whole(35, 7, 3),
];

#[test]
fn q_and_k_are_normed_head_by_head_or_whole() {
    in_every_order(|device| {
        for norms in NORMS {
            let (rows, width, room) = (3, norms.width(), norms.room);
            let qkv = normal_bf16(rows * width, "qkv");
            let (weights, sizes) = (norms.weights(), norms.sizes());
            let mut to = vec![POISON; rows * (width + room)];
            launch!(device, "head_norms", [rows as u32, 1, 1], 64;
                &with_stride(&qkv, width, width + 8)[..], width as i32 + 8, &weights[0][..],
                &weights[1][..], 1e-5f32, &mut to[..], (width + room) as i32, sizes[0], sizes[1],
                sizes[2], sizes[3], sizes[4]);
            let mut expected = wide(&qkv);
            for row in expected.chunks_exact_mut(width) {
                for (band, of) in norms.bands() {
                    let (_, rstd) = statistics(&row[band.clone()], false, 1e-5);
                    let weighted = row[band].iter_mut().zip(&weights[of]);
                    weighted.for_each(|(x, w)| *x *= rstd * f64::from(*w));
                }
            }
            assert_close(&band(&to, width, width + room), &expected, 1e-5, BF16_ROUNDING);
        }
    });
}

#[test]
fn gradients_behind_the_norms_of_q_and_k_become_those_before_them() {
    in_every_order(|device| {
        for norms in NORMS {
            let (rows, width, room) = (3, norms.width(), norms.room);
            let qkv = normal_bf16(rows * width, "qkv");
            let before = normal_bf16(rows * width, "dqkv");
            let (weights, sizes) = (norms.weights(), norms.sizes());
            let mut dqkv = with_stride(&before, width, width + room);
            launch!(device, "head_norms_backward", [rows as u32, 1, 1], 64;
                &with_stride(&qkv, width, width + 8)[..], width as i32 + 8, &weights[0][..],
                &weights[1][..], 1e-5f32, &mut dqkv[..], (width + room) as i32, sizes[0], sizes[1],
                sizes[2], sizes[3], sizes[4]);
            let (qkv, mut expected) = (wide(&qkv), wide(&before));
            for (x, d) in qkv.chunks_exact(width).zip(expected.chunks_exact_mut(width)) {
                for (band, of) in norms.bands() {
                    norm_gradient(&x[band.clone()], &weights[of], &mut d[band]);
                }
            }
            assert_close(&self::band(&dqkv, width, width + room), &expected, 1e-5, BF16_ROUNDING);
        }
    });
}

/// The gradient behind an RMS norm of x becomes that of x.
fn norm_gradient(x: &[f64], weight: &[f32], d: &mut [f64]) {
    let (_, rstd) = statistics(x, false, 1e-5);
    let g: Vec<f64> = d.iter().zip(weight).map(|(d, w)| d * f64::from(*w)).collect();
    let along = g.iter().zip(x).map(|(g, x)| g * x * rstd).sum::<f64>() / x.len() as f64;
    for (i, d) in d.iter_mut().enumerate() {
        *d = rstd * (g[i] - x[i] * rstd * along);
    }
}
