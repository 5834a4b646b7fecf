//! A small GGUF file, written field by field so that tests can make any of them lie.

#![allow(dead_code)] // each test binary uses a part of this module

use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
/// The parts of a file; change some, then call [`GgufFile::bytes`].
#[derive(Clone)]
pub struct GgufFile {
    pub version: u32,
    /// Numbers that the header gives; none for the truth.
    pub num_tensors: Option<u64>,
    pub num_fields: Option<u64>,
    pub fields: Vec<(String, Field)>,
    pub tensors: Vec<Tensor>,
    pub alignment: usize,
}

/// A metadata value.
#[derive(Clone)]
pub enum Field {
    U32(u32),
    F32(f32),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
    /// Type and bytes as they are.
    Raw(u32, Vec<u8>),
}

/// A description and its data.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    /// Fastest dimension first, as the file has them.
    pub shape: Vec<u64>,
    pub kind: u32,
    /// None for the truth.
    pub offset: Option<u64>,
    pub data: Vec<u8>,
}

const VOCABULARY: usize = 128;

impl GgufFile {
    /// The tiny Llama of `tests/data/models/llama_s0` with a byte-pair tokenizer.
    pub fn tiny_llama() -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models/llama_s0");
        let file = fs::read(folder.join("model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&file).unwrap().tensors();
        let tensors = tensors.into_iter().map(|(name, tensor)| Tensor::of(&name, &tensor));
        GgufFile {
            version: 3,
            num_tensors: None,
            num_fields: None,
            fields: fields(),
            tensors: tensors.collect(),
            alignment: 32,
        }
    }

    /// Sets or adds a metadata field.
    pub fn set(&mut self, key: &str, value: Field) {
        match self.fields.iter_mut().find(|(name, _)| name == key) {
            Some((_, old)) => *old = value,
            None => self.fields.push((key.into(), value)),
        }
    }

    /// The tensor `name`.
    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.num_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.num_fields.unwrap_or(self.fields.len() as u64).to_le_bytes());
        for (key, value) in &self.fields {
            put_text(&mut out, key);
            value.put(&mut out);
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            put_text(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().for_each(|size| out.extend(size.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend_from_slice(&tensor.data);
            data.resize(data.len().next_multiple_of(self.alignment), 0);
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(data);
        out
    }
}

/// Metadata of the tiny Llama.
fn fields() -> Vec<(String, Field)> {
    let size = |key: &str, value| (format!("llama.{key}"), Field::U32(value));
    let text = |key: &str, value: &str| (key.to_string(), Field::Text(value.into()));
    // The merge of two letters makes the word `w1`.
    let token =
        |id: u8| if id < 95 { char::from(id + 33).to_string() } else { format!("w{}", id - 94) };
    let words = (0..VOCABULARY as u8).map(token).collect();
    vec![
        text("general.architecture", "llama"),
        size("context_length", 128),
        size("embedding_length", 64),
        size("feed_forward_length", 160),
        size("block_count", 2),
        size("attention.head_count", HEADS as u32),
        size("attention.head_count_kv", KV_HEADS as u32),
        size("rope.dimension_count", 16),
        ("llama.attention.layer_norm_rms_epsilon".into(), Field::F32(1e-6)),
        text("tokenizer.ggml.model", "gpt2"),
        text("tokenizer.ggml.pre", "smollm"),
        ("tokenizer.ggml.tokens".into(), Field::Texts(words)),
        ("tokenizer.ggml.merges".into(), Field::Texts(vec!["w 1".into()])),
        ("tokenizer.ggml.token_type".into(), Field::I32s(vec![1; VOCABULARY])),
        ("tokenizer.ggml.bos_token_id".into(), Field::U32(1)),
        ("tokenizer.ggml.eos_token_id".into(), Field::U32(2)),
        ("tokenizer.ggml.unknown_token_id".into(), Field::U32(0)),
        text("tokenizer.chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}"),
    ]
}

impl Tensor {
    /// A tensor of the Hugging Face folder as llama.cpp stores it.
    fn of(name: &str, tensor: &TensorView) -> Self {
        let rows = tensor.shape()[0];
        let data = match () {
            () if name.contains("q_proj") => interleaved(tensor.data(), rows, HEADS),
            () if name.contains("k_proj") => interleaved(tensor.data(), rows, KV_HEADS),
            () => tensor.data().to_vec(),
        };
        let shape = tensor.shape().iter().rev().map(|&size| size as u64).collect();
        Tensor { name: stored_name(name), shape, kind: 0, offset: None, data }
    }
}

/// llama.cpp's name of a tensor.
fn stored_name(name: &str) -> String {
    let name = name.strip_prefix("model.").unwrap_or(name);
    match name {
        "embed_tokens.weight" => return "token_embd.weight".into(),
        "norm.weight" => return "output_norm.weight".into(),
        "lm_head.weight" => return "output.weight".into(),
        _ => {}
    }
    let mut out = name.replace("layers.", "blk.");
    for (from, to) in [
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ] {
        out = out.replace(from, to);
    }
    out
}

/// Rows of halves to rows in turns, head by head: `convert_hf_to_gguf.py`'s `permute`.
fn interleaved(data: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let (row_bytes, per_head) = (data.len() / rows, rows / heads);
    let mut out = Vec::with_capacity(data.len());
    for row in 0..rows {
        let (head, inside) = (row / per_head, row % per_head);
        let source = head * per_head + inside % 2 * (per_head / 2) + inside / 2;
        out.extend(&data[source * row_bytes..(source + 1) * row_bytes]);
    }
    out
}

impl Field {
    fn put(&self, out: &mut Vec<u8>) {
        let kind = |out: &mut Vec<u8>, id: u32| out.extend(id.to_le_bytes());
        match self {
            Field::U32(value) => {
                kind(out, 4);
                out.extend(value.to_le_bytes());
            }
            Field::F32(value) => {
                kind(out, 6);
                out.extend(value.to_le_bytes());
            }
            Field::Text(text) => {
                kind(out, 8);
                put_text(out, text);
            }
            Field::Texts(texts) => {
                kind(out, 9);
                kind(out, 8);
                out.extend((texts.len() as u64).to_le_bytes());
                texts.iter().for_each(|text| put_text(out, text));
            }
            Field::I32s(values) => {
                kind(out, 9);
                kind(out, 5);
                out.extend((values.len() as u64).to_le_bytes());
                values.iter().for_each(|value| out.extend(value.to_le_bytes()));
            }
            Field::Raw(id, bytes) => {
                kind(out, *id);
                out.extend(bytes);
            }
        }
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}
