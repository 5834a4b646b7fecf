//! Names of GPT-2's tensors in files that were written from its inner model, such as those of the hub.
//!
//! Source: transformers `modeling_gpt2.py`: `GPT2LMHeadModel` has a `GPT2Model` under the name
//! `transformer`, and saves `transformer.wte.weight` where `GPT2Model` saves `wte.weight`.

use serde_json::Value;

/// Where the inner model lies in the whole one.
const PREFIX: &str = "transformer.";

/// The parts of the inner model.
const PARTS: [&str; 4] = ["wte.", "wpe.", "h.", "ln_f."];

/// Whether the files of a model, by its `config.json` and the names in them, are those of the inner model.
pub(super) fn is_inner<'n>(config: &Value, mut names: impl Iterator<Item = &'n str>) -> bool {
    config["model_type"] == "gpt2" && !names.any(|name| name.starts_with(PREFIX))
}

/// The name in the whole model of a tensor of the inner one; others keep theirs.
pub(super) fn name(stored: &str) -> String {
    match PARTS.iter().any(|part| stored.starts_with(part)) {
        true => format!("{PREFIX}{stored}"),
        false => stored.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_inner_model_is_told_by_its_names() {
        let (gpt2, llama) = (json!({"model_type": "gpt2"}), json!({"model_type": "llama"}));
        let (inner, whole) = (["wte.weight", "lm_head.weight"], ["transformer.wte.weight"]);
        assert!(is_inner(&gpt2, inner.into_iter()));
        assert!(!is_inner(&gpt2, whole.into_iter()));
        assert!(!is_inner(&llama, inner.into_iter()));
    }

    #[test]
    fn its_parts_get_the_prefix() {
        for part in ["wte.weight", "h.1.attn.c_attn.weight.absmax", "ln_f.bias"] {
            assert_eq!(name(part), format!("transformer.{part}"));
        }
        for other in ["lm_head.weight", "hidden.weight"] {
            assert_eq!(name(other), other);
        }
    }
}
