//! Qwen 2 and 3: Llamas with biases on q, k and v, or with norms of heads. Sources: transformers
//! `models/qwen{2,3}/configuration_qwen*.py`.

use super::fields::Fields;
use super::llama;
use crate::error::Result;
use crate::model::spec::{Family, ModelSpec, QkNorm};

pub(super) fn qwen2(fields: &Fields) -> Result<ModelSpec> {
    let config = fields.with_defaults([("max_position_embeddings", 32_768)]);
    let fields = &Fields(&config);
    let mut spec = llama(fields, Family::Qwen2)?;
    spec.num_kv_heads = fields.if_absent("num_key_value_heads", 32).unwrap_or(spec.num_kv_heads);
    (spec.qkv_bias, spec.output_bias, spec.mlp_bias) = (true, false, false);
    spec.windows = qwen_windows(fields, spec.num_layers)?;
    Ok(spec)
}

pub(super) fn qwen3(fields: &Fields) -> Result<ModelSpec> {
    let config = fields.with_defaults([("head_dim", 128), ("max_position_embeddings", 32_768)]);
    let fields = &Fields(&config);
    let mut spec = llama(fields, Family::Qwen3)?;
    spec.num_kv_heads = fields.if_absent("num_key_value_heads", 32).unwrap_or(spec.num_kv_heads);
    (spec.qk_norm, spec.mlp_bias) = (Some(QkNorm::Heads), false);
    spec.windows = qwen_windows(fields, spec.num_layers)?;
    Ok(spec)
}

/// Windows in the layers from `max_window_layers` on, unless `layer_types` has them elsewhere.
fn qwen_windows(fields: &Fields, num_layers: usize) -> Result<Vec<Option<usize>>> {
    if !fields.flag_or("use_sliding_window", false)? {
        return Ok(vec![None; num_layers]);
    }
    let Some(window) = fields.window_or(Some(4096))? else {
        return Ok(vec![None; num_layers]);
    };
    let first = fields.size_or("max_window_layers", 28)?;
    fields.windows(num_layers, window, |layer| layer >= first)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::model::families::spec_from_config;

    #[test]
    fn heads_of_a_qwen3_are_128_wide_where_its_config_is_silent() {
        let spec = spec_from_config(&json!({
            "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 64, "vocab_size": 99,
            "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 8,
        }));
        let spec = spec.unwrap();
        assert_eq!((spec.head_dim, spec.rotary_dim, spec.q_width()), (128, 128, 2048));
        assert_eq!(spec.attention_scale, 1.0 / 128_f32.sqrt());
    }
}
