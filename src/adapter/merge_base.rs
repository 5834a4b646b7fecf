//! The two bases that an adapter can be merged into: the original weights, and the 4-bit ones that
//! it was trained on.

use std::path::Path;

use nibble_quant::{BlockFormat, FloatType};
use serde_json::Value;

use crate::checkpoint::repack::quantize;
use crate::checkpoint::tensor_errors::{check_scales, check_shape};
use crate::checkpoint::{Checkpoint, CheckpointKind, DenseTensor, Weight};
use crate::error::{Error, Result};
use crate::model::spec::{TensorRole, TensorSpec};

/// Which weights take the adapter's change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MergeOnto {
    /// The dense original, as PEFT's users do: full precision for all that is not adapted, at the
    /// price of weights that the adapter has not seen.
    Original,
    /// The dequantized 4-bit weights: exactly the model that was trained.
    Dequantized,
}

/// The weights that training computed with.
#[derive(Debug, Clone, Copy)]
enum FourBit<'a> {
    /// The weights of a 4-bit checkpoint.
    Stored(&'a Checkpoint),
    /// The original's linears in this format.
    Quantized(BlockFormat),
    /// No 4-bit weights: training used the original.
    Absent,
}

/// A model's weights, original and 4-bit, as far as they are there.
#[derive(Debug, Clone, Copy)]
pub struct MergeBase<'a> {
    /// The checkpoint that everything but linears through 4-bit blocks comes from.
    source: &'a Checkpoint,
    original: Option<&'a Checkpoint>,
    four_bit: FourBit<'a>,
    onto: MergeOnto,
}

/// A base tensor: as the file has it, or dequantized, `[out, in]`.
pub(super) enum BaseWeight {
    AsStored(DenseTensor),
    Dequantized(Vec<f32>),
}

impl BaseWeight {
    /// The values in the inventory's layout.
    pub fn into_f32(self, spec: &TensorSpec) -> Vec<f32> {
        match self {
            BaseWeight::AsStored(dense) if spec.transposed => dense.transposed().to_f32(),
            BaseWeight::AsStored(dense) => dense.to_f32(),
            BaseWeight::Dequantized(values) => values,
        }
    }
}

impl<'a> MergeBase<'a> {
    /// `model` is what the adapter was trained on, or its dense original; `original` the dense
    /// original of a 4-bit `model`; `format` how training quantized a dense `model`, if it did.
    /// Without `onto`, the original is taken where it is there.
    ///
    /// # Errors
    /// `Usage` when the chosen weights are not there or `original` is not dense.
    pub fn new(
        model: &'a Checkpoint,
        original: Option<&'a Checkpoint>,
        format: Option<BlockFormat>,
        onto: Option<MergeOnto>,
    ) -> Result<Self> {
        let is_4_bit = |checkpoint: &Checkpoint| checkpoint.kind() == CheckpointKind::Bnb4bit;
        if original.is_some_and(is_4_bit) {
            return Err(Error::usage("--original is a 4-bit model, expected its dense original")
                .hint("give the folder that the 4-bit model was quantized from"));
        }
        let (original, four_bit) = match (is_4_bit(model), format) {
            (true, _) => (original, FourBit::Stored(model)),
            (false, _) if original.is_some() => {
                return Err(Error::usage("--original beside a dense --model")
                    .hint("leave it out: the dense model is the original"));
            }
            (false, Some(format)) => (Some(model), FourBit::Quantized(format)),
            (false, None) => (Some(model), FourBit::Absent),
        };
        let onto = onto.unwrap_or(match original {
            Some(_) => MergeOnto::Original,
            None => MergeOnto::Dequantized,
        });
        match (onto, original, four_bit) {
            (MergeOnto::Original, None, _) => {
                Err(Error::usage("--onto original: --model is 4-bit and holds no original weights")
                    .hint("add `--original DIR` with the dense model that it was quantized from"))
            }
            (MergeOnto::Dequantized, _, FourBit::Absent) => Err(Error::usage(
                "--onto dequantized: --quantization none says that training used no 4-bit weights",
            )
            .hint("leave out one of the two")),
            (MergeOnto::Original, Some(source), _) => {
                Ok(MergeBase { source, original, four_bit, onto })
            }
            (MergeOnto::Dequantized, ..) => {
                Ok(MergeBase { source: model, original, four_bit, onto })
            }
        }
    }

    /// Which weights were chosen.
    pub fn onto(&self) -> MergeOnto {
        self.onto
    }

    /// The configuration of the chosen weights.
    pub fn config(&self) -> &Value {
        self.source.config()
    }

    /// The path of the chosen weights.
    pub(super) fn path(&self) -> &Path {
        self.source.path()
    }

    /// Gives back the pages of the files that hold the tensor `name`.
    pub(super) fn release(&self, name: &str) {
        let four_bit = match self.four_bit {
            FourBit::Stored(model) => Some(model),
            _ => None,
        };
        for checkpoint in [Some(self.source), self.original, four_bit].into_iter().flatten() {
            checkpoint.release(name);
        }
    }

    /// The type of the tensor `name` before packing; bfloat16 for GGUF, whose types are not dense.
    pub(super) fn dtype(&self, name: &str) -> Result<FloatType> {
        if self.source.kind() == CheckpointKind::Gguf {
            return Ok(FloatType::Bf16);
        }
        Ok(match read(self.source, name)? {
            Weight::Dense(dense) => dense.dtype,
            Weight::Packed(packed) => packed.dtype(),
        })
    }

    /// The base of the merged tensor `spec`, read under the name `source`.
    pub(super) fn weight(&self, spec: &TensorSpec, source: &str) -> Result<BaseWeight> {
        match self.four_bit {
            FourBit::Quantized(format)
                if is_linear(spec) && self.onto == MergeOnto::Dequantized =>
            {
                through_blocks(self.source, spec, &format).map(BaseWeight::Dequantized)
            }
            _ => stored(self.source, spec, source),
        }
    }

    /// Whether the 4-bit weights were not made here from the original: they may be of another model.
    pub(super) fn has_two_models(&self) -> bool {
        self.original.is_some() && matches!(self.four_bit, FourBit::Stored(_))
    }

    /// The linear `spec` of the base that was not chosen, where there is one.
    pub(super) fn not_chosen(&self, spec: &TensorSpec) -> Result<Option<Vec<f32>>> {
        let other = match (self.onto, self.original, self.four_bit) {
            (MergeOnto::Original, _, FourBit::Stored(model)) => stored(model, spec, &spec.name)?,
            (MergeOnto::Original, Some(original), FourBit::Quantized(format)) => {
                BaseWeight::Dequantized(through_blocks(original, spec, &format)?)
            }
            (MergeOnto::Dequantized, Some(original), _) => stored(original, spec, &spec.name)?,
            _ => return Ok(None),
        };
        Ok(Some(other.into_f32(spec)))
    }
}

fn is_linear(spec: &TensorSpec) -> bool {
    matches!(spec.role, TensorRole::Linear(_))
}

fn read(checkpoint: &Checkpoint, name: &str) -> Result<Weight> {
    checkpoint.weight(name).map_err(|e| e.at(checkpoint.path().display()))
}

/// The tensor `name`, which must be finite and have the shape of `spec`; a packed one dequantized.
fn stored(checkpoint: &Checkpoint, spec: &TensorSpec, name: &str) -> Result<BaseWeight> {
    let weight = match read(checkpoint, name)? {
        Weight::Packed(packed) => check_shape(name, &packed.shape(), &spec.shape_in_file(true))
            .and_then(|()| check_scales(name, &packed))
            .map(|()| BaseWeight::Dequantized(packed.dequantize())),
        Weight::Dense(dense) => check_shape(name, &dense.shape, &spec.shape_in_file(false))
            .and_then(|()| dense.check_finite(name))
            .map(|()| BaseWeight::AsStored(dense)),
    };
    weight.map_err(|e| e.at(checkpoint.path().display()))
}

/// The dense linear `spec` as training saw it: packed and dequantized again, `[out, in]`.
fn through_blocks(
    checkpoint: &Checkpoint,
    spec: &TensorSpec,
    format: &BlockFormat,
) -> Result<Vec<f32>> {
    match stored(checkpoint, spec, &spec.name)? {
        BaseWeight::Dequantized(values) => Ok(values),
        BaseWeight::AsStored(dense) => {
            let dense = if spec.transposed { dense.transposed() } else { dense };
            let packed = quantize(&spec.name, &dense, format);
            Ok(packed.map_err(|e| e.at(checkpoint.path().display()))?.dequantize())
        }
    }
}
