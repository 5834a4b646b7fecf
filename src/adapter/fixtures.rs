//! Small specs for this module's tests, by their `config.json` in `tests/data`.

use crate::model::names::Names;
use crate::model::spec::{
    Activation, Family, ModelSpec, Norm, Projections, RopeScaling, Rotary, RotaryPairs,
};

/// A Llama of `num_layers` blocks: D 64, F 160, 4 heads of 16, 2 key heads, V 128, untied.
pub fn llama(num_layers: usize) -> ModelSpec {
    ModelSpec {
        family: Family::Llama,
        vocab_size: 128,
        hidden_size: 64,
        intermediate_size: 160,
        num_layers,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 16,
        norm: Norm::Rms,
        norm_eps: 1e-6,
        norm_plus_one: false,
        pre_norms: true,
        post_norms: false,
        embedding_scale: 1.0,
        scales_behind_noise: false,
        residual_scale: 1.0,
        logit_divisor: 1.0,
        activation: Activation::Silu,
        projections: Projections::Separate,
        names: &Names::LLAMA,
        rotary: Some(Rotary { theta: 10_000.0, scaling: RopeScaling::Default }),
        rotary_dim: 16,
        rotary_pairs: RotaryPairs::Halves,
        local_rotary: None,
        query_scaling: None,
        rotates: vec![true; num_layers],
        learned_positions: None,
        qkv_bias: false,
        qk_norm: None,
        attention_scale: 0.25,
        attention_soft_cap: None,
        logit_soft_cap: None,
        output_bias: false,
        mlp_bias: false,
        windows: vec![None; num_layers],
        tie_word_embeddings: false,
        max_positions: 128,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
    }
}

/// A GPT-2 of two blocks: D 64, 4 heads, V 128, tied.
pub fn gpt2() -> ModelSpec {
    ModelSpec {
        family: Family::Gpt2,
        intermediate_size: 256,
        num_kv_heads: 4,
        norm: Norm::Layer,
        norm_eps: 1e-5,
        activation: Activation::GeluTanh,
        projections: Projections::Conv1d,
        names: &Names::GPT2,
        rotary: None,
        rotary_dim: 0,
        learned_positions: Some(64),
        qkv_bias: true,
        output_bias: true,
        mlp_bias: true,
        tie_word_embeddings: true,
        max_positions: 64,
        ..llama(2)
    }
}
