//! The `config.json` that a GGUF file's metadata implies.
//!
//! What the metadata say and Nibble cannot do (experts, heads that turn in part but for Phi-3 and GLM-4,
//! values narrower than keys) is refused here: the tensors alone would not show it.

use candle_core::quantized::gguf_file::Value as Metadata;
use nibble_quant::FloatType;
use serde_json::{Map, Value, json};

use super::metadata::{
    ATTENTION_FACTOR, GRANITE_FACTORS, LOCAL_THETA, LONG_ROPE_FACTORS, OLMO_PATTERN,
    ORIGINAL_LENGTH, QUERY_SCALE, ROPE_FACTORS, YARN_BETAS, YARN_LOG_MULTIPLIER,
};
use super::{Architecture, Gguf};
use crate::error::Result;
use crate::model::families::{MOST_LAYERS, ROTATION_INTERVAL};
use crate::model::rotary::{llama3_scaling_of, long_rope_attention_factor, yarn_attention_factor};
use crate::model::spec::Family;

/// Base of the rotary embedding of layers with a window.
const LOCAL_BASE: &str = "rope.freq_base_swa";
/// Tokens of a sliding window.
const WINDOW: &str = "attention.sliding_window";

impl Gguf {
    /// The `config.json`.
    pub(crate) fn config(&self) -> Result<Value> {
        let mut config = match self.architecture {
            Architecture::Gpt2 => self.gpt2_config()?,
            _ => self.llama_config()?,
        };
        for (key, field) in [
            ("bos_token_id", "tokenizer.ggml.bos_token_id"),
            ("eos_token_id", "tokenizer.ggml.eos_token_id"),
            ("pad_token_id", "tokenizer.ggml.padding_token_id"),
        ] {
            if let Some(id) = self.content.metadata.get(field).and_then(|v| v.to_u32().ok()) {
                config.insert(key.into(), id.into());
            }
        }
        config.insert("torch_dtype".into(), FloatType::Bf16.as_str().into());
        Ok(Value::Object(config))
    }

    /// The family whose `config.json` the file gets.
    fn family(&self) -> Family {
        match self.architecture {
            Architecture::Llama => Family::Llama,
            Architecture::Mistral3 if self.has_query_scale() => Family::Ministral3,
            // Mistral Small 3 and 3.1, whose text is a Mistral's.
            Architecture::Mistral3 => Family::Mistral,
            Architecture::Qwen2 => Family::Qwen2,
            Architecture::Qwen3 => Family::Qwen3,
            Architecture::SmolLm3 => Family::SmolLm3,
            Architecture::Granite => Family::Granite,
            Architecture::SeedOss => Family::SeedOss,
            Architecture::Glm4 => Family::Glm4,
            Architecture::Olmo2 if self.field(WINDOW).is_some() => Family::Olmo3,
            Architecture::Olmo2 => Family::Olmo2,
            Architecture::Gemma => Family::Gemma,
            Architecture::Gemma2 => Family::Gemma2,
            Architecture::Gemma3 => Family::Gemma3,
            Architecture::Phi3 => Family::Phi3,
            Architecture::Gpt2 => Family::Gpt2,
        }
    }

    fn llama_config(&self) -> Result<Map<String, Value>> {
        let heads = self.size("attention.head_count")?;
        let hidden = self.size("embedding_length")?;
        let theta = self.float("rope.freq_base").unwrap_or(10_000.0);
        let head_dim = self.head_dim()?;
        self.check_switches(head_dim)?;
        let mut config = json!({
            "architectures": [self.family().class_name()],
            "model_type": self.family().model_type(),
            "vocab_size": self.vocab_size()?,
            "hidden_size": hidden,
            "intermediate_size": self.size("feed_forward_length")?,
            "num_hidden_layers": self.size("block_count")?,
            "num_attention_heads": heads,
            "num_key_value_heads": self.kv_heads()?,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.size("context_length")?,
            "rms_norm_eps": self.required_float("attention.layer_norm_rms_epsilon")?,
            "rope_theta": theta,
            "rope_scaling": self.rope_scaling(theta, head_dim)?,
            "tie_word_embeddings": self.is_tied(),
        });
        let biased = [Architecture::Llama, Architecture::SmolLm3, Architecture::Granite];
        if biased.contains(&self.architecture) {
            config["mlp_bias"] = self.has("blk.0.ffn_up.bias").into();
        }
        let biased_q = [Architecture::Qwen3, Architecture::SeedOss, Architecture::Glm4];
        if biased.contains(&self.architecture) || biased_q.contains(&self.architecture) {
            config["attention_bias"] = self.has("blk.0.attn_q.bias").into();
        }
        if self.architecture == Architecture::Mistral3 {
            match self.has_query_scale() {
                true => self.add_mistral3(&mut config, theta)?,
                // Without the key a Mistral has one of 4,096 tokens.
                false => config["sliding_window"] = Value::Null,
            }
        }
        if self.architecture == Architecture::SmolLm3 {
            config["no_rope_layer_interval"] = ROTATION_INTERVAL.into();
        }
        if self.architecture == Architecture::Granite {
            self.add_granite(&mut config, head_dim)?;
        }
        if self.family() == Family::Olmo3 {
            self.add_olmo3(&mut config, theta)?;
        }
        if self.architecture == Architecture::Glm4 {
            config["partial_rotary_factor"] = self.turned_share(head_dim)?.into();
        }
        if self.architecture == Architecture::Phi3 {
            self.add_phi3(&mut config, head_dim)?;
        }
        if self.architecture.is_gemma() {
            self.add_gemma(&mut config, head_dim)?;
        }
        Ok(config.as_object().cloned().unwrap_or_default())
    }

    /// Adds what a Gemma has and a Llama has not, from the file or from what llama.cpp takes for granted.
    fn add_gemma(&self, config: &mut Value, head_dim: usize) -> Result<()> {
        config["hidden_act"] = "gelu_pytorch_tanh".into();
        config["hidden_activation"] = "gelu_pytorch_tanh".into();
        let Some(pattern) = self.architecture.window_pattern() else { return Ok(()) };
        let layers = self.size("block_count")?;
        let share = self.size("embedding_length")? / self.size("attention.head_count")?.max(1);
        let scalar = self.architecture.attention_scalar(layers, head_dim, share);
        config["query_pre_attn_scalar"] = scalar.into();
        // What llama.cpp takes where a file is silent; 0 is no window.
        let window = if self.architecture == Architecture::Gemma2 { 4096 } else { 0 };
        let window = self.size_or(WINDOW, window)?;
        let pattern = self.size_or("attention.sliding_window_pattern", pattern)?.max(1);
        put_windows(config, layers, window, |layer| !(layer + 1).is_multiple_of(pattern));
        for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if self.field(key).is_some() {
                config[key] = self.required_float(key)?.into();
            }
        }
        if self.architecture == Architecture::Gemma3 {
            let local = self.float(LOCAL_BASE).unwrap_or(LOCAL_THETA);
            config["rope_local_base_freq"] = local.into();
        }
        Ok(())
    }

    /// Adds the windows of an OLMo 3, in the layers that llama.cpp gives them, and their rotary embedding; 0 is
    /// no window.
    fn add_olmo3(&self, config: &mut Value, theta: f64) -> Result<()> {
        let global = take_rope(config, theta);
        let local_theta = self.float(LOCAL_BASE).unwrap_or(theta);
        let local = json!({"rope_type": "default", "rope_theta": local_theta});
        config["rope_parameters"] = json!({"full_attention": global, "sliding_attention": local});
        let listed = match self.field("attention.sliding_window_pattern") {
            Some(Metadata::Array(values)) => &values[..],
            _ => &[],
        };
        let slides = |layer: usize| match listed.get(layer) {
            Some(slides) => matches!(slides, Metadata::Bool(true)),
            None => !(layer + 1).is_multiple_of(OLMO_PATTERN),
        };
        put_windows(config, self.size("block_count")?, self.size(WINDOW)?, slides);
        Ok(())
    }

    fn has_query_scale(&self) -> bool {
        self.field(QUERY_SCALE).is_some()
    }

    /// Adds what a Ministral 3 has and a Llama has not: where its class finds nothing of rope, it takes YaRN.
    fn add_mistral3(&self, config: &mut Value, theta: f64) -> Result<()> {
        let mut rope = take_rope(config, theta);
        rope["llama_4_scaling_beta"] = self.required_float(QUERY_SCALE)?.into();
        let longest = self.size("context_length")?;
        rope["original_max_position_embeddings"] = self.size_or(ORIGINAL_LENGTH, longest)?.into();
        config["rope_parameters"] = rope;
        Ok(())
    }

    /// Adds a Granite's factors, of which llama.cpp wants that of the logits alone: 0 is none.
    fn add_granite(&self, config: &mut Value, head_dim: usize) -> Result<()> {
        const ROTATES: &str = "rope.scaling.finetuned";
        if matches!(self.field(ROTATES), Some(Metadata::Bool(false))) {
            let what = format_args!("metadata `{ROTATES}` is false: no layer has positions");
            return Err(self.wrong(what).hint("models of this kind are not supported"));
        }
        for (key, stored) in GRANITE_FACTORS {
            let given = self.field(stored).is_some() || key == "logits_scaling";
            let given = given.then(|| self.required_float(stored)).transpose()?;
            let usual =
                if key == "attention_multiplier" { (head_dim as f64).powf(-0.5) } else { 1.0 };
            config[key] = given.filter(|factor| *factor != 0.0).unwrap_or(usual).into();
        }
        Ok(())
    }

    /// `partial_rotary_factor`.
    fn turned_share(&self, head_dim: usize) -> Result<f64> {
        let turned = self.size_or("rope.dimension_count", head_dim)?;
        Ok(turned as f64 / head_dim as f64)
    }

    /// Adds what a Phi-3 has and a Llama has not.
    fn add_phi3(&self, config: &mut Value, head_dim: usize) -> Result<()> {
        config["partial_rotary_factor"] = self.turned_share(head_dim)?.into();
        let window = self.size_or(WINDOW, 0)?;
        config["sliding_window"] = if window > 0 { window.into() } else { Value::Null };
        let longest = self.size("context_length")?;
        let original = self.size_or(ORIGINAL_LENGTH, longest)?;
        config["original_max_position_embeddings"] = original.into();
        if !LONG_ROPE_FACTORS.iter().any(|name| self.has(name)) {
            return Ok(());
        }
        let [short, long] = LONG_ROPE_FACTORS.map(|name| self.factors(name));
        let mut scaling = json!({"type": "longrope", "short_factor": short?, "long_factor": long?});
        let implied = long_rope_attention_factor(longest as f64 / original as f64, original as f64);
        let stored = self.attention_factor()?;
        if (stored / implied - 1.0).abs() > 1e-4 {
            scaling["attention_factor"] = stored.into();
        }
        config["rope_scaling"] = scaling;
        Ok(())
    }

    /// A tensor of divisors.
    fn factors(&self, stored: &str) -> Result<Vec<f32>> {
        if !self.has(stored) {
            return Err(self.wrong(format_args!("tensor {stored} is missing")));
        }
        let elements = self.elements_of(stored)?;
        let mut factors = vec![0.0; elements.len()];
        elements.read(0, &mut factors);
        Ok(factors)
    }

    fn gpt2_config(&self) -> Result<Map<String, Value>> {
        let config = json!({
            "architectures": [self.family().class_name()],
            "model_type": self.family().model_type(),
            "vocab_size": self.vocab_size()?,
            "n_embd": self.size("embedding_length")?,
            "n_inner": self.size("feed_forward_length")?,
            "n_layer": self.size("block_count")?,
            "n_head": self.size("attention.head_count")?,
            "n_positions": self.size("context_length")?,
            "layer_norm_epsilon": self.required_float("attention.layer_norm_epsilon")?,
            "activation_function": "gelu_new",
            "tie_word_embeddings": self.is_tied(),
        });
        Ok(config.as_object().cloned().unwrap_or_default())
    }

    /// Refuses what a Llama of `config.json` has no word for.
    fn check_switches(&self, head_dim: usize) -> Result<()> {
        let whole = ("rope.dimension_count", head_dim);
        let in_part = [Architecture::Phi3, Architecture::Glm4].contains(&self.architecture);
        let whole = (!in_part).then_some(whole);
        let before = [("expert_count", 0)].into_iter().chain(whole);
        for (key, expected) in before.chain([("attention.value_length", head_dim)]) {
            if self.field(key).is_some() && self.size(key)? != expected {
                let got = self.size(key)?;
                return Err(self
                    .wrong(format_args!("metadata `{key}` is {got}, expected {expected}"))
                    .hint("models of this kind are not supported"));
            }
        }
        Ok(())
    }

    fn rope_scaling(&self, theta: f64, head_dim: usize) -> Result<Value> {
        if self.has(ROPE_FACTORS) {
            let factors = self.factors(ROPE_FACTORS)?;
            return llama3_scaling_of(&factors, theta, head_dim).ok_or_else(|| {
                self.wrong("rope_freqs.weight: not the factors of a Llama 3 model")
            });
        }
        let kind = self.field("rope.scaling.type").and_then(|v| v.to_string().ok());
        let of_phi3 = self.architecture == Architecture::Phi3 && self.has(LONG_ROPE_FACTORS[0]);
        if of_phi3 && kind.is_none_or(|kind| kind == "longrope") {
            return Ok(Value::Null);
        }
        let factor = self.float("rope.scaling.factor").or_else(|| self.float("rope.scale_linear"));
        match (kind.map(String::as_str), factor) {
            (None, None) | (Some("none"), _) => Ok(Value::Null),
            (None | Some("linear"), Some(factor)) => {
                Ok(json!({"rope_type": "linear", "factor": factor}))
            }
            (Some("yarn"), Some(factor)) => self.yarn(factor),
            (Some(kind), None) => {
                Err(self.wrong(format_args!("rope scaling `{kind}` without a factor")))
            }
            (Some(kind), Some(_)) => {
                Err(self.wrong(format_args!("rope scaling `{kind}` is not supported")))
            }
        }
    }

    fn yarn(&self, factor: f64) -> Result<Value> {
        let original = self.size_or(ORIGINAL_LENGTH, self.size("context_length")?)?;
        let mut scaling = json!({
            "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
        });
        for (key, stored) in ["beta_fast", "beta_slow"].into_iter().zip(YARN_BETAS) {
            if self.field(stored).is_some() {
                scaling[key] = self.required_float(stored)?.into();
            }
        }
        let mistral = self.architecture == Architecture::Mistral3;
        let all = self.float(YARN_LOG_MULTIPLIER).filter(|_| mistral).unwrap_or(0.0);
        let more = self.attention_factor()?;
        // llama.cpp's converter writes all of it for an OLMo.
        if self.architecture == Architecture::Olmo2 {
            if self.field(ATTENTION_FACTOR).is_some() {
                scaling["attention_factor"] = more.into();
            }
            return Ok(scaling);
        }
        if all != 0.0 || more != 1.0 {
            scaling["attention_factor"] = (more * yarn_attention_factor(factor, all)).into();
        }
        Ok(scaling)
    }

    /// What cos and sin are multiplied by besides.
    fn attention_factor(&self) -> Result<f64> {
        let stored = self.float(ATTENTION_FACTOR).unwrap_or(1.0);
        if !(stored.is_finite() && stored > 0.0) {
            return Err(self.wrong(format_args!("metadata `{ATTENTION_FACTOR}` is {stored}")));
        }
        Ok(stored)
    }

    fn is_tied(&self) -> bool {
        !self.has("output.weight")
    }

    fn vocab_size(&self) -> Result<usize> {
        let embedding = self.content.tensor_infos.get("token_embd.weight");
        let rows = embedding.and_then(|info| info.shape.dims().first().copied());
        rows.ok_or_else(|| self.wrong("tensor token_embd.weight is missing"))
    }

    pub(super) fn kv_heads(&self) -> Result<usize> {
        match self.field("attention.head_count_kv") {
            Some(_) => self.size("attention.head_count_kv"),
            None => self.size("attention.head_count"),
        }
    }

    pub(super) fn head_dim(&self) -> Result<usize> {
        if self.field("attention.key_length").is_some() {
            return self.size("attention.key_length");
        }
        let heads = self.size("attention.head_count")?;
        Ok(self.size("embedding_length")? / heads.max(1))
    }

    pub(super) fn size(&self, key: &str) -> Result<usize> {
        let missing = || self.wrong(format_args!("metadata `{key}` is missing or no number"));
        let value = match self.field(key) {
            // A value for each layer.
            Some(Metadata::Array(values)) => {
                let sizes: Option<Vec<usize>> = values.iter().map(whole_number).collect();
                let sizes = sizes.ok_or_else(missing)?;
                if sizes.iter().any(|size| *size != sizes[0]) {
                    let what = format_args!("metadata `{key}` differs from layer to layer");
                    return Err(self.wrong(what).hint("models of this kind are not supported"));
                }
                sizes.first().copied()
            }
            value => value.and_then(whole_number),
        };
        value.ok_or_else(missing)
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        if self.field(key).is_some() { self.size(key) } else { Ok(default) }
    }

    fn float(&self, key: &str) -> Option<f64> {
        let value = self.field(key)?;
        value.to_f32().map(f64::from).or_else(|_| value.to_f64()).ok()
    }

    fn required_float(&self, key: &str) -> Result<f64> {
        let missing = || self.wrong(format_args!("metadata `{key}` is missing or no number"));
        // The shortest decimal of the f32, so that 1e-5 stays 1e-5.
        let shortest = |value: f64| (value as f32).to_string().parse().unwrap_or(value);
        self.float(key).map(shortest).ok_or_else(missing)
    }
}

/// The rope scaling of a config as `rope_parameters` of transformers 5, with its base.
fn take_rope(config: &mut Value, theta: f64) -> Value {
    let mut rope = config["rope_scaling"].take();
    if rope.is_null() {
        rope = json!({"rope_type": "default"});
    }
    rope["rope_theta"] = theta.into();
    rope
}

/// Puts a window, if it is not 0, into those of `layers` that `slides`.
fn put_windows(config: &mut Value, layers: usize, window: usize, slides: impl Fn(usize) -> bool) {
    let slides = |layer| window > 0 && slides(layer);
    let kind = |layer| if slides(layer) { "sliding_attention" } else { "full_attention" };
    // More layers than any model has are refused by who reads the config.
    config["layer_types"] = (0..layers.min(MOST_LAYERS)).map(kind).collect();
    config["sliding_window"] = window.max(1).into();
}

/// A number that is not negative, of any type of integers.
fn whole_number(value: &Metadata) -> Option<usize> {
    let number = match *value {
        Metadata::I8(number) => i64::from(number),
        Metadata::I16(number) => i64::from(number),
        Metadata::I32(number) => i64::from(number),
        Metadata::I64(number) => number,
        _ => return value.to_u64().ok().and_then(|number| usize::try_from(number).ok()),
    };
    usize::try_from(number).ok()
}
