//! The language model inside a model for text and images: the larger Gemma 3, Mistral Small 3.1 and
//! later, Ministral 3, Qwen3-VL.
//!
//! Seen through here such a checkpoint is the text model alone: `text_config` is the config, tensors have
//! the names of the text model's class in transformers, and the vision tower is not there. Text alone
//! takes the same path through it: the three positions of Qwen3-VL's tokens are one. Sources:
//! transformers `models/{gemma3,mistral3,qwen3_vl}/modeling_*.py`.

use serde_json::{Value, json};

use crate::model::spec::Family;

/// Where the text model's tensors lie, in files of the hub and in those that transformers 5 names as its
/// modules.
const PREFIXES: [(&str, &str); 3] = [
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
];

/// A model for text and images: `model_type` of the whole and of its text, and the family that the text
/// belongs to.
type Model = (&'static str, &'static str, Family);

const MODELS: [Model; 4] = [
    ("gemma3", "gemma3_text", Family::Gemma3),
    ("mistral3", "mistral", Family::Mistral),
    ("mistral3", "ministral3", Family::Ministral3),
    ("qwen3_vl", "qwen3_vl_text", Family::Qwen3),
];

/// What is said of the whole model and holds for its text.
const SHARED: [&str; 6] =
    ["bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "quantization_config"];

/// What counts where the whole model says it, whatever its text says.
const TIED: &str = "tie_word_embeddings";

/// Whether `config` is that of a model for text and images.
pub(super) fn has_text_part(config: &Value) -> bool {
    config["text_config"].is_object() && kinds(config).next().is_some()
}

fn kinds(config: &Value) -> impl Iterator<Item = Model> {
    MODELS.into_iter().filter(|(whole, ..)| config["model_type"] == *whole)
}

/// The text model's part of such a config. A text model of another kind than the whole's is left as it is.
pub(super) fn config(config: &Value) -> Value {
    let mut text = config["text_config"].clone();
    for key in SHARED {
        if text[key].is_null() && !config[key].is_null() {
            text[key] = config[key].clone();
        }
    }
    if !config[TIED].is_null() {
        text[TIED] = config[TIED].clone();
    }
    let inner = text["model_type"].clone();
    let kind = kinds(config).find(|(_, known, _)| inner.is_null() || inner == *known);
    if let Some((_, _, family)) = kind {
        text["model_type"] = family.model_type().into();
        text["architectures"] = json!([family.class_name()]);
        if family == Family::Qwen3 {
            add_defaults(&mut text);
        }
    }
    // With them other programs would expect three positions a token.
    for holder in ["rope_scaling", "rope_parameters"] {
        if let Some(parameters) = text.get_mut(holder).and_then(Value::as_object_mut) {
            parameters.retain(|key, _| !key.starts_with("mrope_"));
        }
    }
    text
}

/// What Qwen3-VL's class has by default, and Qwen3's otherwise.
fn add_defaults(text: &mut Value) {
    let holders = ["rope_parameters", "rope_scaling"].map(|key| &text[key]["rope_theta"]);
    if text["rope_theta"].is_null() && holders.iter().all(|theta| theta.is_null()) {
        text["rope_theta"] = 500_000.0.into();
    }
    if text["max_position_embeddings"].is_null() {
        text["max_position_embeddings"] = 128_000.into();
    }
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
        assert!(has_text_part(&whole));
        let whole = json!({
            "model_type": "qwen3_vl", "tie_word_embeddings": true, "text_config": {
                "model_type": "qwen3_vl_text", "head_dim": 8, "tie_word_embeddings": false,
                "rope_scaling": {"mrope_interleaved": true, "mrope_section": [2, 1, 1], "rope_type": "default"},
            },
        });
        let mut text = config(&whole);
        text.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        let expected = json!({
            "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 8,
            "tie_word_embeddings": true, "rope_scaling": {"rope_type": "default"},
            "rope_theta": 500_000.0, "max_position_embeddings": 128_000,
        });
        assert_eq!(text, expected);
        for (inner, class) in [
            (json!(null), json!("MistralForCausalLM")),
            (json!("mistral"), json!("MistralForCausalLM")),
            (json!("ministral3"), json!("Ministral3ForCausalLM")),
            (json!("mistral4"), json!(null)),
        ] {
            let whole = json!({"model_type": "mistral3", "text_config": {"model_type": inner}});
            assert_eq!(config(&whole)["architectures"][0], class);
        }
        assert!(!has_text_part(&json!({"model_type": "llama", "text_config": {}})));
    }
}
