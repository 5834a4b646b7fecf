//! Dense tensors.

use std::borrow::Cow;
use std::ops::Range;

use bytes::Bytes;
use nibble_quant::FloatType;
use rayon::prelude::*;

use super::tensor_errors::not_finite;
use crate::error::Result;

/// A dense tensor: elements row-major, little-endian, usually a slice of the mapped file.
#[derive(Debug, Clone)]
pub struct DenseTensor {
    /// Element type.
    pub dtype: FloatType,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Elements.
    pub data: Bytes,
}

impl DenseTensor {
    /// The elements, copied only if they are not aligned. `T` must be the element type.
    pub fn elements<T: bytemuck::Pod>(&self) -> Cow<'_, [T]> {
        match bytemuck::try_cast_slice(&self.data) {
            Ok(elements) => Cow::Borrowed(elements),
            Err(_) => Cow::Owned(bytemuck::allocation::pod_collect_to_vec(&self.data)),
        }
    }

    /// All elements in f32, widened on all threads.
    pub fn to_f32(&self) -> Vec<f32> {
        parallel_f32(self.data.len() / self.dtype.size(), |first, out| self.read(first, out))
    }

    /// Some of the flattened elements in f32.
    pub fn to_f32_range(&self, range: Range<usize>) -> Vec<f32> {
        let mut out = vec![0.0; range.len()];
        self.read(range.start, &mut out);
        out
    }

    /// The elements from flat index `first` on, in f32.
    ///
    /// # Panics
    /// When they reach beyond the end.
    pub fn read(&self, first: usize, out: &mut [f32]) {
        let size = self.dtype.size();
        self.dtype.widen_into(&self.data[first * size..(first + out.len()) * size], out);
    }

    /// Flat index of the first NaN or infinity.
    fn first_non_finite(&self) -> Option<usize> {
        const CHUNK: usize = 1 << 18;
        let find = |(number, bytes): (usize, &[u8])| {
            let at = match self.dtype {
                FloatType::F32 => first_all_ones::<4>(bytes, 0x7f80_0000),
                FloatType::F16 => first_all_ones::<2>(bytes, 0x7c00),
                FloatType::Bf16 => first_all_ones::<2>(bytes, 0x7f80),
            };
            at.map(|index| number * CHUNK / self.dtype.size() + index)
        };
        self.data.par_chunks(CHUNK).enumerate().find_map_first(find)
    }

    /// Refuses NaN and infinity, looked for on all threads.
    ///
    /// # Errors
    /// `Input` naming the tensor, called `name`, and the first such element.
    pub fn check_finite(&self, name: &str) -> Result<()> {
        let Some(index) = self.first_non_finite() else { return Ok(()) };
        let value = self.to_f32_range(index..index + 1)[0];
        Err(not_finite(name, &self.shape, index, value))
    }

    /// The transpose of a matrix.
    pub fn transposed(&self) -> Self {
        let (rows, columns, size) = (self.shape[0], self.shape[1], self.dtype.size());
        let mut data = Vec::with_capacity(self.data.len());
        for column in 0..columns {
            for row in 0..rows {
                let start = (row * columns + column) * size;
                data.extend_from_slice(&self.data[start..start + size]);
            }
        }
        DenseTensor { dtype: self.dtype, shape: vec![columns, rows], data: data.into() }
    }
}

/// The first of the `N`-byte floats whose exponent, the bits `mask`, is all ones: NaN or infinity.
fn first_all_ones<const N: usize>(bytes: &[u8], mask: u32) -> Option<usize> {
    let is_bad = |float: &[u8; N]| {
        let mut word = [0; 4];
        word[..N].copy_from_slice(float);
        u32::from_le_bytes(word) & mask == mask
    };
    let floats = bytes.as_chunks::<N>().0;
    // Without an early exit the compiler vectorises the search.
    floats.iter().fold(false, |bad, float| bad | is_bad(float)).then_some(())?;
    floats.iter().position(is_bad)
}

/// Reads `elements` values on all threads.
pub(super) fn parallel_f32(elements: usize, read: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    const CHUNK: usize = 1 << 16;
    let mut out = vec![0.0; elements];
    let chunks = out.par_chunks_mut(CHUNK).enumerate();
    chunks.for_each(|(index, chunk)| read(index * CHUNK, chunk));
    out
}
