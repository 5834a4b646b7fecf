//! Mistral: a Llama without biases, with a window or with a scale of q. Sources: transformers
//! `models/mistral/configuration_mistral.py`, `models/ministral/configuration_ministral.py`,
//! `models/ministral3/configuration_ministral3.py`.

use serde_json::{Value, json};

use super::fields::Fields;
use super::llama;
use super::rope::query_scaling;
use crate::error::Result;
use crate::model::spec::{Family, ModelSpec};

pub(super) fn mistral(fields: &Fields) -> Result<ModelSpec> {
    let config = fields.with_defaults([("max_position_embeddings", 131_072)]);
    let fields = &Fields(&config);
    let mut spec = without_biases(fields, Family::Mistral)?;
    // With `layer_types` it is a Ministral for transformers: `models/ministral`.
    spec.windows = match fields.window_or(Some(4096))? {
        Some(window) => fields.windows(spec.num_layers, window, |_| true)?,
        None => vec![None; spec.num_layers],
    };
    Ok(spec)
}

pub(super) fn ministral3(fields: &Fields) -> Result<ModelSpec> {
    const LONGEST: &str = "max_position_embeddings";
    let mut config =
        fields.with_defaults([(LONGEST, Value::from(262_144)), ("rms_norm_eps", 1e-5.into())]);
    if let Some(width) = fields.if_absent("head_dim", 128) {
        config["head_dim"] = width.into();
    }
    if ["rope_parameters", "rope_scaling"].iter().all(|key| fields.present(key).is_none()) {
        config["rope_parameters"] = default_rope();
    }
    let fields = &Fields(&config);
    let mut spec = without_biases(fields, Family::Ministral3)?;
    spec.query_scaling = query_scaling(fields.0)?;
    spec.windows = vec![fields.window_or(None)?; spec.num_layers];
    Ok(spec)
}

fn default_rope() -> Value {
    json!({
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0,
        "original_max_position_embeddings": 16_384, "beta_fast": 32.0, "beta_slow": 1.0,
        "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    })
}

fn without_biases(fields: &Fields, family: Family) -> Result<ModelSpec> {
    let mut spec = llama(fields, family)?;
    spec.num_kv_heads = fields.if_absent("num_key_value_heads", 8).unwrap_or(spec.num_kv_heads);
    (spec.qkv_bias, spec.output_bias, spec.mlp_bias) = (false, false, false);
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::families::spec_from_config;
    use crate::model::spec::RopeScaling;

    fn read(extra: Value) -> Result<ModelSpec> {
        let mut config = json!({
            "model_type": "ministral3", "hidden_size": 64, "intermediate_size": 64,
            "vocab_size": 99, "num_hidden_layers": 2, "num_attention_heads": 8,
        });
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        spec_from_config(&config)
    }

    /// The config as the hub has the text of Ministral-3-3B-Base-2512, but for the sizes.
    #[test]
    fn the_published_ministral_is_read() {
        let spec = read(json!({
            "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu",
            "max_position_embeddings": 262144, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1,
                "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384,
                "rope_theta": 1000000.0, "rope_type": "yarn", "type": "yarn",
            },
            "sliding_window": null, "tie_word_embeddings": true,
        }));
        let spec = spec.unwrap();
        assert_eq!(spec, read(json!({"tie_word_embeddings": true})).unwrap(), "all are defaults");
        assert_eq!((spec.head_dim, spec.num_kv_heads, spec.max_positions), (128, 8, 262_144));
        let rotary = spec.rotary.as_ref().unwrap();
        assert_eq!(rotary.theta, 1e6);
        let RopeScaling::Yarn { attention_factor, .. } = rotary.scaling else { panic!("yarn") };
        assert_eq!(attention_factor, 1.0, "mscale and mscale_all_dim cancel");
        let scaling = spec.query_scaling.unwrap();
        let factors = [0, 16_383, 16_384, 40_000].map(|position| scaling.factor(position));
        assert_eq!(factors, [1.0, 1.0, 1.0 + 0.1 * 2f32.ln(), 1.0 + 0.1 * 3f32.ln()]);
    }

    /// Ministral-8B-2410 calls itself a Mistral.
    #[test]
    fn windows_are_where_the_layer_types_have_them() {
        let types = json!(["sliding_attention", "full_attention"]);
        for name in ["mistral", "ministral"] {
            let windows = |extra: Value| {
                let mut config = json!({"model_type": name, "sliding_window": 7});
                config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
                read(config).unwrap().windows
            };
            assert_eq!(windows(json!({})), [Some(7), Some(7)]);
            assert_eq!(windows(json!({"layer_types": types})), [Some(7), None]);
            assert_eq!(windows(json!({"layer_types": types, "sliding_window": null})), [None; 2]);
        }
    }

    #[test]
    fn null_is_not_the_default() {
        let nulls = json!({"head_dim": null, "num_key_value_heads": null, "sliding_window": 5});
        let spec = read(nulls).unwrap();
        assert_eq!((spec.head_dim, spec.num_kv_heads, spec.windows[1]), (8, 8, Some(5)));
    }

    #[test]
    fn a_scale_needs_the_trained_length() {
        let plain = json!({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}});
        assert_eq!(read(plain).unwrap().query_scaling, None);
        for (key, wrong) in [
            ("llama_4_scaling_beta", json!("steep")),
            ("original_max_position_embeddings", json!(0)),
        ] {
            let mut rope = default_rope();
            rope[key] = wrong;
            let error = read(json!({"rope_parameters": rope})).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }
}
