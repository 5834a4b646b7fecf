//! The MLP's nonlinearity, with or without a gate.
//!
//! Gated: `h = a(g) ∘ u`, `dg = dh ∘ u ∘ a'(g)`, `du = dh ∘ a(g)`. Plain: `h = a(u)`,
//! `du = dh ∘ a'(u)`.

use rayon::prelude::*;

use super::arena::Buffer;
use super::simd::{exp, sigmoid, tanh, vectorized};
use super::{CHUNK, Cpu};
use crate::kernels::MlpKernels;
use crate::model::spec::Activation;

/// `sqrt(2/π)` of the tanh approximation.
const GELU_SCALE: f32 = 0.797_884_6;
/// Cubic coefficient of the tanh approximation.
const GELU_CUBIC: f32 = 0.044_715;

impl MlpKernels for Cpu {
    fn mlp_forward(
        &self,
        activation: Activation,
        gate: Option<&Buffer<f32>>,
        up: &Buffer<f32>,
        out: &mut Buffer<f32>,
        elements: usize,
    ) {
        let gate = gate.map(|gate| &gate[..elements]);
        forward(activation, gate, &up[..elements], &mut out[..elements]);
    }

    fn mlp_backward(
        &self,
        activation: Activation,
        gate: Option<&Buffer<f32>>,
        up: &Buffer<f32>,
        d_out: &mut Buffer<f32>,
        d_up: &mut Buffer<f32>,
        elements: usize,
    ) {
        let gate = gate.map(|gate| &gate[..elements]);
        let (d_out, d_up) = (&mut d_out[..elements], &mut d_up[..elements]);
        backward(activation, gate, &up[..elements], d_out, d_up);
    }

    fn fused_mlp_forward(
        &self,
        activation: Activation,
        gate_up: &Buffer<f32>,
        out: &mut Buffer<f32>,
        rows: usize,
        width: usize,
    ) {
        let (gate_up, out) = (&gate_up[..2 * rows * width], &mut out[..rows * width]);
        fused_forward(activation, gate_up, out, width);
    }

    fn fused_mlp_backward(
        &self,
        activation: Activation,
        gate_up: &mut Buffer<f32>,
        d_out: &Buffer<f32>,
        rows: usize,
        width: usize,
    ) {
        let (gate_up, d_out) = (&mut gate_up[..2 * rows * width], &d_out[..rows * width]);
        fused_backward(activation, gate_up, d_out, width);
    }
}

/// `out = act(gate) ∘ up`, or `act(up)`.
fn forward(activation: Activation, gate: Option<&[f32]>, up: &[f32], out: &mut [f32]) {
    match activation {
        Activation::Silu => forward_with(
            gate,
            up,
            out,
            #[inline(always)]
            |x| value_and_slope_silu(x).0,
        ),
        Activation::Gelu => forward_with(
            gate,
            up,
            out,
            #[inline(always)]
            |x| value_and_slope_gelu(x).0,
        ),
        Activation::GeluTanh => forward_with(
            gate,
            up,
            out,
            #[inline(always)]
            |x| value_and_slope_gelu_tanh(x).0,
        ),
    }
}

/// `d_out` becomes dgate (dup without a gate), `d_up` becomes dup.
fn backward(
    activation: Activation,
    gate: Option<&[f32]>,
    up: &[f32],
    d_out: &mut [f32],
    d_up: &mut [f32],
) {
    match activation {
        Activation::Silu => backward_with(gate, up, d_out, d_up, value_and_slope_silu),
        Activation::Gelu => backward_with(gate, up, d_out, d_up, value_and_slope_gelu),
        Activation::GeluTanh => backward_with(gate, up, d_out, d_up, value_and_slope_gelu_tanh),
    }
}

/// `out = act(gate) ∘ up` of rows `[gate | up]` of `2·width`.
fn fused_forward(activation: Activation, gate_up: &[f32], out: &mut [f32], width: usize) {
    let rows = out.par_chunks_exact_mut(width).zip(gate_up.par_chunks_exact(2 * width));
    rows.for_each(|(out, row)| {
        let (gate, up) = row.split_at(width);
        forward(activation, Some(gate), up, out);
    });
}

/// Rows `[gate | up]` become `[dgate | dup]`.
fn fused_backward(activation: Activation, gate_up: &mut [f32], d_out: &[f32], width: usize) {
    match activation {
        Activation::Silu => fused_backward_with(gate_up, d_out, width, value_and_slope_silu),
        Activation::Gelu => fused_backward_with(gate_up, d_out, width, value_and_slope_gelu),
        Activation::GeluTanh => {
            fused_backward_with(gate_up, d_out, width, value_and_slope_gelu_tanh);
        }
    }
}

#[inline(always)]
fn value_and_slope_silu(x: f32) -> (f32, f32) {
    let s = sigmoid(x);
    (x * s, s * (1.0 + x * (1.0 - s)))
}

#[inline(always)]
fn value_and_slope_gelu_tanh(x: f32) -> (f32, f32) {
    let t = tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x));
    let inner = GELU_SCALE * (1.0 + 3.0 * GELU_CUBIC * x * x);
    (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner)
}

#[inline(always)]
fn value_and_slope_gelu(x: f32) -> (f32, f32) {
    let cdf = 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
    let density = exp(-0.5 * x * x) * 0.398_942_3;
    (x * cdf, cdf + x * density)
}

/// Error function: Abramowitz and Stegun 7.1.26, in f32 with an absolute error below 7e-7.
#[inline(always)]
fn erf(x: f32) -> f32 {
    let t = 1.0 / (1.0 + 0.327_591_1 * x.abs());
    let mut p = 1.061_405_4f32;
    for c in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
        p = p * t + c;
    }
    let magnitude = 1.0 - p * t * exp(-x * x);
    magnitude.copysign(x)
}

#[inline(always)]
fn forward_with(
    gate: Option<&[f32]>,
    up: &[f32],
    out: &mut [f32],
    act: impl Fn(f32) -> f32 + Sync + Copy,
) {
    match gate {
        Some(gate) => {
            let tasks = out.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK));
            tasks.zip(up.par_chunks(CHUNK)).for_each(|((out, gate), up)| {
                vectorized!({
                    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                        *out = act(*gate) * up;
                    }
                });
            });
        }
        None => out.par_chunks_mut(CHUNK).zip(up.par_chunks(CHUNK)).for_each(|(out, up)| {
            vectorized!({
                for (out, up) in out.iter_mut().zip(up) {
                    *out = act(*up);
                }
            });
        }),
    }
}

#[inline(always)]
fn backward_with(
    gate: Option<&[f32]>,
    up: &[f32],
    d_out: &mut [f32],
    d_up: &mut [f32],
    act: impl Fn(f32) -> (f32, f32) + Sync + Copy,
) {
    let Some(gate) = gate else {
        d_out.par_chunks_mut(CHUNK).zip(up.par_chunks(CHUNK)).for_each(|(d_out, up)| {
            vectorized!({
                for (d_out, up) in d_out.iter_mut().zip(up) {
                    *d_out *= act(*up).1;
                }
            });
        });
        return;
    };
    let tasks = d_out.par_chunks_mut(CHUNK).zip(d_up.par_chunks_mut(CHUNK));
    tasks.zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK)).for_each(
        |(((d_out, d_up), gate), up)| {
            vectorized!({
                for (((d_out, d_up), gate), up) in d_out.iter_mut().zip(d_up).zip(gate).zip(up) {
                    let (value, slope) = act(*gate);
                    *d_up = *d_out * value;
                    *d_out *= up * slope;
                }
            });
        },
    );
}

#[inline(always)]
fn fused_backward_with(
    gate_up: &mut [f32],
    d_out: &[f32],
    width: usize,
    act: impl Fn(f32) -> (f32, f32) + Sync + Copy,
) {
    let rows = gate_up.par_chunks_exact_mut(2 * width).zip(d_out.par_chunks_exact(width));
    rows.for_each(|(row, d_out)| {
        let (gate, up) = row.split_at_mut(width);
        vectorized!({
            for ((gate, up), d_out) in gate.iter_mut().zip(up).zip(d_out) {
                let (value, slope) = act(*gate);
                (*gate, *up) = (d_out * (*up * slope), d_out * value);
            }
        });
    });
}
