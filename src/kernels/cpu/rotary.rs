//! Rotary embedding of the q and k bands of `qkv`, in place.
//!
//! `[a, b] ← [a·cos − b·sin, b·cos + a·sin]` for the halves a, b of each head, or of as much of it as
//! turns; the backward pass is the rotation by the opposite angle.

use rayon::prelude::*;

use super::simd::vectorized;
use crate::kernels::AttentionShape;

/// Rows that one task handles.
const ROWS: usize = 16;

/// Rotates the rows of `qkv`; tables `[rows, rotary_dim / 2]`.
pub fn rotate(shape: &AttentionShape, cos: &[f32], sin: &[f32], qkv: &mut [f32], backward: bool) {
    let (width, half) = (shape.qkv_width(), shape.rotary_dim / 2);
    let rotated = shape.q_width() + shape.kv_width();
    let tasks = qkv.par_chunks_mut(ROWS * width).zip(cos.par_chunks(ROWS * half));
    tasks.zip(sin.par_chunks(ROWS * half)).for_each(|((qkv, cos), sin)| {
        vectorized!({
            let rows = qkv.chunks_exact_mut(width).zip(cos.chunks_exact(half));
            for ((row, cos), sin) in rows.zip(sin.chunks_exact(half)) {
                for head in row[..rotated].chunks_exact_mut(shape.head_dim) {
                    rotate_head(&mut head[..2 * half], cos, sin, backward);
                }
            }
        });
    });
}

#[inline(always)]
fn rotate_head(head: &mut [f32], cos: &[f32], sin: &[f32], backward: bool) {
    let sign = if backward { -1.0 } else { 1.0 };
    let (first, second) = head.split_at_mut(cos.len());
    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        let sin = sign * sin;
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}
