//! GGUF files as Hugging Face checkpoints: names, shapes, row order and `config.json` restored.
//!
//! Elements are decoded by candle's block formats when they are asked for. llama.cpp stores q and k
//! of Llamas, Ministral 3, SmolLM3 and Granites with the rows of each head interleaved for its rotary embedding;
//! here they are put back into halves. A file without `output.weight` has a tied head. Source:
//! llama.cpp `convert_hf_to_gguf.py`.

pub(super) mod blocks;
mod config;
mod export;
mod file_type;
mod header;
mod metadata;
mod names;
mod write;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value as Metadata};
use nibble_quant::{FloatType, owned_bytes};

use super::elements::Elements;
use super::mapped::MappedFile;
use super::{DenseTensor, StoredType, TensorInfo};
use crate::error::{Error, Result};
use blocks::Blocks;
pub use export::Export;
pub(crate) use export::{does_not_fit, encoded, source_row};
pub use file_type::FileType;
pub(crate) use header::read_header;
pub use metadata::fields as gguf_fields;
use metadata::{LONG_ROPE_FACTORS, ROPE_FACTORS};
pub(crate) use write::{Description, GgufWriter};

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
pub(crate) enum Architecture {
    Llama,
    Mistral3,
    Qwen2,
    Qwen3,
    SmolLm3,
    Granite,
    SeedOss,
    Glm4,
    Olmo2,
    Gemma,
    Gemma2,
    Gemma3,
    Phi3,
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
        let content = read_header(&file.bytes).map_err(|e| e.at(&place))?;
        let architecture = architecture(&content).map_err(|e| e.at(&place))?;
        let (names, tensors) = (BTreeMap::new(), Vec::new());
        let mut gguf = Gguf { file, content, architecture, names, tensors, place };
        gguf.check_whole()?;
        gguf.list_tensors()?;
        Ok(gguf)
    }

    pub(super) fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    /// The tensor in f32.
    pub(super) fn dense(&self, name: &str) -> Result<DenseTensor> {
        let elements = self.elements(name)?;
        let data = owned_bytes(elements.to_f32());
        // The values are copies; a page that is wanted once more is in the system's cache.
        self.release(name);
        Ok(DenseTensor { dtype: FloatType::F32, shape: elements.shape().to_vec(), data })
    }

    pub(super) fn elements(&self, name: &str) -> Result<Elements> {
        let Some(stored) = self.names.get(name) else {
            return Err(self.wrong(format_args!("tensor {name} is missing")));
        };
        let elements = self.elements_of(stored)?;
        // The file holds GPT-2's linears `[out, in]`, a Hugging Face folder the transpose.
        Ok(if self.is_conv1d(name, elements.shape()) { elements.transposed() } else { elements })
    }

    pub(super) fn release(&self, name: &str) {
        if let Some(stored) = self.names.get(name) {
            self.file.release(self.blocks_of(stored));
        }
    }

    pub(super) fn release_all(&self) {
        self.file.release(&self.file.bytes);
    }

    /// The tensor that the file calls `stored`, in Hugging Face's order of rows.
    fn elements_of(&self, stored: &str) -> Result<Elements> {
        let info = &self.content.tensor_infos[stored];
        let shape = info.shape.dims().to_vec();
        let blocks = Blocks {
            dtype: info.ggml_dtype,
            data: self.file.bytes.slice_ref(self.blocks_of(stored)),
            columns: if shape.len() > 1 { shape[shape.len() - 1] } else { 1 },
            head_rows: self.interleaved_rows(stored, &shape)?,
            excess: if self.architecture.is_gemma() && stored.ends_with("norm.weight") {
                1.0
            } else {
                0.0
            },
        };
        Ok(Elements::blocks(shape, blocks))
    }

    fn blocks_of(&self, stored: &str) -> &[u8] {
        let info = &self.content.tensor_infos[stored];
        let begin = (self.content.tensor_data_offset + info.offset) as usize;
        &self.file.bytes[begin..begin + header::block_bytes(info)]
    }

    /// Rows of one head of q and k, where they are stored interleaved.
    fn interleaved_rows(&self, stored: &str, shape: &[usize]) -> Result<Option<usize>> {
        if !self.architecture.interleaves_heads() {
            return Ok(None);
        }
        let heads = match stored.rsplit('.').nth(1) {
            Some("attn_q") => self.size("attention.head_count")?,
            Some("attn_k") => self.kv_heads()?,
            _ => return Ok(None),
        };
        let rows = shape.first().copied().unwrap_or(1);
        if heads == 0 || !rows.is_multiple_of(heads) || !(rows / heads).is_multiple_of(2) {
            let what = format_args!("tensor {stored} has shape {shape:?} for {heads} heads");
            return Err(self.wrong(what));
        }
        Ok(Some(rows / heads))
    }

    fn is_conv1d(&self, name: &str, shape: &[usize]) -> bool {
        self.architecture == Architecture::Gpt2 && shape.len() == 2 && name.contains(".h.")
    }

    /// A model may be cut into several files, each with some of the tensors.
    fn check_whole(&self) -> Result<()> {
        let parts = self.content.metadata.get("split.count").and_then(|v| v.to_u64().ok());
        match parts {
            Some(parts) if parts > 1 => Err(self
                .wrong(format_args!("one of {parts} parts of a split model"))
                .hint("join the parts with llama.cpp's `llama-gguf-split --merge`")),
            _ => Ok(()),
        }
    }

    fn list_tensors(&mut self) -> Result<()> {
        for (stored, info) in &self.content.tensor_infos {
            let of_phi3 = self.architecture == Architecture::Phi3;
            let long_rope = of_phi3 && LONG_ROPE_FACTORS.contains(&stored.as_str());
            if stored == ROPE_FACTORS || long_rope {
                continue;
            }
            let Some(name) = names::hugging_face_name(self.architecture, stored) else {
                let architecture = self.architecture.name();
                let hint = format!("only the weights of a {architecture} model are supported");
                return Err(self.wrong(format_args!("tensor {stored} is not known")).hint(hint));
            };
            let mut shape = info.shape.dims().to_vec();
            if self.is_conv1d(&name, &shape) {
                shape.swap(0, 1);
            }
            let (stored_type, bytes) =
                (StoredType::Dense(FloatType::F32), header::block_bytes(info));
            self.tensors.push(TensorInfo { name: name.clone(), shape, stored: stored_type, bytes });
            self.names.insert(name, stored.clone());
        }
        self.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(())
    }

    fn has(&self, stored: &str) -> bool {
        self.content.tensor_infos.contains_key(stored)
    }

    fn field(&self, key: &str) -> Option<&Metadata> {
        self.content.metadata.get(&format!("{}.{key}", self.architecture.name()))
    }

    fn wrong(&self, what: impl std::fmt::Display) -> Error {
        Error::input(format_args!("{}: {what}", self.place))
    }
}

fn architecture(content: &Content) -> Result<Architecture> {
    let name = content.metadata.get("general.architecture").and_then(|v| v.to_string().ok());
    let name = name.map_or("(none)", String::as_str);
    Architecture::ALL.into_iter().find(|known| known.name() == name).ok_or_else(|| {
        let what = format_args!("GGUF architecture `{name}` is not supported");
        let all = Architecture::ALL.map(Architecture::name).join(", ");
        Error::input(what).hint(format_args!("supported: {all}; a Mistral is a llama there"))
    })
}
