//! Rotary position embedding: frequencies of every `rope_type` and the tables of cos and sin. What a
//! `config.json` says of it is read in [`families`](super::families).
//!
//! Pair `j` of a head turns by `position · inv_freq[j]`: `[a, b] ← [a·cos − b·sin, b·cos + a·sin]`, a and b
//! as [`RotaryPairs`](super::spec::RotaryPairs) says.
//! Sources: transformers `modeling_rope_utils.py`; YaRN, arXiv 2309.00071; LongRoPE, 2402.13753;
//! RoFormer, 2104.09864.

use std::f64::consts::PI;

use rayon::prelude::*;
use serde_json::Value;

use super::spec::{RopeScaling, Rotary};
use crate::kernels::TokenLayout;

/// Tokens whose angles a thread computes at least.
const ROWS_OF_A_TASK: usize = 64;

/// `sqrt(1 + ln s / ln L)` for a context that is s times the trained length L.
pub fn long_rope_attention_factor(stretch: f64, original: f64) -> f64 {
    if stretch <= 1.0 { 1.0 } else { (1.0 + stretch.ln() / original.ln()).sqrt() }
}

/// What Llama 3's scaling divides the frequency of a wavelength in tokens by; `None` for other scalings.
pub fn llama3_divisor(scaling: &RopeScaling, wavelength: f64) -> Option<f64> {
    let &RopeScaling::Llama3 {
        factor,
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position_embeddings,
    } = scaling
    else {
        return None;
    };
    let turns = original_max_position_embeddings as f64 / wavelength;
    // Many turns within the trained length: as it is. Few: divided by all of the factor.
    let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
    Some(factor / ((1.0 - kept) + kept * factor))
}

/// `mscale(1) / mscale(all)` for a context stretched `factor` times.
pub fn yarn_attention_factor(factor: f64, mscale_all_dim: f64) -> f64 {
    yarn_mscale(factor, 1.0) / yarn_mscale(factor, mscale_all_dim)
}

pub(super) fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// `rope_scaling` of the Llama 3 model whose frequencies are divided by `factors`
/// `[head_dim / 2]`, as GGUF files store them; none if no trained length of a power of two fits.
pub fn llama3_scaling_of(factors: &[f32], theta: f64, head_dim: usize) -> Option<Value> {
    let plain = Rotary { theta, scaling: RopeScaling::Default };
    let (base, _) = plain.inverse_frequencies(head_dim, 0);
    // The longest wavelength is stretched by all of it: 8 times in Llama 3.1, 32 times in Llama 3.2. The bounds are
    // those of both, the trained length is 8,192 tokens in both.
    let factor = f64::from(*factors.last()?);
    let lengths = std::iter::once(8192).chain((4..24).map(|bits| 1 << bits));
    lengths.into_iter().find_map(|original_max_position_embeddings| {
        let scaling = RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings,
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
                "original_max_position_embeddings": original_max_position_embeddings,
            })
        })
    })
}

/// How far a document reaches beyond the tokens of a pass; zeros where it does not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reach {
    /// Tokens of the prompt that these are a piece of.
    pub prompt_tokens: usize,
    /// Tokens that there can be in all.
    pub context_tokens: usize,
}

impl Rotary {
    /// cos and sin `[T, dim / 2]` for the tokens of `layout`; `dim` elements of each head turn.
    ///
    /// Frequencies that depend on a document's length go by that of its tokens here, or by what `reach`
    /// says of more. LongRoPE has one set for all keys of a document: where its length is not known
    /// yet, that of the context decides, as in llama.cpp and vLLM. Dynamic scaling turns all of a prompt
    /// by the prompt's length, and each token behind it by its own, as in transformers.
    pub fn fill_tables(
        &self,
        dim: usize,
        layout: &TokenLayout,
        reach: Reach,
        cos: &mut [f32],
        sin: &mut [f32],
    ) {
        let half = dim / 2;
        let least = match self.scaling {
            RopeScaling::LongRope { .. } => reach.context_tokens,
            RopeScaling::Dynamic { .. } => reach.prompt_tokens,
            _ => 0,
        };
        for document in layout.boundaries.windows(2) {
            let (begin, end) = (document[0], document[1]);
            let positions = &layout.positions[begin..end];
            let length = positions.last().map_or(0, |&last| last as usize + 1).max(least);
            let (frequencies, factor) = self.inverse_frequencies(dim, length);
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

    /// Inverse frequencies `[dim / 2]` (f32, as transformers computes them) for a sequence of
    /// `length_tokens`, and the factor on cos and sin.
    pub fn inverse_frequencies(&self, dim: usize, length_tokens: usize) -> (Vec<f32>, f32) {
        let width = dim as f64;
        let power = |theta: f64, j: usize| (theta as f32).powf((2 * j) as f32 / dim as f32);
        let series =
            |theta: f64| -> Vec<f32> { (0..dim / 2).map(|j| 1.0 / power(theta, j)).collect() };
        match self.scaling {
            RopeScaling::Default => (series(self.theta), 1.0),
            RopeScaling::Linear { factor } => {
                (series(self.theta).into_iter().map(|f| f / factor as f32).collect(), 1.0)
            }
            RopeScaling::Dynamic { factor, original_max_position_embeddings } => {
                let trained = original_max_position_embeddings as f64;
                let stretch = factor * (length_tokens as f64).max(trained) / trained;
                let exponent = width / (width - 2.0);
                (series(self.theta * (stretch - (factor - 1.0)).powf(exponent)), 1.0)
            }
            RopeScaling::Yarn { attention_factor, .. } => {
                (self.yarn(series(self.theta), width), attention_factor as f32)
            }
            RopeScaling::LongRope {
                ref short_factor,
                ref long_factor,
                original_max_position_embeddings,
                attention_factor,
            } => {
                let is_long = length_tokens > original_max_position_embeddings;
                let divisors = if is_long { long_factor } else { short_factor };
                let divided =
                    divisors.iter().enumerate().map(|(j, by)| 1.0 / (by * power(self.theta, j)));
                (divided.collect(), attention_factor as f32)
            }
            RopeScaling::Llama3 { .. } => (self.llama3(series(self.theta)), 1.0),
        }
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

    fn llama3(&self, mut base: Vec<f32>) -> Vec<f32> {
        for frequency in &mut base {
            let exact = f64::from(*frequency);
            if let Some(divisor) = llama3_divisor(&self.scaling, 2.0 * PI / exact) {
                *frequency = (exact / divisor) as f32;
            }
        }
        base
    }
}
