//! The header of a GGUF file, read from the mapped bytes with every length checked against them.
//!
//! Magic, version, counts, metadata, tensor descriptions; then, at the next multiple of
//! `general.alignment`, the tensors' blocks. A description that passes here can be decoded without
//! further checks: its elements are whole blocks that lie in the file. The result is candle's
//! [`Content`], which its tokenizer reader takes. Source: ggml `docs/gguf.md`.

use std::collections::HashMap;
use std::fmt::Display;

use candle_core::Shape;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value, VersionedMagic};

use crate::checkpoint::damage::lfs_pointer;
use crate::error::{Error, Result};

/// `GGML_MAX_DIMS`.
const MAX_DIMENSIONS: u32 = 4;
/// Values of all metadata together; a vocabulary of 256,000 with its merges stays below a million.
const MAX_VALUES: usize = 1 << 23;
/// Arrays of arrays do not occur in model files; a chain of them must not exhaust the stack.
const MAX_ARRAY_DEPTH: usize = 4;
/// The alignment of a file that has no `general.alignment`.
const DEFAULT_ALIGNMENT: u64 = 32;

/// Reads and checks the header of a whole file.
///
/// # Errors
/// `Input` that says what is wrong, without the file's name.
pub(crate) fn read_header(file: &[u8]) -> Result<Content> {
    let mut reader = Reader { file, position: 0, magic: VersionedMagic::GgufV3, values: 0 };
    reader.magic()?;
    let (num_tensors, num_fields) = (reader.length()?, reader.length()?);
    let mut metadata = HashMap::new();
    for _ in 0..num_fields {
        let key = reader.string()?;
        let kind = reader.u32()?;
        let value = reader.value(kind, 0).map_err(|e| e.at(format_args!("field `{key}`")))?;
        metadata.insert(key, value);
    }
    let mut tensor_infos = HashMap::new();
    for _ in 0..num_tensors {
        let name = reader.string()?;
        let info = reader.tensor().map_err(|e| e.at(format_args!("tensor {name}")))?;
        if tensor_infos.insert(name.clone(), info).is_some() {
            return Err(damaged(format_args!("tensor {name} is described twice")));
        }
    }
    let alignment = alignment(&metadata)?;
    let tensor_data_offset = (reader.position as u64).next_multiple_of(alignment);
    for (name, info) in &tensor_infos {
        check_extent(info, tensor_data_offset, alignment, file.len() as u64)
            .map_err(|e| e.at(format_args!("tensor {name}")))?;
    }
    Ok(Content { magic: reader.magic, metadata, tensor_infos, tensor_data_offset })
}

/// Bytes of a tensor's blocks.
pub(super) fn block_bytes(info: &TensorInfo) -> usize {
    info.shape.elem_count() / info.ggml_dtype.block_size() * info.ggml_dtype.type_size()
}

fn damaged(what: impl Display) -> Error {
    Error::input(format_args!("damaged GGUF file: {what}"))
        .hint("the file may be truncated: compare its size with the source")
}

fn alignment(metadata: &HashMap<String, Value>) -> Result<u64> {
    let Some(value) = metadata.get("general.alignment") else { return Ok(DEFAULT_ALIGNMENT) };
    // Blocks are decoded in place, and their scales are up to 4 bytes wide.
    match value.to_u64() {
        Ok(alignment) if alignment.is_power_of_two() && (8..=1 << 20).contains(&alignment) => {
            Ok(alignment)
        }
        _ => Err(damaged(format_args!("general.alignment is {value:?}, expected a power of two"))),
    }
}

fn check_extent(info: &TensorInfo, start: u64, alignment: u64, file_bytes: u64) -> Result<()> {
    if !info.offset.is_multiple_of(alignment) {
        return Err(damaged(format_args!("offset {} is not aligned", info.offset)));
    }
    let end =
        start.checked_add(info.offset).and_then(|at| at.checked_add(block_bytes(info) as u64));
    match end {
        Some(end) if end <= file_bytes => Ok(()),
        _ => Err(Error::input(format_args!(
            "damaged GGUF file: {} bytes at offset {} of the data reach beyond the end of the file",
            block_bytes(info),
            info.offset
        ))
        .hint("the file is truncated: download it again")),
    }
}

struct Reader<'a> {
    file: &'a [u8],
    position: usize,
    magic: VersionedMagic,
    /// Metadata values read so far.
    values: usize,
}

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8]> {
        let rest = &self.file[self.position..];
        let Some(bytes) = rest.get(..count) else {
            return Err(damaged(format_args!(
                "byte {}: {count} bytes expected, the file has {} more",
                self.position,
                rest.len()
            )));
        };
        self.position += count;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let bytes = self.bytes(N)?;
        Ok(bytes.try_into().expect("N bytes were asked for"))
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A count, 32 bits wide in version 1.
    fn length(&mut self) -> Result<u64> {
        match self.magic {
            VersionedMagic::GgufV1 => self.u32().map(u64::from),
            VersionedMagic::GgufV2 | VersionedMagic::GgufV3 => self.u64(),
        }
    }

    fn magic(&mut self) -> Result<()> {
        if let Some(pointer) = lfs_pointer(self.file) {
            return Err(pointer);
        }
        if self.file.get(..4) != Some(b"GGUF") {
            return Err(Error::input("not a GGUF file: the first four bytes are not `GGUF`")
                .hint("the download may have saved an error page"));
        }
        self.position = 4;
        let version = self.u32()?;
        self.magic = match version {
            1 => VersionedMagic::GgufV1,
            2 => VersionedMagic::GgufV2,
            3 => VersionedMagic::GgufV3,
            other if (1..=3).contains(&other.swap_bytes()) => {
                return Err(Error::input("big-endian GGUF files are not supported")
                    .hint("convert the model for little-endian machines"));
            }
            other => {
                return Err(Error::input(format_args!("GGUF version {other}, expected 1 to 3"))
                    .hint("the file is damaged, or newer than this program"));
            }
        };
        Ok(())
    }

    fn string(&mut self) -> Result<String> {
        let length = usize::try_from(self.length()?).unwrap_or(usize::MAX);
        let bytes = self.bytes(length)?;
        // Some writers terminate their strings, and some tokens are no valid UTF-8.
        let end = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        Ok(String::from_utf8_lossy(&bytes[..end]).into_owned())
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value> {
        self.values += 1;
        if self.values > MAX_VALUES {
            return Err(damaged(format_args!("more than {MAX_VALUES} metadata values")));
        }
        Ok(match kind {
            0 => Value::U8(self.array::<1>()?[0]),
            1 => Value::I8(i8::from_le_bytes(self.array()?)),
            2 => Value::U16(u16::from_le_bytes(self.array()?)),
            3 => Value::I16(i16::from_le_bytes(self.array()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.array()?)),
            6 => Value::F32(f32::from_le_bytes(self.array()?)),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::String(self.string()?),
            9 if depth < MAX_ARRAY_DEPTH => {
                let (kind, length) = (self.u32()?, self.length()?);
                Value::Array(
                    (0..length).map(|_| self.value(kind, depth + 1)).collect::<Result<_>>()?,
                )
            }
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.array()?)),
            12 => Value::F64(f64::from_le_bytes(self.array()?)),
            other => return Err(damaged(format_args!("value of unknown type {other}"))),
        })
    }

    fn tensor(&mut self) -> Result<TensorInfo> {
        let num_dimensions = self.u32()?;
        if num_dimensions > MAX_DIMENSIONS {
            return Err(damaged(format_args!("{num_dimensions} dimensions, expected at most 4")));
        }
        let mut shape = Vec::new();
        for _ in 0..num_dimensions {
            shape.push(usize::try_from(self.length()?).unwrap_or(usize::MAX));
        }
        // The file names the fastest dimension first.
        shape.reverse();
        let ggml_dtype = block_type(self.u32()?)?;
        let offset = self.u64()?;
        let elements = shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
        let bytes = elements.and_then(|elements| elements.checked_mul(ggml_dtype.type_size()));
        let columns = shape.last().copied().unwrap_or(1);
        if bytes.is_none_or(|bytes| bytes == 0) || columns % ggml_dtype.block_size() != 0 {
            return Err(damaged(format_args!("shape {shape:?} of {ggml_dtype:?} blocks")));
        }
        Ok(TensorInfo { ggml_dtype, shape: Shape::from(shape), offset })
    }
}

/// Source: `enum ggml_type` of ggml.
fn block_type(id: u32) -> Result<GgmlDType> {
    Ok(match id {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        other => {
            let what = format_args!("GGUF block type {other} is not supported");
            return Err(Error::input(what).hint(
                "supported: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K; \
                 get the model in one of these, best F16 or Q8_0",
            ));
        }
    })
}
