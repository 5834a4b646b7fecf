//! Model files in and out: Hugging Face folders (dense or 4-bit) and GGUF files, memory-mapped.
//!
//! [`Checkpoint`] shows them all alike: a `config.json` value and tensors by Hugging Face name.

pub mod atomic;
pub mod bnb;
mod damage;
pub mod elements;
pub mod folder;
pub(crate) mod gguf;
mod mapped;
pub mod repack;
pub mod writer;

use std::borrow::Cow;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;
use nibble_quant::{FloatType, PackedWeight};
use rayon::prelude::*;
use serde_json::Value;

use crate::error::{Error, Result};
pub(crate) use damage::damaged_safetensors;
pub use elements::Elements;
use folder::Folder;
use gguf::Gguf;
pub(crate) use gguf::read_header as read_gguf_header;
pub use gguf::{Export, gguf_fields};
pub(crate) use mapped::map_file;
pub use mapped::{PageCache, Pages};

/// The way out of a checkpoint that contradicts itself.
const ANOTHER_COPY: &str = "the checkpoint is damaged or incomplete: get another copy of the model";

/// What kind of files a checkpoint consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckpointKind {
    /// safetensors with dense weights.
    Dense,
    /// safetensors with linears in bitsandbytes' 4-bit blocks.
    Bnb4bit,
    /// One GGUF file; tensors are dequantized to f32 as they are read.
    Gguf,
}

/// How a tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredType {
    /// Dense elements.
    Dense(FloatType),
    /// 4-bit blocks with their scales.
    Packed,
}

/// One tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Hugging Face name.
    pub name: String,
    /// Shape; of a packed weight, `[out, in]`.
    pub shape: Vec<usize>,
    /// Dense or packed.
    pub stored: StoredType,
    /// Bytes in the file, scales included.
    pub bytes: usize,
}

/// A dense tensor: elements row-major, little-endian, usually a slice of the mapped file.
#[derive(Debug, Clone)]
pub struct DenseTensor {
    /// Element type.
    pub dtype: FloatType,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Elements.
    pub data: Bytes,
}

impl DenseTensor {
    /// The elements, copied only if they are not aligned. `T` must be the element type.
    pub fn elements<T: bytemuck::Pod>(&self) -> Cow<'_, [T]> {
        match bytemuck::try_cast_slice(&self.data) {
            Ok(elements) => Cow::Borrowed(elements),
            Err(_) => Cow::Owned(bytemuck::allocation::pod_collect_to_vec(&self.data)),
        }
    }

    /// All elements in f32, widened on all threads.
    pub fn to_f32(&self) -> Vec<f32> {
        parallel_f32(self.data.len() / self.dtype.size(), |first, out| self.read(first, out))
    }

    /// Some of the flattened elements in f32.
    pub fn to_f32_range(&self, range: Range<usize>) -> Vec<f32> {
        let mut out = vec![0.0; range.len()];
        self.read(range.start, &mut out);
        out
    }

    /// The elements from flat index `first` on, in f32.
    ///
    /// # Panics
    /// When they reach beyond the end.
    pub fn read(&self, first: usize, out: &mut [f32]) {
        let size = self.dtype.size();
        let data = &self.data[first * size..(first + out.len()) * size];
        match self.dtype {
            FloatType::F32 => {
                for (out, bytes) in out.iter_mut().zip(data.as_chunks::<4>().0) {
                    *out = f32::from_le_bytes(*bytes);
                }
            }
            FloatType::F16 => {
                for (out, bytes) in out.iter_mut().zip(data.as_chunks::<2>().0) {
                    *out = half::f16::from_le_bytes(*bytes).to_f32();
                }
            }
            FloatType::Bf16 => {
                for (out, bytes) in out.iter_mut().zip(data.as_chunks::<2>().0) {
                    *out = half::bf16::from_le_bytes(*bytes).to_f32();
                }
            }
        }
    }

    /// Flat index of the first NaN or infinity, looked for on all threads.
    pub fn first_non_finite(&self) -> Option<usize> {
        const CHUNK: usize = 1 << 18;
        let find = |(number, bytes): (usize, &[u8])| {
            let at = match self.dtype {
                FloatType::F32 => first_all_ones::<4>(bytes, 0x7f80_0000),
                FloatType::F16 => first_all_ones::<2>(bytes, 0x7c00),
                FloatType::Bf16 => first_all_ones::<2>(bytes, 0x7f80),
            };
            at.map(|index| number * CHUNK / self.dtype.size() + index)
        };
        self.data.par_chunks(CHUNK).enumerate().find_map_first(find)
    }

    /// The transpose of a matrix.
    pub fn transposed(&self) -> Self {
        let (rows, columns, size) = (self.shape[0], self.shape[1], self.dtype.size());
        let mut data = Vec::with_capacity(self.data.len());
        for column in 0..columns {
            for row in 0..rows {
                let start = (row * columns + column) * size;
                data.extend_from_slice(&self.data[start..start + size]);
            }
        }
        DenseTensor { dtype: self.dtype, shape: vec![columns, rows], data: data.into() }
    }
}

/// A tensor's contents.
#[derive(Debug, Clone)]
pub enum Weight {
    /// As stored.
    Dense(DenseTensor),
    /// 4-bit blocks.
    Packed(PackedWeight),
}

/// An opened model.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: Value,
    files: Files,
}

#[derive(Debug)]
enum Files {
    Folder(Folder),
    Gguf(Box<Gguf>),
}

impl Checkpoint {
    /// Opens a Hugging Face folder or a `.gguf` file; reads headers, maps the files, touches no
    /// weights.
    ///
    /// # Errors
    /// `Io` when a file cannot be opened; `Input` naming the file when a header is damaged, a shard
    /// is missing, or the index names tensors that no shard has.
    pub fn open(path: &Path) -> Result<Self> {
        Self::read(path).map_err(|error| error.or_hint(ANOTHER_COPY))
    }

    fn read(path: &Path) -> Result<Self> {
        if path.extension().is_some_and(|extension| extension == "gguf") {
            let gguf = Gguf::open(path)?;
            let config = gguf.config()?;
            let files = Files::Gguf(Box::new(gguf));
            return Ok(Checkpoint { path: path.to_path_buf(), config, files });
        }
        if !path.join("config.json").exists() {
            return Err(not_a_model(path));
        }
        let config = read_json(&path.join("config.json"))?;
        check_quantization(&config)?;
        let files = Files::Folder(Folder::open(path)?);
        Ok(Checkpoint { path: path.to_path_buf(), config, files })
    }

    /// `config.json`.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Dense, 4-bit or GGUF.
    pub fn kind(&self) -> CheckpointKind {
        if matches!(self.files, Files::Gguf(_)) {
            return CheckpointKind::Gguf;
        }
        let packed = |info: &TensorInfo| info.stored == StoredType::Packed;
        if self.tensors().iter().any(packed) {
            CheckpointKind::Bnb4bit
        } else {
            CheckpointKind::Dense
        }
    }

    /// All tensors; a packed weight is one entry.
    pub fn tensors(&self) -> &[TensorInfo] {
        match &self.files {
            Files::Folder(folder) => folder.tensors(),
            Files::Gguf(gguf) => gguf.tensors(),
        }
    }

    /// Whether there is a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        match &self.files {
            Files::Folder(folder) => folder.contains(name),
            Files::Gguf(gguf) => gguf.contains(name),
        }
    }

    /// The tensor `name`.
    ///
    /// # Errors
    /// `Input` naming the tensor when it does not exist or its parts do not fit each other.
    pub fn weight(&self, name: &str) -> Result<Weight> {
        let weight = match &self.files {
            Files::Folder(folder) => folder.weight(name),
            Files::Gguf(gguf) => gguf.dense(name).map(Weight::Dense),
        };
        weight.map_err(|error| error.or_hint(ANOTHER_COPY))
    }

    /// The elements of tensor `name`, decoded as they are read.
    ///
    /// # Errors
    /// As [`weight`](Self::weight).
    pub fn elements(&self, name: &str) -> Result<Elements> {
        let elements = match &self.files {
            Files::Folder(folder) => folder.weight(name).map(|weight| match weight {
                Weight::Dense(dense) => dense.into(),
                Weight::Packed(packed) => packed.into(),
            }),
            Files::Gguf(gguf) => gguf.elements(name),
        };
        elements.map_err(|error| error.or_hint(ANOTHER_COPY))
    }

    /// The mapped bytes of the tensors whose name begins with `prefix`; none of a GGUF file, whose
    /// tensors are decoded into memory.
    pub fn pages(&self, prefix: &str) -> Vec<Pages> {
        match &self.files {
            Files::Folder(folder) => folder.pages(prefix),
            Files::Gguf(_) => Vec::new(),
        }
    }

    /// How much of the files the system has in its cache; none of a GGUF file, or where the system
    /// does not tell.
    pub fn page_cache(&self) -> Option<PageCache> {
        match &self.files {
            Files::Folder(folder) => folder.page_cache(),
            Files::Gguf(_) => None,
        }
    }

    /// Gives the memory behind all tensors back to the system: opening a file reads parts of it.
    pub fn release_all(&self) {
        self.pages("").iter().for_each(Pages::release);
    }

    /// Starts to read the tensor `name` from the disk, if it is not in the system's cache.
    pub fn read_ahead(&self, name: &str) {
        self.pages(name).iter().for_each(Pages::read_ahead);
    }

    /// Gives the memory behind the tensor `name` back to the system, once its values have been
    /// copied or quantized; reading it again is slower, nothing else.
    pub fn release(&self, name: &str) {
        match &self.files {
            Files::Folder(folder) => folder.release(name),
            Files::Gguf(gguf) => gguf.release(name),
        }
    }
}

/// The first of the `N`-byte floats whose exponent, the bits `mask`, is all ones: NaN or infinity.
fn first_all_ones<const N: usize>(bytes: &[u8], mask: u32) -> Option<usize> {
    let is_bad = |float: &[u8; N]| {
        let mut word = [0; 4];
        word[..N].copy_from_slice(float);
        u32::from_le_bytes(word) & mask == mask
    };
    let floats = bytes.as_chunks::<N>().0;
    // Without an early exit the compiler vectorises the search.
    floats.iter().fold(false, |bad, float| bad | is_bad(float)).then_some(())?;
    floats.iter().position(is_bad)
}

/// Reads `elements` values on all threads.
fn parallel_f32(elements: usize, read: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    const CHUNK: usize = 1 << 16;
    let mut out = vec![0.0; elements];
    let chunks = out.par_chunks_mut(CHUNK).enumerate();
    chunks.for_each(|(index, chunk)| read(index * CHUNK, chunk));
    out
}

/// The little-endian bytes of `values`, without a copy.
fn f32_bytes(values: Vec<f32>) -> Bytes {
    struct Owner(Vec<f32>);
    impl AsRef<[u8]> for Owner {
        fn as_ref(&self) -> &[u8] {
            bytemuck::cast_slice(&self.0)
        }
    }
    Bytes::from_owner(Owner(values))
}

fn not_a_model(path: &Path) -> Error {
    let shown = path.display();
    if path.join("adapter_config.json").exists() {
        return Error::input(format_args!("{shown} is an adapter, not a model")).hint(
            "`--model` is the model that it was trained on; the adapter itself goes to `--adapter`, \
             or to `--init-adapter` for more training",
        );
    }
    let what = match (path.exists(), path.is_dir()) {
        (false, _) => format!("{shown} does not exist"),
        (_, false) => format!("{shown} is neither a folder nor a .gguf file"),
        (_, true) => format!("{shown} has no config.json"),
    };
    match gguf_inside(path) {
        Some(file) => Error::input(what).hint(format_args!("give the file {}", file.display())),
        None if is_hub_name(path) => Error::input(what).hint(format_args!(
            "models are not downloaded; one of the Hugging Face Hub comes with \
             `hf download {shown} --local-dir DIR`"
        )),
        None => Error::input(what).hint(
            "give a Hugging Face model folder with config.json and *.safetensors, or a .gguf file",
        ),
    }
}

fn gguf_inside(folder: &Path) -> Option<PathBuf> {
    let files = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    files.filter(|path| path.extension().is_some_and(|extension| extension == "gguf")).min()
}

/// `owner/name`, where there is no folder `owner`.
fn is_hub_name(path: &Path) -> bool {
    let parts: Vec<_> = path.components().collect();
    let plain = parts.iter().all(|part| matches!(part, Component::Normal(_)));
    plain && parts.len() == 2 && path.parent().is_some_and(|owner| !owner.exists())
}

/// Other packings than bitsandbytes' 4 bits have names for their parts that nobody here knows.
fn check_quantization(config: &Value) -> Result<()> {
    let settings = &config["quantization_config"];
    let method = settings["quant_method"].as_str().unwrap_or("bitsandbytes");
    let in_8_bits = settings["load_in_8bit"] == true;
    if method == "bitsandbytes" && !in_8_bits {
        return Ok(());
    }
    let what = if in_8_bits { "8-bit weights of bitsandbytes" } else { method };
    Err(Error::input(format_args!("config.json: quantization by {what} is not supported"))
        .hint("give the dense model, or a 4-bit one that bitsandbytes or Nibble packed"))
}

/// Reads and parses a JSON file.
///
/// # Errors
/// `Io` when it cannot be read, `Input` with line and column when it is not JSON.
pub fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
    serde_json::from_slice(&text).map_err(|e| {
        Error::input(format_args!("{}: not valid JSON: {e}", path.display()))
            .hint("the file is damaged or cut off: get it again")
    })
}
