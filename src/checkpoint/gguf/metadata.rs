//! What a GGUF file says of a model beside its tensors and tokenizer. Source: llama.cpp
//! `convert_hf_to_gguf.py`, `gguf-py/gguf/constants.py`.

use std::f64::consts::PI;

use candle_core::quantized::gguf_file::Value as Metadata;

use super::Architecture;
use super::names::gguf_names;
use crate::error::{Error, Result};
use crate::model::families::{ROTATION_INTERVAL, rotates_every};
use crate::model::rotary::{llama3_divisor, yarn_attention_factor};
use crate::model::spec::{Family, ModelSpec, QueryScaling, RopeScaling, Rotary};

/// llama.cpp's tensor with the divisor of every frequency.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";
/// llama.cpp's tensors with the divisors of LongRoPE: for short sequences, for long ones.
pub(super) const LONG_ROPE_FACTORS: [&str; 2] =
    ["rope_factors_short.weight", "rope_factors_long.weight"];

/// Base of the rotary embedding in layers with a window.
pub(super) const LOCAL_THETA: f64 = 10_000.0;

/// What cos and sin are multiplied by besides.
pub(super) const ATTENTION_FACTOR: &str = "rope.scaling.attn_factor";
/// `beta_fast` and `beta_slow` of YaRN.
pub(super) const YARN_BETAS: [&str; 2] =
    ["rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"];
/// `mscale_all_dim`, for a `mscale` of 1.
pub(super) const YARN_LOG_MULTIPLIER: &str = "rope.scaling.yarn_log_multiplier";
/// Tokens of the context before it was stretched.
pub(super) const ORIGINAL_LENGTH: &str = "rope.scaling.original_context_length";
/// Every so many-th layer of an OLMo 3 is without a window.
pub(super) const OLMO_PATTERN: usize = 4;
/// `llama_4_scaling_beta`.
pub(super) const QUERY_SCALE: &str = "attention.temperature_scale";
/// A Granite's factors: the key in `config.json`, and that in a file.
pub(super) const GRANITE_FACTORS: [(&str, &str); 4] = [
    ("embedding_multiplier", "embedding_scale"),
    ("residual_multiplier", "residual_scale"),
    ("attention_multiplier", "attention.scale"),
    ("logits_scaling", "logit_scale"),
];

/// A key and its value.
pub type Field = (String, Metadata);

impl Architecture {
    /// Every architecture that is read and written.
    pub const ALL: [Architecture; 14] = [
        Architecture::Llama,
        Architecture::Mistral3,
        Architecture::Qwen2,
        Architecture::Qwen3,
        Architecture::SmolLm3,
        Architecture::Granite,
        Architecture::SeedOss,
        Architecture::Glm4,
        Architecture::Olmo2,
        Architecture::Gemma,
        Architecture::Gemma2,
        Architecture::Gemma3,
        Architecture::Phi3,
        Architecture::Gpt2,
    ];

    /// The architecture that llama.cpp has for a family: a Mistral is a Llama there.
    pub fn of(family: Family) -> Self {
        match family {
            Family::Llama | Family::Mistral => Architecture::Llama,
            Family::Ministral3 => Architecture::Mistral3,
            Family::Qwen2 => Architecture::Qwen2,
            Family::Qwen3 => Architecture::Qwen3,
            Family::SmolLm3 => Architecture::SmolLm3,
            Family::Granite | Family::GraniteMoeHybrid => Architecture::Granite,
            Family::SeedOss => Architecture::SeedOss,
            Family::Glm4 => Architecture::Glm4,
            Family::Olmo2 | Family::Olmo3 => Architecture::Olmo2,
            Family::Gemma => Architecture::Gemma,
            Family::Gemma2 => Architecture::Gemma2,
            Family::Gemma3 => Architecture::Gemma3,
            Family::Phi3 => Architecture::Phi3,
            Family::Gpt2 => Architecture::Gpt2,
        }
    }

    /// The tensors that llama.cpp has for the tensor `name`: one, or gate and up of an MLP that fuses them
    /// and must not here, each with its share of the rows, in order.
    pub fn tensors(self, name: &str) -> Option<Vec<String>> {
        gguf_names(self, name)
    }

    /// Whether it is one of Google's: norms of 1 + w, which llama.cpp stores as that sum.
    pub fn is_gemma(self) -> bool {
        matches!(self, Architecture::Gemma | Architecture::Gemma2 | Architecture::Gemma3)
    }

    /// Whether the rows of each head of q and k are stored interleaved, for llama.cpp's rotary embedding.
    pub fn interleaves_heads(self) -> bool {
        use Architecture::{Granite, Llama, Mistral3, SmolLm3};
        matches!(self, Llama | Mistral3 | SmolLm3 | Granite)
    }

    /// A layer without a window comes after so many with one.
    pub(super) fn window_pattern(self) -> Option<usize> {
        match self {
            Architecture::Gemma2 => Some(2),
            Architecture::Gemma3 => Some(6),
            _ => None,
        }
    }

    /// `query_pre_attn_scalar`, which no file holds: only the largest models divide scores by
    /// another number than the root of their heads' width. Source: llama.cpp `llama-model.cpp`.
    pub(super) fn attention_scalar(self, layers: usize, head_dim: usize, share: usize) -> usize {
        match (self, layers) {
            (Architecture::Gemma2, 46) | (Architecture::Gemma3, 62) => share,
            _ => head_dim,
        }
    }

    /// The name in `general.architecture`.
    pub fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Mistral3 => "mistral3",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
            Architecture::SmolLm3 => "smollm3",
            Architecture::Granite => "granite",
            Architecture::SeedOss => "seed_oss",
            Architecture::Glm4 => "glm4",
            Architecture::Olmo2 => "olmo2",
            Architecture::Gemma => "gemma",
            Architecture::Gemma2 => "gemma2",
            Architecture::Gemma3 => "gemma3",
            Architecture::Phi3 => "phi3",
            Architecture::Gpt2 => "gpt2",
        }
    }
}

/// Dimensions and switches.
///
/// # Errors
/// `Input` for what llama.cpp has no word for.
pub fn fields(spec: &ModelSpec) -> Result<Vec<Field>> {
    let architecture = Architecture::of(spec.family);
    check_unwritten(architecture, spec)?;
    let mut fields = vec![(
        "general.architecture".to_string(),
        Metadata::String(architecture.name().to_string()),
    )];
    let mut put = |key: &str, value: Metadata| {
        fields.push((format!("{}.{key}", architecture.name()), value));
    };
    let size = |size: usize| Metadata::U32(size as u32);
    put("context_length", size(spec.max_positions));
    put("embedding_length", size(spec.hidden_size));
    put("block_count", size(spec.num_layers));
    put("feed_forward_length", size(spec.intermediate_size));
    put("attention.head_count", size(spec.num_heads));
    put("attention.head_count_kv", size(spec.num_kv_heads));
    put("vocab_size", size(spec.vocab_size));
    let epsilon = Metadata::F32(spec.norm_eps as f32);
    let Some(rotary) = &spec.rotary else {
        put("attention.layer_norm_epsilon", epsilon);
        return Ok(fields);
    };
    put("attention.layer_norm_rms_epsilon", epsilon);
    put("attention.key_length", size(spec.head_dim));
    put("attention.value_length", size(spec.head_dim));
    put("rope.dimension_count", size(spec.rotary_dim));
    put("rope.freq_base", Metadata::F32(rotary.theta as f32));
    if let Some(window) = sliding_window(architecture, spec) {
        put("attention.sliding_window", size(window));
    }
    for (key, cap) in [
        ("attn_logit_softcapping", spec.attention_soft_cap),
        ("final_logit_softcapping", spec.logit_soft_cap),
    ] {
        if let Some(cap) = cap {
            put(key, Metadata::F32(cap));
        }
    }
    for (key, value) in rope_scaling(architecture, &rotary.scaling)? {
        put(key, value);
    }
    if architecture == Architecture::Granite {
        let factors =
            [spec.embedding_scale, spec.residual_scale, spec.attention_scale, spec.logit_divisor];
        for ((_, key), factor) in GRANITE_FACTORS.into_iter().zip(factors) {
            put(key, Metadata::F32(factor));
        }
    }
    if let Some(QueryScaling { beta, original_max_position_embeddings }) = spec.query_scaling {
        put(QUERY_SCALE, Metadata::F32(beta as f32));
        if !matches!(rotary.scaling, RopeScaling::Yarn { .. }) {
            put(ORIGINAL_LENGTH, size(original_max_position_embeddings));
        }
    }
    Ok(fields)
}

/// The window that a file names; none where llama.cpp does not look for one.
fn sliding_window(architecture: Architecture, spec: &ModelSpec) -> Option<usize> {
    let window = spec.windows.iter().flatten().next().copied();
    match architecture {
        // 0 is what llama.cpp's converter writes for none; the key must be there.
        Architecture::Phi3 => Some(window.unwrap_or(0)),
        _ => window.filter(|_| spec.post_norms),
    }
}

/// The keys of a rope scaling and their values.
type ScalingFields = Vec<(&'static str, Metadata)>;

fn number(key: &'static str, number: f64) -> (&'static str, Metadata) {
    (key, Metadata::F32(number as f32))
}

fn original_length(tokens: usize) -> (&'static str, Metadata) {
    (ORIGINAL_LENGTH, Metadata::U32(tokens as u32))
}

fn kind_and_factor(kind: &str, factor: f64) -> ScalingFields {
    let kind = ("rope.scaling.type", Metadata::String(kind.into()));
    vec![kind, number("rope.scaling.factor", factor)]
}

fn rope_scaling(architecture: Architecture, scaling: &RopeScaling) -> Result<ScalingFields> {
    Ok(match *scaling {
        RopeScaling::Default => Vec::new(),
        // The factors are a tensor, as are those of LongRoPE; other graphs do not look for it.
        RopeScaling::Llama3 { .. } if architecture == Architecture::Llama => Vec::new(),
        RopeScaling::Llama3 { .. } => return Err(not_for_all("llama3", Architecture::Llama)),
        RopeScaling::Linear { factor } => kind_and_factor("linear", factor),
        RopeScaling::Yarn { .. } => return yarn(architecture, scaling),
        RopeScaling::LongRope { original_max_position_embeddings, attention_factor, .. }
            if architecture == Architecture::Phi3 =>
        {
            let factor = number(ATTENTION_FACTOR, attention_factor);
            vec![original_length(original_max_position_embeddings), factor]
        }
        RopeScaling::LongRope { .. } => return Err(not_for_all("longrope", Architecture::Phi3)),
        RopeScaling::Dynamic { .. } => {
            return Err(Error::input("rope scaling `dynamic` has no form in GGUF").hint(
                "llama.cpp scales by a fixed factor: set `linear` or `yarn` in config.json",
            ));
        }
    })
}

fn yarn(architecture: Architecture, scaling: &RopeScaling) -> Result<ScalingFields> {
    let &RopeScaling::Yarn {
        factor,
        original_max_position_embeddings,
        beta_fast,
        beta_slow,
        attention_factor,
        truncate,
    } = scaling
    else {
        unreachable!("{scaling:?} is no YaRN");
    };
    let of_mistral3 = architecture == Architecture::Mistral3;
    if !truncate {
        let what = "config.json: llama.cpp truncates the bounds of every yarn";
        return Err(Error::input(what).hint("this model cannot be a GGUF file"));
    }
    // Others are in the files, and read for Mistral 3 alone.
    if !of_mistral3 && [beta_fast, beta_slow] != [32.0, 1.0] {
        let what = format_args!(
            "config.json: llama.cpp has beta_fast 32 and beta_slow 1 for every yarn of a {}",
            architecture.name()
        );
        return Err(Error::input(what).hint("this model cannot be a GGUF file"));
    }
    let mut written = kind_and_factor("yarn", factor);
    written.push(original_length(original_max_position_embeddings));
    written.push(number(YARN_BETAS[0], beta_fast));
    written.push(number(YARN_BETAS[1], beta_slow));
    let mut implied = yarn_attention_factor(factor, 0.0);
    if of_mistral3 && attention_factor == 1.0 {
        implied = 1.0;
        written.push(number(YARN_LOG_MULTIPLIER, 1.0));
    }
    if (attention_factor / implied - 1.0).abs() > 1e-6 {
        written.push(number(ATTENTION_FACTOR, attention_factor / implied));
    }
    Ok(written)
}

/// Refuses what llama.cpp knows better than its files.
fn check_unwritten(architecture: Architecture, spec: &ModelSpec) -> Result<()> {
    if architecture.is_gemma() && !spec.tie_word_embeddings {
        let what = "config.json: llama.cpp takes the embedding for the head of every Gemma";
        return Err(Error::input(what).hint("this model cannot be a GGUF file"));
    }
    // llama.cpp's loaders of the others leave biases over, and refuse the file.
    let reads_all =
        matches!(architecture, Architecture::Llama | Architecture::Granite | Architecture::Gpt2);
    use Architecture::{Glm4, Qwen2, Qwen3, SeedOss, SmolLm3};
    let of_q = matches!(architecture, Qwen2 | Qwen3 | SmolLm3 | SeedOss | Glm4);
    let usual = rotates_every(ROTATION_INTERVAL, spec.num_layers);
    let square =
        matches!(architecture, Architecture::Qwen2 | Architecture::Phi3 | Architecture::Olmo2);
    refuse_first(
        architecture,
        &[
            ("attention_bias", !reads_all && (spec.output_bias || (spec.qkv_bias && !of_q))),
            ("mlp_bias", !reads_all && spec.mlp_bias),
            // q and o are as wide as the model there.
            ("head_dim", square && spec.q_width() != spec.hidden_size),
            ("no_rope_layers", architecture == Architecture::SmolLm3 && spec.rotates != usual),
        ],
    )?;
    if architecture == Architecture::Olmo2 {
        refuse_first(architecture, &olmo_differences(spec))?;
    }
    let Some(pattern) = architecture.window_pattern() else { return Ok(()) };
    let caps = [spec.attention_soft_cap, spec.logit_soft_cap].map(|cap| cap.is_some());
    let share = spec.hidden_size / spec.num_heads;
    let scalar = architecture.attention_scalar(spec.num_layers, spec.head_dim, share);
    let local = Rotary { theta: LOCAL_THETA, scaling: RopeScaling::Default };
    let mut windows = spec.windows.iter().enumerate();
    let different = [
        (
            "layer_types",
            windows.any(|(layer, window)| window.is_none() != (layer + 1).is_multiple_of(pattern)),
        ),
        ("attn_logit_softcapping", caps[0] != (architecture == Architecture::Gemma2)),
        ("final_logit_softcapping", architecture == Architecture::Gemma2 && !caps[1]),
        ("query_pre_attn_scalar", spec.attention_scale != (1.0 / (scalar as f64).sqrt()) as f32),
        ("rope_local_base_freq", spec.local_rotary.as_ref().is_some_and(|it| *it != local)),
    ];
    refuse_first(architecture, &different)
}

/// The keys that llama.cpp has otherwise for every OLMo.
fn olmo_differences(spec: &ModelSpec) -> [(&'static str, bool); 4] {
    let usual = |layer: usize| !(layer + 1).is_multiple_of(OLMO_PATTERN);
    let mut windows = spec.windows.iter().enumerate();
    let has_windows = spec.windows.iter().any(Option::is_some);
    let local = spec.local_rotary.as_ref().or(spec.rotary.as_ref());
    let theta = spec.rotary.as_ref().map(|rotary| rotary.theta);
    let same = |local: &Rotary| local.scaling == RopeScaling::Default && Some(local.theta) == theta;
    [
        ("tie_word_embeddings", spec.tie_word_embeddings),
        (
            "layer_types",
            has_windows && windows.any(|(layer, window)| window.is_some() != usual(layer)),
        ),
        ("rope_parameters", has_windows && !local.is_none_or(same)),
        // What its converter writes of another one would count twice.
        ("attention_factor", spec.rotary.as_ref().is_some_and(|rotary| !is_implied(rotary))),
    ]
}

/// Whether cos and sin of a YaRN are multiplied by what its factor implies.
fn is_implied(rotary: &Rotary) -> bool {
    let RopeScaling::Yarn { factor, attention_factor, .. } = rotary.scaling else { return true };
    (attention_factor / yarn_attention_factor(factor, 0.0) - 1.0).abs() <= 1e-6
}

/// Refuses the first key that llama.cpp has otherwise.
fn refuse_first(architecture: Architecture, different: &[(&str, bool)]) -> Result<()> {
    let found = different.iter().find(|(_, different)| *different);
    found.map_or(Ok(()), |(key, _)| {
        let name = architecture.name();
        let what = format_args!("config.json: llama.cpp has another {key} for every {name}");
        Err(Error::input(what).hint("this model cannot be a GGUF file"))
    })
}

fn not_for_all(scaling: &str, architecture: Architecture) -> Error {
    let name = architecture.name();
    let what = format_args!("config.json: llama.cpp has rope scaling `{scaling}` for {name} alone");
    Error::input(what).hint("this model cannot be a GGUF file")
}

/// Divisors of the frequencies, which are tensors of the file: by name.
pub fn rope_factors(spec: &ModelSpec) -> Vec<(&'static str, Vec<f32>)> {
    let scaling = spec.rotary.as_ref().map(|rotary| &rotary.scaling);
    if let Some(RopeScaling::LongRope { short_factor, long_factor, .. }) = scaling {
        let [short, long] = LONG_ROPE_FACTORS;
        return vec![(short, short_factor.clone()), (long, long_factor.clone())];
    }
    llama3_factors(spec).map(|factors| (ROPE_FACTORS, factors)).into_iter().collect()
}

/// The divisor of each frequency under Llama 3's scaling; none for other models.
fn llama3_factors(spec: &ModelSpec) -> Option<Vec<f32>> {
    let rotary = spec.rotary.as_ref()?;
    let divisor = |pair: usize| {
        let exponent = 2.0 * pair as f64 / spec.head_dim as f64;
        let wavelength = 2.0 * PI * rotary.theta.powf(exponent);
        llama3_divisor(&rotary.scaling, wavelength).map(|divisor| divisor as f32)
    };
    (0..spec.head_dim / 2).map(divisor).collect()
}
