//! Rotary position embedding: frequencies of every `rope_type` and the tables of cos and sin.
//!
//! Pair `j` of a head turns by `position · inv_freq[j]`, in Hugging Face's `rotate_half` layout:
//! `y[j] = x[j]·cos − x[j + d/2]·sin`, `y[j + d/2] = x[j + d/2]·cos + x[j]·sin`.
//! Sources: transformers `modeling_rope_utils.py`; YaRN, arXiv 2309.00071; RoFormer, 2104.09864.

use std::f64::consts::PI;

use rayon::prelude::*;
use serde_json::Value;

use super::spec::{RopeScaling, Rotary};
use crate::error::{Error, Result};
use crate::kernels::TokenLayout;

/// Tokens whose angles a thread computes at least.
const ROWS_OF_A_TASK: usize = 64;

/// Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4).
pub(super) fn rotary_from_config(config: &Value) -> Result<Rotary> {
    let empty = Value::Object(Default::default());
    let present = |key: &str| config.get(key).filter(|v| !v.is_null());
    let parameters = present("rope_parameters").or(present("rope_scaling")).unwrap_or(&empty);
    let theta = [parameters.get("rope_theta"), present("rope_theta")]
        .into_iter()
        .flatten()
        .find_map(Value::as_f64)
        .unwrap_or(10_000.0);
    if !(theta.is_finite() && theta > 0.0) {
        return Err(Error::input(format_args!("config.json: rope_theta is {theta}")));
    }
    for holder in [parameters, config] {
        if let Some(fraction) = holder.get("partial_rotary_factor").and_then(Value::as_f64)
            && fraction != 1.0
        {
            return Err(Error::input(format_args!(
                "config.json: partial_rotary_factor = {fraction} is not supported"
            ))
            .hint("only models that rotate whole heads are"));
        }
    }
    Ok(Rotary { theta, scaling: scaling_from(parameters, config)? })
}

fn scaling_from(parameters: &Value, config: &Value) -> Result<RopeScaling> {
    let kind = parameters.get("rope_type").or(parameters.get("type")).and_then(Value::as_str);
    let optional = |key: &str| parameters.get(key).and_then(Value::as_f64);
    let number = |key: &str| {
        optional(key).filter(|v| v.is_finite() && *v > 0.0).ok_or_else(|| {
            Error::input(format_args!("config.json: rope scaling needs a positive `{key}`"))
        })
    };
    let max_positions = config.get("max_position_embeddings").and_then(Value::as_f64);
    let original = || match optional("original_max_position_embeddings").or(max_positions) {
        Some(length) if length >= 1.0 => Ok(length as usize),
        _ => number("original_max_position_embeddings").map(|length| length as usize),
    };
    Ok(match kind.unwrap_or("default") {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: number("factor")? },
        "dynamic" => RopeScaling::Dynamic {
            factor: number("factor")?,
            // transformers scales by the configured length, not by the original one.
            original_max_position_embeddings: max_positions.unwrap_or(2048.0) as usize,
        },
        "yarn" => {
            let factor = number("factor")?;
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original()?,
                beta_fast: optional("beta_fast").filter(|v| *v != 0.0).unwrap_or(32.0),
                beta_slow: optional("beta_slow").filter(|v| *v != 0.0).unwrap_or(1.0),
                attention_factor: yarn_attention_factor(&optional, factor),
                truncate: parameters.get("truncate").and_then(Value::as_bool).unwrap_or(true),
            }
        }
        "llama3" => RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_position_embeddings: original()?,
        },
        other => {
            return Err(Error::input(format_args!(
                "config.json: rope_type `{other}` is not supported"
            ))
            .hint("supported: default, linear, dynamic, yarn, llama3"));
        }
    })
}

fn yarn_attention_factor(optional: &dyn Fn(&str) -> Option<f64>, factor: f64) -> f64 {
    let mscale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
    let given = |key: &str| optional(key).filter(|v| *v != 0.0);
    optional("attention_factor").unwrap_or_else(|| {
        match (given("mscale"), given("mscale_all_dim")) {
            (Some(m), Some(all)) => mscale(m) / mscale(all),
            _ => mscale(1.0),
        }
    })
}

/// `rope_scaling` of the Llama 3 model whose frequencies are divided by `factors`
/// `[head_dim / 2]`, as GGUF files store them; none if no published variant fits.
pub fn llama3_scaling_of(factors: &[f32], theta: f64, head_dim: usize) -> Option<Value> {
    let plain = Rotary { theta, scaling: RopeScaling::Default };
    let (base, _) = plain.inverse_frequencies(head_dim, 0);
    // Llama 3.1 stretches 8 times, Llama 3.2 32 times; the bounds are those of both.
    [8.0, 32.0].into_iter().find_map(|factor| {
        let scaling = RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let (stretched, _) = Rotary { theta, scaling }.inverse_frequencies(head_dim, 0);
        let close = |((base, stretched), factor): ((&f32, &f32), &f32)| {
            (base / stretched / factor - 1.0).abs() < 1e-3
        };
        let fits =
            factors.len() == base.len() && base.iter().zip(&stretched).zip(factors).all(close);
        fits.then(|| {
            serde_json::json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            })
        })
    })
}

impl Rotary {
    /// cos and sin `[T, head_dim / 2]` for the tokens of `layout`.
    pub fn fill_tables(
        &self,
        head_dim: usize,
        layout: &TokenLayout,
        cos: &mut [f32],
        sin: &mut [f32],
    ) {
        let half = head_dim / 2;
        for document in layout.boundaries.windows(2) {
            let (begin, end) = (document[0], document[1]);
            let positions = &layout.positions[begin..end];
            let length = positions.last().map_or(0, |&last| last as usize + 1);
            let (frequencies, factor) = self.inverse_frequencies(head_dim, length);
            let cos = cos[begin * half..end * half].par_chunks_exact_mut(half);
            let sin = sin[begin * half..end * half].par_chunks_exact_mut(half);
            let rows = positions.par_iter().zip(cos).zip(sin).with_min_len(ROWS_OF_A_TASK);
            rows.for_each(|((&position, cos), sin)| {
                for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(&frequencies) {
                    let (s, c) = (position as f32 * frequency).sin_cos();
                    (*cos, *sin) = (c * factor, s * factor);
                }
            });
        }
    }

    /// Inverse frequencies `[head_dim / 2]` (f32, as transformers computes them) for a sequence of
    /// `length_tokens`, and the factor on cos and sin.
    pub fn inverse_frequencies(&self, head_dim: usize, length_tokens: usize) -> (Vec<f32>, f32) {
        let dim = head_dim as f64;
        let series = |theta: f64| -> Vec<f32> {
            let exponent = |j: usize| (2 * j) as f32 / head_dim as f32;
            (0..head_dim / 2).map(|j| 1.0 / (theta as f32).powf(exponent(j))).collect()
        };
        match self.scaling {
            RopeScaling::Default => (series(self.theta), 1.0),
            RopeScaling::Linear { factor } => {
                (series(self.theta).into_iter().map(|f| f / factor as f32).collect(), 1.0)
            }
            RopeScaling::Dynamic { factor, original_max_position_embeddings } => {
                let trained = original_max_position_embeddings as f64;
                let stretch = factor * (length_tokens as f64).max(trained) / trained;
                let exponent = dim / (dim - 2.0);
                (series(self.theta * (stretch - (factor - 1.0)).powf(exponent)), 1.0)
            }
            RopeScaling::Yarn { attention_factor, .. } => {
                (self.yarn(series(self.theta), dim), attention_factor as f32)
            }
            RopeScaling::Llama3 { .. } => (self.llama3(series(self.theta)), 1.0),
        }
    }

    /// Whether the frequencies depend on the length of the sequence.
    pub fn depends_on_length(&self) -> bool {
        matches!(self.scaling, RopeScaling::Dynamic { .. })
    }

    fn yarn(&self, base: Vec<f32>, dim: f64) -> Vec<f32> {
        let RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            truncate,
            ..
        } = self.scaling
        else {
            return base;
        };
        let trained = original_max_position_embeddings as f64;
        let bound =
            |turns: f64| dim * (trained / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
        let (mut low, mut high) = (bound(beta_fast), bound(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        let interpolate = |(j, frequency): (usize, f32)| {
            let keep = 1.0 - (((j as f64 - low) / (high - low)) as f32).clamp(0.0, 1.0);
            (frequency / factor as f32) * (1.0 - keep) + frequency * keep
        };
        base.into_iter().enumerate().map(interpolate).collect()
    }

    fn llama3(&self, base: Vec<f32>) -> Vec<f32> {
        let RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } = self.scaling
        else {
            return base;
        };
        let trained = original_max_position_embeddings as f64;
        let stretch = |frequency: f32| {
            let wavelength = 2.0 * PI / f64::from(frequency);
            if wavelength < trained / high_freq_factor {
                return frequency;
            }
            if wavelength > trained / low_freq_factor {
                return frequency / factor as f32;
            }
            let smooth =
                (trained / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
            let blended =
                (1.0 - smooth) * f64::from(frequency) / factor + smooth * f64::from(frequency);
            blended as f32
        };
        base.into_iter().map(stretch).collect()
    }
}
