//! GLM-4 of 0414 and GLM-Z1: four norms a block, gate and up fused, neighbours in a head turned as pairs.
//! Source: transformers `models/glm4/modeling_glm4.py`, `configuration_glm4.py`.

use serde_json::Value;

use super::fields::Fields;
use super::{check_silu, decoder};
use crate::error::Result;
use crate::model::names::Names;
use crate::model::spec::{Family, ModelSpec, Projections, RotaryPairs};

pub(super) fn glm4(fields: &Fields) -> Result<ModelSpec> {
    check_silu(fields)?;
    let mut config = fields.with_defaults([
        ("vocab_size", Value::from(151_552)),
        ("num_key_value_heads", 2.into()),
        ("head_dim", 128.into()),
        ("max_position_embeddings", 131_072.into()),
        ("rms_norm_eps", 1.5625e-7.into()),
        ("attention_bias", true.into()),
    ]);
    let holds = |holder: &Value| !holder["partial_rotary_factor"].is_null();
    if ![fields.0, &fields.0["rope_parameters"], &fields.0["rope_scaling"]].into_iter().any(holds) {
        config["partial_rotary_factor"] = 0.5.into();
    }
    let mut spec = decoder(&Fields(&config), Family::Glm4)?;
    (spec.post_norms, spec.names) = (true, &Names::GLM4);
    (spec.projections, spec.rotary_pairs) = (Projections::FusedGateUp, RotaryPairs::Neighbours);
    (spec.output_bias, spec.mlp_bias) = (false, false);
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::model::families::spec_from_config;

    #[test]
    fn a_glm_is_what_its_class_makes_of_silence() {
        let mut config = json!({
            "model_type": "glm4", "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 1, "num_attention_heads": 4,
        });
        let spec = spec_from_config(&config).unwrap();
        assert_eq!((spec.vocab_size, spec.num_kv_heads, spec.norm_eps), (151_552, 2, 1.5625e-7));
        assert_eq!((spec.head_dim, spec.rotary_dim), (128, 64));
        assert!(spec.qkv_bias && !spec.output_bias);
        let linears: Vec<String> = spec.linears(0).into_iter().map(|it| it.module).collect();
        assert_eq!(linears[4], "model.layers.0.mlp.gate_up_proj");
        let norms = spec.layer_norm_modules(0).unwrap();
        assert_eq!(norms[1], "model.layers.0.post_attention_layernorm");
        let norms = spec.post_norm_modules(0).unwrap();
        assert_eq!(norms[0], "model.layers.0.post_self_attn_layernorm");
        config["rope_parameters"] = json!({"rope_theta": 1e4, "partial_rotary_factor": 1.0});
        assert_eq!(spec_from_config(&config).unwrap().rotary_dim, 128);
    }
}
