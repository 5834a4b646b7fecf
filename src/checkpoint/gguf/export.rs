//! A checkpoint as a GGUF file, a few rows at a time.
//!
//! Matrices are written in one type, vectors in f32, as llama.cpp's converter does; q and k of the
//! `llama` architecture get the order of rows that its rotary embedding wants.

use std::path::Path;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use super::Architecture;
use super::blocks::stored_row;
use super::metadata::{Field, rope_factors};
use super::write::{Description, GgufWriter};
use crate::checkpoint::elements::Elements;
use crate::checkpoint::{Checkpoint, f32_bytes};
use crate::error::{Error, Result};
use crate::model::spec::{LinearRole, ModelSpec, TensorRole, TensorSpec};

/// Elements that are converted at a time.
const PIECE_ELEMENTS: usize = 1 << 22;

/// A file to be written.
pub struct Export<'a> {
    /// What is written.
    pub checkpoint: &'a Checkpoint,
    /// What it is.
    pub spec: &'a ModelSpec,
    /// Type of the matrices: F32, F16, BF16 or Q8_0.
    pub dtype: GgmlDType,
}

impl Export<'_> {
    /// Writes the file; calls `progress(bytes_written)` now and then. Returns its bytes.
    ///
    /// # Errors
    /// `Input` naming a tensor that is missing or does not fit the type; `Io` when the disk refuses.
    pub fn write(
        &self,
        path: &Path,
        metadata: &[Field],
        mut progress: impl FnMut(usize),
    ) -> Result<u64> {
        let (tensors, mut descriptions) = self.tensors()?;
        let factors = rope_factors(self.spec);
        for (name, factors) in &factors {
            let (name, shape) = (name.to_string(), vec![factors.len()]);
            descriptions.push(Description { name, shape, dtype: GgmlDType::F32 });
        }
        let mut writer = GgufWriter::create(path, metadata, descriptions.clone())?;
        for (tensor, description) in tensors.iter().zip(&descriptions) {
            self.write_tensor(&mut writer, tensor, description.dtype, &mut progress)?;
            writer.end_tensor()?;
            self.checkpoint.release(&tensor.name);
        }
        for (_, factors) in factors {
            writer.append(&f32_bytes(factors))?;
            writer.end_tensor()?;
        }
        writer.finish()
    }

    /// Bytes of the tensors' data.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn data_bytes(&self) -> Result<usize> {
        Ok(self.tensors()?.1.iter().map(Description::bytes).sum())
    }

    fn tensors(&self) -> Result<(Vec<TensorSpec>, Vec<Description>)> {
        let architecture = Architecture::of(self.spec.family);
        let mut tensors = self.spec.inventory();
        // An embedding that is the head, too, may be stored twice.
        let head = |tensor: &TensorSpec| tensor.role == TensorRole::Head;
        tensors.retain(|tensor| !(self.spec.tie_word_embeddings && head(tensor)));
        let describe = |tensor: &TensorSpec| {
            let name = architecture.tensor(&tensor.name).ok_or_else(|| {
                Error::input(format_args!("tensor {} has no name in GGUF", tensor.name))
            })?;
            Ok(Description { name, shape: tensor.shape.clone(), dtype: self.dtype_of(tensor) })
        };
        let descriptions = tensors.iter().map(describe).collect::<Result<_>>()?;
        Ok((tensors, descriptions))
    }

    /// llama.cpp reads norms, biases and learned positions in f32.
    fn dtype_of(&self, tensor: &TensorSpec) -> GgmlDType {
        let columns = tensor.shape.last().copied().unwrap_or(1);
        let fits = columns.is_multiple_of(self.dtype.block_size());
        match tensor.role {
            TensorRole::Norm | TensorRole::Bias | TensorRole::Positions => GgmlDType::F32,
            _ if !fits => GgmlDType::F16,
            _ => self.dtype,
        }
    }

    fn write_tensor(
        &self,
        writer: &mut GgufWriter,
        tensor: &TensorSpec,
        dtype: GgmlDType,
        progress: &mut impl FnMut(usize),
    ) -> Result<()> {
        let elements = self.elements(tensor)?;
        let columns = if tensor.shape.len() > 1 { tensor.shape[1] } else { 1 };
        let rows = tensor.shape[0];
        let head_rows = self.head_rows(tensor);
        let step = (PIECE_ELEMENTS / columns).max(1);
        for first in (0..rows).step_by(step) {
            let count = step.min(rows - first);
            let mut values = vec![0.0; count * columns];
            match head_rows {
                None => elements.read(first * columns, &mut values),
                Some(head_rows) => {
                    values.par_chunks_mut(columns).enumerate().for_each(|(index, row)| {
                        let source = source_row(first + index, head_rows);
                        elements.read(source * columns, row);
                    });
                }
            }
            if self.spec.norm_plus_one && tensor.role == TensorRole::Norm {
                values.iter_mut().for_each(|value| *value += 1.0);
            }
            let bytes = encoded(&values, dtype).ok_or_else(|| {
                Error::input(format_args!("tensor {}: a value does not fit {dtype:?}", tensor.name))
                    .hint("use `--outtype bf16` or `--outtype f32`")
            })?;
            writer.append(&bytes)?;
            progress(bytes.len());
        }
        Ok(())
    }

    /// `[out, in]`; GPT-2's files may lack the `transformer.` prefix.
    fn elements(&self, tensor: &TensorSpec) -> Result<Elements> {
        let short = tensor.name.strip_prefix("transformer.");
        let name = match short {
            Some(short) if !self.checkpoint.contains(&tensor.name) => short,
            _ => &tensor.name,
        };
        let elements = self.checkpoint.elements(name)?;
        // A packed one lies as products read it.
        let turned = tensor.transposed && elements.packed().is_none();
        let elements = if turned { elements.transposed() } else { elements };
        if elements.shape() != tensor.shape {
            return Err(Error::input(format_args!(
                "tensor {name} has shape {:?}, expected {:?}",
                elements.shape(),
                tensor.shape
            )));
        }
        Ok(elements)
    }

    /// Rows of a head of q or k, weight or bias, where they change places.
    fn head_rows(&self, tensor: &TensorSpec) -> Option<usize> {
        let llama = Architecture::of(self.spec.family) == Architecture::Llama;
        let turned = match tensor.role {
            TensorRole::Linear(LinearRole::Q | LinearRole::K) => true,
            TensorRole::Bias => {
                ["q_proj.bias", "k_proj.bias"].iter().any(|module| tensor.name.ends_with(module))
            }
            _ => false,
        };
        (llama && turned).then_some(self.spec.head_dim)
    }
}

/// Which row of the model is row `stored` of the file: the inverse of [`stored_row`].
pub fn source_row(stored: usize, head_rows: usize) -> usize {
    let (head, within) = (stored / head_rows, stored % head_rows);
    let row = head * head_rows + within % 2 * (head_rows / 2) + within / 2;
    debug_assert_eq!(stored_row(row, head_rows), stored);
    row
}

/// Little-endian; none where a value does not fit.
pub fn encoded(values: &[f32], dtype: GgmlDType) -> Option<Vec<u8>> {
    const CHUNK: usize = 1 << 14;
    let mut bytes = vec![0; values.len() / dtype.block_size() * dtype.type_size()];
    let chunk_bytes = CHUNK / dtype.block_size() * dtype.type_size();
    let chunks = bytes.par_chunks_mut(chunk_bytes).zip(values.par_chunks(CHUNK));
    let fits = chunks.map(|(bytes, values)| match dtype {
        GgmlDType::F32 => {
            bytes.copy_from_slice(bytemuck::cast_slice(values));
            true
        }
        GgmlDType::F16 => put(bytes, values, |x| f16::from_f32(x).to_bits(), f16::MAX.to_f32()),
        GgmlDType::BF16 => put(bytes, values, |x| bf16::from_f32(x).to_bits(), bf16::MAX.to_f32()),
        _ => put_q8_0(bytes, values),
    });
    fits.reduce(|| true, |a, b| a && b).then_some(bytes)
}

fn put(bytes: &mut [u8], values: &[f32], bits: impl Fn(f32) -> u16, largest: f32) -> bool {
    for (bytes, value) in bytes.chunks_exact_mut(2).zip(values) {
        bytes.copy_from_slice(&bits(*value).to_le_bytes());
    }
    values.iter().all(|x| x.abs() <= largest)
}

/// Blocks of 32: an f16 scale, and codes of 8 bits.
fn put_q8_0(bytes: &mut [u8], values: &[f32]) -> bool {
    let packed = Tensor::from_slice(values, values.len(), &Device::Cpu)
        .and_then(|values| QTensor::quantize(&values, GgmlDType::Q8_0));
    let Ok(packed) = packed else { return false };
    let Ok(blocks) = packed.data() else { return false };
    bytes.copy_from_slice(&blocks);
    let mut scales = blocks.chunks_exact(GgmlDType::Q8_0.type_size());
    scales.all(|block| f16::from_le_bytes([block[0], block[1]]).is_finite())
}
