//! Rotary position embedding as a `config.json` has it. Source: transformers `modeling_rope_utils.py`.

use serde_json::Value;

use crate::error::{Error, Result};
use crate::model::rotary::{long_rope_attention_factor, yarn_attention_factor, yarn_mscale};
use crate::model::spec::{QueryScaling, RopeScaling, Rotary};

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
fn parameters_of(config: &Value) -> &Value {
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
    let number = |key: &str| positive(parameters, key);
    Ok(match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: number("factor")? },
        "dynamic" => {
            // transformers scales by the configured length, not by the original one.
            let length = optional_number(config, "max_position_embeddings")?.unwrap_or(2048.0);
            let original_max_position_embeddings = length as usize;
            RopeScaling::Dynamic { factor: number("factor")?, original_max_position_embeddings }
        }
        "yarn" => yarn(parameters, config)?,
        "longrope" => long_rope(parameters, config)?,
        "llama3" => RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_position_embeddings: whole_original_length(parameters, config)?,
        },
        other => {
            let what = format_args!("config.json: rope_type `{other}` is not supported");
            let hint = "supported: default, linear, dynamic, yarn, longrope, llama3";
            return Err(Error::input(what).hint(hint));
        }
    })
}

fn yarn(parameters: &Value, config: &Value) -> Result<RopeScaling> {
    let factor = positive(parameters, "factor")?;
    // As in Python, 0 counts as absent.
    let given = |key: &str| {
        optional_number(parameters, key).map(|number| number.filter(|number| *number != 0.0))
    };
    let implied = match (given("mscale")?, given("mscale_all_dim")?) {
        (Some(m), Some(all)) => yarn_mscale(factor, m) / yarn_mscale(factor, all),
        _ => yarn_attention_factor(factor, 0.0),
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_max_position_embeddings: whole_original_length(parameters, config)?,
        beta_fast: given("beta_fast")?.unwrap_or(32.0),
        beta_slow: given("beta_slow")?.unwrap_or(1.0),
        attention_factor: attention_factor(parameters)?.unwrap_or(implied),
        truncate: flag(parameters, "truncate")?.unwrap_or(true),
    })
}

/// A number of a scaling that does not go without.
fn positive(parameters: &Value, key: &str) -> Result<f64> {
    optional_number(parameters, key)?.filter(|v| v.is_finite() && *v > 0.0).ok_or_else(|| {
        Error::input(format_args!("config.json: rope scaling needs a positive `{key}`"))
    })
}

fn whole_original_length(parameters: &Value, config: &Value) -> Result<usize> {
    match original_length(parameters, config)? {
        Some(length) if length >= 1.0 => Ok(length as usize),
        _ => positive(parameters, "original_max_position_embeddings").map(|length| length as usize),
    }
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
