//! One row: `y = W·x`, each weight multiplied where it was decoded.
//!
//! Generating text is this for every token, and bound by reading the weights: packing panels for one
//! row would cost many times the product. Sums are made in an order of their own, not that of tiles; it
//! does not depend on the number of threads.

use std::borrow::Cow;

use rayon::prelude::*;

use super::{LowRank, WeightRef};
use crate::dot::dot;

/// Rows that are multiplied together.
const ROWS: usize = 16;
/// Partial sums of a short product.
const LANES: usize = 8;
/// Weights of a task.
const TASK: usize = 1 << 17;

/// `y = x·Wᵀ + low_rank + beta·y` of one row; x `[in]`, y `[out]`, in f32.
///
/// # Panics
/// When the shapes do not agree.
pub fn product_row(
    x: &[f32],
    weight: WeightRef,
    low_rank: Option<LowRank>,
    beta: f32,
    y: &mut [f32],
) {
    assert_eq!([y.len(), x.len()], weight.shape(), "shapes of a product agree");
    if let Some(LowRank { a, b, .. }) = &low_rank {
        let shape = (a.rows, b.rows, b.columns);
        assert_eq!(shape, (1, a.columns, y.len()), "shapes of an addition agree");
    }
    let rows = (TASK / x.len().max(1)).max(1).next_multiple_of(ROWS);
    let x = match weight {
        WeightRef::Packed(packed) => packed.arrange(x),
        _ => Cow::Borrowed(x),
    };
    y.par_chunks_mut(rows).enumerate().for_each(|(task, y)| {
        let mut sums = [0.0; ROWS];
        for (group, y) in y.chunks_mut(ROWS).enumerate() {
            let (first, sums) = (task * rows + group * ROWS, &mut sums[..y.len()]);
            weight.dot_rows(first, &x, sums);
            for (row, (y, sum)) in (first..).zip(y.iter_mut().zip(sums)) {
                let added = low_rank.as_ref().map_or(0.0, |low_rank| low_rank.of_column(row));
                let value = *sum + added;
                *y = if beta == 0.0 { value } else { value + beta * *y };
            }
        }
    });
}

impl WeightRef<'_> {
    /// Rows from `first` on times x, which is arranged.
    fn dot_rows(&self, first: usize, x: &[f32], out: &mut [f32]) {
        let rows = (first..).map(|row| row * x.len()..(row + 1) * x.len());
        match self {
            WeightRef::F32(data, _) => {
                out.iter_mut().zip(rows).for_each(|(out, row)| *out = dot(&data[row], x));
            }
            WeightRef::Bf16(data, _) => {
                out.iter_mut().zip(rows).for_each(|(out, row)| *out = dot(&data[row], x));
            }
            WeightRef::Packed(packed) => packed.dot_rows(first, x, out),
        }
    }
}

impl LowRank<'_> {
    /// A column of an addition to one row.
    fn of_column(&self, column: usize) -> f32 {
        let LowRank { scale, a, b } = self;
        let rank = a.columns;
        if a.column_stride == 1 && b.row_stride == 1 {
            return scale * short_dot(&a.data[..rank], &b.data[column * b.column_stride..][..rank]);
        }
        let product = |k: usize| {
            a.data[k * a.column_stride] * b.data[k * b.row_stride + column * b.column_stride]
        };
        scale * (0..rank).map(product).sum::<f32>()
    }
}

/// `Σ a·b` of a few numbers, which the calls of [`dot`] would take longer than.
fn short_dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}
