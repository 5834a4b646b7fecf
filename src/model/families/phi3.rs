//! Phi-3, Phi-3.5 and Phi-4. Source: transformers `models/phi3/modeling_phi3.py`,
//! `configuration_phi3.py`.

use super::fields::Fields;
use super::{check_silu, decoder};
use crate::error::Result;
use crate::model::spec::{Family, ModelSpec, Projections};

pub(super) fn phi3(fields: &Fields) -> Result<ModelSpec> {
    check_silu(fields)?;
    let mut config = fields.0.clone();
    for (key, value) in [
        ("max_position_embeddings", 4096),
        ("original_max_position_embeddings", 4096),
        ("vocab_size", 32_064),
    ] {
        if fields.present(key).is_none() {
            config[key] = value.into();
        }
    }
    if fields.present("rms_norm_eps").is_none() {
        config["rms_norm_eps"] = 1e-5.into();
    }
    // The first files called LongRoPE by other names.
    for holder in ["rope_parameters", "rope_scaling"] {
        let kind = |key: &str| fields.0[holder][key].as_str();
        if let Some("su" | "yarn") = kind("rope_type").or(kind("type")) {
            config[holder]["rope_type"] = "longrope".into();
        }
    }
    let mut spec = decoder(&Fields(&config), Family::Phi3)?;
    spec.windows = vec![fields.window_or(None)?; spec.num_layers];
    spec.projections = Projections::Fused;
    (spec.qkv_bias, spec.output_bias, spec.mlp_bias) = (false, false, false);
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::model::families::spec_from_config;
    use crate::model::spec::RopeScaling;

    fn config(extra: Value) -> Result<ModelSpec> {
        let mut config = json!({
            "model_type": "phi3", "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4,
        });
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        spec_from_config(&config)
    }

    #[test]
    fn a_phi_is_what_its_class_makes_of_silence() {
        let plain = config(json!({})).unwrap();
        assert_eq!((plain.vocab_size, plain.max_positions), (32_064, 4096));
        assert_eq!((plain.norm_eps, plain.num_kv_heads, plain.rotary_dim), (1e-5, 4, 16));
        assert_eq!((plain.windows, plain.tie_word_embeddings), (vec![None; 2], false));
        let window = config(json!({"sliding_window": 2047})).unwrap();
        assert_eq!(window.windows, [Some(2047); 2]);
        let modules: Vec<String> = window.linears(1).into_iter().map(|it| it.module).collect();
        assert_eq!(modules[0], "model.layers.1.self_attn.qkv_proj");
        assert_eq!(modules[2], "model.layers.1.mlp.gate_up_proj");
        assert_eq!(window.linears(1)[2].out_features, 2 * 96);
    }

    /// The config as the files of Phi-3-mini-128k and Phi-4-mini have it.
    #[test]
    fn long_rope_by_every_name() {
        let extra = |kind: &str, key: &str| {
            json!({
                "max_position_embeddings": 131_072, "original_max_position_embeddings": 4096,
                "partial_rotary_factor": 0.75, "rope_theta": 10_000.0,
                "rope_scaling": {key: kind, "short_factor": [1, 1.25, 1, 1, 1, 2],
                                 "long_factor": [1, 1, 2, 3, 4, 5.5]},
            })
        };
        for kind in ["su", "yarn", "longrope"] {
            for key in ["type", "rope_type"] {
                let spec = config(extra(kind, key)).unwrap();
                assert_eq!(spec.rotary_dim, 12);
                // sqrt(1 + ln 32 / ln 4096)
                let factor = (1.0_f64 + 5.0 / 12.0).sqrt();
                let RopeScaling::LongRope {
                    short_factor,
                    long_factor,
                    original_max_position_embeddings,
                    attention_factor,
                } = spec.rotary.unwrap().scaling
                else {
                    panic!("{kind}");
                };
                assert!((attention_factor - factor).abs() < 1e-12);
                assert_eq!(short_factor, [1.0, 1.25, 1.0, 1.0, 1.0, 2.0]);
                assert_eq!((long_factor[5], original_max_position_embeddings), (5.5, 4096));
            }
        }
    }

    /// The class' own length comes before that of the scaling.
    #[test]
    fn the_trained_length_is_4096_where_the_config_is_silent() {
        let factors = vec![1.0; 8];
        let spec = config(json!({
            "max_position_embeddings": 131_072,
            "rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 8192,
                                "short_factor": factors, "long_factor": factors},
        }));
        let RopeScaling::LongRope { original_max_position_embeddings, attention_factor, .. } =
            spec.unwrap().rotary.unwrap().scaling
        else {
            panic!("another scaling");
        };
        assert_eq!(original_max_position_embeddings, 4096);
        assert!((attention_factor - (1.0_f64 + 5.0 / 12.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let rope = |short: Value, long: Value| json!({"rope_scaling": {"type": "longrope", "short_factor": short, "long_factor": long}});
        let eight = || json!(vec![1.0; 8]);
        let rope_with = |key: &str, value: Value| {
            let mut config = rope(eight(), eight());
            config["rope_scaling"][key] = value;
            config
        };
        assert!(config(rope(eight(), eight())).is_ok());
        for (extra, says) in [
            (
                rope(eight(), json!([1.0])),
                "`long_factor` of the rope scaling has 1 numbers, expected 8",
            ),
            (rope(json!("all"), eight()), "short_factor"),
            (rope(eight(), json!(null)), "long_factor"),
            (rope(json!(vec![0.0; 8]), eight()), "short_factor"),
            (json!({"partial_rotary_factor": 0.2}), "turns 3 elements of heads of 16"),
            (json!({"partial_rotary_factor": 0.0}), "turns 0 elements"),
            (json!({"partial_rotary_factor": 1.5}), "turns 24 elements"),
            (json!({"partial_rotary_factor": "0.75"}), "`partial_rotary_factor` must be a number"),
            (rope_with("attention_factor", json!(1e300)), "attention_factor"),
            (rope_with("attention_factor", json!(-1)), "attention_factor"),
            (rope_with("factor", json!("32")), "`factor` must be a number"),
            (
                json!({"original_max_position_embeddings": 1u64 << 40,
                    "rope_scaling": rope(eight(), eight())["rope_scaling"]}),
                "original_max",
            ),
            (json!({"hidden_act": "gelu"}), "hidden_act"),
            (json!({"sliding_window": 0}), "sliding_window is 0"),
        ] {
            let error = config(extra).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
