//! Packing: the right operand of a product, laid out as the tiles read it.
//!
//! Columns are cut into panels, each `[k][width]` with rows of whole registers (filled up with
//! zeros); stored weights are decoded on the way, so 4-bit blocks cost their decoding alone.

use std::ops::Range;

use super::WeightRef;
use super::transpose::transpose;
use super::view::Matrix;

/// Elements of a line that are decoded before they are turned: they stay in the first-level cache.
const PIECE: usize = 128;
/// Lines that are decoded together.
const LINES: usize = 16;

/// The right operand, `K × N`.
#[derive(Clone, Copy)]
pub(super) enum Operand<'a> {
    /// Dense f32, any strides.
    Dense(Matrix<'a>),
    /// A weight `[out, in]`, transposed: K is in, N is out.
    Transposed(WeightRef<'a>),
    /// A weight `[out, in]`: K is out, N is in.
    Plain(WeightRef<'a>),
}

/// Contiguous elements, one line after another.
#[derive(Clone, Copy)]
enum Lines<'a> {
    /// f32 in place: the first element and the distance between lines.
    Dense(&'a [f32], usize),
    /// To be decoded.
    Stored(WeightRef<'a>),
}

impl<'a> Operand<'a> {
    /// `(K, N)`.
    pub(super) fn shape(&self) -> (usize, usize) {
        match self {
            Operand::Dense(matrix) => (matrix.rows, matrix.columns),
            Operand::Transposed(weight) => (weight.shape()[1], weight.shape()[0]),
            Operand::Plain(weight) => (weight.shape()[0], weight.shape()[1]),
        }
    }

    /// The elements from row `k` on and the distance between rows, if rows are contiguous f32.
    pub(super) fn rows_in_place(&self) -> Option<(&'a [f32], usize)> {
        match self.lines() {
            (Lines::Dense(data, stride), true) => Some((data, stride)),
            _ => None,
        }
    }

    /// The lines and whether they are rows (or else columns).
    fn lines(&self) -> (Lines<'a>, bool) {
        match *self {
            Operand::Dense(matrix) if matrix.column_stride == 1 => {
                (Lines::Dense(matrix.data, matrix.row_stride), true)
            }
            Operand::Dense(matrix) => (Lines::Dense(matrix.data, matrix.column_stride), false),
            Operand::Transposed(weight) => (Lines::of(weight), false),
            Operand::Plain(weight) => (Lines::of(weight), true),
        }
    }

    /// Packs the panel of `columns` of rows `k`; its rows are `width` long.
    pub(super) fn pack(
        &self,
        k: Range<usize>,
        columns: Range<usize>,
        width: usize,
        panel: &mut [f32],
    ) {
        let count = columns.len();
        let (lines, rows) = self.lines();
        if count < width {
            panel.chunks_exact_mut(width).for_each(|row| row[count..].fill(0.0));
        }
        if rows {
            for (k, row) in k.zip(panel.chunks_exact_mut(width)) {
                lines.read(k, columns.start, &mut row[..count]);
            }
            return;
        }
        if let Lines::Dense(data, stride) = lines {
            let from = &data[columns.start * stride + k.start..];
            return transpose((from, stride), (count, k.len()), (panel, width));
        }
        let mut decoded = [0.0f32; LINES * PIECE];
        for begin in k.clone().step_by(PIECE) {
            let length = PIECE.min(k.end - begin);
            let rows = &mut panel[(begin - k.start) * width..];
            for first in (0..count).step_by(LINES) {
                let group = LINES.min(count - first);
                for (line, to) in decoded.chunks_exact_mut(PIECE).take(group).enumerate() {
                    lines.read(columns.start + first + line, begin, &mut to[..length]);
                }
                transpose((&decoded, PIECE), (group, length), (&mut rows[first..], width));
            }
        }
    }
}

impl<'a> Lines<'a> {
    fn of(weight: WeightRef<'a>) -> Self {
        match weight {
            WeightRef::F32(data, shape) => Lines::Dense(data, shape[1]),
            stored => Lines::Stored(stored),
        }
    }

    /// `out.len()` elements of `line` from `begin` on.
    #[inline]
    fn read(&self, line: usize, begin: usize, out: &mut [f32]) {
        match self {
            Lines::Dense(data, stride) => {
                out.copy_from_slice(&data[line * stride + begin..][..out.len()]);
            }
            Lines::Stored(weight) => weight.read(line * weight.shape()[1] + begin, out),
        }
    }
}

impl WeightRef<'_> {
    /// `out.len()` elements from flat index `begin` on.
    #[inline]
    fn read(&self, begin: usize, out: &mut [f32]) {
        match self {
            WeightRef::F32(data, _) => out.copy_from_slice(&data[begin..begin + out.len()]),
            WeightRef::Bf16(data, _) => {
                for (out, from) in out.iter_mut().zip(&data[begin..]) {
                    *out = f32::from_bits(u32::from(from.to_bits()) << 16);
                }
            }
            WeightRef::Packed(packed) => packed.dequantize_range(begin, out),
        }
    }
}
