//! [`PackedWeight`]: a matrix in 4-bit blocks, its parts as bitsandbytes stores them.

use std::ops::Range;

use bytes::Bytes;
use candle_core::{Error, Result, bail};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::block::quantize_blocks;
use crate::codebook::dynamic_map;
use crate::decode::{Decoder, RUN};
use crate::nested;

/// Scales that share one nested absmax; fixed in bitsandbytes.
pub const NESTED_BLOCK_SIZE: usize = 256;

/// Blocks that one parallel task handles.
const BLOCKS_PER_TASK: usize = 1024;

/// Which 16 values the codes stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QuantType {
    /// Quantiles of a normal distribution.
    Nf4,
    /// A 4-bit float.
    Fp4,
}

impl QuantType {
    /// `nf4` or `fp4`, as in `bnb_4bit_quant_type`.
    pub fn as_str(self) -> &'static str {
        match self {
            QuantType::Nf4 => "nf4",
            QuantType::Fp4 => "fp4",
        }
    }
}

/// Element type of a dense tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum FloatType {
    /// 32-bit float.
    #[serde(rename = "float32")]
    F32,
    /// IEEE half precision.
    #[serde(rename = "float16")]
    F16,
    /// bfloat16.
    #[serde(rename = "bfloat16")]
    Bf16,
}

impl FloatType {
    /// PyTorch's name, as in `torch_dtype` and a quant state's `dtype`.
    pub fn as_str(self) -> &'static str {
        match self {
            FloatType::F32 => "float32",
            FloatType::F16 => "float16",
            FloatType::Bf16 => "bfloat16",
        }
    }

    /// The type that PyTorch calls `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        [FloatType::F32, FloatType::F16, FloatType::Bf16].into_iter().find(|t| t.as_str() == name)
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        if self == FloatType::F32 { 4 } else { 2 }
    }
}

/// Borrowed elements of a dense tensor.
#[derive(Debug, Clone, Copy)]
pub enum Floats<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// IEEE halves.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

impl<'a> Floats<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Floats::F32(v) => v.len(),
            Floats::F16(v) => v.len(),
            Floats::Bf16(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Their type.
    pub fn dtype(&self) -> FloatType {
        match self {
            Floats::F32(_) => FloatType::F32,
            Floats::F16(_) => FloatType::F16,
            Floats::Bf16(_) => FloatType::Bf16,
        }
    }

    /// A part of them.
    pub fn slice(self, range: Range<usize>) -> Self {
        match self {
            Floats::F32(v) => Floats::F32(&v[range]),
            Floats::F16(v) => Floats::F16(&v[range]),
            Floats::Bf16(v) => Floats::Bf16(&v[range]),
        }
    }
}

/// How to quantize.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockFormat {
    /// NF4 or FP4.
    pub quant_type: QuantType,
    /// Elements that share an absmax: a power of two from 32 to 4096.
    pub block_size: usize,
    /// Whether absmax values are stored in 8 bits.
    pub double_quant: bool,
}

impl Default for BlockFormat {
    fn default() -> Self {
        BlockFormat { quant_type: QuantType::Nf4, block_size: 64, double_quant: true }
    }
}

impl BlockFormat {
    /// Bits that one weight takes on average in a large tensor.
    pub fn bits_per_weight(&self) -> f64 {
        let block = self.block_size as f64;
        let scale = if self.double_quant { 8.0 + 32.0 / NESTED_BLOCK_SIZE as f64 } else { 32.0 };
        4.0 + scale / block
    }

    /// Bytes of a tensor of `elements`: codes, scales and, nested, their scales and offset.
    pub fn packed_bytes(&self, elements: usize) -> usize {
        let blocks = elements.div_ceil(self.block_size);
        let scales = if self.double_quant {
            blocks + 4 * blocks.div_ceil(NESTED_BLOCK_SIZE) + 4
        } else {
            4 * blocks
        };
        elements.div_ceil(2) + scales
    }
}

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
    parts: PackedParts,
    decoder: Decoder,
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
            let run = weight.slice(range);
            pulp::Arch::new().dispatch(QuantizeRun { run, format, codes, absmax })
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
            let mut part = vec![0.0; range.len()];
            read(range.start, &mut part);
            let run = Floats::F32(&part);
            pulp::Arch::new().dispatch(QuantizeRun { run, format, codes, absmax })
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
        let tasks = codes.par_chunks_mut(BLOCKS_PER_TASK * block_size / 2);
        let bad = tasks
            .zip(absmax.par_chunks_mut(BLOCKS_PER_TASK))
            .enumerate()
            .filter_map(|(task, (codes, absmax))| {
                let begin = task * BLOCKS_PER_TASK * block_size;
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
            Absmax::Nested { codes: codes.into(), absmax: float_bytes(nested), offset }
        } else {
            Absmax::Plain(float_bytes(absmax))
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

    /// The scale of block `block`.
    #[inline]
    pub fn block_absmax(&self, block: usize) -> f32 {
        match &self.parts.absmax {
            Absmax::Plain(absmax) => bytemuck::cast_slice::<u8, f32>(absmax)[block],
            Absmax::Nested { codes, absmax, offset } => {
                let nested = bytemuck::cast_slice::<u8, f32>(absmax)[block / NESTED_BLOCK_SIZE];
                dynamic_map()[usize::from(codes[block])] * nested + offset
            }
        }
    }

    /// All elements in f32.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.parts.shape[0] * self.parts.shape[1]];
        self.dequantize_into(&mut out);
        out
    }

    /// All elements in f32, on all threads.
    ///
    /// # Panics
    /// When `out` is not `out · in` long.
    pub fn dequantize_into(&self, out: &mut [f32]) {
        assert_eq!(out.len(), self.parts.shape[0] * self.parts.shape[1], "one f32 per element");
        let task = BLOCKS_PER_TASK * self.parts.block_size;
        out.par_chunks_mut(task).enumerate().for_each(|(index, out)| {
            self.dequantize_range(index * task, out);
        });
    }

    /// The elements of `rows` in f32, on this thread.
    ///
    /// # Panics
    /// When `out` is not `rows.len() · in` long or the rows do not exist.
    pub fn dequantize_rows_into(&self, rows: Range<usize>, out: &mut [f32]) {
        let [count, columns] = self.parts.shape;
        assert!(rows.end <= count && out.len() == rows.len() * columns, "rows exist and fit");
        self.dequantize_range(rows.start * columns, out);
    }

    /// `out.len()` elements from flat index `begin` on, on this thread.
    pub fn dequantize_range(&self, begin: usize, out: &mut [f32]) {
        let block_size = self.parts.block_size;
        let (mut element, mut rest) = (begin, out);
        while !rest.is_empty() {
            let block = element / block_size;
            let count = rest.len().min((block + 1) * block_size - element);
            let (now, later) = rest.split_at_mut(count);
            self.decode_within_block(element, self.block_absmax(block), now);
            (element, rest) = (element + count, later);
        }
    }

    #[inline]
    fn decode_within_block(&self, begin: usize, absmax: f32, out: &mut [f32]) {
        let (values, codes) = (self.parts.quant_type.values(), &self.parts.codes);
        let one = |element: usize| {
            let shift = if element.is_multiple_of(2) { 4 } else { 0 };
            values[usize::from(codes[element / 2] >> shift & 15)] * absmax
        };
        let odd = begin % 2;
        let (first, rest) = out.split_at_mut(odd.min(out.len()));
        first.iter_mut().for_each(|out| *out = one(begin));
        let vector = rest.len() / RUN * RUN;
        let (runs, last) = rest.split_at_mut(vector);
        let start = (begin + odd) / 2;
        self.decoder.runs(&codes[start..start + vector / 2], values, absmax, runs);
        for (i, out) in last.iter_mut().enumerate() {
            *out = one(begin + odd + vector + i);
        }
    }
}

/// [`quantize_blocks`] of one run of blocks.
struct QuantizeRun<'a> {
    run: Floats<'a>,
    format: &'a BlockFormat,
    codes: &'a mut [u8],
    absmax: &'a mut [f32],
}

impl pulp::WithSimd for QuantizeRun<'_> {
    type Output = Option<usize>;

    // A closure in its place would be called, not inlined, and so compiled for the oldest machine.
    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> Option<usize> {
        let QuantizeRun { run, format, codes, absmax } = self;
        quantize_blocks(run, format.quant_type, format.block_size, codes, absmax)
    }
}

fn float_bytes(values: Vec<f32>) -> Bytes {
    Bytes::from_owner(FloatOwner(values))
}

struct FloatOwner(Vec<f32>);

impl AsRef<[u8]> for FloatOwner {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

fn align(bytes: &mut Bytes) {
    if bytemuck::try_cast_slice::<u8, f32>(bytes).is_err() {
        *bytes = float_bytes(bytemuck::allocation::pod_collect_to_vec(bytes));
    }
}

fn element_count(shape: [usize; 2]) -> Result<usize> {
    match shape[0].checked_mul(shape[1]) {
        Some(elements) if elements > 0 => Ok(elements),
        _ => bail!("shape {shape:?} is empty or overflows"),
    }
}

fn check_shape(shape: [usize; 2], elements: usize) -> Result<()> {
    if shape[0].checked_mul(shape[1]) != Some(elements) || elements == 0 {
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
