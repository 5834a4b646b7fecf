//! `config.json` → [`ModelSpec`], one function per family.
//!
//! Reads both spellings: transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).
//! Missing keys take the defaults of transformers' config classes; an unknown family or a switch
//! that Nibble does not implement is an error that names the field.

mod fields;
mod gemma;
mod glm4;
mod gpt2;
mod granite;
mod layer_kinds;
mod mistral;
mod olmo;
mod phi3;
mod qwen;
mod rope;
mod seed_oss;
mod smollm3;

use serde_json::Value;

use fields::{Fields, unsupported};
use gemma::{gemma, gemma2, gemma3};
use glm4::glm4;
use gpt2::gpt2;
use granite::{granite, granite_moe_hybrid};
use mistral::{ministral3, mistral};
use olmo::{olmo2, olmo3};
use phi3::phi3;
use qwen::{qwen2, qwen3};
use rope::{partial_rotary_factor, rotary_from_config};
use seed_oss::seed_oss;
use smollm3::smollm3;

use super::names::Names;
use super::spec::{Activation, Family, ModelSpec, Norm, Projections, RopeScaling, RotaryPairs};
use crate::error::{Error, Result};

pub(crate) use fields::MOST_LAYERS;
pub(crate) use smollm3::{ROTATION_INTERVAL, rotates_every};

/// The spec of the model that `config` (a parsed `config.json`) describes.
///
/// # Errors
/// `Input` naming the field when the family is unknown, a dimension is missing or inconsistent, or
/// a switch has no implementation.
pub fn spec_from_config(config: &Value) -> Result<ModelSpec> {
    const GENERAL: &str = "config.json is damaged or belongs to another kind of model";
    read_spec(&Fields(config)).map_err(|error| error.or_hint(GENERAL))
}

/// Dropout of the base model that transformers applies in training and Nibble does not: the key of
/// `config` and its probability.
pub fn base_dropout(config: &Value) -> Option<(&'static str, f64)> {
    const KEYS: [&str; 5] =
        ["attention_dropout", "residual_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"];
    // Two classes drop where a config is silent.
    let silent: &[&str] = match config["model_type"].as_str() {
        Some("gpt2") => &KEYS[2..],
        Some("seed_oss") => &KEYS[..2],
        _ => &[],
    };
    let probability = |key: &'static str| {
        let default = if silent.contains(&key) { 0.1 } else { 0.0 };
        (key, config[key].as_f64().unwrap_or(default))
    };
    KEYS.map(probability).into_iter().find(|(_, probability)| *probability > 0.0)
}

fn read_spec(fields: &Fields) -> Result<ModelSpec> {
    let name = fields.text("model_type")?;
    let family = Family::of(name).ok_or_else(|| {
        let what = format_args!("config.json: model_type `{name}` is not supported");
        let all = Family::ALL.map(Family::model_type).join(", ");
        Error::input(what)
            .hint(format_args!("supported families: {all}, and the text of {WITH_TEXT}"))
    })?;
    let spec = match family {
        Family::Llama => llama(fields, family)?,
        Family::Mistral => mistral(fields)?,
        Family::Ministral3 => ministral3(fields)?,
        Family::Qwen2 => qwen2(fields)?,
        Family::Qwen3 => qwen3(fields)?,
        Family::SmolLm3 => smollm3(fields)?,
        Family::Granite => granite(fields)?,
        Family::GraniteMoeHybrid => granite_moe_hybrid(fields)?,
        Family::SeedOss => seed_oss(fields)?,
        Family::Glm4 => glm4(fields)?,
        Family::Olmo2 => olmo2(fields)?,
        Family::Olmo3 => olmo3(fields)?,
        Family::Gemma => gemma(fields)?,
        Family::Gemma2 => gemma2(fields)?,
        Family::Gemma3 => gemma3(fields)?,
        Family::Phi3 => phi3(fields)?,
        Family::Gpt2 => gpt2(fields)?,
    };
    validate(&spec)?;
    Ok(spec)
}

/// Models for text and images whose text is of one of the families.
const WITH_TEXT: &str = "gemma3, mistral3 and qwen3_vl";

/// `swish` is another name of it in transformers.
fn check_silu(fields: &Fields) -> Result<()> {
    let is_silu = |name: &Value| name == "silu" || name == "swish";
    fields.unless("hidden_act", is_silu, "only `silu` is implemented")
}

fn llama(fields: &Fields, family: Family) -> Result<ModelSpec> {
    check_silu(fields)?;
    decoder(fields, family)
}

/// What all but GPT-2 have in common, with Llama's switches.
fn decoder(fields: &Fields, family: Family) -> Result<ModelSpec> {
    let hidden_size = fields.size("hidden_size")?;
    let num_heads = fields.size("num_attention_heads")?;
    let num_layers = fields.layers("num_hidden_layers")?;
    let head_dim = fields.size_or("head_dim", hidden_size / num_heads.max(1))?;
    let attention_bias = fields.flag_or("attention_bias", false)?;
    Ok(ModelSpec {
        family,
        vocab_size: fields.size("vocab_size")?,
        hidden_size,
        intermediate_size: fields.size("intermediate_size")?,
        num_layers,
        num_heads,
        num_kv_heads: fields.size_or("num_key_value_heads", num_heads)?,
        head_dim,
        norm: Norm::Rms,
        norm_eps: fields.number_or("rms_norm_eps", 1e-6)?,
        norm_plus_one: false,
        pre_norms: true,
        post_norms: false,
        embedding_scale: 1.0,
        scales_behind_noise: false,
        residual_scale: 1.0,
        logit_divisor: 1.0,
        activation: Activation::Silu,
        projections: Projections::Separate,
        names: &Names::LLAMA,
        rotary: Some(rotary_from_config(fields.0)?),
        rotary_dim: rotary_dim(fields, family, head_dim)?,
        rotary_pairs: RotaryPairs::Halves,
        local_rotary: None,
        query_scaling: None,
        rotates: vec![true; num_layers],
        learned_positions: None,
        qkv_bias: attention_bias,
        qk_norm: None,
        attention_scale: 1.0 / (head_dim as f32).sqrt(),
        attention_soft_cap: None,
        logit_soft_cap: None,
        output_bias: attention_bias,
        mlp_bias: fields.flag_or("mlp_bias", false)?,
        windows: vec![None; num_layers],
        tie_word_embeddings: fields.flag_or("tie_word_embeddings", false)?,
        max_positions: fields.size_or("max_position_embeddings", 2048)?,
        bos_token_id: fields.token_ids("bos_token_id")?.first().copied(),
        eos_token_ids: fields.token_ids("eos_token_id")?,
    })
}

/// Elements of each head that turn: of Phi-3 and GLM-4, part of a head may.
fn rotary_dim(fields: &Fields, family: Family, head_dim: usize) -> Result<usize> {
    if !matches!(family, Family::Phi3 | Family::Glm4) {
        return whole_heads(fields.0).map(|()| head_dim);
    }
    Ok((head_dim as f64 * partial_rotary_factor(fields.0)?) as usize)
}

/// Refuses a config whose heads turn in part.
fn whole_heads(config: &Value) -> Result<()> {
    let fraction = partial_rotary_factor(config)?;
    if fraction != 1.0 {
        let hint = "models of this family rotate whole heads";
        return Err(unsupported("partial_rotary_factor", fraction, hint));
    }
    Ok(())
}

/// Dimensions that do not fit each other are found here, before any weight is read.
fn validate(spec: &ModelSpec) -> Result<()> {
    let sizes = [
        ("vocab_size", spec.vocab_size),
        ("hidden_size (n_embd)", spec.hidden_size),
        ("intermediate_size (n_inner)", spec.intermediate_size),
        ("num_hidden_layers (n_layer)", spec.num_layers),
        ("num_attention_heads (n_head)", spec.num_heads),
        ("num_key_value_heads", spec.num_kv_heads),
        ("head_dim", spec.head_dim),
        ("num_attention_heads · head_dim", spec.num_heads.saturating_mul(spec.head_dim)),
    ];
    // Larger values are lies: no model comes near, and products of them must not overflow.
    const LIMIT: usize = 1 << 24;
    if let Some((name, value)) = sizes.iter().find(|(_, v)| *v == 0 || *v > LIMIT) {
        let what = format_args!("config.json: {name} is {value}, expected 1 to {LIMIT}");
        return Err(Error::input(what).hint("the file is damaged: get it again"));
    }
    if spec.windows.contains(&Some(0)) {
        let what = "config.json: sliding_window is 0: no token would see itself";
        return Err(Error::input(what).hint("null, where the family has it, is no window"));
    }
    if !spec.num_heads.is_multiple_of(spec.num_kv_heads) {
        return Err(Error::input(format_args!(
            "config.json: num_attention_heads {} is not a multiple of num_key_value_heads {}",
            spec.num_heads, spec.num_kv_heads
        )));
    }
    check_rotary(spec)?;
    if spec.projections == Projections::Conv1d && spec.q_width() != spec.hidden_size {
        return Err(Error::input(format_args!(
            "config.json: n_embd {} is not a multiple of n_head {}",
            spec.hidden_size, spec.num_heads
        )));
    }
    let of_layers = [spec.windows.len(), spec.rotates.len()];
    assert_eq!(of_layers, [spec.num_layers; 2], "a family says something of each layer");
    Ok(())
}

fn check_rotary(spec: &ModelSpec) -> Result<()> {
    let (head, turned) = (spec.head_dim, spec.rotary_dim);
    if spec.rotary.is_some() && turned == head && !head.is_multiple_of(2) {
        let what = format_args!("config.json: head_dim {head} is odd");
        return Err(Error::input(what).hint("rotary embedding needs an even head_dim"));
    }
    if spec.rotary.is_some() && (!turned.is_multiple_of(2) || turned == 0 || turned > head) {
        let what = format_args!(
            "config.json: partial_rotary_factor turns {turned} elements of heads of {head}"
        );
        return Err(Error::input(what).hint("pairs of elements are turned"));
    }
    for rotary in spec.rotaries() {
        let RopeScaling::LongRope { short_factor, long_factor, .. } = &rotary.scaling else {
            continue;
        };
        for (key, factors) in [("short_factor", short_factor), ("long_factor", long_factor)] {
            let (got, expected) = (factors.len(), turned / 2);
            if got != expected {
                return Err(Error::input(format_args!(
                    "config.json: `{key}` of the rope scaling has {got} numbers, expected {expected}"
                )));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// What the classes of transformers have.
    #[test]
    fn a_config_that_is_silent_has_its_class_s_positions_and_windows() {
        let read = |family: &str, extra: Value| {
            let mut config = json!({
                "model_type": family, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 99,
                "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8,
            });
            config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            spec_from_config(&config).unwrap()
        };
        for (family, positions) in
            [("llama", 2048), ("qwen2", 32_768), ("qwen3", 32_768), ("mistral", 131_072)]
        {
            let dynamic = json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}});
            let spec = read(family, dynamic);
            assert_eq!(spec.max_positions, positions);
            let RopeScaling::Dynamic { original_max_position_embeddings, .. } =
                spec.rotary.unwrap().scaling
            else {
                panic!("{family}");
            };
            assert_eq!(original_max_position_embeddings, positions);
        }
        for family in ["qwen2", "qwen3"] {
            let slides = json!({"use_sliding_window": true, "max_window_layers": 0});
            assert_eq!(read(family, slides.clone()).windows, [Some(4096)]);
            let mut null = slides;
            null["sliding_window"] = Value::Null;
            assert_eq!(read(family, null).windows, [None]);
        }
    }

    #[test]
    fn dropout_of_the_base_is_known_by_every_name() {
        let llama = |extra: Value| {
            let mut config = json!({"model_type": "llama"});
            config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            base_dropout(&config)
        };
        assert_eq!(llama(json!({})), None);
        assert_eq!(llama(json!({"attention_dropout": 0.0})), None);
        assert_eq!(llama(json!({"attention_dropout": 0.2})), Some(("attention_dropout", 0.2)));
        // Classes that have it by default.
        let gpt2 = json!({"model_type": "gpt2", "attn_pdrop": 0.0});
        assert_eq!(base_dropout(&gpt2), Some(("resid_pdrop", 0.1)));
        let seed_oss = json!({"model_type": "seed_oss", "attention_dropout": 0.0});
        assert_eq!(base_dropout(&seed_oss), Some(("residual_dropout", 0.1)));
    }
}
