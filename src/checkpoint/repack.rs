//! A base checkpoint in 4-bit blocks: which tensors are packed, and the stream that packs them.
//!
//! The inventory decides: linears of the blocks are packed; embeddings, norms, biases and the head
//! stay dense, as `transformers` expects of a pre-quantized model. One tensor is in memory at a
//! time.

use std::borrow::Cow;
use std::collections::BTreeMap;

use nibble_quant::{BlockFormat, FloatType, Floats, PackedWeight};
use rayon::prelude::*;
use regex::Regex;
use serde::Serialize;

use super::writer::{Announced, Contents, ShardWriter};
use super::{Checkpoint, CheckpointKind, DenseTensor, StoredType, TensorInfo, Weight};
use crate::error::{Error, Result, candle_text};
use crate::model::spec::{ModelSpec, TensorRole, TensorSpec};

/// What to do with each tensor.
pub struct Repack<'a> {
    /// Where tensors come from.
    pub checkpoint: &'a Checkpoint,
    /// What the model is.
    pub spec: &'a ModelSpec,
    /// How linears are packed.
    pub format: BlockFormat,
    /// Names that stay dense.
    pub skip: Vec<Regex>,
    /// Type of dense tensors; as stored if absent.
    pub dtype: Option<FloatType>,
    /// Whether linears that are 4-bit already are packed anew.
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
    /// Type in the output (dense), or before packing.
    dtype: FloatType,
    /// Whether the source stores the transpose and the output is packed.
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

/// Sums over the tensors of one role.
#[derive(Debug, Clone, Default)]
pub struct RoleSummary {
    /// Number of tensors.
    pub tensors: usize,
    /// Elements.
    pub elements: usize,
    /// Bytes in the source.
    pub bytes_before: usize,
    /// Bytes in the output.
    pub bytes_after: usize,
    /// Sum of squared differences.
    squared_error: f64,
    /// Sum of squares.
    squared: f64,
    /// Largest relative RMS error of a block, and where.
    pub worst_block: Option<WorstBlock>,
}

/// The block that lost most.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WorstBlock {
    /// Its tensor.
    pub tensor: String,
    /// Number of the block in the flattened tensor.
    pub block: usize,
    /// RMS of the error over RMS of the block.
    pub relative_rms: f64,
}

impl RoleSummary {
    /// All figures.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "tensors": self.tensors,
            "elements": self.elements,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": self.bits_per_weight(),
            "relative_rms_error": self.relative_rms_error(),
            "worst_block": self.worst_block,
        })
    }

    /// Bits for each element in the output.
    pub fn bits_per_weight(&self) -> f64 {
        8.0 * self.bytes_after as f64 / self.elements as f64
    }

    /// RMS of the error over RMS of the weights.
    pub fn relative_rms_error(&self) -> f64 {
        if self.squared == 0.0 { 0.0 } else { (self.squared_error / self.squared).sqrt() }
    }
}

impl Repack<'_> {
    /// The output's tensors in order.
    ///
    /// # Errors
    /// `Input` when the checkpoint lacks a tensor of the inventory or has another shape.
    pub fn steps(&self) -> Result<Vec<Step>> {
        let stored: BTreeMap<&str, &TensorInfo> =
            self.checkpoint.tensors().iter().map(|info| (info.name.as_str(), info)).collect();
        self.spec.inventory().iter().map(|tensor| self.step(tensor, &stored)).collect()
    }

    fn step(&self, tensor: &TensorSpec, stored: &BTreeMap<&str, &TensorInfo>) -> Result<Step> {
        let short = tensor.name.strip_prefix("transformer.").unwrap_or(&tensor.name);
        let Some(info) = stored.get(tensor.name.as_str()).or_else(|| stored.get(short)) else {
            return Err(Error::input(format_args!(
                "{}: tensor {} is missing",
                self.checkpoint.path().display(),
                tensor.name
            ))
            .hint("the weights and config.json belong to different models"));
        };
        let linear = matches!(tensor.role, TensorRole::Linear(_));
        let skipped = self.skip.iter().any(|pattern| pattern.is_match(&tensor.name));
        let (dtype, packed) = match info.stored {
            StoredType::Dense(dtype) => (dtype, (linear && !skipped).then_some(self.format)),
            StoredType::Packed => self.packed_already(info, &tensor.name, skipped)?,
        };
        let mut step = Step {
            name: info.name.clone(),
            role: tensor.role,
            shape: tensor.shape.clone(),
            packed,
            dtype,
            transposed: tensor.transposed && info.stored != StoredType::Packed,
            bytes_before: info.bytes,
            bytes_after: 0,
        };
        if step.transposed && packed.is_none() {
            step.shape.reverse();
        }
        let expected = if step.transposed && packed.is_some() {
            tensor.shape.iter().rev().copied().collect()
        } else {
            step.shape.clone()
        };
        if info.shape != expected {
            return Err(Error::input(format_args!(
                "tensor {} has shape {:?}, config.json implies {expected:?}",
                info.name, info.shape
            ))
            .hint("the weights and config.json belong to different models"));
        }
        if packed.is_none() {
            step.dtype = self.dtype.unwrap_or(dtype);
        }
        let elements: usize = step.shape.iter().product();
        step.bytes_after =
            packed.map_or(elements * step.dtype.size(), |format| format.packed_bytes(elements));
        Ok(step)
    }

    /// A linear that is packed in the source stays as it is, or is packed anew, or is skipped.
    fn packed_already(
        &self,
        info: &TensorInfo,
        name: &str,
        skipped: bool,
    ) -> Result<(FloatType, Option<BlockFormat>)> {
        let Weight::Packed(packed) = self.checkpoint.weight(&info.name)? else {
            return Err(Error::input(format_args!("tensor {name} is not packed as described")));
        };
        let format = if self.reblock { self.format } else { packed.format() };
        Ok((packed.dtype(), (!skipped).then_some(format)))
    }

    /// Writes all steps; calls `progress(bytes_read)` after each.
    ///
    /// # Errors
    /// `Input` naming the tensor when an element is not finite, `Io` when the disk refuses.
    pub fn run(
        &self,
        steps: &[Step],
        writer: &mut ShardWriter,
        mut progress: impl FnMut(usize),
    ) -> Result<BTreeMap<TensorRole, RoleSummary>> {
        let mut summaries = BTreeMap::new();
        for step in steps {
            let summary: &mut RoleSummary = summaries.entry(step.role).or_default();
            summary.tensors += 1;
            summary.elements += step.shape.iter().product::<usize>();
            summary.bytes_before += step.bytes_before;
            summary.bytes_after += step.bytes_after;
            self.write(step, writer, summary)?;
            self.checkpoint.release(&step.name);
            progress(step.bytes_before);
        }
        Ok(summaries)
    }

    fn write(
        &self,
        step: &Step,
        writer: &mut ShardWriter,
        summary: &mut RoleSummary,
    ) -> Result<()> {
        match (self.checkpoint.weight(&step.name)?, &step.packed) {
            (Weight::Packed(packed), Some(format)) if packed.format() == *format => {
                writer.write(&step.name, Contents::Packed(&packed))
            }
            (weight, Some(format)) => {
                let dense = oriented(weight, step.transposed);
                let packed = quantize(&step.name, &dense, format)?;
                summary.add_error(&step.name, &dense, &packed);
                writer.write(&step.name, Contents::Packed(&packed))
            }
            (weight, None) => {
                let dense = oriented(weight, false);
                let data = convert(&step.name, &dense, step.dtype)?;
                writer.write(&step.name, Contents::Dense(step.dtype, &step.shape, &data))
            }
        }
    }

    /// Compares a written checkpoint with the source, tensor by tensor.
    ///
    /// # Errors
    /// `Input` naming the first tensor that differs.
    pub fn check(&self, steps: &[Step], written: &Checkpoint) -> Result<()> {
        for step in steps {
            let differs = match (self.checkpoint.weight(&step.name)?, written.weight(&step.name)?) {
                (source, Weight::Packed(packed)) => {
                    let expected = match source {
                        Weight::Packed(source) if source.format() == packed.format() => source,
                        source => {
                            let dense = oriented(source, step.transposed);
                            quantize(&step.name, &dense, &packed.format())?
                        }
                    };
                    expected.codes() != packed.codes()
                        || expected.dequantize() != packed.dequantize()
                }
                (source, Weight::Dense(dense)) => {
                    *convert(&step.name, &oriented(source, false), step.dtype)? != *dense.data
                }
            };
            if differs {
                return Err(Error::input(format_args!(
                    "{}: tensor {} differs from its source",
                    written.path().display(),
                    step.name
                ))
                .hint("the disk may be failing: quantize again and check its health"));
            }
        }
        Ok(())
    }

    /// What a [`ShardWriter`] needs to know beforehand.
    pub fn announce(steps: &[Step]) -> Vec<Announced> {
        let announce = |step: &Step| Announced { name: step.name.clone(), bytes: step.bytes_after };
        steps.iter().map(announce).collect()
    }

    /// Whether the source is 4-bit and would be copied through.
    pub fn copies_through(&self) -> bool {
        self.checkpoint.kind() == CheckpointKind::Bnb4bit && !self.reblock
    }
}

impl RoleSummary {
    fn add_error(&mut self, name: &str, dense: &DenseTensor, packed: &PackedWeight) {
        const BLOCKS_PER_TASK: usize = 256;
        let block_size = packed.format().block_size;
        let elements: usize = dense.shape.iter().product();
        let task = BLOCKS_PER_TASK * block_size;
        let parts: Vec<(f64, f64, f64, usize)> = (0..elements.div_ceil(task))
            .into_par_iter()
            .map(|index| {
                let range = index * task..((index + 1) * task).min(elements);
                let original = dense.to_f32_range(range.clone());
                let mut restored = vec![0.0; range.len()];
                packed.dequantize_range(range.start, &mut restored);
                let blocks = original.chunks(block_size).zip(restored.chunks(block_size));
                let first = range.start / block_size;
                blocks.enumerate().fold((0.0, 0.0, 0.0, 0), |sums, (i, (a, b))| {
                    let (error, square) = squares(a, b);
                    let relative = if square == 0.0 { 0.0 } else { (error / square).sqrt() };
                    let worse = relative > sums.2;
                    let worst = if worse { (relative, first + i) } else { (sums.2, sums.3) };
                    (sums.0 + error, sums.1 + square, worst.0, worst.1)
                })
            })
            .collect();
        for (error, square, relative_rms, block) in parts {
            self.squared_error += error;
            self.squared += square;
            if self.worst_block.as_ref().is_none_or(|worst| relative_rms > worst.relative_rms) {
                self.worst_block =
                    Some(WorstBlock { tensor: name.to_string(), block, relative_rms });
            }
        }
    }
}

fn squares(original: &[f32], restored: &[f32]) -> (f64, f64) {
    let error: f32 = original.iter().zip(restored).map(|(a, b)| (a - b) * (a - b)).sum();
    let square: f32 = original.iter().map(|a| a * a).sum();
    (f64::from(error), f64::from(square))
}

/// Dense elements in the orientation of the output.
fn oriented(weight: Weight, transposed: bool) -> DenseTensor {
    let dense = match weight {
        Weight::Dense(dense) => dense,
        Weight::Packed(packed) => {
            let values = packed.dequantize();
            DenseTensor {
                dtype: FloatType::F32,
                shape: packed.shape().to_vec(),
                data: bytemuck::allocation::pod_collect_to_vec(&values).into(),
            }
        }
    };
    if transposed { dense.transposed() } else { dense }
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
    packed.map_err(|e| {
        Error::input(format_args!("tensor {name}: {}", candle_text(&e)))
            .hint("the checkpoint holds NaN or Inf: get another copy of the model")
    })
}

/// The elements of `dense` in `dtype`, rounded to nearest even.
fn convert<'a>(name: &str, dense: &'a DenseTensor, dtype: FloatType) -> Result<Cow<'a, [u8]>> {
    if dense.dtype == dtype {
        return Ok(Cow::Borrowed(&dense.data));
    }
    let values = dense.to_f32();
    let bytes = match dtype {
        FloatType::F32 => bytemuck::allocation::pod_collect_to_vec(&values),
        FloatType::Bf16 => halves(&values, |v| half::bf16::from_f32(v).to_bits()),
        FloatType::F16 => {
            let limit = half::f16::MAX.to_f32();
            if let Some(value) = values.iter().find(|v| v.abs() > limit) {
                return Err(Error::input(format_args!(
                    "tensor {name}: {value} does not fit float16"
                ))
                .hint("use `--dtype bfloat16`"));
            }
            halves(&values, |v| half::f16::from_f32(v).to_bits())
        }
    };
    Ok(Cow::Owned(bytes))
}

fn halves(values: &[f32], bits: impl Fn(f32) -> u16) -> Vec<u8> {
    values.iter().flat_map(|&value| bits(value).to_le_bytes()).collect()
}
