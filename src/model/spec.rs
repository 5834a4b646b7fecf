//! What a model *is*, as data: dimensions and switches, and the tensors that follow from them.
//!
//! A family is one function from `config.json` to a [`ModelSpec`] (see `families`);
//! everything else (loading, quantizing, planning, training, exporting) reads the spec.

use super::names::Names;
pub use super::projections::{BlockHalf, LinearRole, LinearSpec, MlpKind, Projections};

/// Which Hugging Face `model_type` the names follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `LlamaForCausalLM`.
    Llama,
    /// `MistralForCausalLM`: Llama with a sliding window.
    Mistral,
    /// `Ministral3ForCausalLM`: Llama, whose q grows with its position.
    Ministral3,
    /// `Qwen2ForCausalLM`: Llama with biases on q, k and v.
    Qwen2,
    /// `Qwen3ForCausalLM`: Llama with a norm of each head of q and k.
    Qwen3,
    /// `SmolLM3ForCausalLM`: Llama, of which some layers turn nothing.
    SmolLm3,
    /// `GraniteForCausalLM`: Llama with factors on embeddings, scores, halves of blocks and logits.
    Granite,
    /// `GraniteMoeHybridForCausalLM` without experts and Mamba: Granite 4, gate and up fused.
    GraniteMoeHybrid,
    /// `SeedOssForCausalLM`: Llama with biases on q, k and v.
    SeedOss,
    /// `Glm4ForCausalLM`: four norms, fused gate and up, neighbours turned as pairs.
    Glm4,
    /// `Olmo2ForCausalLM`: Llama with norms behind attention and MLP alone, and one of q and k.
    Olmo2,
    /// `Olmo3ForCausalLM`: OLMo 2 with windows, whose layers do without a rope scaling.
    Olmo3,
    /// `GemmaForCausalLM`: norms of 1 + w, scaled embeddings, GELU.
    Gemma,
    /// `Gemma2ForCausalLM`: Gemma with norms behind attention and MLP, and capped scores and logits.
    Gemma2,
    /// `Gemma3ForCausalLM`: norms of heads in place of caps, two rotary embeddings.
    Gemma3,
    /// `Phi3ForCausalLM`: fused qkv, fused gate and up, LongRoPE; also Phi-4.
    Phi3,
    /// `GPT2LMHeadModel`: layer norms, learned positions, fused qkv stored `[in, out]`.
    Gpt2,
}

impl Family {
    /// All families.
    pub const ALL: [Family; 17] = [
        Family::Llama,
        Family::Mistral,
        Family::Ministral3,
        Family::Qwen2,
        Family::Qwen3,
        Family::SmolLm3,
        Family::Granite,
        Family::GraniteMoeHybrid,
        Family::SeedOss,
        Family::Glm4,
        Family::Olmo2,
        Family::Olmo3,
        Family::Gemma,
        Family::Gemma2,
        Family::Gemma3,
        Family::Phi3,
        Family::Gpt2,
    ];

    /// The family of a `model_type`. A `ministral` is what transformers makes of a Mistral with
    /// `layer_types`.
    pub fn of(model_type: &str) -> Option<Self> {
        let model_type = if model_type == "ministral" { "mistral" } else { model_type };
        Family::ALL.into_iter().find(|family| family.model_type() == model_type)
    }

    /// The `model_type` of `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Ministral3 => "ministral3",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::SmolLm3 => "smollm3",
            Family::Granite => "granite",
            Family::GraniteMoeHybrid => "granitemoehybrid",
            Family::SeedOss => "seed_oss",
            Family::Glm4 => "glm4",
            Family::Olmo2 => "olmo2",
            Family::Olmo3 => "olmo3",
            Family::Gemma => "gemma",
            Family::Gemma2 => "gemma2",
            Family::Gemma3 => "gemma3_text",
            Family::Phi3 => "phi3",
            Family::Gpt2 => "gpt2",
        }
    }

    /// The class of transformers, one of the `architectures` of `config.json`.
    pub fn class_name(self) -> &'static str {
        match self {
            Family::Llama => "LlamaForCausalLM",
            Family::Mistral => "MistralForCausalLM",
            Family::Ministral3 => "Ministral3ForCausalLM",
            Family::Qwen2 => "Qwen2ForCausalLM",
            Family::Qwen3 => "Qwen3ForCausalLM",
            Family::SmolLm3 => "SmolLM3ForCausalLM",
            Family::Granite => "GraniteForCausalLM",
            Family::GraniteMoeHybrid => "GraniteMoeHybridForCausalLM",
            Family::SeedOss => "SeedOssForCausalLM",
            Family::Glm4 => "Glm4ForCausalLM",
            Family::Olmo2 => "Olmo2ForCausalLM",
            Family::Olmo3 => "Olmo3ForCausalLM",
            Family::Gemma => "GemmaForCausalLM",
            Family::Gemma2 => "Gemma2ForCausalLM",
            Family::Gemma3 => "Gemma3ForCausalLM",
            Family::Phi3 => "Phi3ForCausalLM",
            Family::Gpt2 => "GPT2LMHeadModel",
        }
    }
}

/// Normalisation before attention, before the MLP and before the head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Norm {
    /// `y = w · x / sqrt(mean(x²) + eps)`.
    Rms,
    /// `y = w · (x − mean) / sqrt(var + eps) + b`.
    Layer,
}

/// What the norms of q and k are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// Each head by itself: one weight for all heads of q, one for those of k.
    Heads,
    /// All heads of q together, and all of k.
    Whole,
}

/// The MLP's nonlinearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// `x · Φ(x)` with the error function.
    Gelu,
    /// GPT-2's `gelu_new`: tanh approximation.
    GeluTanh,
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotary {
    /// Base of the geometric frequency series.
    pub theta: f64,
    /// How the frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
}

/// `rope_type` of Hugging Face's `modeling_rope_utils`.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// No stretching.
    Default,
    /// Positions divided by `factor`.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// NTK-aware: the base grows once a sequence is longer than the trained length.
    Dynamic {
        /// Stretch.
        factor: f64,
        /// Trained length in tokens.
        original_max_position_embeddings: usize,
    },
    /// YaRN, arXiv 2309.00071: interpolation by frequency with an attention factor.
    Yarn {
        /// Stretch.
        factor: f64,
        /// Trained length in tokens.
        original_max_position_embeddings: usize,
        /// High-frequency bound (32).
        beta_fast: f64,
        /// Low-frequency bound (1).
        beta_slow: f64,
        /// Multiplies cos and sin.
        attention_factor: f64,
        /// Whether the bounds are rounded to whole dimensions (default true).
        truncate: bool,
    },
    /// LongRoPE, arXiv 2402.13753: a divisor for each frequency.
    LongRope {
        /// Divisors `[rotary_dim / 2]` for sequences of up to the trained length.
        short_factor: Vec<f32>,
        /// Divisors `[rotary_dim / 2]` for longer sequences.
        long_factor: Vec<f32>,
        /// Trained length in tokens.
        original_max_position_embeddings: usize,
        /// Multiplies cos and sin, of short sequences, too.
        attention_factor: f64,
    },
    /// Llama 3.1's piecewise stretch by wavelength.
    Llama3 {
        /// Stretch of the long wavelengths.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are stretched.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Trained length in tokens.
        original_max_position_embeddings: usize,
    },
}

/// Which elements of a head rotary embedding turns as a pair, of `rotary_dim` at its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RotaryPairs {
    /// j and j + rotary_dim/2: Hugging Face's `rotate_half` in most models.
    Halves,
    /// 2j and 2j + 1, as in the paper: GLM's.
    Neighbours,
}

/// Llama 4's temperature of attention, in Ministral 3: q of the token at position p is multiplied by
/// `1 + beta · ln(1 + ⌊p / original⌋)` after it is rotated. Source: transformers
/// `modeling_ministral3.py`, `get_llama_4_attn_scale`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QueryScaling {
    /// `llama_4_scaling_beta`.
    pub beta: f64,
    /// Trained length in tokens: up to it, the factor is 1.
    pub original_max_position_embeddings: usize,
}

impl QueryScaling {
    /// The factor at `position`.
    pub fn factor(&self, position: u32) -> f32 {
        let lengths = position as usize / self.original_max_position_embeddings;
        1.0 + self.beta as f32 * (1.0 + lengths as f32).ln()
    }
}

/// Dimensions and switches of one causal language model. Legend in [`super`].
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// Names and conventions.
    pub family: Family,
    /// V: rows of the embedding.
    pub vocab_size: usize,
    /// D: model width.
    pub hidden_size: usize,
    /// F: feed-forward width.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_layers: usize,
    /// H: query heads.
    pub num_heads: usize,
    /// K: key and value heads; H is a multiple of it.
    pub num_kv_heads: usize,
    /// Width of one head; `H · head_dim` need not be D.
    pub head_dim: usize,
    /// Kind of all norms.
    pub norm: Norm,
    /// Epsilon of all norms.
    pub norm_eps: f64,
    /// Files hold the weights of norms less 1.
    pub norm_plus_one: bool,
    /// What attention and the MLP read of the stream goes through norms; else they read it as it is.
    pub pre_norms: bool,
    /// What attention and the MLP add to the stream goes through norms of its own.
    pub post_norms: bool,
    /// Factor on the embeddings: 1, Gemma's √D, or Granite's `embedding_multiplier`.
    pub embedding_scale: f32,
    /// The embeddings get their factor behind the module that NEFTune adds noise in: Granite's.
    pub scales_behind_noise: bool,
    /// Factor on what attention and the MLP add to the stream: 1, or Granite's `residual_multiplier`.
    pub residual_scale: f32,
    /// What logits are divided by: 1, or Granite's `logits_scaling`.
    pub logit_divisor: f32,
    /// Nonlinearity of the MLP.
    pub activation: Activation,
    /// Matrices of a block.
    pub projections: Projections,
    /// Names of the modules.
    pub names: &'static Names,
    /// Rotary embedding of q and k.
    pub rotary: Option<Rotary>,
    /// The first elements of each head, which it turns; the others stay as they are.
    pub rotary_dim: usize,
    /// Which of them make a pair.
    pub rotary_pairs: RotaryPairs,
    /// Rotary embedding of the layers with a window, where they have one of their own.
    pub local_rotary: Option<Rotary>,
    /// What q grows by with its position.
    pub query_scaling: Option<QueryScaling>,
    /// Whether each layer turns q and k at all, if there is a rotary embedding.
    pub rotates: Vec<bool>,
    /// Rows of a learned position table, GPT-2's `wpe`.
    pub learned_positions: Option<usize>,
    /// Bias on q, k, v.
    pub qkv_bias: bool,
    /// RMS norms of q and k before they are rotated.
    pub qk_norm: Option<QkNorm>,
    /// Factor on the scores: `1 / sqrt(head_dim)` but for Granites and some Gemmas.
    pub attention_scale: f32,
    /// c of `c·tanh(score / c)`.
    pub attention_soft_cap: Option<f32>,
    /// c of `c·tanh(logit / c)`.
    pub logit_soft_cap: Option<f32>,
    /// Bias on the attention output projection.
    pub output_bias: bool,
    /// Bias on the MLP's linears.
    pub mlp_bias: bool,
    /// Sliding window in tokens for each layer; `None` is full causal attention.
    pub windows: Vec<Option<usize>>,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// `max_position_embeddings`: the longest trained sequence in tokens.
    pub max_positions: usize,
    /// `bos_token_id`.
    pub bos_token_id: Option<u32>,
    /// `eos_token_id`, one or several.
    pub eos_token_ids: Vec<u32>,
}

/// What a tensor is for; decides whether it is packed, loaded widened, or counted as embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TensorRole {
    /// Token embedding `[V, D]`.
    Embedding,
    /// Learned positions `[positions, D]`.
    Positions,
    /// Weight of a block's linear: packed in 4 bits.
    Linear(LinearRole),
    /// Bias of a linear.
    Bias,
    /// Norm weight or bias.
    Norm,
    /// Output head `[V, D]` when it is not tied.
    Head,
}

impl TensorRole {
    /// Its name in tables; of a linear's weight that of the linear.
    pub fn name(self) -> &'static str {
        match self {
            TensorRole::Embedding => "embedding",
            TensorRole::Positions => "positions",
            TensorRole::Linear(role) => role.name(),
            TensorRole::Bias => "bias",
            TensorRole::Norm => "norm",
            TensorRole::Head => "head",
        }
    }
}

/// One tensor of a checkpoint, by its Hugging Face name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in the state dict.
    pub name: String,
    /// Shape as Nibble holds it: linears `[out, in]` for every family.
    pub shape: Vec<usize>,
    /// What the tensor is for.
    pub role: TensorRole,
    /// Dense checkpoints store the transpose (`Conv1D`).
    pub transposed: bool,
}

impl TensorSpec {
    /// The tensor's shape in a file: packed weights are `[out, in]`, dense ones of `Conv1D` the transpose.
    pub fn shape_in_file(&self, packed: bool) -> Vec<usize> {
        match self.transposed && !packed {
            true => self.shape.iter().rev().copied().collect(),
            false => self.shape.clone(),
        }
    }
}

impl ModelSpec {
    /// Factor on the embeddings of a stream that is held divided by `residual_scale`.
    ///
    /// Where r is that factor, blocks are `x ← x + r·f(norm(x))`. With y = x / r they are
    /// `y ← y + f(norm(r·y))`, whose norm is the norm of y with [another ε](Self::stream_norm_eps): no
    /// operation knows of r.
    pub fn stream_scale(&self) -> f32 {
        self.embedding_scale / self.residual_scale
    }

    /// ε of a norm of that stream, of which `norm(r·y; ε) = norm(y; ε / r²)`.
    pub fn stream_norm_eps(&self) -> f64 {
        self.norm_eps / f64::from(self.residual_scale).powi(2)
    }

    /// Factor on noise that is added to the embeddings as transformers' module gives them: Gemmas' come with
    /// their factor, those of a Granite are multiplied later.
    pub fn noise_scale(&self) -> f32 {
        if self.scales_behind_noise { self.stream_scale() } else { 1.0 }
    }

    /// Width of q: `H · head_dim`.
    pub fn q_width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// `tokens`, or the number of learned positions if that is less.
    pub fn possible_length(&self, tokens: usize) -> usize {
        tokens.min(self.learned_positions.unwrap_or(usize::MAX))
    }

    /// The longest trained sequence in tokens, of a model that computes longer ones all the same:
    /// rotary positions go on, learned ones do not.
    pub fn trained_length(&self) -> Option<usize> {
        self.rotary.is_some().then_some(self.max_positions)
    }

    /// All rotary embeddings, that of layers without a window first.
    pub fn rotaries(&self) -> impl Iterator<Item = &Rotary> {
        self.rotary.iter().chain(&self.local_rotary)
    }

    /// Which of them turns q and k of block `layer`.
    pub fn rotary_of(&self, layer: usize) -> Option<usize> {
        let local = self.windows[layer].is_some() && self.local_rotary.is_some();
        (self.rotary.is_some() && self.rotates[layer]).then_some(usize::from(local))
    }

    /// Width of k and of v: `K · head_dim`.
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// The prefix of block `layer`, such as `model.layers.3`.
    pub fn layer_prefix(&self, layer: usize) -> String {
        format!("{}.{layer}", self.names.layers)
    }
}
