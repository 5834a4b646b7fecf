//! Exact causal attention over documents: tiles of query rows against blocks of keys, probabilities
//! recomputed in the backward pass.
//!
//! With `s_ij = scale·q_i·k_j` for `j ≤ i` (and `j > i − window`): `lse_i = log Σ_j e^{s_ij}`,
//! `p_ij = e^{s_ij − lse_i}`, `o_i = Σ_j p_ij v_j`. Source: FlashAttention-2, arXiv 2307.08691,
//! section 3: work memory is a few tiles and blocks, however long a document is.
//!
//! Query heads that share a key head are stacked into one tile, so grouped-query attention costs
//! one packing of k and v, and its sum over the group is part of the product. Every tile's order
//! of additions is fixed: results do not depend on the number of threads.
#![allow(unsafe_code)]

mod backward;
mod forward;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use nibble_quant::product::{Matrix, Precision};
use rayon::prelude::*;

use super::arena::Buffer;
use super::simd::vectorized;
use super::{Cpu, head_norms, rotary};
use crate::kernels::{
    AttentionInputs, AttentionKernels, AttentionShape, Cache, CachedScratch, Direction, HeadNorms,
    RotaryTables, TokenLayout,
};
use crate::plan::layout::{ATTENTION_KEY_BLOCK, ATTENTION_TILE_ROWS};
use backward::{Inputs, backward};
use forward::{cached, forward};

impl AttentionKernels for Cpu {
    fn head_norms(
        &self,
        norms: &HeadNorms<Vec<f32>>,
        shape: &AttentionShape,
        qkv: &Buffer<f32>,
        to: &mut Buffer<f32>,
        rows: usize,
    ) {
        let n = rows * shape.qkv_width();
        head_norms::forward(norms, shape, &qkv[..n], &mut to[..n]);
    }

    fn head_norms_backward(
        &self,
        norms: &HeadNorms<Vec<f32>>,
        shape: &AttentionShape,
        qkv: &Buffer<f32>,
        dqkv: &mut Buffer<f32>,
        rows: usize,
    ) {
        let n = rows * shape.qkv_width();
        head_norms::backward(norms, shape, &qkv[..n], &mut dqkv[..n]);
    }

    fn rotary(
        &self,
        shape: &AttentionShape,
        tables: RotaryTables<Buffer<f32>>,
        qkv: &mut Buffer<f32>,
        rows: usize,
        direction: Direction,
    ) {
        let half = rows * shape.rotary_dim / 2;
        let qkv = &mut qkv[..rows * shape.qkv_width()];
        let (cos, sin) = (&tables.cos[..half], &tables.sin[..half]);
        let query_scale = tables.query_scale.map(|scale| &scale[..rows]);
        rotary::rotate(shape, (cos, sin), query_scale, qkv, direction);
    }

    fn attention_forward(
        &self,
        shape: &AttentionShape,
        layout: &TokenLayout,
        qkv: &Buffer<f32>,
        o: &mut Buffer<f32>,
        lse: &mut Buffer<f32>,
        work: &mut Buffer<f32>,
    ) {
        forward((shape, self.precision), layout, qkv, o, lse, work);
    }

    fn attention_cached(
        &self,
        shape: &AttentionShape,
        qkv: &Buffer<f32>,
        cache: Cache<Buffer<f32>>,
        rows: usize,
        o: &mut Buffer<f32>,
        scratch: CachedScratch<Buffer<f32>>,
    ) {
        let qkv = &qkv[..rows * shape.qkv_width()];
        // As the products of one row are.
        let precision = if rows == 1 { Precision::F32 } else { self.precision };
        cached((shape, precision), qkv, (cache.keys_values, cache.past), o, scratch.tiles);
    }

    fn attention_backward(
        &self,
        shape: &AttentionShape,
        layout: &TokenLayout,
        AttentionInputs { qkv, o, lse, d_o }: AttentionInputs<Buffer<f32>>,
        dqkv: &mut Buffer<f32>,
        work: &mut Buffer<f32>,
    ) {
        let inputs = Inputs { shape, precision: self.precision, qkv, o, lse, d_o };
        backward(inputs, layout, dqkv, work);
    }
}

/// A tensor that tasks write disjoint rectangles of.
struct Shared<'a> {
    start: *mut f32,
    elements: usize,
    _borrow: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: tasks write disjoint rectangles (see `slice`).
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    fn new(data: &'a mut [f32]) -> Self {
        Shared { start: data.as_mut_ptr(), elements: data.len(), _borrow: std::marker::PhantomData }
    }

    /// `width` elements from `offset` on.
    ///
    /// # Safety
    /// No two live slices may overlap, and what threads do with the same place one after the other must be
    /// ordered.
    #[allow(clippy::mut_from_ref)]
    unsafe fn slice(&self, offset: usize, width: usize) -> &mut [f32] {
        assert!(offset + width <= self.elements, "slice of a shared tensor is in bounds");
        // SAFETY: in bounds as asserted; disjointness is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(offset), width) }
    }
}

/// A block of query rows of one document, for the heads of one key head.
#[derive(Clone, Copy)]
struct Tile {
    /// Token of the first query row.
    first: usize,
    /// Query rows.
    rows: usize,
    /// First token that any row sees.
    first_key: usize,
}

/// The tiles of the queries `first_query..end` of a document that begins at `begin`, in order.
fn tiles(
    begin: usize,
    end: usize,
    window: Option<usize>,
    first_query: usize,
) -> impl Iterator<Item = Tile> {
    (first_query..end).step_by(ATTENTION_TILE_ROWS).map(move |first| {
        let first_key = window.map_or(begin, |w| (first + 1).saturating_sub(w).max(begin));
        Tile { first, rows: ATTENTION_TILE_ROWS.min(end - first), first_key }
    })
}

impl Tile {
    /// Last token that any row sees, plus one.
    fn end(&self) -> usize {
        self.first + self.rows
    }

    /// The columns of a score tile, of keys from `first_key` on, that query `row` sees.
    fn visible(
        &self,
        row: usize,
        window: Option<usize>,
        (first_key, keys): (usize, usize),
    ) -> Range<usize> {
        let token = self.first + row;
        let begin = window.map_or(0, |w| (token + 1).saturating_sub(w)).max(first_key) - first_key;
        let end = (token + 1).saturating_sub(first_key).min(keys);
        begin.min(end)..end
    }
}

/// The keys `begin..end` in blocks.
fn key_blocks(begin: usize, end: usize) -> impl Iterator<Item = Range<usize>> {
    (begin..end)
        .step_by(ATTENTION_KEY_BLOCK)
        .map(move |first| first..(first + ATTENTION_KEY_BLOCK).min(end))
}

/// Cuts a workspace up.
struct Pieces<'a>(&'a mut [f32]);

impl<'a> Pieces<'a> {
    fn take(&mut self, elements: usize) -> &'a mut [f32] {
        let (piece, rest) = std::mem::take(&mut self.0).split_at_mut(elements);
        self.0 = rest;
        piece
    }
}

/// Runs `task(item, workspace)` for every item, each worker with its own slice of `work`.
fn for_each_item(items: usize, work: &mut [f32], task: impl Fn(usize, &mut [f32]) + Sync) {
    let workers = rayon::current_num_threads().min(items.max(1));
    let share = work.len() / rayon::current_num_threads();
    let next = AtomicUsize::new(0);
    work.par_chunks_mut(share).take(workers).for_each(|workspace| {
        loop {
            let item = next.fetch_add(1, Ordering::Relaxed);
            if item >= items {
                break;
            }
            task(item, workspace);
        }
    });
}

/// Copies `scale ·` the tile's rows of the group's heads into `[group · rows, d]`.
fn gather_heads(
    shape: &AttentionShape,
    tile: Tile,
    kv_head: usize,
    (from, stride): (&[f32], usize),
    scale: f32,
    to: &mut [f32],
) {
    let (d, group) = (shape.head_dim, shape.num_heads / shape.num_kv_heads);
    vectorized!(for (row, to) in to.chunks_exact_mut(d).enumerate() {
        let head = kv_head * group + row / tile.rows;
        let start = (tile.first + row % tile.rows) * stride + head * d;
        for (to, from) in to.iter_mut().zip(&from[start..start + d]) {
            *to = scale * from;
        }
    });
}

/// The reverse of [`gather_heads`], without a scale; adds if told so.
fn scatter_heads(
    shape: &AttentionShape,
    tile: Tile,
    kv_head: usize,
    from: &[f32],
    (to, stride): (&Shared, usize),
    accumulate: bool,
) {
    let (d, group) = (shape.head_dim, shape.num_heads / shape.num_kv_heads);
    for (row, from) in from.chunks_exact(d).enumerate() {
        let head = kv_head * group + row / tile.rows;
        let start = (tile.first + row % tile.rows) * stride + head * d;
        // SAFETY: no other task is at these tokens and heads: it is the only one with them, or comes
        // behind those that are done, which a released and acquired count tells.
        let to = unsafe { to.slice(start, d) };
        if accumulate {
            to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
        } else {
            to.copy_from_slice(from);
        }
    }
}

/// Where keys lie in a row, and how far rows are apart; values follow all keys.
#[derive(Clone, Copy)]
struct KvRow {
    key: usize,
    stride: usize,
}

impl KvRow {
    fn of_qkv(shape: &AttentionShape) -> Self {
        KvRow { key: shape.q_width(), stride: shape.qkv_width() }
    }

    /// Views of a block's keys and values `[keys, d]`.
    fn keys_and_values<'a>(
        self,
        shape: &AttentionShape,
        kv_head: usize,
        kv: &'a [f32],
        keys: &Range<usize>,
    ) -> (Matrix<'a>, Matrix<'a>) {
        let d = shape.head_dim;
        let view = |column: usize| {
            let from = &kv[keys.start * self.stride + column..];
            Matrix::new(from, (keys.len(), d, self.stride))
        };
        let k = self.key + kv_head * d;
        (view(k), view(k + shape.kv_width()))
    }
}

#[cfg(test)]
mod tests;
