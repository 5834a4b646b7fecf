//! A tensor's elements in f32, any part of them at any time: what lets tensors of any size be
//! converted, quantized and compared in little memory.

use nibble_quant::{FloatType, PackedWeight};

use super::gguf::blocks::Blocks;
use super::{DenseTensor, parallel_f32};

/// Elements that are widened or decoded as they are read; many threads may read at once.
#[derive(Debug, Clone)]
pub struct Elements {
    shape: Vec<usize>,
    dtype: FloatType,
    source: Source,
}

#[derive(Debug, Clone)]
enum Source {
    Dense(DenseTensor),
    Packed(PackedWeight),
    Blocks(Blocks),
    /// The transpose of a matrix.
    Transposed(Box<Elements>),
}

impl Elements {
    /// Elements in GGUF blocks.
    pub(super) fn blocks(shape: Vec<usize>, blocks: Blocks) -> Self {
        Elements { shape, dtype: FloatType::F32, source: Source::Blocks(blocks) }
    }

    /// Dimensions; elements are row-major.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Type of dense elements; of packed ones, the type that they had before.
    pub fn dtype(&self) -> FloatType {
        self.dtype
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements in f32, read on all threads.
    pub fn to_f32(&self) -> Vec<f32> {
        parallel_f32(self.len(), |first, out| self.read(first, out))
    }

    /// The stored bytes, if these are dense elements as they lie in the file.
    pub fn stored(&self) -> Option<&DenseTensor> {
        match &self.source {
            Source::Dense(dense) => Some(dense),
            _ => None,
        }
    }

    /// The 4-bit weight, if that is what is stored.
    pub fn packed(&self) -> Option<&PackedWeight> {
        match &self.source {
            Source::Packed(packed) => Some(packed),
            _ => None,
        }
    }

    /// The transpose of a matrix.
    pub fn transposed(self) -> Self {
        let (shape, dtype) = (self.shape.iter().rev().copied().collect(), self.dtype);
        match self.source {
            Source::Transposed(original) => *original,
            _ => Elements { shape, dtype, source: Source::Transposed(Box::new(self)) },
        }
    }

    /// `out.len()` elements from flat index `first` on.
    ///
    /// # Panics
    /// When they reach beyond the end.
    pub fn read(&self, first: usize, out: &mut [f32]) {
        match &self.source {
            Source::Dense(dense) => dense.read(first, out),
            Source::Packed(packed) => packed.dequantize_range(first, out),
            Source::Blocks(blocks) => blocks.read(first, out),
            Source::Transposed(original) => read_transposed(original, self.shape[1], first, out),
        }
    }
}

/// Reads rows `[.., columns]` of the transpose: for each of its columns, a run of the original.
fn read_transposed(original: &Elements, columns: usize, first: usize, out: &mut [f32]) {
    let last = first + out.len();
    let (first_row, end_row) = (first / columns, last.div_ceil(columns));
    let rows = original.shape[1];
    let mut run = vec![0.0; end_row - first_row];
    for column in 0..columns {
        original.read(column * rows + first_row, &mut run);
        for (row, value) in (first_row..).zip(&run) {
            let at = row * columns + column;
            if (first..last).contains(&at) {
                out[at - first] = *value;
            }
        }
    }
}

impl From<DenseTensor> for Elements {
    fn from(dense: DenseTensor) -> Self {
        let (shape, dtype) = (dense.shape.clone(), dense.dtype);
        Elements { shape, dtype, source: Source::Dense(dense) }
    }
}

impl From<PackedWeight> for Elements {
    fn from(packed: PackedWeight) -> Self {
        let (shape, dtype) = (packed.shape().to_vec(), packed.dtype());
        Elements { shape, dtype, source: Source::Packed(packed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_of_a_transpose_reads_as_the_whole_does() {
        let values: Vec<f32> = (0..7 * 11).map(|i| i as f32).collect();
        let dense = DenseTensor {
            dtype: FloatType::F32,
            shape: vec![7, 11],
            data: nibble_quant::owned_bytes(values.clone()),
        };
        let transposed = Elements::from(dense).transposed();
        assert_eq!(transposed.shape(), [11, 7]);
        let expected: Vec<f32> = (0..77).map(|i| values[i % 7 * 11 + i / 7]).collect();
        for (first, count) in [(0, 77), (0, 3), (5, 20), (13, 1), (70, 7)] {
            let mut out = vec![0.0; count];
            transposed.read(first, &mut out);
            assert_eq!(out, expected[first..first + count], "{count} from {first}");
        }
        let mut back = vec![0.0; 77];
        transposed.transposed().read(0, &mut back);
        assert_eq!(back, values);
    }
}
