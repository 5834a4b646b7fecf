//! A base checkpoint in 4-bit blocks: which tensors are packed, and the stream that packs them.
//!
//! The inventory decides: linears of the blocks are packed; embeddings, norms, biases and the head
//! stay dense, as `transformers` expects of a pre-quantized model. What a packed tensor becomes is
//! in memory, of all others only a part at a time.

mod stream;
mod summary;

use nibble_quant::{BlockFormat, FloatType, Floats, PackedWeight};
use regex::Regex;

use super::tensor_errors::{check_shape, unusable};
use super::writer::{Announced, TABLE_BYTES};
use super::{Checkpoint, CheckpointKind, DenseTensor, StoredType, TensorInfo};
use crate::error::{Error, Result};
use crate::model::spec::{ModelSpec, TensorRole, TensorSpec};
pub use summary::{RoleSummary, WorstBlock};

/// What to do with each tensor.
pub struct Repack<'a> {
    /// The source of the tensors.
    pub checkpoint: &'a Checkpoint,
    /// What the model is.
    pub spec: &'a ModelSpec,
    /// How linears are packed.
    pub format: BlockFormat,
    /// Names that stay dense.
    pub skip: Vec<Regex>,
    /// Type of dense tensors; as stored if absent.
    pub dtype: Option<FloatType>,
    /// Whether linears are packed anew where some are 4-bit already.
    pub reblock: bool,
}

/// One tensor of the output.
#[derive(Debug, Clone)]
pub struct Step {
    /// Name in source and output.
    pub name: String,
    /// What it is for.
    pub role: TensorRole,
    /// Shape in the output: packed linears are `[out, in]`.
    shape: Vec<usize>,
    /// Whether it is packed, in which format.
    packed: Option<BlockFormat>,
    /// Type in the output; of packed linears, the type that they are said to have had before.
    dtype: FloatType,
    /// Whether the output is the transpose of the source.
    transposed: bool,
    /// Bytes in the source.
    pub bytes_before: usize,
    /// Bytes in the output, constant tables left out.
    pub bytes_after: usize,
}

impl Step {
    /// How it is packed in the output; none if it stays dense.
    pub fn format(&self) -> Option<BlockFormat> {
        self.packed
    }

    /// The module of a linear that stays dense.
    pub fn skipped_linear(&self) -> Option<&str> {
        let linear = matches!(self.role, TensorRole::Linear(_)) && self.packed.is_none();
        linear.then(|| self.name.strip_suffix(".weight").unwrap_or(&self.name))
    }
}

impl Repack<'_> {
    /// The output's tensors in order.
    ///
    /// # Errors
    /// `Input` when the checkpoint lacks a tensor of the inventory, has another shape or more layers.
    pub fn steps(&self) -> Result<Vec<Step>> {
        self.spec.check_no_further_layer(|name| self.checkpoint.contains(name))?;
        self.spec.inventory().iter().map(|tensor| self.step(tensor)).collect()
    }

    fn step(&self, tensor: &TensorSpec) -> Result<Step> {
        let Some(info) = self.checkpoint.info(&tensor.name) else {
            // Says so, too, when it is there in a type that nobody can read.
            self.checkpoint.elements(&tensor.name)?;
            return Err(Error::mismatched_weights(format_args!(
                "{}: tensor {} is missing",
                self.checkpoint.path().display(),
                tensor.name
            )));
        };
        let linear = matches!(tensor.role, TensorRole::Linear(_));
        let skipped = self.skip.iter().any(|pattern| pattern.is_match(&tensor.name));
        let from_packed = info.stored == StoredType::Packed;
        let (stored_type, format) = match info.stored {
            StoredType::Dense(dtype) => (dtype, self.format),
            StoredType::Packed => self.packed_already(info)?,
        };
        // Whoever packed the others left those dense on purpose that are.
        let stays = skipped || (self.copies_through() && !from_packed);
        let packed = (linear && !stays).then_some(format);
        let expected = tensor.shape_in_file(from_packed);
        check_shape(&info.name, &info.shape, &expected)?;
        let copied = from_packed && packed.is_some() && !self.reblock;
        let dtype = if copied { stored_type } else { self.dtype.unwrap_or(stored_type) };
        let shape = tensor.shape_in_file(packed.is_some());
        let elements: usize = shape.iter().product();
        let bytes_after =
            packed.map_or(elements * dtype.size(), |format| format.packed_bytes(elements));
        Ok(Step {
            name: info.name.clone(),
            role: tensor.role,
            transposed: tensor.transposed && from_packed != packed.is_some(),
            shape,
            packed,
            dtype,
            bytes_before: info.bytes,
            bytes_after,
        })
    }

    /// Type before packing of a tensor that is packed in the source, and its format in the output.
    fn packed_already(&self, info: &TensorInfo) -> Result<(FloatType, BlockFormat)> {
        let elements = self.checkpoint.elements(&info.name)?;
        let format = match elements.packed() {
            Some(packed) if !self.reblock => packed.format(),
            _ => self.format,
        };
        Ok((elements.dtype(), format))
    }

    /// Tensors of the source that are not in the output: the model has no use for them.
    pub fn not_written(&self) -> Vec<&str> {
        self.spec.not_in_inventory(self.checkpoint.names())
    }

    /// What a [`ShardWriter`](super::writer::ShardWriter) needs to know beforehand.
    pub fn announce(steps: &[Step]) -> Vec<Announced> {
        let announce = |step: &Step| {
            let tables = if step.packed.is_some() { TABLE_BYTES } else { 0 };
            Announced { name: step.name.clone(), bytes: step.bytes_after + tables }
        };
        steps.iter().map(announce).collect()
    }

    /// How linears are packed that stay as they are stored; none where all are packed anew.
    pub fn kept_format(&self) -> Option<BlockFormat> {
        self.checkpoint.packed_format().filter(|_| self.copies_through())
    }

    /// Whether the source is 4-bit, so that its linears stay as they are stored.
    pub fn copies_through(&self) -> bool {
        self.checkpoint.kind() == CheckpointKind::Bnb4bit && !self.reblock
    }
}

/// Quantizes a dense `[out, in]` tensor.
///
/// # Errors
/// `Input` naming tensor and element when one is not finite.
pub fn quantize(name: &str, dense: &DenseTensor, format: &BlockFormat) -> Result<PackedWeight> {
    let shape = [dense.shape[0], dense.shape[1]];
    let packed = match dense.dtype {
        FloatType::F32 => PackedWeight::quantize(Floats::F32(&dense.elements()), shape, format),
        FloatType::F16 => PackedWeight::quantize(Floats::F16(&dense.elements()), shape, format),
        FloatType::Bf16 => PackedWeight::quantize(Floats::Bf16(&dense.elements()), shape, format),
    };
    packed.map_err(|e| unusable(name, &e))
}
