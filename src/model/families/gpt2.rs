//! GPT-2: layer norms, learned positions, no gate. Source: transformers
//! `models/gpt2/modeling_gpt2.py`, `configuration_gpt2.py`.

use super::fields::{Fields, unsupported};
use crate::error::Result;
use crate::model::names::Names;
use crate::model::spec::{Activation, Family, ModelSpec, Norm, Projections, RotaryPairs};

pub(super) fn gpt2(fields: &Fields) -> Result<ModelSpec> {
    let hidden_size = fields.size("n_embd")?;
    let num_heads = fields.size("n_head")?;
    let num_layers = fields.layers("n_layer")?;
    fields.unless("scale_attn_weights", |v| v == true, "only `true` is implemented")?;
    fields.unless(
        "scale_attn_by_inverse_layer_idx",
        |v| v == false,
        "only `false` is implemented",
    )?;
    fields.unless("add_cross_attention", |v| v == false, "only `false` is implemented")?;
    let activation = match fields.text_or("activation_function", "gelu_new")? {
        "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
        "gelu" => Activation::Gelu,
        other => return Err(unsupported("activation_function", other, "use `gelu_new` or `gelu`")),
    };
    let positions = fields.size_or("n_positions", 1024)?;
    Ok(ModelSpec {
        family: Family::Gpt2,
        vocab_size: fields.size("vocab_size")?,
        hidden_size,
        intermediate_size: fields.size_or("n_inner", 4 * hidden_size)?,
        num_layers,
        num_heads,
        num_kv_heads: num_heads,
        head_dim: hidden_size / num_heads.max(1),
        norm: Norm::Layer,
        norm_eps: fields.number_or("layer_norm_epsilon", 1e-5)?,
        norm_plus_one: false,
        pre_norms: true,
        post_norms: false,
        embedding_scale: 1.0,
        scales_behind_noise: false,
        residual_scale: 1.0,
        logit_divisor: 1.0,
        activation,
        projections: Projections::Conv1d,
        names: &Names::GPT2,
        rotary: None,
        rotary_dim: 0,
        rotary_pairs: RotaryPairs::Halves,
        local_rotary: None,
        query_scaling: None,
        rotates: vec![true; num_layers],
        learned_positions: Some(positions),
        qkv_bias: true,
        qk_norm: None,
        attention_scale: 1.0 / ((hidden_size / num_heads.max(1)) as f32).sqrt(),
        attention_soft_cap: None,
        logit_soft_cap: None,
        output_bias: true,
        mlp_bias: true,
        windows: vec![None; num_layers],
        tie_word_embeddings: fields.flag_or("tie_word_embeddings", true)?,
        max_positions: positions,
        bos_token_id: fields.token_ids("bos_token_id")?.first().copied(),
        eos_token_ids: fields.token_ids("eos_token_id")?,
    })
}
