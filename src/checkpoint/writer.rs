//! Writing a checkpoint one tensor at a time, in shards.
//!
//! The caller announces all tensors first (their sizes follow from shapes), so that shards and their
//! names are known; then it hands over the contents in the same order. A shard's header is written
//! last, into room that was kept for it and is filled up with spaces.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use nibble_quant::codebook::dynamic_map;
use nibble_quant::{Absmax, FloatType, NESTED_BLOCK_SIZE, PackedWeight};
use serde_json::{Map, Value, json};

use super::bnb::{
    ABSMAX, NESTED_ABSMAX, NESTED_QUANT_MAP, QUANT_MAP, QuantState, quant_state_name,
};
use super::folder::{INDEX_FILE, SINGLE_FILE};
use crate::error::{Error, Result};

/// Tensors behind a packed weight, and the first one, begin at multiples of this.
const ALIGNMENT_BYTES: usize = 64;
/// Room for a tensor's entry in the header beside its name, which appears once more in its parts.
const ENTRY_BYTES: usize = 160;

/// Room for a packed weight's constant tables and JSON, in bytes: at most so many are needed.
pub const TABLE_BYTES: usize = 4 * 16 + 4 * 256 + 200;

/// A tensor to come.
#[derive(Debug, Clone)]
pub struct Announced {
    /// Hugging Face name.
    pub name: String,
    /// Bytes of all its parts.
    pub bytes: usize,
}

/// A tensor's contents.
pub enum Contents<'a> {
    /// Dense elements, little-endian.
    Dense(FloatType, &'a [usize], &'a [u8]),
    /// 4-bit blocks, written as bitsandbytes does.
    Packed(&'a PackedWeight),
}

/// Writes the announced tensors to a folder.
pub struct ShardWriter {
    folder: PathBuf,
    /// The shard that each tensor goes to.
    shards: Vec<usize>,
    announced: Vec<Announced>,
    next: usize,
    open: Option<Shard>,
    weight_map: Map<String, Value>,
    total_bytes: usize,
    total_parameters: usize,
}

struct Shard {
    index: usize,
    path: PathBuf,
    file: BufWriter<File>,
    room: usize,
    header: Map<String, Value>,
    offset: usize,
}

impl ShardWriter {
    /// Plans shards of at most `max_shard_bytes` (a larger tensor gets its own).
    pub fn new(folder: &Path, announced: Vec<Announced>, max_shard_bytes: u64) -> Self {
        let (mut shard, mut filled) = (0, 0);
        let shards = announced
            .iter()
            .map(|tensor| {
                if filled > 0 && (filled + tensor.bytes) as u64 > max_shard_bytes {
                    (shard, filled) = (shard + 1, 0);
                }
                filled += tensor.bytes;
                shard
            })
            .collect();
        ShardWriter {
            folder: folder.to_path_buf(),
            shards,
            announced,
            next: 0,
            open: None,
            weight_map: Map::new(),
            total_bytes: 0,
            total_parameters: 0,
        }
    }

    /// Writes the next announced tensor.
    ///
    /// # Errors
    /// `Io` when the disk refuses.
    pub fn write(&mut self, name: &str, contents: Contents) -> Result<()> {
        self.next_tensor(name)?;
        match contents {
            Contents::Dense(dtype, shape, data) => {
                self.total_parameters += shape.iter().product::<usize>();
                self.part(name, float_name(dtype), shape, data)
            }
            Contents::Packed(packed) => {
                self.total_parameters += packed.shape()[0] * packed.shape()[1];
                self.packed(name, packed)
            }
        }
    }

    /// Writes the next announced tensor, dense, from pieces of its bytes.
    ///
    /// # Errors
    /// What a piece is, or `Io` when the disk refuses.
    pub fn write_pieces(
        &mut self,
        name: &str,
        dtype: FloatType,
        shape: &[usize],
        pieces: impl Iterator<Item = Result<Vec<u8>>>,
    ) -> Result<()> {
        self.next_tensor(name)?;
        let elements = shape.iter().product::<usize>();
        self.total_parameters += elements;
        let mut missing = elements * dtype.size();
        self.describe(name, float_name(dtype), shape, missing);
        for piece in pieces {
            let piece = piece?;
            missing -= piece.len();
            self.append(&piece)?;
        }
        assert_eq!(missing, 0, "the pieces are the tensor");
        Ok(())
    }

    /// Completes the last shard and, if there are several, the index. Returns the bytes of data.
    ///
    /// # Errors
    /// `Io` when the disk refuses.
    pub fn finish(mut self) -> Result<usize> {
        assert_eq!(self.next, self.announced.len(), "all announced tensors were written");
        self.finish_shard()?;
        if self.shards.last().is_some_and(|&last| last > 0) {
            let index = json!({
                "metadata": {
                    "total_parameters": self.total_parameters,
                    "total_size": self.total_bytes,
                },
                "weight_map": self.weight_map,
            });
            let path = self.folder.join(INDEX_FILE);
            let text = format!("{index:#}\n");
            std::fs::write(&path, text).map_err(|e| Error::io("write", &path, e))?;
        }
        Ok(self.total_bytes)
    }

    fn packed(&mut self, name: &str, packed: &PackedWeight) -> Result<()> {
        let format = packed.format();
        let codes = packed.codes();
        self.part(name, "U8", &[codes.len(), 1], codes)?;
        let mut state = QuantState {
            quant_type: format.quant_type,
            blocksize: format.block_size,
            dtype: packed.dtype(),
            shape: packed.shape().to_vec(),
            nested_blocksize: None,
            nested_dtype: None,
            nested_offset: None,
        };
        match packed.absmax() {
            Absmax::Plain(absmax) => {
                self.part(&format!("{name}{ABSMAX}"), "F32", &[absmax.len() / 4], absmax)?;
            }
            Absmax::Nested { codes, absmax, offset } => {
                self.part(&format!("{name}{ABSMAX}"), "U8", &[codes.len()], codes)?;
                let nested = format!("{name}{NESTED_ABSMAX}");
                self.part(&nested, "F32", &[absmax.len() / 4], absmax)?;
                let nested_map = dynamic_map();
                let bytes = bytemuck::cast_slice(nested_map);
                let name = format!("{name}{NESTED_QUANT_MAP}");
                self.part(&name, "F32", &[nested_map.len()], bytes)?;
                state.nested_blocksize = Some(NESTED_BLOCK_SIZE);
                state.nested_dtype = Some("float32".into());
                state.nested_offset = Some(f64::from(*offset));
            }
        }
        let map = format.quant_type.values();
        let bytes = bytemuck::cast_slice(map);
        self.part(&format!("{name}{QUANT_MAP}"), "F32", &[map.len()], bytes)?;
        // Spaces after the JSON put the next tensor at an aligned place: a reader that maps the
        // file needs no copy of it.
        let mut json = python_json(&state);
        let offset = self.open.as_ref().map_or(0, |shard| shard.offset);
        let end = (offset + json.len()).next_multiple_of(ALIGNMENT_BYTES);
        json.push_str(&" ".repeat(end - offset - json.len()));
        let key = quant_state_name(name, format.quant_type);
        self.part(&key, "U8", &[json.len()], json.as_bytes())
    }

    fn next_tensor(&mut self, name: &str) -> Result<()> {
        assert_eq!(self.announced[self.next].name, name, "tensors come in the announced order");
        let index = self.shards[self.next];
        self.next += 1;
        if self.open.as_ref().is_none_or(|shard| shard.index != index) {
            self.finish_shard()?;
            self.open = Some(self.open_shard(index)?);
        }
        Ok(())
    }

    fn part(&mut self, name: &str, dtype: &str, shape: &[usize], data: &[u8]) -> Result<()> {
        self.describe(name, dtype, shape, data.len());
        self.append(data)
    }

    /// Enters a tensor of `bytes` bytes, which follow, in the header.
    fn describe(&mut self, name: &str, dtype: &str, shape: &[usize], bytes: usize) {
        let shard = self.open.as_mut().expect("opened by next_tensor");
        let end = shard.offset + bytes;
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [shard.offset, end]});
        shard.header.insert(name.to_string(), entry);
        let file = shard.path.file_name().and_then(|f| f.to_str()).unwrap_or_default();
        self.weight_map.insert(name.to_string(), file.into());
        shard.offset = end;
        self.total_bytes += bytes;
    }

    fn append(&mut self, data: &[u8]) -> Result<()> {
        let shard = self.open.as_mut().expect("opened by next_tensor");
        shard.file.write_all(data).map_err(|e| Error::io("write", &shard.path, e))
    }

    fn open_shard(&self, index: usize) -> Result<Shard> {
        let count = self.shards.last().map_or(1, |last| last + 1);
        let name = if count == 1 {
            SINGLE_FILE.to_string()
        } else {
            format!("model-{:05}-of-{count:05}.safetensors", index + 1)
        };
        let path = self.folder.join(name);
        let tensors = self.announced.iter().zip(&self.shards).filter(|(_, shard)| **shard == index);
        // A packed weight has six parts, each with the weight's name.
        let room: usize = tensors.map(|(t, _)| 6 * (t.name.len() + ENTRY_BYTES)).sum();
        let room = (room + 64 + 8).next_multiple_of(ALIGNMENT_BYTES) - 8;
        let open = || {
            let mut file = BufWriter::with_capacity(1 << 20, File::create(&path)?);
            file.seek(SeekFrom::Start((8 + room) as u64))?;
            Ok(file)
        };
        let file = open().map_err(|e| Error::io("write", &path, e))?;
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({"format": "pt"}));
        Ok(Shard { index, path, file, room, header, offset: 0 })
    }

    fn finish_shard(&mut self) -> Result<()> {
        let Some(mut shard) = self.open.take() else { return Ok(()) };
        let mut header = Value::Object(std::mem::take(&mut shard.header)).to_string();
        assert!(header.len() <= shard.room, "room for the header was reckoned from the names");
        header.push_str(&" ".repeat(shard.room - header.len()));
        let mut finish = || {
            shard.file.seek(SeekFrom::Start(0))?;
            shard.file.write_all(&(header.len() as u64).to_le_bytes())?;
            shard.file.write_all(header.as_bytes())?;
            shard.file.flush()?;
            shard.file.get_ref().sync_all()
        };
        finish().map_err(|e| Error::io("write", &shard.path, e))
    }
}

fn float_name(dtype: FloatType) -> &'static str {
    match dtype {
        FloatType::F32 => "F32",
        FloatType::F16 => "F16",
        FloatType::Bf16 => "BF16",
    }
}

/// Separators of Python's `json.dumps`: `", "` and `": "`.
struct PythonJson;

impl serde_json::ser::Formatter for PythonJson {
    fn begin_object_key<W>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()>
    where
        W: ?Sized + Write,
    {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }

    fn begin_array_value<W>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()>
    where
        W: ?Sized + Write,
    {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }
}

fn python_json(state: &QuantState) -> String {
    let mut out = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, PythonJson);
    serde::Serialize::serialize(state, &mut serializer).expect("plain data serializes");
    String::from_utf8(out).expect("JSON is UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;
    use nibble_quant::QuantType;

    #[test]
    fn the_quant_state_is_what_bitsandbytes_writes() {
        let state = QuantState {
            quant_type: QuantType::Nf4,
            blocksize: 64,
            dtype: FloatType::Bf16,
            shape: vec![512, 256],
            nested_blocksize: Some(256),
            nested_dtype: Some("float32".into()),
            nested_offset: Some(0.052011311054229736),
        };
        let expected = "{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"bfloat16\", \
            \"shape\": [512, 256], \"nested_blocksize\": 256, \"nested_dtype\": \"float32\", \
            \"nested_offset\": 0.052011311054229736}";
        assert_eq!(python_json(&state), expected);
        assert_eq!(expected.len(), 171);
    }
}
