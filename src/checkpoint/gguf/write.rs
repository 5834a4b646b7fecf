//! A GGUF file, version 3, written tensor by tensor. Source: ggml `docs/gguf.md`.

use std::io::{BufWriter, Write};
use std::path::PathBuf;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value as Metadata;

use crate::checkpoint::atomic::AtomicFile;
use crate::error::{Error, Result};

/// Data and each tensor begin at multiples of this.
const ALIGNMENT_BYTES: usize = 32;

/// A tensor to come.
#[derive(Debug, Clone)]
pub struct Description {
    /// llama.cpp's name.
    pub name: String,
    /// Outermost dimension first, as everywhere but in the file.
    pub shape: Vec<usize>,
    /// How its elements are stored; blocks do not straddle rows.
    pub dtype: GgmlDType,
}

impl Description {
    /// Bytes of its data.
    pub fn bytes(&self) -> usize {
        let elements: usize = self.shape.iter().product();
        elements / self.dtype.block_size() * self.dtype.type_size()
    }
}

/// A file that takes its name when it is whole.
pub struct GgufWriter {
    file: BufWriter<AtomicFile>,
    path: PathBuf,
    tensors: Vec<Description>,
    /// Bytes of the data so far.
    written: usize,
}

impl GgufWriter {
    /// Writes the header into `file`; the tensors' data follow in their order.
    ///
    /// # Errors
    /// `Io` when the disk refuses.
    pub fn create(
        file: AtomicFile,
        metadata: &[(String, Metadata)],
        tensors: Vec<Description>,
    ) -> Result<Self> {
        let path = file.destination().to_path_buf();
        let mut header = b"GGUF".to_vec();
        header.extend(3u32.to_le_bytes());
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend((metadata.len() as u64).to_le_bytes());
        for (key, value) in metadata {
            put_text(&mut header, key);
            header.extend(kind(value).to_le_bytes());
            put(&mut header, value);
        }
        let mut offset = 0u64;
        for tensor in &tensors {
            put_text(&mut header, &tensor.name);
            header.extend((tensor.shape.len() as u32).to_le_bytes());
            for size in tensor.shape.iter().rev() {
                header.extend((*size as u64).to_le_bytes());
            }
            header.extend(block_id(tensor.dtype).to_le_bytes());
            header.extend(offset.to_le_bytes());
            offset += tensor.bytes().next_multiple_of(ALIGNMENT_BYTES) as u64;
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT_BYTES), 0);
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&header).map_err(|e| Error::io("write", &path, e))?;
        Ok(GgufWriter { file, path, tensors, written: 0 })
    }

    /// Appends data of the tensor at work.
    ///
    /// # Errors
    /// `Io` when the disk refuses.
    pub fn append(&mut self, data: &[u8]) -> Result<()> {
        self.written += data.len();
        self.file.write_all(data).map_err(|e| Error::io("write", &self.path, e))
    }

    /// Ends the tensor at work.
    ///
    /// # Errors
    /// `Io` when the disk refuses.
    pub fn end_tensor(&mut self) -> Result<()> {
        let padding = self.written.next_multiple_of(ALIGNMENT_BYTES) - self.written;
        self.append(&[0; ALIGNMENT_BYTES][..padding])
    }

    /// Gives the file its name. Returns its bytes.
    ///
    /// # Errors
    /// `Io` when the disk refuses, and those of [`AtomicFile::commit`]; what had the name before is as it was
    /// then.
    pub fn finish(self) -> Result<u64> {
        let padded = |t: &Description| t.bytes().next_multiple_of(ALIGNMENT_BYTES);
        let expected: usize = self.tensors.iter().map(padded).sum();
        assert_eq!(self.written, expected, "every tensor was written");
        let path = &self.path;
        let file = self.file.into_inner();
        file.map_err(|e| Error::io("write", path, e.into_error()))?.commit()
    }
}

fn put_text(to: &mut Vec<u8>, text: &str) {
    to.extend((text.len() as u64).to_le_bytes());
    to.extend(text.as_bytes());
}

/// Source: `enum gguf_type` of ggml.
fn kind(value: &Metadata) -> u32 {
    match value {
        Metadata::U8(_) => 0,
        Metadata::I8(_) => 1,
        Metadata::U16(_) => 2,
        Metadata::I16(_) => 3,
        Metadata::U32(_) => 4,
        Metadata::I32(_) => 5,
        Metadata::F32(_) => 6,
        Metadata::Bool(_) => 7,
        Metadata::String(_) => 8,
        Metadata::Array(_) => 9,
        Metadata::U64(_) => 10,
        Metadata::I64(_) => 11,
        Metadata::F64(_) => 12,
    }
}

fn put(to: &mut Vec<u8>, value: &Metadata) {
    match value {
        Metadata::U8(x) => to.push(*x),
        Metadata::I8(x) => to.extend(x.to_le_bytes()),
        Metadata::U16(x) => to.extend(x.to_le_bytes()),
        Metadata::I16(x) => to.extend(x.to_le_bytes()),
        Metadata::U32(x) => to.extend(x.to_le_bytes()),
        Metadata::I32(x) => to.extend(x.to_le_bytes()),
        Metadata::F32(x) => to.extend(x.to_le_bytes()),
        Metadata::Bool(x) => to.push(u8::from(*x)),
        Metadata::String(text) => put_text(to, text),
        Metadata::Array(values) => {
            to.extend(values.first().map_or(0, kind).to_le_bytes());
            to.extend((values.len() as u64).to_le_bytes());
            values.iter().for_each(|value| put(to, value));
        }
        Metadata::U64(x) => to.extend(x.to_le_bytes()),
        Metadata::I64(x) => to.extend(x.to_le_bytes()),
        Metadata::F64(x) => to.extend(x.to_le_bytes()),
    }
}

/// Source: `enum ggml_type` of ggml; those that are written.
fn block_id(dtype: GgmlDType) -> u32 {
    match dtype {
        GgmlDType::F32 => 0,
        GgmlDType::F16 => 1,
        GgmlDType::Q5_0 => 6,
        GgmlDType::Q5_1 => 7,
        GgmlDType::Q8_0 => 8,
        GgmlDType::Q4K => 12,
        GgmlDType::Q5K => 13,
        GgmlDType::Q6K => 14,
        GgmlDType::BF16 => 30,
        other => unreachable!("{other:?} is read only"),
    }
}
