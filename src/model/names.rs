//! What modules are called.

/// Names of the modules that are not linears, as transformers' class for the model has them.
#[derive(Debug, PartialEq, Eq)]
pub struct Names {
    /// Where the blocks are.
    pub(super) layers: &'static str,
    pub(super) embedding: &'static str,
    /// Name of the position table, with `.weight`.
    pub(super) positions: Option<&'static str>,
    pub(super) final_norm: &'static str,
    pub(super) head: &'static str,
    pub(super) first_norm: &'static str,
    pub(super) second_norm: &'static str,
    /// Norms of what attention and the MLP add to the stream, where a model has some.
    pub(super) post_norms: [&'static str; 2],
}

impl Names {
    /// Names of `LlamaForCausalLM`, which most have.
    pub const LLAMA: Names = Names {
        layers: "model.layers",
        embedding: "model.embed_tokens",
        positions: None,
        final_norm: "model.norm",
        head: "lm_head",
        first_norm: "input_layernorm",
        second_norm: "post_attention_layernorm",
        post_norms: ["", ""],
    };

    /// Names of `Gemma2ForCausalLM`, and of others with norms behind both halves of a block.
    pub const GEMMA2: Names = Names {
        second_norm: "pre_feedforward_layernorm",
        post_norms: ["post_attention_layernorm", "post_feedforward_layernorm"],
        ..Names::LLAMA
    };

    /// Names of `Glm4ForCausalLM`.
    pub const GLM4: Names =
        Names { post_norms: ["post_self_attn_layernorm", "post_mlp_layernorm"], ..Names::LLAMA };

    /// Names of `GPT2LMHeadModel`.
    pub const GPT2: Names = Names {
        layers: "transformer.h",
        embedding: "transformer.wte",
        positions: Some("transformer.wpe.weight"),
        final_norm: "transformer.ln_f",
        head: "lm_head",
        first_norm: "ln_1",
        second_norm: "ln_2",
        post_norms: ["", ""],
    };
}
