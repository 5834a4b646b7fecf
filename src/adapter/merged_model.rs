//! A whole model with an adapter merged in, as a stream of dense tensors.
//!
//! The inventory says which tensors are written; one is in memory at a time. The base is either
//! the original weights or the 4-bit ones that the adapter was trained on, dequantized; on the way the
//! stream measures what the choice and the rounding cost.

use bytes::Bytes;
use nibble_quant::FloatType;
use rayon::prelude::*;
use serde_json::Value;

use super::merge::Merge;
use super::merge_base::{BaseWeight, MergeBase};
use super::merge_cost::MergeCost;
use crate::checkpoint::tensor_errors::not_finite;
use crate::checkpoint::writer::{Announced, Contents, ShardWriter};
use crate::checkpoint::{DenseTensor, drop_code, set_dtype};
use crate::error::{Error, Result};
use crate::model::spec::{ModelSpec, TensorRole, TensorSpec};

/// A model with an adapter merged in.
pub struct MergedModel<'a> {
    base: MergeBase<'a>,
    merge: Merge<'a>,
    tensors: Vec<MergedTensor>,
}

/// One tensor of the output.
struct MergedTensor {
    spec: TensorSpec,
    dtype: FloatType,
}

impl MergedTensor {
    fn elements(&self) -> usize {
        self.spec.shape.iter().product()
    }

    /// The tensor with these values, rounded to its type.
    fn rounded(&self, values: &[f32]) -> Result<DenseTensor> {
        const CHUNK: usize = 1 << 14;
        let (shape, dtype) = (&self.spec.shape, self.dtype);
        let is_unfit = |value: &f32| value.is_nan() || value.abs() > dtype.largest();
        let chunks = values.par_chunks(CHUNK).enumerate();
        let unfit = chunks.find_map_first(|(number, chunk)| {
            Some(number * CHUNK + chunk.iter().position(is_unfit)?)
        });
        if let Some(index) = unfit {
            return Err(self.unfit(index, values[index]));
        }
        let size = dtype.size();
        let mut bytes = vec![0; values.len() * size];
        let chunks = bytes.par_chunks_mut(CHUNK * size).zip(values.par_chunks(CHUNK));
        chunks.for_each(|(bytes, values)| dtype.round_into(values, bytes));
        Ok(DenseTensor { dtype, shape: shape.clone(), data: bytes.into() })
    }

    /// An error for an element that is not finite, or too large for the type.
    fn unfit(&self, index: usize, value: f32) -> Error {
        let (name, dtype) = (&self.spec.name, self.dtype.as_str());
        if !value.is_finite() {
            return not_finite(name, &self.spec.shape, index, value);
        }
        Error::input(format_args!("tensor {name}: {value} does not fit {dtype}"))
            .hint("use `--dtype bfloat16` or `--dtype float32`")
    }
}

impl<'a> MergedModel<'a> {
    /// Plans the output: every tensor in `dtype`, by default in the type that the base has it in
    /// (of a packed weight, the type before packing; bfloat16 from GGUF).
    ///
    /// # Errors
    /// `Input` naming the tensor that the base lacks.
    pub fn new(
        base: MergeBase<'a>,
        merge: Merge<'a>,
        spec: &ModelSpec,
        dtype: Option<FloatType>,
    ) -> Result<Self> {
        let mut specs = spec.inventory();
        if merge.unties_head() {
            specs.push(spec.head_tensor());
        }
        let tensors = specs
            .into_iter()
            .map(|spec| {
                let stored = || base.dtype(merge.source(&spec.name));
                Ok(MergedTensor { dtype: dtype.map_or_else(stored, Ok)?, spec })
            })
            .collect::<Result<_>>()?;
        Ok(MergedModel { base, merge, tensors })
    }

    /// What a [`ShardWriter`] needs to know beforehand.
    pub fn announce(&self) -> Vec<Announced> {
        let announce = |tensor: &MergedTensor| Announced {
            name: tensor.spec.name.clone(),
            bytes: tensor.elements() * tensor.dtype.size(),
        };
        self.tensors.iter().map(announce).collect()
    }

    /// How many tensors are written, and how many of them the adapter changes.
    pub fn counts(&self) -> (usize, usize) {
        let changed = self.tensors.iter().filter(|tensor| self.merge.changes(&tensor.spec.name));
        (self.tensors.len(), changed.count())
    }

    /// `config.json` of the output: the base's, dense, in the type of the linears, and untied if
    /// the adapter makes head and embedding differ.
    pub fn config(&self) -> Value {
        let mut config = self.base.config().clone();
        let linear = |tensor: &&MergedTensor| matches!(tensor.spec.role, TensorRole::Linear(_));
        if let Some(fields) = config.as_object_mut() {
            fields.shift_remove("quantization_config");
            drop_code(fields);
            if let Some(tensor) = self.tensors.iter().find(linear) {
                set_dtype(fields, tensor.dtype);
            }
            if self.merge.unties_head() {
                fields.insert("tie_word_embeddings".into(), false.into());
            }
        }
        config
    }

    /// Writes all tensors; calls `progress(bytes_written)` after each.
    ///
    /// # Errors
    /// `Input` naming the tensor when the base's does not fit or the result does not fit its type;
    /// `Io` when the disk refuses.
    pub fn write(
        &self,
        writer: &mut ShardWriter,
        mut progress: impl FnMut(usize) -> Result<()>,
    ) -> Result<MergeCost> {
        let mut cost = MergeCost::default();
        for tensor in &self.tensors {
            let data = self.tensor(tensor, &mut cost)?;
            let shape = tensor.spec.shape_in_file(false);
            let contents = Contents::Dense(tensor.dtype, &shape, &data);
            writer.write(&tensor.spec.name, contents)?;
            self.base.release(self.merge.source(&tensor.spec.name));
            progress(data.len())?;
        }
        Ok(cost)
    }

    /// The bytes of one tensor in the layout of the file.
    fn tensor(&self, tensor: &MergedTensor, cost: &mut MergeCost) -> Result<Bytes> {
        let name = &tensor.spec.name;
        let at_base = |error: Error| error.at(self.base.path().display());
        let source = self.merge.source(name);
        let weight = self.base.weight(&tensor.spec, source)?;
        if !self.merge.changes(name)
            && let BaseWeight::AsStored(dense) = &weight
            && dense.dtype == tensor.dtype
        {
            dense.check_finite(name).map_err(at_base)?;
            return Ok(dense.data.clone());
        }
        let base = weight.into_f32(&tensor.spec);
        let adapted = matches!(tensor.spec.role, TensorRole::Linear(_)) && self.merge.changes(name);
        let before = adapted.then(|| base.clone());
        let merged = self.merge.merged_weight(name, base)?;
        let written = tensor.rounded(&merged).map_err(at_base)?;
        if let Some(before) = before {
            let other = self.base.not_chosen(&tensor.spec)?;
            let off = cost.add(&before, &merged, &written, other.as_deref());
            if self.base.has_two_models() {
                check_same_weights(name, off)?;
            }
        }
        Ok(if tensor.spec.transposed { written.transposed().data } else { written.data })
    }
}

/// What 4 bits leave of a weight is near it; another model's is not: `off` is what lies between them, as a
/// part of the weight.
fn check_same_weights(name: &str, off: f64) -> Result<()> {
    // Root mean squares: 0.09 in NF4, √2 of two weights that have nothing in common.
    const MOST: f64 = 1.0;
    if off <= MOST {
        return Ok(());
    }
    let percent = 100.0 * off;
    let what = format_args!(
        "--original is not what --model was quantized from: {name} differs by {percent:.0} %"
    );
    Err(Error::input(what)
        .hint("give the dense model that --model was quantized from, or leave it out"))
}
