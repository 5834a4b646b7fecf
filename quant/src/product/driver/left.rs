//! The left operand: rows of A as a task reads them, in place or copied.

use std::ops::Range;

use super::super::step::{round_line, round_lines};
use super::{CACHE_LINE, Isa, Matrix, Operand, Precision};

/// Rows of A that are this many floats apart (or a multiple) fall into the same few sets of the
/// caches: panels after the first would not find them there, unless they are copied.
pub(super) const ALIASING_STRIDE: usize = 1024;
/// Panels from which on a copy of A pays.
const PANELS_FOR_COPY: usize = 4;

/// Operands of a stretch of k.
#[derive(Clone)]
pub(super) struct Block<'a> {
    pub a: Matrix<'a>,
    pub b: Operand<'a>,
    pub k: Range<usize>,
    pub scale: f32,
}

/// Elements from `begin` on; none where a product without terms begins behind the last.
pub(super) fn from(data: &[f32], begin: usize) -> &[f32] {
    &data[begin.min(data.len())..]
}

/// A's elements from a row and the first k of a block on.
#[derive(Clone, Copy, Default)]
pub(super) struct Rows<'a> {
    pub data: &'a [f32],
    pub row_stride: usize,
    pub step_stride: usize,
}

impl<'a> Block<'a> {
    /// Steps of k.
    pub(super) fn steps(&self, isa: Isa) -> usize {
        self.k.len().div_ceil(isa.precision().per_step())
    }

    /// Elements from row to row of a copy of A, where one is to be made: of pairs always, of floats
    /// where it pays.
    pub(super) fn copy_stride(&self, isa: Isa, panels: usize) -> Option<usize> {
        let copied = match isa.precision() {
            Precision::F32 => self.aliases() && panels >= PANELS_FOR_COPY,
            Precision::Bf16 => true,
        };
        copied.then(|| self.steps(isa).next_multiple_of(CACHE_LINE) + CACHE_LINE)
    }

    /// A copy of rows of A, which lie in `copy` from then on; rows of A itself are `stride` apart there.
    pub(super) fn copy_rows<'b>(
        &self,
        isa: Isa,
        rows: Range<usize>,
        stride: usize,
        copy: &'b mut [f32],
    ) -> Rows<'b> {
        let (a, k) = (&self.a, self.k.clone());
        if a.column_stride != 1 {
            // Columns are contiguous; two of them become one of pairs.
            let column = |k: usize| &a.data[k * a.column_stride + rows.start..][..rows.len()];
            for (first, to) in k.clone().step_by(2).zip(copy.chunks_exact_mut(rows.len())) {
                let next = (first + 1 < k.end).then(|| column(first + 1));
                round_lines(column(first), next, to);
            }
            return Rows { data: copy, row_stride: 1, step_stride: rows.len() };
        }
        let steps = self.steps(isa);
        for (row, to) in rows.zip(copy.chunks_exact_mut(stride)) {
            let line = &from(a.data, row * a.row_stride + k.start)[..k.len()];
            match isa.precision() {
                Precision::F32 => to[..steps].copy_from_slice(line),
                Precision::Bf16 => round_line(line, &mut to[..steps]),
            }
        }
        Rows { data: copy, row_stride: stride, step_stride: 1 }
    }

    /// Whether rows of A evict each other from the caches.
    fn aliases(&self) -> bool {
        self.a.column_stride == 1 && self.a.row_stride.is_multiple_of(ALIASING_STRIDE)
    }

    /// A from `row` on, in place.
    pub(super) fn rows(&self, row: usize) -> Rows<'a> {
        let a = &self.a;
        let data = from(a.data, row * a.row_stride + self.k.start * a.column_stride);
        Rows { data, row_stride: a.row_stride, step_stride: a.column_stride }
    }
}
