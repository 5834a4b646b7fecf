//! Cross-entropy of a chunk of logits, with its gradient in the same pass.
//!
//! `loss_i = log Σ_v e^{z_iv} − z_{i,y_i}`; `dz_iv = scale · (softmax(z_i)_v − [v = y_i])`. Where
//! logits are capped, `z = c·tanh(x/c)`: `dx = dz · (1 − tanh²(x/c))`.

use rayon::prelude::*;

use super::Cpu;
use super::arena::Buffer;
use super::simd::{LANES, exp, exp_below, max, tanh, vectorized};
use crate::kernels::{HeadKernels, LogitShape, TokenLosses};

impl HeadKernels for Cpu {
    fn cross_entropy(
        &self,
        logits: &mut Buffer<f32>,
        targets: &[u32],
        shape: LogitShape,
        scale: Option<f32>,
        loss: &mut TokenLosses,
    ) {
        let logits = &mut logits[..targets.len() * shape.vocab_size];
        *loss += forward_backward(logits, targets, shape, scale);
    }
}

/// The rows' losses (summed in f64, in row order); with `scale`, logits become gradients.
fn forward_backward(
    logits: &mut [f32],
    targets: &[u32],
    LogitShape { vocab_size, soft_cap }: LogitShape,
    scale: Option<f32>,
) -> TokenLosses {
    let rows = logits.par_chunks_mut(vocab_size).zip(targets.par_iter());
    let losses = rows.map(|(row, &target)| {
        let target = target as usize;
        match soft_cap {
            None => vectorized!(one_row(row, target, scale)),
            Some(cap) => vectorized!(capped_row(row, target, scale, cap)),
        }
    });
    losses.collect::<Vec<TokenLosses>>().into_iter().sum()
}

#[inline(always)]
fn one_row(row: &mut [f32], target: usize, scale: Option<f32>) -> TokenLosses {
    let (largest, chosen) = (max(row), row[target]);
    let total: f64 = exp_below(row, largest).iter().map(|&lane| f64::from(lane)).sum();
    if let Some(scale) = scale {
        let factor = (f64::from(scale) / total) as f32;
        row.iter_mut().for_each(|value| *value *= factor);
        row[target] -= scale;
    }
    let sum = f64::from(largest) + total.ln() - f64::from(chosen);
    TokenLosses { sum, hits: u64::from(chosen >= largest) }
}

#[inline(always)]
fn capped_row(row: &mut [f32], target: usize, scale: Option<f32>, cap: f32) -> TokenLosses {
    row.iter_mut().for_each(|value| *value = tanh(*value / cap));
    let (largest, chosen) = (cap * max(row), row[target]);
    let mut lanes = [0.0f32; LANES];
    for chunk in row.chunks(LANES) {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += exp(cap * value - largest);
        }
    }
    let total: f64 = lanes.iter().map(|&lane| f64::from(lane)).sum();
    if let Some(scale) = scale {
        let factor = (f64::from(scale) / total) as f32;
        for value in row.iter_mut() {
            *value = factor * exp(cap * *value - largest) * (1.0 - *value * *value);
        }
        row[target] -= scale * (1.0 - chosen * chosen);
    }
    let sum = f64::from(largest) + total.ln() - f64::from(cap * chosen);
    TokenLosses { sum, hits: u64::from(cap * chosen >= largest) }
}
