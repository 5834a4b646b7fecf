//! GGUF's tensor names in Hugging Face's words. Source: `gguf-py/gguf/tensor_mapping.py`.

use super::Architecture;

/// `blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`.
pub(super) fn hugging_face_name(architecture: Architecture, stored: &str) -> Option<String> {
    let gpt2 = architecture == Architecture::Gpt2;
    let (module, suffix) = stored.rsplit_once('.')?;
    let module = match module.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
        Some((layer, part)) => {
            let layer: usize = layer.parse().ok()?;
            if gpt2 {
                format!("transformer.h.{layer}.{}", gpt2_part(part)?)
            } else {
                format!("model.layers.{layer}.{}", llama_part(architecture, part)?)
            }
        }
        None => match (module, gpt2) {
            ("token_embd", true) => "transformer.wte".into(),
            ("position_embd", true) => "transformer.wpe".into(),
            ("output_norm", true) => "transformer.ln_f".into(),
            ("token_embd", false) => "model.embed_tokens".into(),
            ("output_norm", false) => "model.norm".into(),
            ("output", _) => "lm_head".into(),
            _ => return None,
        },
    };
    Some(format!("{module}.{suffix}"))
}

fn llama_part(architecture: Architecture, part: &str) -> Option<&'static str> {
    use Architecture::{Gemma2, Gemma3, Glm4, Olmo2, Phi3, Qwen3, SeedOss};
    let norms_heads = matches!(architecture, Qwen3 | Gemma3 | Olmo2);
    let post_norms = matches!(architecture, Gemma2 | Gemma3 | Olmo2);
    match architecture {
        Phi3 => return phi3_part(part),
        Glm4 => return glm4_part(part),
        _ => {}
    }
    Some(match part {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_q_norm" if norms_heads => "self_attn.q_norm",
        "attn_k_norm" if norms_heads => "self_attn.k_norm",
        "attn_output" => "self_attn.o_proj",
        "post_attention_norm" if post_norms || architecture == SeedOss => {
            "post_attention_layernorm"
        }
        "ffn_norm" if post_norms => "pre_feedforward_layernorm",
        "post_ffw_norm" if post_norms => "post_feedforward_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    })
}

fn phi3_part(part: &str) -> Option<&'static str> {
    Some(match part {
        "attn_norm" => "input_layernorm",
        "attn_qkv" => "self_attn.qkv_proj",
        "attn_output" => "self_attn.o_proj",
        "ffn_norm" => "post_attention_layernorm",
        "ffn_up" => "mlp.gate_up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    })
}

fn glm4_part(part: &str) -> Option<&'static str> {
    Some(match part {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "post_attention_norm" => "post_self_attn_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "post_ffw_norm" => "post_mlp_layernorm",
        "ffn_up" => "mlp.gate_up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    })
}

fn gpt2_part(part: &str) -> Option<&'static str> {
    Some(match part {
        "attn_norm" => "ln_1",
        "attn_qkv" => "attn.c_attn",
        "attn_output" => "attn.c_proj",
        "ffn_norm" => "ln_2",
        "ffn_up" => "mlp.c_fc",
        "ffn_down" => "mlp.c_proj",
        _ => return None,
    })
}

/// `model.layers.3.self_attn.q_proj.weight` → `blk.3.attn_q.weight`.
fn gguf_name(architecture: Architecture, name: &str) -> Option<String> {
    const OUTSIDE: [&str; 4] = ["token_embd", "position_embd", "output_norm", "output"];
    const PARTS: [&str; 14] = [
        "attn_norm",
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_qkv",
        "attn_output",
        "attn_q_norm",
        "attn_k_norm",
        "post_attention_norm",
        "ffn_norm",
        "post_ffw_norm",
        "ffn_gate",
        "ffn_up",
        "ffn_down",
    ];
    let (module, suffix) = name.rsplit_once('.')?;
    let layer = layer_of(module);
    let stored = OUTSIDE.iter().map(|part| part.to_string());
    let inside =
        layer.into_iter().flat_map(|layer| PARTS.map(|part| format!("blk.{layer}.{part}")));
    let mut stored = stored.chain(inside).map(|module| format!("{module}.{suffix}"));
    stored.find(|stored| hugging_face_name(architecture, stored).as_deref() == Some(name))
}

/// The tensors that a file has for `name`, which share its rows: Granite 4's gate and up are apart there.
pub(super) fn gguf_names(architecture: Architecture, name: &str) -> Option<Vec<String>> {
    let (module, suffix) = name.rsplit_once('.')?;
    let (layer, parts): (_, &[&str]) = match module.rsplit_once(".shared_mlp.") {
        Some((layer, "input_linear")) => (layer, &["mlp.gate_proj", "mlp.up_proj"]),
        Some((layer, "output_linear")) => (layer, &["mlp.down_proj"]),
        _ => return gguf_name(architecture, name).map(|stored| vec![stored]),
    };
    let stored = |part: &&str| gguf_name(architecture, &format!("{layer}.{part}.{suffix}"));
    parts.iter().map(stored).collect()
}

/// The layer that a tensor's name says.
pub(super) fn layer_of(name: &str) -> Option<usize> {
    name.split('.').find_map(|part| part.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_there_and_back() {
        let names = [
            (
                Architecture::Llama,
                "model.layers.12.self_attn.q_proj.weight",
                "blk.12.attn_q.weight",
            ),
            (Architecture::Qwen2, "model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
            (Architecture::Qwen2, "model.layers.3.self_attn.k_proj.bias", "blk.3.attn_k.bias"),
            (
                Architecture::Qwen3,
                "model.layers.1.self_attn.k_norm.weight",
                "blk.1.attn_k_norm.weight",
            ),
            (
                Architecture::Gemma,
                "model.layers.4.post_attention_layernorm.weight",
                "blk.4.ffn_norm.weight",
            ),
            (
                Architecture::Gemma2,
                "model.layers.4.post_attention_layernorm.weight",
                "blk.4.post_attention_norm.weight",
            ),
            (
                Architecture::Gemma3,
                "model.layers.0.pre_feedforward_layernorm.weight",
                "blk.0.ffn_norm.weight",
            ),
            (
                Architecture::Gemma3,
                "model.layers.0.post_feedforward_layernorm.weight",
                "blk.0.post_ffw_norm.weight",
            ),
            (
                Architecture::Gemma3,
                "model.layers.0.self_attn.q_norm.weight",
                "blk.0.attn_q_norm.weight",
            ),
            (Architecture::Phi3, "model.layers.0.mlp.gate_up_proj.weight", "blk.0.ffn_up.weight"),
            (
                Architecture::Glm4,
                "model.layers.0.post_attention_layernorm.weight",
                "blk.0.ffn_norm.weight",
            ),
            (
                Architecture::SeedOss,
                "model.layers.0.post_attention_layernorm.weight",
                "blk.0.post_attention_norm.weight",
            ),
            (
                Architecture::Olmo2,
                "model.layers.0.post_attention_layernorm.weight",
                "blk.0.post_attention_norm.weight",
            ),
            (Architecture::Gpt2, "transformer.h.1.attn.c_attn.bias", "blk.1.attn_qkv.bias"),
            (Architecture::Gpt2, "transformer.wpe.weight", "position_embd.weight"),
            (Architecture::Llama, "lm_head.weight", "output.weight"),
        ];
        for (architecture, name, stored) in names {
            assert_eq!(gguf_name(architecture, name).as_deref(), Some(stored));
            assert_eq!(hugging_face_name(architecture, stored).as_deref(), Some(name));
        }
        assert_eq!(gguf_name(Architecture::Llama, "model.other.weight"), None);
        let shared = |part: &str| {
            let name = format!("model.layers.2.shared_mlp.{part}.weight");
            gguf_names(Architecture::Granite, &name)
        };
        let names = |names: &[&str]| Some(names.iter().map(|name| name.to_string()).collect());
        let gate_up = names(&["blk.2.ffn_gate.weight", "blk.2.ffn_up.weight"]);
        assert_eq!(shared("input_linear"), gate_up);
        assert_eq!(shared("output_linear"), names(&["blk.2.ffn_down.weight"]));
        assert_eq!(shared("other"), None);
        assert_eq!(hugging_face_name(Architecture::Qwen2, "blk.0.attn_q_norm.weight"), None);
    }
}
