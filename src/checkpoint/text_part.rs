//! The language model inside a model for text and images: Gemma 3's larger checkpoints.
//!
//! Seen through here such a checkpoint is the text model alone: `text_config` is the config, tensors have
//! the names of transformers' `Gemma3ForCausalLM`, and the vision tower is not there. Source: transformers
//! `models/gemma3/modeling_gemma3.py`.

use serde_json::{Value, json};

/// Where the text model's tensors lie, in files of the hub and in those that transformers 5 names as its
/// modules.
const PREFIXES: [(&str, &str); 3] = [
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
];

/// What is said of the whole model and holds for its text.
const SHARED: [&str; 6] =
    ["bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "quantization_config"];

/// Whether `config` is that of a model for text and images.
pub(super) fn is_more(config: &Value) -> bool {
    config["model_type"] == "gemma3" && config["text_config"].is_object()
}

/// The text model's part of such a config.
pub(super) fn config(config: &Value) -> Value {
    let mut text = config["text_config"].clone();
    text["model_type"] = "gemma3_text".into();
    text["architectures"] = json!(["Gemma3ForCausalLM"]);
    for key in SHARED {
        if text[key].is_null() && !config[key].is_null() {
            text[key] = config[key].clone();
        }
    }
    text
}

/// The name of a tensor in the text model; none for those of images.
pub(super) fn name(stored: &str) -> Option<String> {
    let renamed = PREFIXES
        .iter()
        .find_map(|(prefix, ours)| stored.strip_prefix(prefix).map(|rest| format!("{ours}{rest}")));
    renamed.or_else(|| stored.starts_with("lm_head.").then(|| stored.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_told_from_images() {
        for (stored, expected) in [
            (
                "language_model.model.layers.0.mlp.up_proj.weight",
                "model.layers.0.mlp.up_proj.weight",
            ),
            ("model.language_model.norm.weight", "model.norm.weight"),
            ("language_model.lm_head.weight", "lm_head.weight"),
            ("lm_head.weight", "lm_head.weight"),
        ] {
            assert_eq!(name(stored).as_deref(), Some(expected));
        }
        for stored in ["vision_tower.vision_model.post_layernorm.weight", "model.vision_tower.x"] {
            assert_eq!(name(stored), None, "{stored}");
        }
    }

    #[test]
    fn the_text_s_own_settings_come_first() {
        let whole = json!({
            "model_type": "gemma3", "eos_token_id": [1, 106], "torch_dtype": "bfloat16",
            "text_config": {"hidden_size": 8, "torch_dtype": "float32"},
        });
        let expected = json!({
            "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "hidden_size": 8,
            "torch_dtype": "float32", "eos_token_id": [1, 106],
        });
        let mut text = config(&whole);
        text.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        assert_eq!(text, expected);
        assert!(is_more(&whole));
        assert!(!is_more(&json!({"model_type": "llama", "text_config": {}})));
    }
}
