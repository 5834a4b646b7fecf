//! `dqkv` from o, its gradient and the log-sum-exp.
//!
//! With `δ_i = do_i·o_i`: `dv_j = Σ_i p_ij do_i`, `ds_ij = scale·p_ij (do_i·v_j − δ_i)`,
//! `dq_i = Σ_j ds_ij k_j`, `dk_j = Σ_i ds_ij q_i`. Scores that are capped, `c·tanh(s/c)`, take
//! `1 − tanh²(s/c)` into ds. A block of keys is a task: it stays while the queries that see
//! it pass by. dk and dv are summed up beside it, dq where it lies, tile by tile behind the task with
//! the keys before: so all threads have work in a single long document, and every sum has one order.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use nibble_quant::product::{Matrix, MatrixMut, PackedOperand, Precision, gemm_serial};

use super::super::simd::{exp, sum2, tanh, vectorized};
use super::{
    KvRow, Pieces, Shared, Tile, for_each_item, gather_heads, key_blocks, scatter_heads, tiles,
};
use crate::kernels::{AttentionShape, TokenLayout};
use crate::plan::layout::ATTENTION_SCORE_STRIDE;

/// Overwrites dqkv. A task owns dk and dv of one block of keys of one key head in one document.
pub fn backward(inputs: Inputs, layout: &TokenLayout, dqkv: &mut [f32], work: &mut [f32]) {
    // Tasks own the tokens of their document.
    assert!(layout.boundaries.is_sorted(), "documents follow each other");
    let mut documents: Vec<&[usize]> = layout.boundaries.windows(2).collect();
    documents.sort_by_key(|document| std::cmp::Reverse(document[1] - document[0]));
    let blocks = documents.into_iter().flat_map(|document| {
        let (begin, end) = (document[0], document[1]);
        key_blocks(begin, end).map(move |keys| ((begin, end), keys))
    });
    let blocks: Vec<((usize, usize), Range<usize>)> = blocks.collect();
    let heads = inputs.shape.num_kv_heads;
    let progress = Progress::new(blocks.len() * heads);
    let dqkv = Shared::new(dqkv);
    // Tasks are begun in this order, so the first that is not done waits for none.
    for_each_item(blocks.len() * heads, work, |item, workspace| {
        let (document, keys) = blocks[item / heads].clone();
        let _guard = Guard(&progress);
        let turn = Turn { progress: &progress, own: item, before: item.wrapping_sub(heads) };
        inputs.backward_block(document, keys, item % heads, (&dqkv, turn), workspace);
    });
}

/// How far each task has come: the first query that it has not added its part to.
struct Progress {
    next_query: Vec<AtomicUsize>,
    /// Whether a task has panicked; those that wait for it must not wait for ever.
    failed: AtomicBool,
}

impl Progress {
    fn new(tasks: usize) -> Self {
        let next_query = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        Progress { next_query, failed: AtomicBool::new(false) }
    }
}

/// Tells of a panic.
struct Guard<'a>(&'a Progress);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.failed.store(true, Ordering::Relaxed);
        }
    }
}

/// A task's place behind the one with the keys before, of the same head and document.
#[derive(Clone, Copy)]
struct Turn<'a> {
    progress: &'a Progress,
    own: usize,
    before: usize,
}

impl Turn<'_> {
    /// Returns when the task before is done with all queries below `end`.
    fn wait_for(self, end: usize) {
        while self.progress.next_query[self.before].load(Ordering::Acquire) < end {
            assert!(!self.progress.failed.load(Ordering::Relaxed), "another task has failed");
            thread::yield_now();
        }
    }

    fn is_done_with(self, end: usize) {
        self.progress.next_query[self.own].store(end, Ordering::Release);
    }
}

/// What the backward pass reads.
pub struct Inputs<'a> {
    pub shape: &'a AttentionShape,
    pub precision: Precision,
    pub qkv: &'a [f32],
    pub o: &'a [f32],
    pub lse: &'a [f32],
    pub d_o: &'a [f32],
}

/// A block of keys and values as products take them, and their gradients `[keys, d]`.
struct Block<'a> {
    first_key: usize,
    keys_turned: PackedOperand<'a>,
    keys: PackedOperand<'a>,
    values_turned: PackedOperand<'a>,
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

impl Inputs<'_> {
    fn backward_block(
        &self,
        (begin, end): (usize, usize),
        keys: Range<usize>,
        kv_head: usize,
        (dqkv, turn): (&Shared, Turn),
        workspace: &mut [f32],
    ) {
        let (shape, precision) = (self.shape, self.precision);
        let (d, stride) = (shape.head_dim, shape.qkv_width());
        let mut pieces = Pieces(workspace);
        let (k, v) = KvRow::of_qkv(shape).keys_and_values(shape, kv_head, self.qkv, &keys);
        let turned = PackedOperand::elements(d, keys.len());
        let plain = pieces.take(PackedOperand::elements(keys.len(), d));
        let mut block = Block {
            first_key: keys.start,
            keys_turned: PackedOperand::pack(k.transposed(), pieces.take(turned), precision),
            keys: PackedOperand::pack(k, plain, precision),
            values_turned: PackedOperand::pack(v.transposed(), pieces.take(turned), precision),
            dk: pieces.take(keys.len() * d),
            dv: pieces.take(keys.len() * d),
        };
        block.dk.fill(0.0);
        block.dv.fill(0.0);
        for tile in tiles(begin, end, shape.window, begin) {
            if tile.end() > keys.start && tile.first_key < keys.end {
                let into = (dqkv, turn);
                self.backward_tile(tile, kv_head, &mut block, into, Pieces(&mut *pieces.0));
            }
        }
        let k_column = shape.q_width() + kv_head * d;
        for (gradient, column) in [(block.dk, k_column), (block.dv, k_column + shape.kv_width())] {
            for (token, row) in keys.clone().zip(gradient.chunks_exact(d)) {
                // SAFETY: this task is the only one with these keys and this key head.
                unsafe { dqkv.slice(token * stride + column, d) }.copy_from_slice(row);
            }
        }
    }

    /// The tile's part of dq, dk and dv.
    fn backward_tile(
        &self,
        tile: Tile,
        kv_head: usize,
        block: &mut Block,
        (dqkv, turn): (&Shared, Turn),
        mut pieces: Pieces,
    ) {
        let (shape, d) = (self.shape, self.shape.head_dim);
        let stacked = shape.num_heads / shape.num_kv_heads * tile.rows;
        let keys = (tile.end() - block.first_key).min(block.dk.len() / d);
        let [q, d_o, dq] = std::array::from_fn(|_| pieces.take(stacked * d));
        let [p, dp] = std::array::from_fn(|_| pieces.take(stacked * ATTENTION_SCORE_STRIDE));
        gather_heads(shape, tile, kv_head, (self.qkv, shape.qkv_width()), shape.scale, q);
        gather_heads(shape, tile, kv_head, (self.d_o, shape.q_width()), 1.0, d_o);
        let rows = (stacked, d, d);
        let scores = (stacked, keys, ATTENTION_SCORE_STRIDE);
        block.keys_turned.gemm(1.0, Matrix::new(q, rows), 0.0, MatrixMut::new(p, scores));
        block.values_turned.gemm(1.0, Matrix::new(d_o, rows), 0.0, MatrixMut::new(dp, scores));
        self.scores_backward(tile, kv_head, (block.first_key, keys), p, dp);
        let (p, dp) = (Matrix::new(p, scores), Matrix::new(dp, scores));
        let (q, d_o) = (Matrix::new(q, rows), Matrix::new(d_o, rows));
        let key_rows = (keys, d, d);
        let (dv, dk) = (MatrixMut::new(block.dv, key_rows), MatrixMut::new(block.dk, key_rows));
        gemm_serial(1.0, p.transposed(), d_o, 1.0, dv, self.precision);
        gemm_serial(1.0, dp.transposed(), q, 1.0, dk, self.precision);
        block.keys.gemm(shape.scale, dp, 0.0, MatrixMut::new(dq, rows));
        // An earlier block of keys writes there.
        let accumulate = tile.first_key < block.first_key;
        if accumulate {
            turn.wait_for(tile.end());
        }
        scatter_heads(shape, tile, kv_head, dq, (dqkv, shape.qkv_width()), accumulate);
        turn.is_done_with(tile.end());
    }

    /// `p` from scores, `dp` becomes `p ∘ (dp − δ)`; zero where a query does not see a key.
    fn scores_backward(
        &self,
        tile: Tile,
        kv_head: usize,
        block: (usize, usize),
        p: &mut [f32],
        dp: &mut [f32],
    ) {
        let (shape, d) = (self.shape, self.shape.head_dim);
        let heads = shape.num_heads / shape.num_kv_heads;
        let rows = p.chunks_exact_mut(ATTENTION_SCORE_STRIDE);
        let rows = rows.zip(dp.chunks_exact_mut(ATTENTION_SCORE_STRIDE));
        for (row, (p, dp)) in rows.enumerate() {
            let visible = tile.visible(row % tile.rows, shape.window, block);
            let (token, head) = (tile.first + row % tile.rows, kv_head * heads + row / tile.rows);
            let lse = self.lse[token * shape.num_heads + head];
            let band = token * shape.q_width() + head * d;
            let (d_o, o) = (&self.d_o[band..band + d], &self.o[band..band + d]);
            let (p, dp) = (&mut p[..block.1], &mut dp[..block.1]);
            vectorized!({
                let delta = sum2(d_o, o, |a, b| a * b);
                p[..visible.start].fill(0.0);
                p[visible.end..].fill(0.0);
                dp[..visible.start].fill(0.0);
                dp[visible.end..].fill(0.0);
                let visible = p[visible.clone()].iter_mut().zip(&mut dp[visible]);
                match shape.soft_cap {
                    None => {
                        for (p, dp) in visible {
                            *p = exp(*p - lse);
                            *dp = *p * (*dp - delta);
                        }
                    }
                    Some(cap) => {
                        for (p, dp) in visible {
                            let t = tanh(*p / cap);
                            *p = exp(cap * t - lse);
                            *dp = *p * (*dp - delta) * (1.0 - t * t);
                        }
                    }
                }
            });
        }
    }
}
