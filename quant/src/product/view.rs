//! Checked views of matrices in slices.

use std::ops::Range;

/// A read-only matrix: `rows × columns`, any strides.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    pub(super) data: &'a [f32],
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
}

/// A writable row-major matrix.
#[derive(Debug)]
pub struct MatrixMut<'a> {
    pub(super) data: &'a mut [f32],
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) row_stride: usize,
}

fn check(length: usize, (rows, columns, row_stride): (usize, usize, usize)) {
    assert!(columns <= row_stride || rows <= 1, "rows of {columns} overlap at stride {row_stride}");
    let needed = match rows {
        0 => Some(0),
        _ => (rows - 1).checked_mul(row_stride).and_then(|last| last.checked_add(columns)),
    };
    assert!(
        needed.is_some_and(|needed| needed <= length),
        "matrix of {rows} rows of {columns} at stride {row_stride} has {length} elements"
    );
}

impl<'a> Matrix<'a> {
    /// `(rows, columns, row_stride)` over `data`.
    ///
    /// # Panics
    /// When `data` is too short.
    pub fn new(data: &'a [f32], shape: (usize, usize, usize)) -> Self {
        check(data.len(), shape);
        let (rows, columns, row_stride) = shape;
        Matrix { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// The transpose; no copy.
    pub fn transposed(self) -> Self {
        Matrix {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// Some of the columns.
    ///
    /// # Panics
    /// When they do not exist.
    pub fn columns(self, range: Range<usize>) -> Self {
        assert!(range.end <= self.columns, "columns exist");
        let data = &self.data[(range.start * self.column_stride).min(self.data.len())..];
        Matrix { data, columns: range.len(), ..self }
    }
}

impl<'a> MatrixMut<'a> {
    /// `(rows, columns, row_stride)` over `data`.
    ///
    /// # Panics
    /// When `data` is too short or rows overlap.
    pub fn new(data: &'a mut [f32], shape: (usize, usize, usize)) -> Self {
        check(data.len(), shape);
        let (rows, columns, row_stride) = shape;
        MatrixMut { data, rows, columns, row_stride }
    }

    /// Some of the columns.
    ///
    /// # Panics
    /// When they do not exist.
    pub fn columns(&mut self, range: Range<usize>) -> MatrixMut<'_> {
        assert!(range.end <= self.columns, "columns exist");
        let begin = range.start.min(self.data.len());
        MatrixMut { data: &mut self.data[begin..], columns: range.len(), ..*self }
    }

    /// A shorter borrow of the whole.
    pub fn all(&mut self) -> MatrixMut<'_> {
        MatrixMut { data: self.data, ..*self }
    }
}
