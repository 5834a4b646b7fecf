//! RMS norm and layer norm.
//!
//! Forward: `y = w ∘ (x − μ)·ρ + b`, with `ρ = 1/sqrt(mean((x − μ)²) + ε)`; RMS has μ = 0, b = 0.
//! Backward, with `g = w ∘ dy`, `x̂ = (x − μ)·ρ`: `dx += ρ·(g − [layer] mean(g) − x̂·mean(g ∘ x̂))`.
//! Sources: RMSNorm, arXiv 1910.07467; layer norm, 1607.06450.

use rayon::prelude::*;

use super::ROWS;
use super::simd::{sum, sum2, sum3, vectorized};
use crate::kernels::{NormParameters, Write};
use crate::model::spec::Norm;

/// y (or what is added to it), stats `(μ, ρ)` from x; all rows of `[rows, D]`.
pub fn forward(
    norm: &NormParameters<Vec<f32>>,
    x: &[f32],
    y: &mut [f32],
    stats: &mut [f32],
    write: Write,
) {
    let d = norm.weight.len();
    x.par_chunks(ROWS * d)
        .zip(y.par_chunks_mut(ROWS * d))
        .zip(stats.par_chunks_mut(ROWS * 2))
        .for_each(|((x, y), stats)| {
            vectorized!({
                let rows =
                    x.chunks_exact(d).zip(y.chunks_exact_mut(d)).zip(stats.chunks_exact_mut(2));
                for ((x, y), stats) in rows {
                    let (mean, rstd) = statistics(norm, x);
                    (stats[0], stats[1]) = (mean, rstd);
                    if write.adds() {
                        apply(norm, x, y, (mean, rstd), |y, value| *y += value);
                    } else {
                        apply(norm, x, y, (mean, rstd), |y, value| *y = value);
                    }
                }
            });
        });
}

#[inline(always)]
pub(super) fn statistics(norm: &NormParameters<Vec<f32>>, x: &[f32]) -> (f32, f32) {
    let d = x.len() as f32;
    let mean = if norm.kind == Norm::Layer { sum(x, |v| v) / d } else { 0.0 };
    let variance = sum(x, |v| (v - mean) * (v - mean)) / d;
    (mean, 1.0 / (variance + norm.epsilon).sqrt())
}

#[inline(always)]
pub(super) fn apply(
    norm: &NormParameters<Vec<f32>>,
    x: &[f32],
    y: &mut [f32],
    (mean, rstd): (f32, f32),
    put: impl Fn(&mut f32, f32),
) {
    match &norm.bias {
        Some(bias) => {
            for (((y, x), w), b) in y.iter_mut().zip(x).zip(&norm.weight).zip(bias) {
                put(y, (x - mean) * rstd * w + b);
            }
        }
        None => {
            for ((y, x), w) in y.iter_mut().zip(x).zip(&norm.weight) {
                put(y, (x - mean) * rstd * w);
            }
        }
    }
}

/// `dx += …` from dy, x and the stats of [`forward`].
pub fn backward(
    norm: &NormParameters<Vec<f32>>,
    dy: &[f32],
    x: &[f32],
    stats: &[f32],
    dx: &mut [f32],
) {
    let d = norm.weight.len();
    let tasks = dx.par_chunks_mut(ROWS * d).zip(dy.par_chunks(ROWS * d));
    tasks.zip(x.par_chunks(ROWS * d)).zip(stats.par_chunks(ROWS * 2)).for_each(
        |(((dx, dy), x), stats)| {
            vectorized!({
                let rows = dx.chunks_exact_mut(d).zip(dy.chunks_exact(d)).zip(x.chunks_exact(d));
                for (((dx, dy), x), stats) in rows.zip(stats.chunks_exact(2)) {
                    backward_row(norm, dy, x, stats[0], stats[1], dx);
                }
            });
        },
    );
}

#[inline(always)]
fn backward_row(
    norm: &NormParameters<Vec<f32>>,
    dy: &[f32],
    x: &[f32],
    mean: f32,
    rstd: f32,
    dx: &mut [f32],
) {
    let (w, d) = (&norm.weight[..], x.len() as f32);
    let projection = sum3(dy, w, x, |dy, w, x| dy * w * (x - mean));
    let along = projection * rstd * rstd / d;
    let level = if norm.kind == Norm::Layer { sum2(dy, w, |a, b| a * b) / d } else { 0.0 };
    for (((dx, dy), w), x) in dx.iter_mut().zip(dy).zip(w).zip(x) {
        *dx += rstd * (dy * w - level - (x - mean) * along);
    }
}
