//! RMS norms of q and k: of single heads, as Qwen3 and Gemma 3 have them, or of all of them, as OLMo 2.
//!
//! `y = w ∘ x·ρ` with `ρ = 1/sqrt(mean(x²) + ε)` over as much as the norm is wide; backward, with `g = w ∘ dy`:
//! `dx = ρ·(g − x̂·mean(g ∘ x̂))`, `x̂ = x·ρ`. ρ is made again rather than kept.
//! Sources: transformers `models/qwen3/modeling_qwen3.py`, `models/olmo2/modeling_olmo2.py`.

use rayon::prelude::*;

use super::ROWS;
use super::norm::{apply, statistics};
use super::simd::{sum3, vectorized};
use crate::kernels::{AttentionShape, HeadNorms, NormParameters};

/// `to = [norm(q) | norm(k) | v]` of the rows of `qkv`.
pub fn forward(norms: &HeadNorms<Vec<f32>>, shape: &AttentionShape, qkv: &[f32], to: &mut [f32]) {
    let (width, q, kv) = (shape.qkv_width(), shape.q_width(), shape.kv_width());
    qkv.par_chunks(ROWS * width).zip(to.par_chunks_mut(ROWS * width)).for_each(|(from, to)| {
        vectorized!({
            for (from, to) in from.chunks_exact(width).zip(to.chunks_exact_mut(width)) {
                forward_heads(&norms.q, &from[..q], &mut to[..q]);
                forward_heads(&norms.k, &from[q..q + kv], &mut to[q..q + kv]);
                to[q + kv..].copy_from_slice(&from[q + kv..]);
            }
        });
    });
}

#[inline(always)]
fn forward_heads(norm: &NormParameters<Vec<f32>>, from: &[f32], to: &mut [f32]) {
    let width = norm.weight.len();
    for (x, y) in from.chunks_exact(width).zip(to.chunks_exact_mut(width)) {
        let (mean, rstd) = statistics(norm, x);
        apply(norm, x, y, (mean, rstd), |y, value| *y = value);
    }
}

/// Gradients of norm(q) and norm(k) in `dqkv` become those of q and k in `qkv`.
pub fn backward(
    norms: &HeadNorms<Vec<f32>>,
    shape: &AttentionShape,
    qkv: &[f32],
    dqkv: &mut [f32],
) {
    let (width, q, kv) = (shape.qkv_width(), shape.q_width(), shape.kv_width());
    qkv.par_chunks(ROWS * width).zip(dqkv.par_chunks_mut(ROWS * width)).for_each(|(x, d)| {
        vectorized!({
            for (x, d) in x.chunks_exact(width).zip(d.chunks_exact_mut(width)) {
                backward_heads(&norms.q, &x[..q], &mut d[..q]);
                backward_heads(&norms.k, &x[q..q + kv], &mut d[q..q + kv]);
            }
        });
    });
}

#[inline(always)]
fn backward_heads(norm: &NormParameters<Vec<f32>>, x: &[f32], d: &mut [f32]) {
    let w = &norm.weight[..];
    for (x, d) in x.chunks_exact(w.len()).zip(d.chunks_exact_mut(w.len())) {
        let (_, rstd) = statistics(norm, x);
        let along = sum3(d, w, x, |dy, w, x| dy * w * x) * rstd * rstd / w.len() as f32;
        for ((d, w), x) in d.iter_mut().zip(w).zip(x) {
            *d = rstd * (*d * w - x * along);
        }
    }
}
