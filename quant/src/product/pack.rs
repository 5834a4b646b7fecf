//! Packing: the right operand of a product, laid out as the tiles read it.
//!
//! Columns are cut into panels, each `[step of k][width]` with rows of whole registers (filled up with
//! zeros); stored weights are decoded on the way, so 4-bit blocks cost their decoding alone.

use std::ops::Range;

use half::bf16;
use pulp::{Simd, WithSimd};

use super::WeightRef;
use super::step::{Precision, round_line, round_lines};
use super::tile::MOST_COLUMNS;
use super::transpose::transpose;
use super::view::Matrix;
use crate::dot::Element;

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

    /// Packs a panel.
    pub(super) fn pack(&self, panel: &Panel, into: &mut [f32]) {
        let (count, width) = (panel.columns.len(), panel.width);
        if count < width {
            into.chunks_exact_mut(width).for_each(|row| row[count..].fill(0.0));
        }
        match (panel.precision, self.lines()) {
            (Precision::F32, (lines, true)) => lines.pack_rows(panel, into),
            (Precision::F32, (lines, false)) => lines.pack_columns(panel, into),
            (Precision::Bf16, (lines, true)) => lines.pack_rows_in_pairs(panel, into),
            (Precision::Bf16, (lines, false)) => lines.pack_columns_in_pairs(panel, into),
        }
        if panel.precision == Precision::F32 && panel.scale != 1.0 {
            into.iter_mut().for_each(|value| *value *= panel.scale);
        }
    }
}

/// What is packed: columns of a stretch of k.
pub(super) struct Panel {
    pub k: Range<usize>,
    pub columns: Range<usize>,
    /// Elements of a packed row, at least the columns.
    pub width: usize,
    /// Factor of every element.
    pub scale: f32,
    pub precision: Precision,
}

impl<'a> Lines<'a> {
    fn of(weight: WeightRef<'a>) -> Self {
        match weight {
            WeightRef::F32(data, shape) => Lines::Dense(data, shape[1]),
            stored => Lines::Stored(stored),
        }
    }

    fn pack_rows(&self, panel: &Panel, into: &mut [f32]) {
        let (first, count) = (panel.columns.start, panel.columns.len());
        for (k, row) in panel.k.clone().zip(into.chunks_exact_mut(panel.width)) {
            self.read(k, first, &mut row[..count]);
        }
    }

    fn pack_columns(&self, panel: &Panel, into: &mut [f32]) {
        let (k, count, width) = (panel.k.clone(), panel.columns.len(), panel.width);
        if let Lines::Dense(data, stride) = self {
            let from = &data[panel.columns.start * stride + k.start..];
            return transpose((from, *stride), (count, k.len()), (into, width));
        }
        let mut decoded = [0.0f32; LINES * PIECE];
        for begin in k.clone().step_by(PIECE) {
            let length = PIECE.min(k.end - begin);
            let rows = &mut into[(begin - k.start) * width..];
            for first in (0..count).step_by(LINES) {
                let group = LINES.min(count - first);
                for (line, to) in decoded.chunks_exact_mut(PIECE).take(group).enumerate() {
                    self.read(panel.columns.start + first + line, begin, &mut to[..length]);
                }
                transpose((&decoded, PIECE), (group, length), (&mut rows[first..], width));
            }
        }
    }

    fn pack_rows_in_pairs(&self, panel: &Panel, into: &mut [f32]) {
        let (first, count) = (panel.columns.start, panel.columns.len());
        let mut pair = [[0.0f32; MOST_COLUMNS]; 2];
        for (k, row) in panel.k.clone().step_by(2).zip(into.chunks_exact_mut(panel.width)) {
            for (k, line) in (k..panel.k.end).zip(&mut pair) {
                self.read_scaled(k, first, panel.scale, &mut line[..count]);
            }
            let [low, high] = pair.each_ref().map(|line| &line[..count]);
            round_lines(low, (k + 1 < panel.k.end).then_some(high), &mut row[..count]);
        }
    }

    fn pack_columns_in_pairs(&self, panel: &Panel, into: &mut [f32]) {
        const STEPS: usize = PIECE / 2;
        let (k, count, width) = (panel.k.clone(), panel.columns.len(), panel.width);
        let (mut decoded, mut pairs) = ([0.0f32; PIECE], [0.0f32; LINES * STEPS]);
        for begin in k.clone().step_by(PIECE) {
            let length = PIECE.min(k.end - begin);
            let rows = &mut into[(begin - k.start) / 2 * width..];
            for first in (0..count).step_by(LINES) {
                let group = LINES.min(count - first);
                for (line, to) in pairs.chunks_exact_mut(STEPS).take(group).enumerate() {
                    let line = panel.columns.start + first + line;
                    self.read_scaled(line, begin, panel.scale, &mut decoded[..length]);
                    round_line(&decoded[..length], &mut to[..length.div_ceil(2)]);
                }
                let turned = (group, length.div_ceil(2));
                transpose((&pairs, STEPS), turned, (&mut rows[first..], width));
            }
        }
    }

    /// [`read`](Lines::read), times `scale`.
    #[inline]
    fn read_scaled(&self, line: usize, begin: usize, scale: f32, out: &mut [f32]) {
        self.read(line, begin, out);
        if scale != 1.0 {
            out.iter_mut().for_each(|value| *value *= scale);
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
            WeightRef::Bf16(data, _) => widen(&data[begin..begin + out.len()], out),
            WeightRef::Packed(packed) => packed.dequantize_range(begin, out),
        }
    }
}

/// Widens bf16 to f32.
fn widen(from: &[bf16], to: &mut [f32]) {
    struct Widen<'a>(&'a [bf16], &'a mut [f32]);
    impl WithSimd for Widen<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            for (to, from) in self.1.iter_mut().zip(self.0) {
                *to = from.widen();
            }
        }
    }
    pulp::Arch::new().dispatch(Widen(from, to));
}
