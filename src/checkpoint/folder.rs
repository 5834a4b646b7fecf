//! A Hugging Face folder: `model.safetensors`, or shards with `model.safetensors.index.json`.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use bytes::Bytes;
use nibble_quant::FloatType;
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::mapped::{MappedFile, PageCache, Pages};
use super::raw::RawTensor;
use super::{
    DenseTensor, OTHER_TOOL, StoredType, TensorInfo, Weight, bnb, damaged_safetensors, read_json,
    unread_type,
};
use crate::error::{Error, Result};

/// Name of the index of a sharded checkpoint.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// Name of an unsharded checkpoint.
pub const SINGLE_FILE: &str = "model.safetensors";

/// Bytes of two tensors that a thread compares at a time.
const PIECE_BYTES: usize = 1 << 20;

const DAMAGED_INDEX: &str = "the index is damaged: download it again";

/// Whether there are weights in a folder, be they whole or not.
pub(crate) fn holds_weights(folder: &Path) -> bool {
    [SINGLE_FILE, INDEX_FILE].iter().any(|file| folder.join(file).exists())
}

/// The tensors of a folder.
#[derive(Debug)]
pub(super) struct Folder {
    files: Vec<MappedFile>,
    raw: HashMap<String, RawTensor>,
    tensors: Vec<TensorInfo>,
}

impl Folder {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let mut raw = HashMap::new();
        let (single, index) = (path.join(SINGLE_FILE), path.join(INDEX_FILE));
        // In this order, as transformers: saving a small model over a large one leaves the index behind.
        let files = if single.exists() {
            vec![read_file(&single, &mut raw)?]
        } else if index.exists() {
            open_shards(path, &index, &mut raw)?
        } else {
            let what = format!("{} has no {SINGLE_FILE} and no {INDEX_FILE}", path.display());
            return Err(Error::input(what).hint(way_to_weights(path)));
        };
        let tensors = describe(&raw)?;
        Ok(Folder { files, raw, tensors })
    }

    /// Gives each tensor another name, and leaves out those that get none; returns how many.
    ///
    /// # Errors
    /// `Input` when two would have the same name.
    pub(super) fn rename(&mut self, name: impl Fn(&str) -> Option<String>) -> Result<usize> {
        let mut renamed = HashMap::with_capacity(self.raw.len());
        for (stored, tensor) in std::mem::take(&mut self.raw) {
            let Some(name) = name(&stored) else { continue };
            if renamed.insert(name.clone(), tensor).is_some() {
                let what = format_args!("there are two tensors {name}, one under a longer name");
                return Err(Error::input(what));
            }
        }
        self.raw = renamed;
        let before = self.tensors.len();
        let tensors = std::mem::take(&mut self.tensors).into_iter();
        let renamed = |tensor: TensorInfo| Some(TensorInfo { name: name(&tensor.name)?, ..tensor });
        self.tensors = tensors.filter_map(renamed).collect();
        self.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(before - self.tensors.len())
    }

    /// Names of all tensors, parts of packed ones included.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.raw.keys().map(String::as_str)
    }

    pub(super) fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.raw.contains_key(name)
    }

    /// Whether both tensors are there and differ; where types and shapes do not, all bytes are read.
    pub(super) fn differ(&self, one: &str, other: &str) -> bool {
        let Some((a, b)) = self.raw.get(one).zip(self.raw.get(other)) else { return false };
        let bytes_differ = || {
            let pieces = a.data.par_chunks(PIECE_BYTES).zip(b.data.par_chunks(PIECE_BYTES));
            pieces.any(|(a, b)| a != b)
        };
        let differ = a.dtype != b.dtype || a.shape != b.shape || bytes_differ();
        [one, other].into_iter().for_each(|name| self.release(name));
        differ
    }

    pub(super) fn weight(&self, name: &str) -> Result<Weight> {
        let Some(tensor) = self.raw.get(name) else {
            let what = format_args!("tensor {name} is not in the checkpoint");
            return Err(match self.is_packed_by_others(name) {
                true => Error::input(what).hint(OTHER_TOOL),
                false => Error::mismatched_weights(what),
            });
        };
        if let Some(state) = bnb::quant_state_key(name, |key| self.raw.contains_key(key)) {
            return bnb::packed_weight(name, &state, |key| self.raw.get(key)).map(Weight::Packed);
        }
        let dtype = float_type(name, tensor.dtype)?;
        let (shape, data) = (tensor.shape.clone(), tensor.data.clone());
        Ok(Weight::Dense(DenseTensor { dtype, shape, data }))
    }

    /// Whether there are parts that other tools make of the weight `name`: GPTQ's and AWQ's, compressed-tensors'.
    fn is_packed_by_others(&self, name: &str) -> bool {
        let module = name.strip_suffix("weight").unwrap_or(name);
        ["qweight", "weight_packed"].iter().any(|part| self.contains(&format!("{module}{part}")))
    }

    /// The mapped bytes of all tensors (and parts of packed ones) whose name begins with `prefix`.
    pub(super) fn pages(&self, prefix: &str) -> Vec<Pages> {
        let wanted = self.raw.iter().filter(|(name, _)| name.starts_with(prefix));
        let in_file = |data: &Bytes| self.files.iter().find_map(|file| file.pages(data));
        wanted.filter_map(|(_, tensor)| in_file(&tensor.data)).collect()
    }

    pub(super) fn page_cache(&self) -> Option<PageCache> {
        self.files.iter().try_fold(PageCache::default(), |sum, file| {
            let PageCache { file_bytes, cached_bytes } = file.page_cache()?;
            Some(PageCache {
                file_bytes: sum.file_bytes + file_bytes,
                cached_bytes: sum.cached_bytes + cached_bytes,
            })
        })
    }

    pub(super) fn release(&self, name: &str) {
        self.pages(name).iter().for_each(Pages::release);
    }
}

/// What to do about a folder without weights under one of their names, by what else is there.
fn way_to_weights(folder: &Path) -> &'static str {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let names: Vec<_> = entries.map(|entry| entry.file_name()).collect();
    let has = |part: &str| names.iter().any(|name| name.to_string_lossy().contains(part));
    if has(".safetensors") && !has("-of-") {
        "its tensors may have other names than transformers': download `model.safetensors`"
    } else if has(".safetensors") {
        "the shards of a model are listed in model.safetensors.index.json: download that file, too"
    } else if has(".gguf") {
        "give the GGUF file itself"
    } else if has(".bin") || has(".pth") {
        "Nibble reads safetensors; convert `pytorch_model.bin` with transformers' `save_pretrained`"
    } else {
        "download the weights, too: `*.safetensors` beside config.json"
    }
}

fn open_shards(
    path: &Path,
    index: &Path,
    raw: &mut HashMap<String, RawTensor>,
) -> Result<Vec<MappedFile>> {
    let json = read_json(index)?;
    let Some(map) = json.get("weight_map").and_then(Value::as_object) else {
        return Err(
            Error::input(format_args!("{}: no `weight_map`", index.display())).hint(DAMAGED_INDEX)
        );
    };
    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, file) in map {
        let file_name = file.as_str().map(|file| file.strip_prefix("./").unwrap_or(file));
        let Some(file) = file_name.filter(|f| !f.contains(['/', '\\'])) else {
            return Err(Error::input(format_args!(
                "{}: tensor {tensor} names the file {file}",
                index.display()
            ))
            .hint(DAMAGED_INDEX));
        };
        shards.entry(file).or_default().push(tensor);
    }
    let mut files = Vec::with_capacity(shards.len());
    for (file, tensors) in shards {
        let shard = path.join(file);
        if !shard.exists() {
            let what = format!("{}: shard {file} is missing", path.display());
            return Err(Error::input(what).hint("download the checkpoint again, all files of it"));
        }
        let mut found = HashMap::new();
        files.push(read_file(&shard, &mut found)?);
        if let Some(absent) = tensors.iter().find(|tensor| !found.contains_key(**tensor)) {
            return Err(Error::input(format_args!(
                "{}: tensor {absent} is not in {file}",
                index.display()
            ))
            .hint("index and shards belong to different downloads"));
        }
        raw.extend(found);
    }
    Ok(files)
}

fn read_file(path: &Path, raw: &mut HashMap<String, RawTensor>) -> Result<MappedFile> {
    let file = MappedFile::open(path)?;
    let bytes = &file.bytes;
    let (header, metadata) = SafeTensors::read_metadata(bytes)
        .map_err(|e| damaged_safetensors(bytes, &e).at(path.display()))?;
    let start = header + size_of::<u64>();
    for (name, info) in metadata.tensors() {
        let (begin, end) = info.data_offsets;
        let (Some(begin), Some(end)) = (start.checked_add(begin), start.checked_add(end)) else {
            return Err(Error::input(format_args!("{}: {name}: offsets overflow", path.display())));
        };
        if end > bytes.len() || begin > end {
            return Err(Error::input(format_args!(
                "{}: tensor {name} ends at byte {end}, the file has {}",
                path.display(),
                bytes.len()
            ))
            .hint("the file is truncated: download it again"));
        }
        let data = bytes.slice(begin..end);
        raw.insert(name, RawTensor { dtype: info.dtype, shape: info.shape.clone(), data });
    }
    Ok(file)
}

/// The tensors as a user knows them: a packed weight is one entry, its parts are none.
fn describe(raw: &HashMap<String, RawTensor>) -> Result<Vec<TensorInfo>> {
    let has = |key: &str| raw.contains_key(key);
    let mut tensors = Vec::new();
    for (name, tensor) in raw {
        if bnb::is_part(name, has) {
            continue;
        }
        let get = |key: &str| raw.get(key);
        let info = match bnb::quant_state_key(name, has) {
            Some(state) => {
                let packed = bnb::packed_weight(name, &state, get)?;
                TensorInfo {
                    name: name.clone(),
                    shape: packed.shape().to_vec(),
                    stored: StoredType::Packed,
                    bytes: packed.bytes(),
                }
            }
            None => match float_type(name, tensor.dtype) {
                Ok(dtype) => TensorInfo {
                    name: name.clone(),
                    shape: tensor.shape.clone(),
                    stored: StoredType::Dense(dtype),
                    bytes: tensor.data.len(),
                },
                // Buffers such as position ids and masks: old checkpoints carry them, nobody needs them.
                Err(_) => continue,
            },
        };
        tensors.push(info);
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(tensors)
}

fn float_type(name: &str, dtype: Dtype) -> Result<FloatType> {
    match dtype {
        Dtype::F32 => Ok(FloatType::F32),
        Dtype::F16 => Ok(FloatType::F16),
        Dtype::BF16 => Ok(FloatType::Bf16),
        other => Err(unread_type(name, &format!("{other:?}"))),
    }
}
