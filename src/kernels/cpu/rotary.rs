//! Rotary embedding of the q and k bands of `qkv`, in place.
//!
//! `[a, b] ← [a·cos − b·sin, b·cos + a·sin]` for the halves a, b of each head, or of as much of it as turns, or
//! for neighbours; the backward pass is the rotation by the opposite angle. Where the heads of q have a factor
//! for their row besides, it multiplies cos and sin: whole heads turn then.

use rayon::prelude::*;

use super::ROWS;
use super::simd::vectorized;
use crate::kernels::{AttentionShape, Direction};
use crate::model::spec::RotaryPairs;

/// Rotates the rows of `qkv`; tables `[rows, rotary_dim / 2]`, `query_scale` `[rows]`.
pub fn rotate(
    shape: &AttentionShape,
    (cos, sin): (&[f32], &[f32]),
    query_scale: Option<&[f32]>,
    qkv: &mut [f32],
    direction: Direction,
) {
    let (width, half) = (shape.qkv_width(), shape.rotary_dim / 2);
    let rotated = shape.q_width() + shape.kv_width();
    let tasks = qkv.par_chunks_mut(ROWS * width).zip(cos.par_chunks(ROWS * half));
    let tasks = tasks.zip(sin.par_chunks(ROWS * half)).enumerate();
    tasks.for_each(|(task, ((qkv, cos), sin))| {
        vectorized!({
            let rows = qkv.chunks_exact_mut(width).zip(cos.chunks_exact(half));
            for (i, ((row, cos), sin)) in rows.zip(sin.chunks_exact(half)).enumerate() {
                let query_scale = query_scale.map_or(1.0, |scale| scale[task * ROWS + i]);
                for (j, head) in row[..rotated].chunks_exact_mut(shape.head_dim).enumerate() {
                    let scale = if j < shape.num_heads { query_scale } else { 1.0 };
                    let (head, tables) = (&mut head[..2 * half], (cos, sin));
                    match shape.rotary_pairs {
                        RotaryPairs::Halves => {
                            let (first, second) = head.split_at_mut(half);
                            let pairs = first.iter_mut().zip(second);
                            rotate_head(pairs, tables, scale, direction);
                        }
                        RotaryPairs::Neighbours => {
                            let pairs = head.chunks_exact_mut(2).map(|pair| pair.split_at_mut(1));
                            let pairs = pairs.map(|(a, b)| (&mut a[0], &mut b[0]));
                            rotate_head(pairs, tables, scale, direction);
                        }
                    }
                }
            }
        });
    });
}

#[inline(always)]
fn rotate_head<'a>(
    pairs: impl Iterator<Item = (&'a mut f32, &'a mut f32)>,
    (cos, sin): (&[f32], &[f32]),
    scale: f32,
    direction: Direction,
) {
    let sign = match direction {
        Direction::Forward => scale,
        Direction::Backward => -scale,
    };
    for (((a, b), cos), sin) in pairs.zip(cos).zip(sin) {
        let (cos, sin) = (scale * cos, sign * sin);
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}
