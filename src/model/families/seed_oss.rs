//! Seed-OSS: a Llama with biases on q, k and v. Source: transformers
//! `models/seed_oss/configuration_seed_oss.py`.

use serde_json::Value;

use super::fields::Fields;
use super::llama;
use crate::error::Result;
use crate::model::spec::{Family, ModelSpec};

pub(super) fn seed_oss(fields: &Fields) -> Result<ModelSpec> {
    let mut config = fields.with_defaults([
        ("vocab_size", Value::from(155_136)),
        ("max_position_embeddings", 524_288.into()),
        ("attention_bias", true.into()),
    ]);
    for (key, absent) in [("head_dim", 128), ("num_key_value_heads", 8)] {
        if let Some(value) = fields.if_absent(key, absent) {
            config[key] = value.into();
        }
    }
    let mut spec = llama(&Fields(&config), Family::SeedOss)?;
    spec.output_bias = fields.flag_or("attention_out_bias", false)?;
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::model::families::spec_from_config;

    #[test]
    fn a_seed_oss_has_biases_on_q_k_and_v_where_its_config_is_silent() {
        let mut config = json!({
            "model_type": "seed_oss", "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 1, "num_attention_heads": 16,
        });
        let spec = spec_from_config(&config).unwrap();
        assert_eq!((spec.vocab_size, spec.head_dim, spec.num_kv_heads), (155_136, 128, 8));
        assert_eq!((spec.qkv_bias, spec.output_bias, spec.mlp_bias), (true, false, false));
        config["attention_bias"] = false.into();
        config["attention_out_bias"] = true.into();
        let spec = spec_from_config(&config).unwrap();
        assert_eq!((spec.qkv_bias, spec.output_bias), (false, true));
    }
}
