//! Names of tensors in files that were written from a model without its head: GPT-2's on the hub, and those of
//! embedding models.
//!
//! Source: transformers: `GPT2LMHeadModel` has a `GPT2Model` under the name `transformer`, other classes theirs
//! under `model`, and saves `transformer.wte.weight` where `GPT2Model` saves `wte.weight`.

use serde_json::Value;

/// Where the inner model lies in the whole one, and its parts.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct InnerModel {
    prefix: &'static str,
    parts: &'static [&'static str],
}

const GPT2: InnerModel =
    InnerModel { prefix: "transformer.", parts: &["wte.", "wpe.", "h.", "ln_f."] };
const OTHERS: InnerModel =
    InnerModel { prefix: "model.", parts: &["embed_tokens.", "layers.", "norm."] };

impl InnerModel {
    /// If the files of a model, by its `config.json` and the names in them, are those of the inner one.
    pub(super) fn of<'n>(config: &Value, mut names: impl Iterator<Item = &'n str>) -> Option<Self> {
        let inner = if config["model_type"] == "gpt2" { GPT2 } else { OTHERS };
        (!names.any(|name| name.starts_with(inner.prefix))).then_some(inner)
    }

    /// The name in the whole model of a tensor of the inner one; others keep theirs.
    pub(super) fn name(&self, stored: &str) -> String {
        match self.parts.iter().any(|part| stored.starts_with(part)) {
            true => format!("{}{stored}", self.prefix),
            false => stored.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_inner_model_is_told_by_its_names() {
        let of = |family: &str, names: &[&'static str]| {
            InnerModel::of(&json!({"model_type": family}), names.iter().copied())
        };
        assert_eq!(of("gpt2", &["wte.weight", "lm_head.weight"]), Some(GPT2));
        assert_eq!(of("gpt2", &["transformer.wte.weight"]), None);
        assert_eq!(of("qwen3", &["layers.0.mlp.up_proj.weight", "norm.weight"]), Some(OTHERS));
        assert_eq!(of("qwen3", &["model.norm.weight", "lm_head.weight"]), None);
    }

    #[test]
    fn its_parts_get_the_prefix() {
        for part in ["wte.weight", "h.1.attn.c_attn.weight.absmax", "ln_f.bias"] {
            assert_eq!(GPT2.name(part), format!("transformer.{part}"));
        }
        for part in ["embed_tokens.weight", "layers.1.mlp.up_proj.weight", "norm.weight"] {
            assert_eq!(OTHERS.name(part), format!("model.{part}"));
        }
        for other in ["lm_head.weight", "hidden.weight"] {
            assert_eq!((GPT2.name(other), OTHERS.name(other)), (other.into(), other.into()));
        }
    }
}
