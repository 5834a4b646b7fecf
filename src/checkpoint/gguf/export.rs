//! A checkpoint as a GGUF file, a few rows at a time.
//!
//! Matrices have the type that their file's gives them, vectors are f32; q and k of
//! Llamas, Ministral 3, SmolLM3 and Granites get the order of rows that llama.cpp's rotary embedding wants.

use std::ops::Range;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::f16;
use nibble_quant::FloatType;
use rayon::prelude::*;

use super::Architecture;
use super::blocks::stored_row;
use super::file_type::FileType;
use super::metadata::{Field, rope_factors};
use super::write::{Description, GgufWriter};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::atomic::AtomicFile;
use crate::checkpoint::elements::Elements;
use crate::checkpoint::tensor_errors::check_shape;
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
    /// How its matrices are stored.
    pub file_type: FileType,
}

/// A tensor of the file, and the rows of one of the model's that are in it.
struct Part {
    tensor: TensorSpec,
    rows: Range<usize>,
    stored: Description,
}

impl Export<'_> {
    /// Writes the file; calls `progress(bytes_written)` now and then, whose error ends it. Returns its
    /// bytes.
    ///
    /// # Errors
    /// `Input` naming a tensor that is missing or does not fit the type; `Io` when the disk refuses; that
    /// of `progress`. The file is then as it was.
    pub fn write(
        &self,
        file: AtomicFile,
        metadata: &[Field],
        mut progress: impl FnMut(usize) -> Result<()>,
    ) -> Result<u64> {
        let parts = self.parts()?;
        let mut descriptions: Vec<_> = parts.iter().map(|part| part.stored.clone()).collect();
        let factors = rope_factors(self.spec);
        for (name, factors) in &factors {
            let (name, shape) = (name.to_string(), vec![factors.len()]);
            descriptions.push(Description { name, shape, dtype: GgmlDType::F32 });
        }
        let mut writer = GgufWriter::create(file, metadata, descriptions)?;
        for part in &parts {
            self.write_part(&mut writer, part, &mut progress)?;
            writer.end_tensor()?;
            self.checkpoint.release(&part.tensor.name);
        }
        for (_, factors) in factors {
            writer.append(bytemuck::cast_slice(&factors))?;
            writer.end_tensor()?;
        }
        writer.finish()
    }

    /// Bytes of the tensors' data.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn data_bytes(&self) -> Result<usize> {
        Ok(self.parts()?.iter().map(|part| part.stored.bytes()).sum())
    }

    fn parts(&self) -> Result<Vec<Part>> {
        let architecture = Architecture::of(self.spec.family);
        let mut tensors = self.spec.inventory();
        // An embedding that is the head, too, may be stored twice.
        let head = |tensor: &TensorSpec| tensor.role == TensorRole::Head;
        tensors.retain(|tensor| !(self.spec.tie_word_embeddings && head(tensor)));
        let mut parts = Vec::new();
        for tensor in tensors {
            let names = architecture.tensors(&tensor.name).ok_or_else(|| {
                Error::input(format_args!("tensor {} has no name in GGUF", tensor.name))
            })?;
            let rows = tensor.shape[0] / names.len();
            for (number, name) in names.into_iter().enumerate() {
                let shape = [&[rows], &tensor.shape[1..]].concat();
                let stored =
                    Description { name, shape, dtype: self.file_type.of(&tensor, self.spec) };
                let rows = number * rows..(number + 1) * rows;
                parts.push(Part { tensor: tensor.clone(), rows, stored });
            }
        }
        Ok(parts)
    }

    fn write_part(
        &self,
        writer: &mut GgufWriter,
        Part { tensor, rows, stored }: &Part,
        progress: &mut impl FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let elements = self.elements(tensor)?;
        let columns = if tensor.shape.len() > 1 { tensor.shape[1] } else { 1 };
        let head_rows = self.head_rows(tensor);
        let step = (PIECE_ELEMENTS / columns).max(1);
        for first in rows.clone().step_by(step) {
            let count = step.min(rows.end - first);
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
            let bytes = encoded(&values, stored.dtype)
                .ok_or_else(|| does_not_fit("checkpoint", &tensor.name, &values, stored.dtype))?;
            writer.append(&bytes)?;
            progress(bytes.len())?;
        }
        Ok(())
    }

    /// `[out, in]`.
    fn elements(&self, tensor: &TensorSpec) -> Result<Elements> {
        let elements = self.checkpoint.elements(&tensor.name)?;
        // A packed one lies as products read it.
        let turned = tensor.transposed && elements.packed().is_none();
        let elements = if turned { elements.transposed() } else { elements };
        check_shape(&tensor.name, elements.shape(), &tensor.shape)?;
        Ok(elements)
    }

    /// Rows of a head of q or k, weight or bias, where they change places.
    fn head_rows(&self, tensor: &TensorSpec) -> Option<usize> {
        let interleaved = Architecture::of(self.spec.family).interleaves_heads();
        let turned = match tensor.role {
            TensorRole::Linear(LinearRole::Q | LinearRole::K) => true,
            TensorRole::Bias => {
                ["q_proj.bias", "k_proj.bias"].iter().any(|module| tensor.name.ends_with(module))
            }
            _ => false,
        };
        (interleaved && turned).then_some(self.spec.head_dim)
    }
}

/// Which row of the model is row `stored` of the file: the inverse of [`stored_row`].
pub fn source_row(stored: usize, head_rows: usize) -> usize {
    let (head, within) = (stored / head_rows, stored % head_rows);
    let row = head * head_rows + within % 2 * (head_rows / 2) + within / 2;
    debug_assert_eq!(stored_row(row, head_rows), stored);
    row
}

/// Why [`encoded`] gave none; `source` is what holds the tensor.
pub fn does_not_fit(source: &str, name: &str, values: &[f32], dtype: GgmlDType) -> Error {
    match values.iter().find(|x| !x.is_finite()) {
        Some(value) => Error::input(format_args!("tensor {name}: a value is {value}"))
            .hint(format_args!("the {source} holds NaN or Inf: get another copy of it")),
        None => Error::input(format_args!("tensor {name}: a value does not fit {dtype:?}"))
            .hint("use `--outtype bf16` or `--outtype f32`"),
    }
}

/// Little-endian; none where a value does not fit, or is NaN or infinite.
pub fn encoded(values: &[f32], dtype: GgmlDType) -> Option<Vec<u8>> {
    const CHUNK: usize = 1 << 14;
    let mut bytes = vec![0; values.len() / dtype.block_size() * dtype.type_size()];
    let chunk_bytes = CHUNK / dtype.block_size() * dtype.type_size();
    let chunks = bytes.par_chunks_mut(chunk_bytes).zip(values.par_chunks(CHUNK));
    let fits = chunks.map(|(bytes, values)| match dtype {
        GgmlDType::F32 => put_floats(bytes, values, FloatType::F32),
        GgmlDType::F16 => put_floats(bytes, values, FloatType::F16),
        GgmlDType::BF16 => put_floats(bytes, values, FloatType::Bf16),
        _ => put_blocks(bytes, values, dtype),
    });
    fits.reduce(|| true, |a, b| a && b).then_some(bytes)
}

fn put_floats(bytes: &mut [u8], values: &[f32], dtype: FloatType) -> bool {
    dtype.round_into(values, bytes);
    values.iter().all(|x| x.abs() <= dtype.largest())
}

/// candle's blocks: codes, and scales of f16, which values may be too large for.
fn put_blocks(bytes: &mut [u8], values: &[f32], dtype: GgmlDType) -> bool {
    if !values.iter().all(|x| x.is_finite()) {
        return false;
    }
    let size = dtype.block_size();
    let packed = Tensor::from_slice(values, (values.len() / size, size), &Device::Cpu);
    let packed = packed.and_then(|values| match dtype {
        // The search for the best scales is the better one with an importance matrix, even of ones.
        GgmlDType::Q4K | GgmlDType::Q5K | GgmlDType::Q6K => {
            QTensor::quantize_imatrix(&values, &vec![1.0; size], dtype)
        }
        _ => QTensor::quantize(&values, dtype),
    });
    let blocks = packed.and_then(|packed| packed.data().map(|blocks| blocks.into_owned()));
    let blocks = blocks.expect("whole blocks of f32 are packed on the CPU");
    bytes.copy_from_slice(&blocks);
    let scale = |block: &[u8], at: usize| f16::from_le_bytes([block[at], block[at + 1]]);
    let finite = |block: &[u8]| scales(dtype).iter().all(|at| scale(block, *at).is_finite());
    blocks.chunks_exact(dtype.type_size()).all(finite)
}

/// Offsets of the f16 in a block. Source: ggml `src/ggml-common.h`.
fn scales(dtype: GgmlDType) -> &'static [usize] {
    match dtype {
        GgmlDType::Q5_0 | GgmlDType::Q8_0 => &[0],
        GgmlDType::Q5_1 | GgmlDType::Q4K | GgmlDType::Q5K => &[0, 2],
        GgmlDType::Q6K => &[208],
        other => unreachable!("{other:?} is read only"),
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use candle_core::CpuStorage;

    use super::*;

    const TYPES: [(GgmlDType, f32); 6] = [
        (GgmlDType::Q8_0, 0.005),
        (GgmlDType::Q6K, 0.04),
        (GgmlDType::Q5_0, 0.07),
        (GgmlDType::Q5_1, 0.04),
        (GgmlDType::Q5K, 0.05),
        (GgmlDType::Q4K, 0.09),
    ];

    fn decoded(values: &[f32], dtype: GgmlDType) -> Vec<f32> {
        let bytes = encoded(values, dtype).unwrap();
        match dtype.from_data(Cow::Owned(bytes)).dequantize(values.len()).unwrap() {
            CpuStorage::F32(values) => values,
            _ => unreachable!(),
        }
    }

    /// A row of padding, of one value, of one weight among zeros.
    #[test]
    fn hard_blocks_keep_their_values() {
        let spike = |at: usize| (0..256).map(move |i| if i == at { -3.0 } else { 0.0 }).collect();
        let hard: [Vec<f32>; 7] = [
            vec![0.0; 256],
            vec![0.75; 256],
            vec![-0.75; 256],
            spike(0),
            spike(131),
            (0..256).map(|i| if i < 32 { 0.0 } else { (i as f32).sin() }).collect(),
            (0..256).map(|i| (i as f32).cos() * 0.05).collect(),
        ];
        for (dtype, tolerance) in TYPES {
            for (index, values) in hard.iter().enumerate() {
                let largest = values.iter().fold(0f32, |most, x| most.max(x.abs()));
                let got = decoded(values, dtype);
                let off = got.iter().zip(values).map(|(a, b)| (a - b).abs());
                let off = off.fold(0f32, |most, x| if x.is_nan() { x } else { most.max(x) });
                assert!(off <= tolerance * largest, "{dtype:?} {index}: {off} of {largest}");
            }
        }
    }

    #[test]
    fn values_too_large_for_the_scales_are_told() {
        for (dtype, _) in TYPES {
            assert!(encoded(&[1e9; 256], dtype).is_none(), "{dtype:?}");
            let mut values = [0.5; 256];
            values[77] = f32::NAN;
            assert!(encoded(&values, dtype).is_none(), "{dtype:?}");
        }
    }
}
