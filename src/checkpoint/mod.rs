//! Model files in and out: Hugging Face folders (dense or 4-bit) and GGUF files, memory-mapped.
//!
//! [`Checkpoint`] shows them all alike: a `config.json` value and tensors by Hugging Face name, which are
//! those of transformers' class for the model, whatever the files call them.

pub mod atomic;
pub mod bnb;
mod damage;
mod dense;
pub mod elements;
pub(crate) mod elsewhere;
pub mod folder;
pub(crate) mod gguf;
mod inner_model;
mod mapped;
mod raw;
pub mod repack;
pub(crate) mod tensor_errors;
pub mod tensor_file;
mod text_part;
pub mod writer;

use std::path::{Path, PathBuf};

use nibble_quant::{BlockFormat, FloatType, PackedWeight};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::model::families::spec_from_config;
pub(crate) use atomic::is_there;
pub(crate) use damage::{OTHER_TOOL, damaged_safetensors, lfs_pointer, unread_type};
pub use dense::DenseTensor;
use dense::parallel_f32;
pub use elements::Elements;
pub(crate) use elsewhere::not_here;
use folder::Folder;
pub(crate) use folder::holds_weights;
use gguf::Gguf;
pub(crate) use gguf::read_header as read_gguf_header;
pub use gguf::{Export, FileType, gguf_fields};
use inner_model::InnerModel;
pub(crate) use mapped::{MappedFile, map_file};
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

impl CheckpointKind {
    /// How dense linears are packed while they are loaded, if `format` is asked for: not at all where others
    /// are packed already, since whoever packed those left these dense on purpose.
    pub fn packing<F>(self, format: Option<F>) -> Option<F> {
        format.filter(|_| self != CheckpointKind::Bnb4bit)
    }
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

/// A tensor's contents.
#[derive(Debug, Clone)]
pub enum Weight {
    /// Dense elements as stored.
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
    /// Tensors of images, of a model for text and images, which are not among the text model's.
    image_tensors: usize,
}

#[derive(Debug)]
enum Files {
    Folder(Folder),
    Gguf(Box<Gguf>),
}

impl Checkpoint {
    /// Opens a Hugging Face folder or a `.gguf` file; reads headers, maps the files, touches no
    /// weights but a head that is stored beside the embedding that it should be.
    ///
    /// # Errors
    /// `Io` when a file cannot be opened; `Input` naming the file when a header is damaged, a shard
    /// is missing, or the index names tensors that no shard has.
    pub fn open(path: &Path) -> Result<Self> {
        let hint = if path.exists() { ANOTHER_COPY } else { "is the path right?" };
        Self::read(path).map_err(|error| match error {
            // The system says what is wrong.
            Error::Io(..) if path.exists() => error,
            error => error.or_hint(hint),
        })
    }

    fn read(path: &Path) -> Result<Self> {
        if path.extension().is_some_and(|extension| extension == "gguf") {
            let gguf = Gguf::open(path)?;
            let config = gguf.config()?;
            let files = Files::Gguf(Box::new(gguf));
            return Ok(Checkpoint { path: path.to_path_buf(), config, files, image_tensors: 0 });
        }
        if !path.join("config.json").exists() {
            return Err(not_a_model(path));
        }
        let whole = read_json(&path.join("config.json"))?;
        check_quantization(&whole)?;
        let (has_text_part, mut folder) = (text_part::has_text_part(&whole), Folder::open(path)?);
        let at = |error: Error| error.at(path.display());
        let image_tensors =
            if has_text_part { folder.rename(text_part::name).map_err(at)? } else { 0 };
        let mut config = as_understood(whole);
        if let Some(inner) = InnerModel::of(&config, folder.names()) {
            folder.rename(|stored| Some(inner.name(stored))).map_err(at)?;
        }
        if has_own_head(&config, &folder) {
            config["tie_word_embeddings"] = false.into();
        }
        let files = Files::Folder(folder);
        Ok(Checkpoint { path: path.to_path_buf(), config, files, image_tensors })
    }

    /// How many tensors of a model for text and images are for images: they stay unread.
    pub fn image_tensors(&self) -> usize {
        self.image_tensors
    }

    /// `config.json`, as [`read_config`] reads it.
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

    /// How the first packed weight is packed.
    pub fn packed_format(&self) -> Option<BlockFormat> {
        let packed = |info: &&TensorInfo| info.stored == StoredType::Packed;
        let first = self.tensors().iter().find(packed)?;
        match self.weight(&first.name) {
            Ok(Weight::Packed(packed)) => Some(packed.format()),
            _ => None,
        }
    }

    /// The tensors in the order of their names; a packed weight is one entry.
    pub fn tensors(&self) -> &[TensorInfo] {
        match &self.files {
            Files::Folder(folder) => folder.tensors(),
            Files::Gguf(gguf) => gguf.tensors(),
        }
    }

    /// The names of all tensors, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors().iter().map(|info| info.name.as_str())
    }

    /// What is known of tensor `name`; none of one that is not there, or of a type that is not read.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        let tensors = self.tensors();
        let found = tensors.binary_search_by(|info| info.name.as_str().cmp(name));
        found.ok().map(|index| &tensors[index])
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

    /// Gives the memory behind all tensors back to the system: opening a file reads parts of it, and a
    /// page that is read brings its neighbours.
    pub fn release_all(&self) {
        match &self.files {
            Files::Folder(folder) => folder.pages("").iter().for_each(Pages::release),
            Files::Gguf(gguf) => gguf.release_all(),
        }
    }

    /// Starts to read the tensor `name` from the disk, if it is not in the system's cache.
    pub fn read_ahead(&self, name: &str) {
        self.pages(name).iter().for_each(Pages::read_ahead);
    }

    /// Gives the memory behind the tensor `name` and its parts back to the system, once its values have
    /// been copied or quantized; reading it again is slower, nothing else.
    pub fn release(&self, name: &str) {
        match &self.files {
            Files::Folder(folder) => folder.release(name),
            Files::Gguf(gguf) => gguf.release(name),
        }
    }
}

/// Whether a head is stored that the config ties to the embedding, and is another: it is meant, as
/// transformers 5 has it. Configs of models for text and images say `true` where nobody asked.
fn has_own_head(config: &Value, folder: &Folder) -> bool {
    // A config that is wrong is refused by who reads it.
    let Ok(spec) = spec_from_config(config) else { return false };
    let [head, embedding] =
        [spec.head_module(), spec.embedding_module()].map(|module| format!("{module}.weight"));
    spec.tie_word_embeddings && folder.differ(&head, &embedding)
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
    let inside = gguf_inside(path).map(|file| ("file", file));
    let inside = inside.or_else(|| snapshot_inside(path).map(|folder| ("folder", folder)));
    match inside {
        Some((kind, inside)) => {
            Error::input(what).hint(format_args!("give the {kind} {}", inside.display()))
        }
        None => Error::input(what).hint(not_here("models", path).unwrap_or(
            "give a Hugging Face model folder with config.json and *.safetensors, or a .gguf file".into(),
        )),
    }
}

fn gguf_inside(folder: &Path) -> Option<PathBuf> {
    let files = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    files.filter(|path| path.extension().is_some_and(|extension| extension == "gguf")).min()
}

/// A model in the Hub's cache, whose folder keeps one for each commit: that of the main branch.
fn snapshot_inside(folder: &Path) -> Option<PathBuf> {
    let commit = std::fs::read_to_string(folder.join("refs/main")).ok()?;
    let snapshot = folder.join("snapshots").join(commit.trim());
    snapshot.join("config.json").exists().then_some(snapshot)
}

/// Refuses a model that is quantized otherwise than in bitsandbytes' 4 bits: the names of its parts are not
/// known here.
///
/// # Errors
/// `Input` naming the packing of `config`, a parsed `config.json`.
pub fn check_quantization(config: &Value) -> Result<()> {
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

/// Reads a `config.json`: of a model for text and images the text model's part, of a Gemma with the
/// activation function that it was trained with.
///
/// # Errors
/// As [`read_json`].
pub fn read_config(path: &Path) -> Result<Value> {
    read_json(path).map(as_understood)
}

fn as_understood(whole: Value) -> Value {
    let mut config =
        if text_part::has_text_part(&whole) { text_part::config(&whole) } else { whole };
    // The first files of Gemma say `gelu`, by which its authors meant the approximation; those of
    // today say so. Source: transformers 4.39, `GemmaMLP`.
    if config["model_type"] == "gemma" && config["hidden_act"] == "gelu" {
        config["hidden_act"] = "gelu_pytorch_tanh".into();
    }
    config
}

/// Takes out what names a model's own Python files, which are not copied: transformers has a class for every
/// family that is read.
pub(crate) fn drop_code(fields: &mut Map<String, Value>) {
    fields.shift_remove("auto_map");
}

/// The type of dense weights by a `config.json`: `torch_dtype` before transformers 5.
pub(crate) fn dtype_of(config: &Value) -> Option<FloatType> {
    let named = ["dtype", "torch_dtype"].iter().find_map(|key| config[*key].as_str());
    named.and_then(FloatType::from_name)
}

/// Writes the type of dense weights into a `config.json`, under the name that it has there: `torch_dtype` before
/// transformers 5.
pub(crate) fn set_dtype(fields: &mut Map<String, Value>, dtype: FloatType) {
    let key = if fields.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    fields.insert(key.into(), dtype.as_str().into());
}

/// Reads and parses a JSON file.
///
/// # Errors
/// `Io` when it cannot be read, `Input` with line and column when it is not JSON.
pub fn read_json(path: &Path) -> Result<Value> {
    const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
    let text = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
    let text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&text);
    serde_json::from_slice(text).map_err(|e| {
        Error::input(format_args!("{}: not valid JSON: {e}", path.display()))
            .hint("the file is damaged or cut off: get it again")
    })
}
