//! Rotary position embedding: frequencies of every `rope_type` and the tables of cos and sin.
//!
//! Pair `j` of a head turns by `position · inv_freq[j]`: `[a, b] ← [a·cos − b·sin, b·cos + a·sin]`, a and b
//! as [`RotaryPairs`](super::spec::RotaryPairs) says.
//! Sources: transformers `modeling_rope_utils.py`; YaRN, arXiv 2309.00071; LongRoPE, 2402.13753;
//! RoFormer, 2104.09864.

use std::f64::consts::PI;

use rayon::prelude::*;
use serde_json::Value;

use super::spec::{QueryScaling, RopeScaling, Rotary};
use crate::error::{Error, Result};
use crate::kernels::TokenLayout;

/// Tokens whose angles a thread computes at least.
const ROWS_OF_A_TASK: usize = 64;

/// Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4).
///
/// # Errors
/// `Input` naming what is missing, no number, not supported, or said twice.
pub(super) fn rotary_from_config(config: &Value) -> Result<Rotary> {
    let parameters = parameters_of(config);
    if !(parameters.is_null() || parameters.is_object()) {
        let what = format_args!("config.json: rope_scaling must be an object, got {parameters}");
        return Err(Error::input(what));
    }
    check_one_base(config)?;
    let own = optional_number(parameters, "rope_theta")?;
    let theta = own.or(optional_number(config, "rope_theta")?).unwrap_or(10_000.0);
    if !(theta.is_finite() && theta > 0.0) {
        return Err(Error::input(format_args!("config.json: rope_theta is {theta}")));
    }
    Ok(Rotary { theta, scaling: scaling_from(parameters, config)? })
}

/// What the config says of rotary embedding besides its base, as transformers 4 or 5 spells it; null if
/// nothing. Where both do, transformers takes `rope_scaling`.
pub(super) fn parameters_of(config: &Value) -> &Value {
    match &config["rope_scaling"] {
        Value::Null => &config["rope_parameters"],
        Value::Object(fields) if fields.is_empty() => &config["rope_parameters"],
        scaling => scaling,
    }
}

/// Refuses a `rope_scaling` that was added to a config of transformers 5 and would hide the base that its
/// `rope_parameters` have: transformers then takes its default.
fn check_one_base(config: &Value) -> Result<()> {
    const BASE: &str = "rope_theta";
    let parameters = parameters_of(config);
    let hidden = &config["rope_parameters"][BASE];
    if !hidden.is_number() || parameters[BASE].is_number() || config[BASE].is_number() {
        return Ok(());
    }
    let what = format_args!("config.json: `rope_scaling` hides the {BASE} of `rope_parameters`");
    Err(Error::input(what).hint(format_args!(
        "put all of it into `rope_parameters`, or add `\"{BASE}\": {hidden}` to `rope_scaling`"
    )))
}

/// The trained length: the config's own comes before that of the parameters, as in transformers, and that
/// before the longest one.
fn original_length(parameters: &Value, config: &Value) -> Result<Option<f64>> {
    const KEY: &str = "original_max_position_embeddings";
    let own = optional_number(config, KEY)?.or(optional_number(parameters, KEY)?);
    Ok(own.or(optional_number(config, "max_position_embeddings")?))
}

/// The scale of q by its position, if the config has one.
///
/// # Errors
/// `Input` for a slope that is no number or without a trained length.
pub(super) fn query_scaling(config: &Value) -> Result<Option<QueryScaling>> {
    const ORIGINAL: &str = "original_max_position_embeddings";
    let parameters = parameters_of(config);
    let Some(beta) = optional_number(parameters, "llama_4_scaling_beta")? else { return Ok(None) };
    let given = optional_number(config, ORIGINAL)?.or(optional_number(parameters, ORIGINAL)?);
    let original = given.filter(|length| *length >= 1.0).ok_or_else(|| {
        let what = "config.json: llama_4_scaling_beta needs an";
        Error::input(format_args!("{what} `{ORIGINAL}` above 0"))
    })?;
    let original_max_position_embeddings = original as usize;
    Ok(Some(QueryScaling { beta, original_max_position_embeddings }))
}

/// The share of each head that turns, as transformers 5 or 4 spells it.
///
/// # Errors
/// `Input` when it is no number.
pub(super) fn partial_rotary_factor(config: &Value) -> Result<f64> {
    const KEY: &str = "partial_rotary_factor";
    let holders = [parameters_of(config), config];
    let given = holders.into_iter().find_map(|holder| optional_number(holder, KEY).transpose());
    Ok(given.transpose()?.unwrap_or(1.0))
}

/// A number, if there is anything.
fn optional_number(holder: &Value, key: &str) -> Result<Option<f64>> {
    let value = &holder[key];
    if value.is_null() {
        return Ok(None);
    }
    let number = value.as_f64().map(Some);
    number.ok_or_else(|| {
        Error::input(format_args!("config.json: field `{key}` must be a number, got {value}"))
    })
}

/// True or false, if there is anything.
fn flag(holder: &Value, key: &str) -> Result<Option<bool>> {
    match &holder[key] {
        Value::Null => Ok(None),
        Value::Bool(flag) => Ok(Some(*flag)),
        other => Err(Error::input(format_args!(
            "config.json: field `{key}` must be true or false, got {other}"
        ))),
    }
}

/// What cos and sin are multiplied by, if the config says so.
fn attention_factor(parameters: &Value) -> Result<Option<f64>> {
    const KEY: &str = "attention_factor";
    let given = optional_number(parameters, KEY)?;
    match given.filter(|factor| !(*factor as f32).is_normal() || *factor < 0.0) {
        Some(wrong) => {
            let what = format_args!("config.json: {KEY} is {wrong}, expected a number above 0");
            Err(Error::input(what))
        }
        None => Ok(given),
    }
}

fn scaling_from(parameters: &Value, config: &Value) -> Result<RopeScaling> {
    let kind = match parameters.get("rope_type").or(parameters.get("type")) {
        None | Some(Value::Null) => "default",
        Some(Value::String(kind)) => kind,
        Some(other) => {
            let what = format_args!("config.json: rope_type must be text, got {other}");
            return Err(Error::input(what));
        }
    };
    let optional = |key: &str| optional_number(parameters, key);
    let number = |key: &str| {
        optional(key)?.filter(|v| v.is_finite() && *v > 0.0).ok_or_else(|| {
            Error::input(format_args!("config.json: rope scaling needs a positive `{key}`"))
        })
    };
    let max_positions = optional_number(config, "max_position_embeddings")?;
    let original = || match original_length(parameters, config)? {
        Some(length) if length >= 1.0 => Ok(length as usize),
        _ => number("original_max_position_embeddings").map(|length| length as usize),
    };
    Ok(match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: number("factor")? },
        "dynamic" => RopeScaling::Dynamic {
            factor: number("factor")?,
            // transformers scales by the configured length, not by the original one.
            original_max_position_embeddings: max_positions.unwrap_or(2048.0) as usize,
        },
        "yarn" => {
            let factor = number("factor")?;
            // As in Python, 0 counts as absent.
            let given = |key: &str| Ok::<_, Error>(optional(key)?.filter(|v| *v != 0.0));
            let implied = match (given("mscale")?, given("mscale_all_dim")?) {
                (Some(m), Some(all)) => yarn_mscale(factor, m) / yarn_mscale(factor, all),
                _ => yarn_attention_factor(factor, 0.0),
            };
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original()?,
                beta_fast: given("beta_fast")?.unwrap_or(32.0),
                beta_slow: given("beta_slow")?.unwrap_or(1.0),
                attention_factor: attention_factor(parameters)?.unwrap_or(implied),
                truncate: flag(parameters, "truncate")?.unwrap_or(true),
            }
        }
        "longrope" => long_rope(parameters, config)?,
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
            .hint("supported: default, linear, dynamic, yarn, longrope, llama3"));
        }
    })
}

fn long_rope(parameters: &Value, config: &Value) -> Result<RopeScaling> {
    const ORIGINAL: &str = "original_max_position_embeddings";
    const LONGEST: f64 = (1u64 << 30) as f64;
    let longest = optional_number(config, "max_position_embeddings")?;
    let original = original_length(parameters, config)?;
    let original = original.filter(|length| (2.0..LONGEST).contains(length)).ok_or_else(|| {
        Error::input(format_args!("config.json: longrope needs an `{ORIGINAL}` above 1"))
    })?;
    let divisors = |key: &str| {
        let listed = parameters[key].as_array().map_or(&[][..], Vec::as_slice);
        let divisor = |value: &Value| value.as_f64().map(|x| x as f32);
        let divisor = |value| divisor(value).filter(|x| x.is_normal() && *x > 0.0);
        let divisors: Option<Vec<f32>> = listed.iter().map(divisor).collect();
        divisors.filter(|divisors| !divisors.is_empty()).ok_or_else(|| {
            Error::input(format_args!("config.json: longrope needs positive numbers `{key}`"))
        })
    };
    let stretch = optional_number(parameters, "factor")?;
    let stretch = stretch.unwrap_or(longest.unwrap_or(original) / original);
    Ok(RopeScaling::LongRope {
        short_factor: divisors("short_factor")?,
        long_factor: divisors("long_factor")?,
        original_max_position_embeddings: original as usize,
        attention_factor: attention_factor(parameters)?
            .unwrap_or_else(|| long_rope_attention_factor(stretch, original)),
    })
}

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

fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
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
