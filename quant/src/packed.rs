//! [`PackedWeight`]: a matrix in 4-bit blocks, its parts as bitsandbytes stores them.

use std::ops::Range;

use bytes::Bytes;
use candle_core::{Error, Result, bail};
use rayon::prelude::*;

use crate::block::quantize_blocks;
use crate::decode::Decoder;
use crate::float::{FloatType, Floats};
use crate::format::{BlockFormat, NESTED_BLOCK_SIZE, QuantType};
use crate::nested;
use crate::owned_bytes::owned_bytes;

/// Elements that one parallel task handles: a whole number of blocks of any size.
pub(crate) const ELEMENTS_PER_TASK: usize = 65_536;
/// Elements that a task reads at a time: a multiple of every block size, and few enough that the allocator
/// reuses the buffer instead of mapping a new one.
const ELEMENTS_PER_READ: usize = 8_192;

/// The scales of a packed weight.
#[derive(Debug, Clone)]
pub enum Absmax {
    /// One f32 for each block (little-endian bytes).
    Plain(Bytes),
    /// Double-quantized.
    Nested {
        /// One code for each block.
        codes: Bytes,
        /// One f32 for each 256 blocks.
        absmax: Bytes,
        /// Mean that was taken off.
        offset: f32,
    },
}

/// What a [`PackedWeight`] is made of.
#[derive(Debug, Clone)]
pub struct PackedParts {
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// Type that the weight had before quantization.
    pub dtype: FloatType,
    /// NF4 or FP4.
    pub quant_type: QuantType,
    /// Elements for each absmax.
    pub block_size: usize,
    /// Two codes to a byte, the earlier in the high nibble.
    pub codes: Bytes,
    /// The scales.
    pub absmax: Absmax,
}

/// A frozen matrix `[out, in]` in 4-bit blocks over its flattened elements.
#[derive(Debug, Clone)]
pub struct PackedWeight {
    pub(crate) parts: PackedParts,
    pub(crate) decoder: Decoder,
}

impl PackedWeight {
    /// Quantizes `weight`, row-major `[out, in]`, on all threads.
    ///
    /// # Errors
    /// When the length is not `out · in`, the block size is not a power of two from 32 to 4096, or
    /// an element is not finite (the message names its index).
    pub fn quantize(weight: Floats, shape: [usize; 2], format: &BlockFormat) -> Result<Self> {
        check_shape(shape, weight.len())?;
        Self::quantize_parts(weight.dtype(), shape, format, |range, codes, absmax| {
            quantize_blocks(weight.slice(range), format, codes, absmax)
        })
    }

    /// Quantizes a weight `[out, in]` that was of type `dtype` and is read a part at a time, by all
    /// threads: `read(first, part)` fills `part` with the elements from flat index `first` on. Only
    /// the result and a few parts are in memory.
    ///
    /// # Errors
    /// As [`quantize`](Self::quantize).
    pub fn quantize_from(
        read: impl Fn(usize, &mut [f32]) + Sync,
        dtype: FloatType,
        shape: [usize; 2],
        format: &BlockFormat,
    ) -> Result<Self> {
        Self::quantize_parts(dtype, shape, format, |range, codes, absmax| {
            let mut part = vec![0.0; ELEMENTS_PER_READ.min(range.len())];
            let codes = codes.chunks_mut(ELEMENTS_PER_READ / 2);
            let absmax = absmax.chunks_mut(ELEMENTS_PER_READ / format.block_size);
            codes.zip(absmax).enumerate().find_map(|(index, (codes, absmax))| {
                let begin = index * ELEMENTS_PER_READ;
                let part = &mut part[..ELEMENTS_PER_READ.min(range.len() - begin)];
                read(range.start + begin, part);
                let bad = quantize_blocks(Floats::F32(part), format, codes, absmax)?;
                Some(begin + bad)
            })
        })
    }

    /// Cuts a weight into runs of blocks; `quantize(elements, codes, absmax)` fills those of one
    /// run and returns the place of its first element that is not finite.
    fn quantize_parts(
        dtype: FloatType,
        shape: [usize; 2],
        format: &BlockFormat,
        quantize: impl Fn(Range<usize>, &mut [u8], &mut [f32]) -> Option<usize> + Sync,
    ) -> Result<Self> {
        let block_size = format.block_size;
        check_block_size(block_size)?;
        let elements = element_count(shape)?;
        let mut codes = vec![0u8; elements.div_ceil(2)];
        let mut absmax = vec![0.0f32; elements.div_ceil(block_size)];
        let tasks = codes.par_chunks_mut(ELEMENTS_PER_TASK / 2);
        let bad = tasks
            .zip(absmax.par_chunks_mut(ELEMENTS_PER_TASK / block_size))
            .enumerate()
            .filter_map(|(task, (codes, absmax))| {
                let begin = task * ELEMENTS_PER_TASK;
                let range = begin..(begin + codes.len() * 2).min(elements);
                quantize(range, codes, absmax).map(|index| begin + index)
            })
            .min();
        if let Some(index) = bad {
            let (row, column) = (index / shape[1], index % shape[1]);
            bail!("element [{row}, {column}] (flat index {index}) is not finite");
        }
        let absmax = if format.double_quant {
            let offset = nested::mean(&absmax);
            let (codes, nested) = nested::quantize_absmax(&absmax, offset);
            Absmax::Nested { codes: codes.into(), absmax: owned_bytes(nested), offset }
        } else {
            Absmax::Plain(owned_bytes(absmax))
        };
        let (quant_type, codes) = (format.quant_type, codes.into());
        Self::from_parts(PackedParts { shape, dtype, quant_type, block_size, codes, absmax })
    }

    /// A weight from stored parts; f32 parts are copied only if they are not aligned.
    ///
    /// # Errors
    /// When a part's length does not follow from the shape and block size.
    pub fn from_parts(mut parts: PackedParts) -> Result<Self> {
        let elements = element_count(parts.shape)?;
        check_block_size(parts.block_size)?;
        let blocks = elements.div_ceil(parts.block_size);
        check_length("codes", parts.codes.len(), elements.div_ceil(2))?;
        match &mut parts.absmax {
            Absmax::Plain(absmax) => {
                check_length("absmax", absmax.len(), 4 * blocks)?;
                align(absmax);
            }
            Absmax::Nested { codes, absmax, offset } => {
                check_length("absmax", codes.len(), blocks)?;
                check_length(
                    "nested_absmax",
                    absmax.len(),
                    4 * blocks.div_ceil(NESTED_BLOCK_SIZE),
                )?;
                if !offset.is_finite() {
                    bail!("nested_offset is {offset}");
                }
                align(absmax);
            }
        }
        Ok(PackedWeight { parts, decoder: Decoder::detect() })
    }

    /// Checks that all scales are finite, which those of a damaged file need not be: with double
    /// quantization what they are made of, `map[code]·absmax + offset` for every code.
    ///
    /// # Errors
    /// Names the first one that is not.
    pub fn check_scales(&self) -> Result<()> {
        let (name, scales, offset) = match &self.parts.absmax {
            Absmax::Plain(absmax) => ("absmax", absmax, 0.0),
            Absmax::Nested { absmax, offset, .. } => ("nested_absmax", absmax, *offset),
        };
        if !offset.is_finite() {
            bail!("nested_offset is {offset}");
        }
        let scales: &[f32] = bytemuck::cast_slice(scales);
        // The map's values lie between -1 and 1.
        let is_wrong = |scale: &f32| !(scale.abs() + offset.abs()).is_finite();
        match scales.par_iter().position_first(is_wrong) {
            Some(index) => bail!("{name}[{index}] is {}", scales[index]),
            None => Ok(()),
        }
    }

    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        self.parts.shape
    }

    /// Type that the weight had before quantization.
    pub fn dtype(&self) -> FloatType {
        self.parts.dtype
    }

    /// Type, block size and nesting.
    pub fn format(&self) -> BlockFormat {
        BlockFormat {
            quant_type: self.parts.quant_type,
            block_size: self.parts.block_size,
            double_quant: matches!(self.parts.absmax, Absmax::Nested { .. }),
        }
    }

    /// Two codes to a byte.
    pub fn codes(&self) -> &Bytes {
        &self.parts.codes
    }

    /// The scales as stored.
    pub fn absmax(&self) -> &Absmax {
        &self.parts.absmax
    }

    /// Bytes of all parts.
    pub fn bytes(&self) -> usize {
        let scales = match &self.parts.absmax {
            Absmax::Plain(absmax) => absmax.len(),
            Absmax::Nested { codes, absmax, .. } => codes.len() + absmax.len() + 4,
        };
        self.parts.codes.len() + scales
    }
}

fn align(bytes: &mut Bytes) {
    if bytemuck::try_cast_slice::<u8, f32>(bytes).is_err() {
        *bytes = owned_bytes::<f32>(bytemuck::allocation::pod_collect_to_vec(bytes));
    }
}

fn element_count(shape: [usize; 2]) -> Result<usize> {
    match shape[0].checked_mul(shape[1]) {
        Some(elements) if elements > 0 => Ok(elements),
        _ => bail!("shape {shape:?} is empty or overflows"),
    }
}

fn check_shape(shape: [usize; 2], elements: usize) -> Result<()> {
    if shape[0].checked_mul(shape[1]) != Some(elements) {
        bail!("shape {shape:?} does not hold {elements} elements");
    }
    Ok(())
}

fn check_block_size(block_size: usize) -> Result<()> {
    if !(block_size.is_power_of_two() && (32..=4096).contains(&block_size)) {
        bail!("block size {block_size} is not a power of two from 32 to 4096");
    }
    Ok(())
}

fn check_length(part: &str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::Msg(format!("{part} has {got} bytes, expected {expected}")))
}
