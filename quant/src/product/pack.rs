//! Packing: the operands of a block, laid out as the tiles read them.
//!
//! B is cut into panels of a tile's width, each `[k][columns]`; weights are decoded on the way, so
//! 4-bit blocks cost their decoding and nothing else. Short panels are filled up with zeros.

use std::ops::Range;

use super::WeightRef;
use super::micro::A_ROW_STRIDE;
use super::view::Matrix;

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

impl Operand<'_> {
    /// `(K, N)`.
    pub(super) fn shape(&self) -> (usize, usize) {
        match self {
            Operand::Dense(matrix) => (matrix.rows, matrix.columns),
            Operand::Transposed(weight) => (weight.shape()[1], weight.shape()[0]),
            Operand::Plain(weight) => (weight.shape()[0], weight.shape()[1]),
        }
    }

    /// Packs the panels that cover `columns` of rows `k`, each `k.len() · width` long.
    pub(super) fn pack(
        &self,
        k: Range<usize>,
        columns: Range<usize>,
        width: usize,
        panels: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        let size = k.len() * width;
        match self.contiguous() {
            Contiguous::Rows => {
                scratch.resize(columns.len().next_multiple_of(width), 0.0);
                for (row, k) in k.enumerate() {
                    scratch[columns.len()..].fill(0.0);
                    self.read(k, columns.clone(), &mut scratch[..columns.len()]);
                    for (panel, piece) in
                        panels.chunks_exact_mut(size).zip(scratch.chunks_exact(width))
                    {
                        panel[row * width..(row + 1) * width].copy_from_slice(piece);
                    }
                }
            }
            Contiguous::Columns => {
                scratch.resize(width * k.len(), 0.0);
                for (index, panel) in panels.chunks_exact_mut(size).enumerate() {
                    let begin = columns.start + index * width;
                    let count = width.min(columns.end - begin);
                    for (column, out) in scratch.chunks_exact_mut(k.len()).enumerate() {
                        if column < count {
                            self.read(begin + column, k.clone(), out);
                        } else {
                            out.fill(0.0);
                        }
                    }
                    transpose(scratch, k.len(), panel, width);
                }
            }
        }
    }

    /// Rows from `k` on and the distance between them, if they can be read without packing.
    pub(super) fn in_place(&self, k: usize, width: usize) -> Option<(&[f32], usize)> {
        match self {
            Operand::Dense(matrix) if matrix.column_stride == 1 && matrix.columns >= width => {
                Some((&matrix.data[k * matrix.row_stride..], matrix.row_stride))
            }
            _ => None,
        }
    }

    fn contiguous(&self) -> Contiguous {
        match self {
            Operand::Dense(matrix) if matrix.column_stride == 1 => Contiguous::Rows,
            Operand::Plain(_) => Contiguous::Rows,
            _ => Contiguous::Columns,
        }
    }

    /// A stretch of contiguous elements: of row `line` (or column, if those are contiguous).
    fn read(&self, line: usize, range: Range<usize>, out: &mut [f32]) {
        match self {
            Operand::Dense(matrix) => {
                let stride = if matrix.column_stride == 1 {
                    matrix.row_stride
                } else {
                    matrix.column_stride
                };
                let begin = line * stride + range.start;
                out.copy_from_slice(&matrix.data[begin..begin + range.len()]);
            }
            Operand::Transposed(weight) | Operand::Plain(weight) => {
                weight.read(line * weight.shape()[1] + range.start, out);
            }
        }
    }
}

enum Contiguous {
    Rows,
    Columns,
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

/// `to[k][line] = from[line][k]` for `lines` lines of `length`; lines are a multiple of 8.
fn transpose(from: &[f32], length: usize, to: &mut [f32], lines: usize) {
    let whole = length / 8 * 8;
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            for k in (0..whole).step_by(8) {
                for line in (0..lines).step_by(8) {
                    transpose_square(
                        &from[line * length + k..],
                        length,
                        &mut to[k * lines + line..],
                        lines,
                    );
                }
            }
        },
    );
    for k in whole..length {
        for line in 0..lines {
            to[k * lines + line] = from[line * length + k];
        }
    }
}

/// An 8 × 8 square by three rounds of exchanges between pairs of rows, each a vector shuffle.
#[inline(always)]
fn transpose_square(from: &[f32], from_stride: usize, to: &mut [f32], to_stride: usize) {
    let mut rows = [[0.0f32; 8]; 8];
    for (i, row) in rows.iter_mut().enumerate() {
        row.copy_from_slice(&from[i * from_stride..i * from_stride + 8]);
    }
    for distance in [4, 2, 1] {
        for i in (0..8).filter(|i| i & distance == 0) {
            let (upper, lower) = (rows[i], rows[i + distance]);
            for j in (0..8).filter(|j| j & distance == 0) {
                rows[i][j + distance] = lower[j];
                rows[i + distance][j] = upper[j + distance];
            }
        }
    }
    for (i, row) in rows.iter().enumerate() {
        to[i * to_stride..i * to_stride + 8].copy_from_slice(row);
    }
}

/// Packs `rows` of A for the k's in `k`, in panels of at most `tile_rows`; returns whether panels
/// are k by k. A panel starts every `tile_rows · A_ROW_STRIDE` elements.
pub(super) fn pack_a(
    a: Matrix,
    rows: Range<usize>,
    k: Range<usize>,
    tile_rows: usize,
    packed: &mut [f32],
) -> bool {
    let by_k = a.column_stride != 1;
    if by_k {
        // One k after another: neighbours in a row of memory go to all panels at once.
        for (index, k) in k.enumerate() {
            let line = &a.data[k * a.column_stride + rows.start..][..rows.len()];
            let panels = packed.chunks_exact_mut(tile_rows * A_ROW_STRIDE);
            for (piece, panel) in line.chunks(tile_rows).zip(panels) {
                panel[index * piece.len()..][..piece.len()].copy_from_slice(piece);
            }
        }
        return true;
    }
    let starts = rows.clone().step_by(tile_rows);
    for (begin, panel) in starts.zip(packed.chunks_exact_mut(tile_rows * A_ROW_STRIDE)) {
        let count = tile_rows.min(rows.end - begin);
        for (row, out) in (begin..begin + count).zip(panel.chunks_exact_mut(A_ROW_STRIDE)) {
            let from = row * a.row_stride + k.start;
            out[..k.len()].copy_from_slice(&a.data[from..from + k.len()]);
        }
    }
    false
}
