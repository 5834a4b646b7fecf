//! A GGUF tensor's blocks, decoded to f32 where and when they are asked for.

use std::borrow::Cow;

use bytes::Bytes;
use candle_core::CpuStorage;
use candle_core::quantized::GgmlDType;

/// Elements that are decoded at a time, by way of a buffer that the decoder allocates.
const DECODED_ELEMENTS: usize = 1 << 13;

/// A tensor `[rows, columns]` in blocks that do not straddle rows, mapped.
#[derive(Debug, Clone)]
pub(crate) struct Blocks {
    pub(super) dtype: GgmlDType,
    pub(super) data: Bytes,
    pub(super) columns: usize,
    /// Rows of one head that llama.cpp stores interleaved; none if rows are in order.
    pub(super) head_rows: Option<usize>,
    /// What stored values are larger by: llama.cpp stores what a Gemma's norms multiply by.
    pub(super) excess: f32,
}

impl Blocks {
    /// The elements from flat index `first` on.
    pub(crate) fn read(&self, first: usize, out: &mut [f32]) {
        let Some(head_rows) = self.head_rows else { return self.decode(first, out) };
        let (mut at, mut rest) = (first, out);
        while !rest.is_empty() {
            let (row, column) = (at / self.columns, at % self.columns);
            let (now, later) = rest.split_at_mut(rest.len().min(self.columns - column));
            self.decode(stored_row(row, head_rows) * self.columns + column, now);
            (at, rest) = (at + now.len(), later);
        }
    }

    /// Stored elements from flat index `first` on.
    fn decode(&self, first: usize, out: &mut [f32]) {
        for (index, part) in out.chunks_mut(DECODED_ELEMENTS).enumerate() {
            self.decode_part(first + index * DECODED_ELEMENTS, part);
        }
    }

    fn decode_part(&self, first: usize, out: &mut [f32]) {
        let (size, bytes) = (self.dtype.block_size(), self.dtype.type_size());
        let last = first + out.len();
        let (begin, end) = (first / size, last.div_ceil(size));
        let blocks = self.dtype.from_data(Cow::Borrowed(&self.data[begin * bytes..end * bytes]));
        match blocks.dequantize((end - begin) * size) {
            Ok(CpuStorage::F32(values)) => {
                out.copy_from_slice(&values[first - begin * size..last - begin * size]);
                if self.excess != 0.0 {
                    out.iter_mut().for_each(|value| *value -= self.excess);
                }
            }
            _ => unreachable!("the CPU decodes every type that the header reader lets pass"),
        }
    }
}

/// llama.cpp's converter puts row `half · d/2 + j` of a head of d rows at `2j + half`.
pub(super) fn stored_row(row: usize, head_rows: usize) -> usize {
    let (head, within) = (row / head_rows, row % head_rows);
    let (half, j) = (within / (head_rows / 2), within % (head_rows / 2));
    head * head_rows + 2 * j + half
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Row r of the file holds r in every column; `permute` is that of `convert_hf_to_gguf.py`:
    /// `reshape(heads, 2, d/2, ..).swapaxes(1, 2)`.
    #[test]
    fn rows_of_heads_are_put_back_into_halves() {
        let (heads, d, columns) = (3, 6, 5);
        let mut stored = Vec::new();
        for head in 0..heads {
            for j in 0..d / 2 {
                for half in 0..2 {
                    stored.extend(vec![(head * d + half * (d / 2) + j) as f32; columns]);
                }
            }
        }
        let blocks = Blocks {
            dtype: GgmlDType::F32,
            data: nibble_quant::owned_bytes(stored),
            columns,
            head_rows: Some(d),
            excess: 0.0,
        };
        let mut all = vec![0.0; heads * d * columns];
        blocks.read(0, &mut all);
        let expected: Vec<f32> = (0..all.len()).map(|i| (i / columns) as f32).collect();
        assert_eq!(all, expected);
        let mut some = vec![0.0; 17];
        blocks.read(23, &mut some);
        assert_eq!(some, expected[23..40]);
    }
}
