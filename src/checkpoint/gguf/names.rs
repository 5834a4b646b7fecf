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
                format!("model.layers.{layer}.{}", llama_part(part)?)
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

fn llama_part(part: &str) -> Option<&'static str> {
    Some(match part {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "ffn_norm" => "post_attention_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
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
