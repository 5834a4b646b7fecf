//! Exact causal attention over documents, block of query rows by block, probabilities recomputed in
//! the backward pass.
//!
//! With `s_ij = q_i·k_j/√d` for `j ≤ i` (and `j > i − window`): `lse_i = log Σ_j e^{s_ij}`,
//! `p_ij = e^{s_ij − lse_i}`, `o_i = Σ_j p_ij v_j`. Backward, with `δ_i = do_i·o_i`:
//! `dv_j = Σ_i p_ij do_i`, `ds_ij = p_ij (do_i·v_j − δ_i)/√d`, `dq_i = Σ_j ds_ij k_j`,
//! `dk_j = Σ_i ds_ij q_i`. Source: FlashAttention-2, arXiv 2307.08691, sections 2 and 3.
//!
//! Query heads that share a key head are stacked into one tile, so grouped-query attention costs
//! one packing of k and v, and its sum over the group is part of the product. Every tile's order
//! of additions is fixed: results do not depend on the number of threads.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicUsize, Ordering};

use nibble_quant::product::{Matrix, MatrixMut, gemm_serial};
use rayon::prelude::*;

use super::simd::{LANES, exp, max, sum2, vectorized};
use crate::kernels::{AttentionShape, TokenLayout};
use crate::plan::layout::ATTENTION_TILE_ROWS;

/// A tensor that tasks write disjoint rectangles of.
struct Shared<'a> {
    start: *mut f32,
    elements: usize,
    _borrow: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: tasks write disjoint rectangles (see `band_mut`).
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    fn new(data: &'a mut [f32]) -> Self {
        Shared { start: data.as_mut_ptr(), elements: data.len(), _borrow: std::marker::PhantomData }
    }

    /// `width` elements from `offset` on.
    ///
    /// # Safety
    /// No two live slices may overlap.
    #[allow(clippy::mut_from_ref)]
    unsafe fn slice(&self, offset: usize, width: usize) -> &mut [f32] {
        assert!(offset + width <= self.elements, "slice of a shared tensor is in bounds");
        // SAFETY: in bounds as asserted; disjointness is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(offset), width) }
    }
}

/// One tile: a block of query rows of one document, for the heads of one key head.
#[derive(Clone, Copy)]
struct Tile {
    /// Token of the first query row.
    first: usize,
    /// Query rows.
    rows: usize,
    /// First key token that any row sees.
    first_key: usize,
    /// Key tokens: up to the last query row.
    keys: usize,
}

/// The tiles of the queries `first_query..end` of a document `begin..end`, in order.
fn tiles(
    begin: usize,
    end: usize,
    window: Option<usize>,
    first_query: usize,
) -> impl Iterator<Item = Tile> {
    let count = (end - first_query).div_ceil(ATTENTION_TILE_ROWS);
    (0..count).map(move |index| {
        let first = first_query + index * ATTENTION_TILE_ROWS;
        let rows = ATTENTION_TILE_ROWS.min(end - first);
        let first_key = window.map_or(begin, |w| (first + 1).saturating_sub(w).max(begin));
        Tile { first, rows, first_key, keys: first + rows - first_key }
    })
}

impl Tile {
    /// Columns of the score tile that query `row` sees.
    fn visible(&self, row: usize, window: Option<usize>) -> std::ops::Range<usize> {
        let token = self.first + row;
        let begin = window.map_or(self.first_key, |w| (token + 1).saturating_sub(w));
        begin.max(self.first_key) - self.first_key..token + 1 - self.first_key
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

/// o and the log-sum-exp from the rotated q, k and v.
pub fn forward(
    shape: &AttentionShape,
    layout: &TokenLayout,
    qkv: &[f32],
    o: &mut [f32],
    lse: &mut [f32],
    work: &mut [f32],
) {
    let mut items: Vec<(Tile, usize)> = layout
        .boundaries
        .windows(2)
        .flat_map(|w| tiles(w[0], w[1], shape.window, w[0]))
        .flat_map(|tile| (0..shape.num_kv_heads).map(move |kv_head| (tile, kv_head)))
        .collect();
    // Long tiles first: the short ones fill the gaps at the end.
    items.sort_by_key(|(tile, _)| std::cmp::Reverse(tile.keys));
    let source = Source { q: qkv, first_token: 0, kv: qkv, kv_row: KvRow::of_qkv(shape) };
    let (o, lse) = (Shared::new(o), Shared::new(lse));
    for_each_item(items.len(), work, |item, workspace| {
        let (tile, kv_head) = items[item];
        forward_tile(shape, tile, kv_head, &source, (&o, Some(&lse)), workspace);
    });
}

/// Appends the new tokens' k and v to the cache and attends to all of it.
pub fn cached(
    shape: &AttentionShape,
    qkv: &[f32],
    (cache, past): (&mut [f32], usize),
    o: &mut [f32],
    work: &mut [f32],
) {
    let (width, kv) = (shape.qkv_width(), 2 * shape.kv_width());
    let rows = qkv.len() / width;
    for (cached, row) in cache[past * kv..].chunks_exact_mut(kv).zip(qkv.chunks_exact(width)) {
        cached.copy_from_slice(&row[shape.q_width()..]);
    }
    let kv_row = KvRow { key: 0, stride: kv };
    let source = Source { q: qkv, first_token: past, kv: cache, kv_row };
    let items: Vec<(Tile, usize)> = tiles(0, past + rows, shape.window, past)
        .flat_map(|tile| (0..shape.num_kv_heads).map(move |kv_head| (tile, kv_head)))
        .collect();
    let o = Shared::new(o);
    for_each_item(items.len(), work, |item, workspace| {
        let (tile, kv_head) = items[item];
        forward_tile(shape, tile, kv_head, &source, (&o, None), workspace);
    });
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
}

/// Queries and keys: rows of one `qkv`, or new queries over a cache.
struct Source<'a> {
    /// Rows of q, k and v; the first is `first_token`'s.
    q: &'a [f32],
    first_token: usize,
    kv: &'a [f32],
    kv_row: KvRow,
}

fn forward_tile(
    shape: &AttentionShape,
    tile: Tile,
    kv_head: usize,
    source: &Source,
    (o, lse): (&Shared, Option<&Shared>),
    workspace: &mut [f32],
) {
    let (d, group) = (shape.head_dim, shape.num_heads / shape.num_kv_heads);
    let stacked = group * tile.rows;
    let (q_tile, rest) = workspace.split_at_mut(stacked * d);
    let (o_tile, scores) = rest.split_at_mut(stacked * d);
    let scores = &mut scores[..stacked * tile.keys];
    // Rows of q and o count from the first token that has a query.
    let rows = Tile { first: tile.first - source.first_token, ..tile };
    gather_heads(shape, rows, kv_head, source.q, shape.qkv_width(), shape.scale(), q_tile);
    let (k, v) = keys_and_values(shape, tile, kv_head, source.kv, source.kv_row);
    let full = |rows, columns| (rows, columns, columns);
    gemm_serial(
        1.0,
        Matrix::new(q_tile, full(stacked, d)),
        k.transposed(),
        0.0,
        MatrixMut::new(scores, full(stacked, tile.keys)),
    );
    for (row, scores) in scores.chunks_exact_mut(tile.keys).enumerate() {
        let visible = tile.visible(row % tile.rows, shape.window);
        let log_sum = vectorized!(softmax(scores, visible));
        let (token, head) = (tile.first + row % tile.rows, kv_head * group + row / tile.rows);
        if let Some(lse) = lse {
            // SAFETY: this tile is the only one with this token and head.
            let slot = unsafe { lse.slice(token * shape.num_heads + head, 1) };
            slot[0] = log_sum;
        }
    }
    gemm_serial(
        1.0,
        Matrix::new(scores, full(stacked, tile.keys)),
        v,
        0.0,
        MatrixMut::new(o_tile, full(stacked, d)),
    );
    scatter_heads(shape, rows, kv_head, o_tile, o, shape.q_width());
}

/// Probabilities in place, zero outside `visible`; returns the log-sum-exp.
#[inline(always)]
fn softmax(scores: &mut [f32], visible: std::ops::Range<usize>) -> f32 {
    scores[..visible.start].fill(0.0);
    scores[visible.end..].fill(0.0);
    let row = &mut scores[visible];
    let largest = max(row);
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            chunk[lane] = exp(chunk[lane] - largest);
            lanes[lane] += chunk[lane];
        }
    }
    for (lane, value) in rest.iter_mut().enumerate() {
        *value = exp(*value - largest);
        lanes[lane] += *value;
    }
    let total: f32 = lanes.iter().sum();
    let inverse = 1.0 / total;
    row.iter_mut().for_each(|value| *value *= inverse);
    largest + total.ln()
}

/// Copies `scale ·` the tile's rows of the group's heads into `[group · rows, d]`.
fn gather_heads(
    shape: &AttentionShape,
    tile: Tile,
    kv_head: usize,
    from: &[f32],
    stride: usize,
    scale: f32,
    to: &mut [f32],
) {
    let (d, group) = (shape.head_dim, shape.num_heads / shape.num_kv_heads);
    for (row, to) in to.chunks_exact_mut(d).enumerate() {
        let head = kv_head * group + row / tile.rows;
        let start = (tile.first + row % tile.rows) * stride + head * d;
        for (to, from) in to.iter_mut().zip(&from[start..start + d]) {
            *to = scale * from;
        }
    }
}

/// The reverse of [`gather_heads`], without a scale.
fn scatter_heads(
    shape: &AttentionShape,
    tile: Tile,
    kv_head: usize,
    from: &[f32],
    to: &Shared,
    stride: usize,
) {
    let (d, group) = (shape.head_dim, shape.num_heads / shape.num_kv_heads);
    for (row, from) in from.chunks_exact(d).enumerate() {
        let head = kv_head * group + row / tile.rows;
        let start = (tile.first + row % tile.rows) * stride + head * d;
        // SAFETY: this tile is the only one with these tokens and heads.
        unsafe { to.slice(start, d) }.copy_from_slice(from);
    }
}

/// Views of the tile's keys and values `[keys, d]`.
fn keys_and_values<'a>(
    shape: &AttentionShape,
    tile: Tile,
    kv_head: usize,
    kv: &'a [f32],
    KvRow { key, stride }: KvRow,
) -> (Matrix<'a>, Matrix<'a>) {
    let d = shape.head_dim;
    let view = |column: usize| {
        Matrix::new(&kv[tile.first_key * stride + column..], (tile.keys, d, stride))
    };
    let k = key + kv_head * d;
    (view(k), view(k + shape.kv_width()))
}

/// Overwrites dqkv; a task owns all columns of one key head (and its query heads) in one document.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    shape: &AttentionShape,
    layout: &TokenLayout,
    qkv: &[f32],
    o: &[f32],
    lse: &[f32],
    d_o: &[f32],
    dqkv: &mut [f32],
    work: &mut [f32],
) {
    let mut items: Vec<(usize, usize, usize)> = layout
        .boundaries
        .windows(2)
        .flat_map(|w| (0..shape.num_kv_heads).map(move |kv_head| (w[0], w[1], kv_head)))
        .collect();
    items.sort_by_key(|(begin, end, _)| std::cmp::Reverse(end - begin));
    let inputs = Inputs { shape, qkv, o, lse, d_o };
    let dqkv = Shared::new(dqkv);
    for_each_item(items.len(), work, |item, workspace| {
        let (begin, end, kv_head) = items[item];
        inputs.backward_document(begin, end, kv_head, &dqkv, workspace);
    });
}

/// What the backward pass reads.
struct Inputs<'a> {
    shape: &'a AttentionShape,
    qkv: &'a [f32],
    o: &'a [f32],
    lse: &'a [f32],
    d_o: &'a [f32],
}

impl Inputs<'_> {
    fn backward_document(
        &self,
        begin: usize,
        end: usize,
        kv_head: usize,
        dqkv: &Shared,
        workspace: &mut [f32],
    ) {
        let (d, stride) = (self.shape.head_dim, self.shape.qkv_width());
        let length = (end - begin) * d;
        let (dk, rest) = workspace.split_at_mut(length);
        let (dv, workspace) = rest.split_at_mut(length);
        dk.fill(0.0);
        dv.fill(0.0);
        for tile in tiles(begin, end, self.shape.window, begin) {
            let band = (tile.first_key - begin) * d..(tile.first + tile.rows - begin) * d;
            let gradients = (&mut dk[band.clone()], &mut dv[band]);
            self.backward_tile(tile, kv_head, dqkv, gradients, workspace);
        }
        let k_column = self.shape.q_width() + kv_head * d;
        for (gradient, column) in [(dk, k_column), (dv, k_column + self.shape.kv_width())] {
            for (token, row) in (begin..end).zip(gradient.chunks_exact(d)) {
                // SAFETY: this task is the only one with these tokens and this key head.
                unsafe { dqkv.slice(token * stride + column, d) }.copy_from_slice(row);
            }
        }
    }

    /// Writes the tile's dq and adds to dk and dv `[keys, d]`.
    fn backward_tile(
        &self,
        tile: Tile,
        kv_head: usize,
        dqkv: &Shared,
        (dk, dv): (&mut [f32], &mut [f32]),
        workspace: &mut [f32],
    ) {
        let shape = self.shape;
        let (d, stride) = (shape.head_dim, shape.qkv_width());
        let stacked = shape.num_heads / shape.num_kv_heads * tile.rows;
        let (q_tile, rest) = workspace.split_at_mut(stacked * d);
        let (do_tile, rest) = rest.split_at_mut(stacked * d);
        let (o_tile, rest) = rest.split_at_mut(stacked * d);
        let (dq_tile, rest) = rest.split_at_mut(stacked * d);
        let (p, rest) = rest.split_at_mut(stacked * tile.keys);
        let dp = &mut rest[..stacked * tile.keys];
        gather_heads(shape, tile, kv_head, self.qkv, stride, shape.scale(), q_tile);
        gather_heads(shape, tile, kv_head, self.d_o, shape.q_width(), 1.0, do_tile);
        gather_heads(shape, tile, kv_head, self.o, shape.q_width(), 1.0, o_tile);
        let (k, v) = keys_and_values(shape, tile, kv_head, self.qkv, KvRow::of_qkv(shape));
        let tile_view = (stacked, d, d);
        let score_view = (stacked, tile.keys, tile.keys);
        let (q, d_o) = (Matrix::new(q_tile, tile_view), Matrix::new(do_tile, tile_view));
        gemm_serial(1.0, q, k.transposed(), 0.0, MatrixMut::new(p, score_view));
        gemm_serial(1.0, d_o, v.transposed(), 0.0, MatrixMut::new(dp, score_view));
        self.scores_backward(tile, kv_head, p, dp, do_tile, o_tile);
        let (p, dp) = (Matrix::new(p, score_view), Matrix::new(dp, score_view));
        let (q, d_o) = (Matrix::new(q_tile, tile_view), Matrix::new(do_tile, tile_view));
        let key_view = (tile.keys, d, d);
        gemm_serial(1.0, p.transposed(), d_o, 1.0, MatrixMut::new(dv, key_view));
        gemm_serial(1.0, dp.transposed(), q, 1.0, MatrixMut::new(dk, key_view));
        let dq = MatrixMut::new(dq_tile, tile_view);
        gemm_serial(shape.scale(), dp, k, 0.0, dq);
        scatter_heads(shape, tile, kv_head, dq_tile, dqkv, stride);
    }

    /// `p` from scores, `dp` becomes `p ∘ (dp − δ)`; zero where a query does not see a key.
    fn scores_backward(
        &self,
        tile: Tile,
        kv_head: usize,
        p: &mut [f32],
        dp: &mut [f32],
        do_tile: &[f32],
        o_tile: &[f32],
    ) {
        let (shape, d) = (self.shape, self.shape.head_dim);
        let group = shape.num_heads / shape.num_kv_heads;
        let rows = p.chunks_exact_mut(tile.keys).zip(dp.chunks_exact_mut(tile.keys));
        for (row, (p, dp)) in rows.enumerate() {
            let visible = tile.visible(row % tile.rows, shape.window);
            let (token, head) = (tile.first + row % tile.rows, kv_head * group + row / tile.rows);
            let lse = self.lse[token * shape.num_heads + head];
            let band = row * d..(row + 1) * d;
            vectorized!({
                let delta = sum2(&do_tile[band.clone()], &o_tile[band], |a, b| a * b);
                p[..visible.start].fill(0.0);
                p[visible.end..].fill(0.0);
                dp[..visible.start].fill(0.0);
                dp[visible.end..].fill(0.0);
                for (p, dp) in p[visible.clone()].iter_mut().zip(&mut dp[visible]) {
                    *p = exp(*p - lse);
                    *dp = *p * (*dp - delta);
                }
            });
        }
    }
}
