//! Granite: a Llama with four factors. Sources: transformers `models/granite/modeling_granite.py`,
//! `configuration_granite.py`, and `models/granitemoehybrid` for Granite 4.

use serde_json::Value;

use super::fields::{Fields, unsupported, wrong_type};
use super::llama;
use crate::error::Result;
use crate::model::spec::{Family, ModelSpec, Projections};

pub(super) fn granite(fields: &Fields) -> Result<ModelSpec> {
    any_granite(fields, Family::Granite)
}

/// Granite 4, of which only models of attention and one MLP are: no experts, no Mamba.
pub(super) fn granite_moe_hybrid(fields: &Fields) -> Result<ModelSpec> {
    const WIDTH: &str = "shared_intermediate_size";
    let mut config = fields.with_defaults([("num_local_experts", 8), (WIDTH, 1024)]);
    config["intermediate_size"] = config[WIDTH].clone();
    let fields = &Fields(&config);
    fields.unless("num_local_experts", |experts| experts == 0, DENSE)?;
    let mut spec = any_granite(fields, Family::GraniteMoeHybrid)?;
    check_attention(fields, spec.num_layers)?;
    let positions = fields.text_or("position_embedding_type", "nope")?;
    if positions != "rope" {
        let hint = "only `rope` is implemented";
        return Err(unsupported("position_embedding_type", positions, hint));
    }
    (spec.projections, spec.mlp_bias) = (Projections::SharedMlp, false);
    Ok(spec)
}

const DENSE: &str = "only Granites without experts and Mamba are, such as granite-4.0-micro";

/// Refuses layers of Mamba, which all are where a config is silent.
fn check_attention(fields: &Fields, num_layers: usize) -> Result<()> {
    let listed = |key| fields.present(key).map(|kinds| (key, kinds));
    let listed = listed("layer_types").or_else(|| listed("layers_block_type"));
    let Some((key, value)) = listed else { return Err(unsupported("layer_types", "null", DENSE)) };
    let attends = |kind: &Value| kind == "attention" || kind == "full_attention";
    let kinds = value.as_array().filter(|kinds| kinds.len() == num_layers);
    let kinds =
        kinds.ok_or_else(|| wrong_type(key, &format!("a list of {num_layers} names"), value))?;
    match kinds.iter().find(|kind| !attends(kind)) {
        Some(other) => Err(unsupported(key, other, DENSE)),
        None => Ok(()),
    }
}

fn any_granite(fields: &Fields, family: Family) -> Result<ModelSpec> {
    let mut spec = llama(fields, family)?;
    spec.scales_behind_noise = true;
    spec.embedding_scale = multiplier(fields, "embedding_multiplier")?;
    spec.residual_scale = multiplier(fields, "residual_multiplier")?;
    spec.logit_divisor = multiplier(fields, "logits_scaling")?;
    spec.attention_scale = multiplier(fields, "attention_multiplier")?;
    Ok(spec)
}

/// 1 where the config is silent.
fn multiplier(fields: &Fields, key: &str) -> Result<f32> {
    let Some(value) = fields.present(key) else { return Ok(1.0) };
    let number = value.as_f64().map(|number| number as f32);
    let usual = number.filter(|number| (1e-6..=1e6).contains(number));
    usual.ok_or_else(|| wrong_type(key, "a number from 1e-6 to 1e6", value))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::families::spec_from_config;

    fn config(extra: Value) -> Result<ModelSpec> {
        let mut config = json!({
            "model_type": "granite", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 99,
            "num_hidden_layers": 1, "num_attention_heads": 4,
        });
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        spec_from_config(&config)
    }

    /// Scores of a Granite that names no multiplier are not divided by the root of the heads' width.
    #[test]
    fn every_factor_is_1_where_the_config_is_silent() {
        let spec = config(json!({})).unwrap();
        assert_eq!((spec.embedding_scale, spec.residual_scale), (1.0, 1.0));
        assert_eq!((spec.logit_divisor, spec.attention_scale), (1.0, 1.0));
    }

    /// The factors of granite-3.3-2b-instruct.
    #[test]
    fn the_stream_is_held_divided_by_the_residual_multiplier() {
        let spec = config(json!({
            "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0,
            "attention_multiplier": 0.015625, "rms_norm_eps": 1e-5,
        }));
        let spec = spec.unwrap();
        assert_eq!((spec.logit_divisor, spec.attention_scale), (8.0, 1.0 / 64.0));
        assert_eq!((spec.stream_scale(), spec.noise_scale()), (12.0 / 0.22, 12.0 / 0.22));
        assert!((spec.stream_norm_eps() / (1e-5 / 0.0484) - 1.0).abs() < 1e-6);
    }

    fn granite_4(extra: Value) -> Result<ModelSpec> {
        let mut config = json!({
            "model_type": "granitemoehybrid", "num_local_experts": 0, "layer_types": ["attention"],
            "position_embedding_type": "rope", "shared_intermediate_size": 48,
        });
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        self::config(config)
    }

    /// As granite-4.0-micro has it; transformers 5 calls the layers otherwise.
    #[test]
    fn a_granite_4_without_experts_is_a_granite_with_a_fused_mlp() {
        let spec = granite_4(json!({"residual_multiplier": 0.22})).unwrap();
        assert_eq!((spec.family, spec.residual_scale), (Family::GraniteMoeHybrid, 0.22));
        let linears = spec.linears(0).into_iter().map(|it| (it.module, it.out_features));
        let linears: Vec<(String, usize)> = linears.collect();
        assert_eq!(linears[4], ("model.layers.0.shared_mlp.input_linear".into(), 2 * 48));
        assert_eq!(linears[5], ("model.layers.0.shared_mlp.output_linear".into(), 64));
        let named = json!({"layer_types": null, "layers_block_type": ["full_attention"]});
        assert_eq!(granite_4(named).unwrap().linears(0).len(), 6);
    }

    #[test]
    fn a_granite_4_with_more_than_attention_is_refused() {
        for (extra, says) in [
            (json!({"num_local_experts": 64}), "num_local_experts = 64 is not supported"),
            (json!({"num_local_experts": null}), "num_local_experts = 8 is not supported"),
            (json!({"layer_types": ["mamba"]}), "layer_types = \"mamba\" is not supported"),
            (json!({"layer_types": null}), "layer_types = null is not supported"),
            (json!({"layer_types": []}), "`layer_types` must be a list of 1 names"),
            (json!({"position_embedding_type": "nope"}), "position_embedding_type = nope"),
            (json!({"position_embedding_type": null}), "position_embedding_type = nope"),
        ] {
            let error = granite_4(extra).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn factors_that_leave_nothing_are_named() {
        for (key, value) in [
            ("embedding_multiplier", json!(0)),
            ("residual_multiplier", json!(-0.22)),
            ("logits_scaling", json!(1e-30)),
            ("attention_multiplier", json!("1")),
        ] {
            let error = config(json!({key: value})).unwrap_err().to_string();
            let says = format!("field `{key}` must be a number from 1e-6 to 1e6, got {value}");
            assert!(error.contains(&says), "{error}");
        }
    }
}
