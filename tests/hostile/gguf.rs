//! A whole GGUF file in memory: the tiny Llama of `tests/data/models/llama_s0`, its q and k rows
//! interleaved as llama.cpp stores them, and a byte-pair tokenizer of 128 tokens.

use std::path::Path;

use safetensors::SafeTensors;

const ALIGNMENT: usize = 32;

/// A file under construction.
#[derive(Default)]
pub struct Builder {
    fields: Vec<u8>,
    num_fields: u64,
    tensors: Vec<(String, Vec<u64>, Vec<u8>)>,
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Builder {
    fn field(&mut self, key: &str, kind: u32, value: &[u8]) {
        string(&mut self.fields, key);
        self.fields.extend(kind.to_le_bytes());
        self.fields.extend(value);
        self.num_fields += 1;
    }

    fn text(&mut self, key: &str, value: &str) {
        let mut bytes = Vec::new();
        string(&mut bytes, value);
        self.field(key, 8, &bytes);
    }

    pub fn number(&mut self, key: &str, value: u32) {
        self.field(key, 4, &value.to_le_bytes());
    }

    fn texts(&mut self, key: &str, values: &[String]) {
        let mut bytes = 8u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| string(&mut bytes, value));
        self.field(key, 9, &bytes);
    }

    /// Header, then data at multiples of the alignment.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend(self.num_fields.to_le_bytes());
        out.extend(&self.fields);
        let mut offset = 0usize;
        for (name, shape, data) in &self.tensors {
            string(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|size| out.extend(size.to_le_bytes()));
            out.extend(0u32.to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset += data.len().next_multiple_of(ALIGNMENT);
        }
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        for (_, _, data) in &self.tensors {
            out.extend(data);
            out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        }
        out
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

/// The tiny Llama.
pub fn llama() -> Builder {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models/llama_s0");
    let file = std::fs::read(folder.join("model.safetensors")).unwrap();
    let mut builder = Builder::default();
    builder.text("general.architecture", "llama");
    for (key, value) in [
        ("llama.attention.head_count", 4),
        ("llama.attention.head_count_kv", 2),
        ("llama.embedding_length", 64),
        ("llama.feed_forward_length", 160),
        ("llama.block_count", 2),
        ("llama.context_length", 128),
        ("llama.rope.dimension_count", 16),
        ("tokenizer.ggml.bos_token_id", 1),
        ("tokenizer.ggml.eos_token_id", 2),
        ("tokenizer.ggml.unknown_token_id", 0),
    ] {
        builder.number(key, value);
    }
    builder.field("llama.attention.layer_norm_rms_epsilon", 6, &1e-6f32.to_le_bytes());
    builder.text("tokenizer.ggml.model", "gpt2");
    builder.text("tokenizer.ggml.pre", "smollm");
    let token =
        |id: u8| if id < 95 { char::from(id + 33).to_string() } else { format!("w{}", id - 94) };
    let tokens: Vec<String> = (0..128).map(token).collect();
    builder.texts("tokenizer.ggml.tokens", &tokens);
    builder.texts("tokenizer.ggml.merges", &["w 1".into()]);
    for (name, tensor) in SafeTensors::deserialize(&file).unwrap().tensors() {
        let shape: Vec<u64> = tensor.shape().iter().map(|&size| size as u64).collect();
        let heads = match () {
            () if name.contains("q_proj") => Some(4),
            () if name.contains("k_proj") => Some(2),
            () => None,
        };
        let data = match heads {
            Some(heads) => interleaved(tensor.data(), tensor.shape()[0], heads),
            None => tensor.data().to_vec(),
        };
        builder.tensors.push((stored_name(&name), shape, data));
    }
    builder
}
