//! GGUF files as Hugging Face checkpoints: names, shapes, row order and `config.json` restored.
//!
//! Tensors are dequantized to f32 one at a time, when they are asked for, by candle's block
//! formats. llama.cpp stores q and k of the `llama` architecture with the rows of each head
//! interleaved for its rotary embedding; here they are put back into halves. A file without
//! `output.weight` has a tied head. Source: llama.cpp `convert_hf_to_gguf.py` and
//! `gguf-py/gguf/tensor_mapping.py`.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::Path;

use candle_core::Device;
use candle_core::quantized::gguf_file::{Content, Value as Metadata};
use nibble_quant::FloatType;
use serde_json::{Map, Value, json};

use super::mapped::MappedFile;
use super::{DenseTensor, StoredType, TensorInfo, Weight};
use crate::error::{Error, Result, candle_text};
use crate::model::rotary::llama3_scaling_of;

/// An opened GGUF file.
pub(super) struct Gguf {
    file: MappedFile,
    content: Content,
    architecture: Architecture,
    /// Hugging Face name to GGUF name.
    names: BTreeMap<String, String>,
    tensors: Vec<TensorInfo>,
    place: String,
}

/// The architectures that have a Hugging Face family here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Architecture {
    Llama,
    Qwen2,
    Gpt2,
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gguf").field("place", &self.place).finish_non_exhaustive()
    }
}

impl Gguf {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let place = path.display().to_string();
        let damaged = |e: candle_core::Error| {
            Error::input(format_args!("{place}: damaged GGUF file: {}", candle_text(&e)))
                .hint("the file may be truncated: compare its size with the source")
        };
        let content = Content::read(&mut Cursor::new(&file.bytes)).map_err(damaged)?;
        let architecture = architecture(&content, &place)?;
        let mut gguf = Gguf {
            file,
            content,
            architecture,
            names: BTreeMap::new(),
            tensors: Vec::new(),
            place,
        };
        gguf.list_tensors()?;
        Ok(gguf)
    }

    pub(super) fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    pub(super) fn weight(&self, name: &str) -> Result<Weight> {
        let Some(stored) = self.names.get(name) else {
            return Err(Error::input(format_args!("tensor {name} is not in {}", self.place)));
        };
        let read = || {
            let tensor =
                self.content.tensor(&mut Cursor::new(&self.file.bytes), stored, &Device::Cpu)?;
            tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()
        };
        let values = read();
        // The values are copies; a page of the file that is wanted once more is in the cache.
        self.file.release(&self.file.bytes);
        let mut values =
            values.map_err(|e| self.wrong(format_args!("tensor {stored}: {}", candle_text(&e))))?;
        let shape = self.content.tensor_infos[stored].shape.dims().to_vec();
        let heads = match stored.rsplit('.').nth(1) {
            Some("attn_q") => self.head_count("attention.head_count")?,
            Some("attn_k") => self.kv_heads()?,
            _ => 0,
        };
        if heads > 0 && self.architecture == Architecture::Llama {
            values = deinterleave_rows(&values, &shape, heads);
        }
        let mut shape = shape;
        if self.architecture == Architecture::Gpt2 && shape.len() == 2 && name.contains(".h.") {
            values = transpose(&values, shape[0], shape[1]);
            shape.swap(0, 1);
        }
        let data = bytemuck::allocation::pod_collect_to_vec(&values).into();
        Ok(Weight::Dense(DenseTensor { dtype: FloatType::F32, shape, data }))
    }

    /// The `config.json` that the metadata implies.
    pub(super) fn config(&self) -> Result<Value> {
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
        config.insert("torch_dtype".into(), "bfloat16".into());
        Ok(Value::Object(config))
    }

    fn llama_config(&self) -> Result<Map<String, Value>> {
        let heads = self.head_count("attention.head_count")?;
        let hidden = self.size("embedding_length")?;
        let (kind, class) = match self.architecture {
            Architecture::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
            _ => ("llama", "LlamaForCausalLM"),
        };
        let theta = self.float("rope.freq_base").unwrap_or(10_000.0);
        let head_dim = self.size("attention.key_length").unwrap_or(hidden / heads.max(1));
        let config = json!({
            "architectures": [class],
            "model_type": kind,
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
            "tie_word_embeddings": !self.content.tensor_infos.contains_key("output.weight"),
        });
        Ok(config.as_object().cloned().unwrap_or_default())
    }

    fn gpt2_config(&self) -> Result<Map<String, Value>> {
        let config = json!({
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": self.vocab_size()?,
            "n_embd": self.size("embedding_length")?,
            "n_inner": self.size("feed_forward_length")?,
            "n_layer": self.size("block_count")?,
            "n_head": self.head_count("attention.head_count")?,
            "n_positions": self.size("context_length")?,
            "layer_norm_epsilon": self.required_float("attention.layer_norm_epsilon")?,
            "activation_function": "gelu_new",
            "tie_word_embeddings": !self.content.tensor_infos.contains_key("output.weight"),
        });
        Ok(config.as_object().cloned().unwrap_or_default())
    }

    fn rope_scaling(&self, theta: f64, head_dim: usize) -> Result<Value> {
        if self.content.tensor_infos.contains_key("rope_freqs.weight") {
            return self.llama3_scaling(theta, head_dim);
        }
        let kind = self.field("rope.scaling.type").and_then(|v| v.to_string().ok());
        let factor = self.float("rope.scaling.factor");
        match (kind.map(String::as_str), factor) {
            (None | Some("none"), _) => Ok(Value::Null),
            (Some("linear"), Some(factor)) => Ok(json!({"rope_type": "linear", "factor": factor})),
            (Some("yarn"), Some(factor)) => Ok(json!({
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings":
                    self.size("rope.scaling.original_context_length")?,
            })),
            (Some(kind), _) => Err(self.wrong(format_args!("rope scaling `{kind}`"))),
        }
    }

    /// Llama 3.1 files carry the factor of every frequency in place of its parameters.
    fn llama3_scaling(&self, theta: f64, head_dim: usize) -> Result<Value> {
        let read = || {
            let mut cursor = Cursor::new(&self.file.bytes);
            let tensor = self.content.tensor(&mut cursor, "rope_freqs.weight", &Device::Cpu)?;
            tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()
        };
        let factors = read().map_err(|e| {
            let cause = candle_text(&e);
            self.wrong(format_args!("tensor rope_freqs.weight: {cause}"))
        })?;
        llama3_scaling_of(&factors, theta, head_dim)
            .ok_or_else(|| self.wrong("rope_freqs.weight: not the factors of a Llama 3 model"))
    }

    fn list_tensors(&mut self) -> Result<()> {
        for (stored, info) in &self.content.tensor_infos {
            if stored == "rope_freqs.weight" {
                continue;
            }
            let Some(name) = hugging_face_name(self.architecture, stored) else {
                return Err(self
                    .wrong(format_args!("tensor {stored} is not known"))
                    .hint("only the weights of llama, qwen2 and gpt2 models are supported"));
            };
            let mut shape = info.shape.dims().to_vec();
            if self.architecture == Architecture::Gpt2 && shape.len() == 2 && name.contains(".h.") {
                shape.swap(0, 1);
            }
            let blocks = info.shape.elem_count() / info.ggml_dtype.block_size();
            let bytes = blocks * info.ggml_dtype.type_size();
            let end = self.content.tensor_data_offset.saturating_add(info.offset);
            if end.saturating_add(bytes as u64) > self.file.bytes.len() as u64 {
                return Err(self
                    .wrong(format_args!("tensor {stored} ends after the end of the file"))
                    .hint("the file is truncated: download it again"));
            }
            let stored_type = StoredType::Dense(FloatType::F32);
            self.tensors.push(TensorInfo { name: name.clone(), shape, stored: stored_type, bytes });
            self.names.insert(name, stored.clone());
        }
        self.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(())
    }

    fn vocab_size(&self) -> Result<usize> {
        let embedding = self.content.tensor_infos.get("token_embd.weight");
        let rows = embedding.and_then(|info| info.shape.dims().first().copied());
        rows.ok_or_else(|| self.wrong("tensor token_embd.weight is missing"))
    }

    fn kv_heads(&self) -> Result<usize> {
        match self.field("attention.head_count_kv") {
            Some(_) => self.size("attention.head_count_kv"),
            None => self.head_count("attention.head_count"),
        }
    }

    fn head_count(&self, key: &str) -> Result<usize> {
        self.size(key)
    }

    fn field(&self, key: &str) -> Option<&Metadata> {
        let prefix = match self.architecture {
            Architecture::Llama => "llama",
            Architecture::Qwen2 => "qwen2",
            Architecture::Gpt2 => "gpt2",
        };
        self.content.metadata.get(&format!("{prefix}.{key}"))
    }

    fn size(&self, key: &str) -> Result<usize> {
        let value = self.field(key).and_then(|value| value.to_u64().ok());
        value
            .and_then(|value| usize::try_from(value).ok())
            .ok_or_else(|| self.wrong(format_args!("metadata `{key}` is missing or no number")))
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

    fn wrong(&self, what: impl std::fmt::Display) -> Error {
        Error::input(format_args!("{}: {what}", self.place))
    }
}

fn architecture(content: &Content, place: &str) -> Result<Architecture> {
    let name = content.metadata.get("general.architecture").and_then(|v| v.to_string().ok());
    match name.map(String::as_str) {
        Some("llama") => Ok(Architecture::Llama),
        Some("qwen2") => Ok(Architecture::Qwen2),
        Some("gpt2") => Ok(Architecture::Gpt2),
        other => Err(Error::input(format_args!(
            "{place}: GGUF architecture `{}` is not supported",
            other.unwrap_or("(none)")
        ))
        .hint("supported: llama (also Mistral), qwen2, gpt2")),
    }
}

/// `blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`.
fn hugging_face_name(architecture: Architecture, stored: &str) -> Option<String> {
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

/// Undoes llama.cpp's `permute`: row `2j + half` of a head goes to row `half·d/2 + j`.
fn deinterleave_rows(values: &[f32], shape: &[usize], heads: usize) -> Vec<f32> {
    let columns = if shape.len() == 2 { shape[1] } else { 1 };
    let half = shape[0] / heads / 2;
    let mut out = Vec::with_capacity(values.len());
    for head in values.chunks(2 * half * columns) {
        for parity in 0..2 {
            for j in 0..half {
                let row = (2 * j + parity) * columns;
                out.extend_from_slice(&head[row..row + columns]);
            }
        }
    }
    out
}

fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..rows * columns).map(|i| values[i % rows * columns + i / rows]).collect()
}
