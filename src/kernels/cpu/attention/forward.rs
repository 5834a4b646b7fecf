//! `o` and the log-sum-exp, with a running maximum and sum over blocks of keys.

use std::ops::Range;

use nibble_quant::product::{Matrix, MatrixMut, PackedOperand, Precision};

use super::super::simd::{exp, exp_below, max, tanh, vectorized};
use super::{
    KvRow, Pieces, Shared, Tile, for_each_item, gather_heads, key_blocks, scatter_heads, tiles,
};
use crate::kernels::{AttentionShape, TokenLayout};
use crate::plan::layout::{ATTENTION_SCORE_STRIDE, ATTENTION_TILES};

/// o and the log-sum-exp from the rotated q, k and v.
pub fn forward(
    (shape, precision): (&AttentionShape, Precision),
    layout: &TokenLayout,
    qkv: &[f32],
    o: &mut [f32],
    lse: &mut [f32],
    work: &mut [f32],
) {
    // Tasks own the tokens of their document.
    assert!(layout.boundaries.is_sorted(), "documents follow each other");
    let tiles = layout.boundaries.windows(2).flat_map(|w| groups(w[0], w[1], shape.window, w[0]));
    let mut items: Vec<(Vec<Tile>, usize)> = tiles
        .flat_map(|group| (0..shape.num_kv_heads).map(move |kv_head| (group.clone(), kv_head)))
        .collect();
    // Long ones first: the short ones fill the gaps at the end.
    items.sort_by_key(|(group, _)| std::cmp::Reverse(keys_of(group).len()));
    let kv_row = KvRow::of_qkv(shape);
    let source = Source { q: qkv, first_token: 0, kv: qkv, kv_row, precision };
    let (o, lse) = (Shared::new(o), Shared::new(lse));
    for_each_item(items.len(), work, |item, workspace| {
        let (group, kv_head) = &items[item];
        forward_group(shape, group, *kv_head, &source, (&o, Some(&lse)), workspace);
    });
}

/// Appends the new tokens' k and v to the cache and attends to all of it.
pub fn cached(
    (shape, precision): (&AttentionShape, Precision),
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
    let source = Source { q: qkv, first_token: past, kv: cache, kv_row, precision };
    let items: Vec<(Vec<Tile>, usize)> = groups(0, past + rows, shape.window, past)
        .flat_map(|group| (0..shape.num_kv_heads).map(move |kv_head| (group.clone(), kv_head)))
        .collect();
    let o = Shared::new(o);
    for_each_item(items.len(), work, |item, workspace| {
        let (group, kv_head) = &items[item];
        forward_group(shape, group, *kv_head, &source, (&o, None), workspace);
    });
}

/// [`tiles`] in groups that share the packing of keys and values.
fn groups(
    begin: usize,
    end: usize,
    window: Option<usize>,
    first_query: usize,
) -> impl Iterator<Item = Vec<Tile>> {
    let tiles: Vec<Tile> = tiles(begin, end, window, first_query).collect();
    let groups: Vec<Vec<Tile>> = tiles.chunks(ATTENTION_TILES).map(<[Tile]>::to_vec).collect();
    groups.into_iter()
}

/// The keys that any tile of a group sees.
fn keys_of(group: &[Tile]) -> Range<usize> {
    group[0].first_key..group[group.len() - 1].end()
}

/// Queries and keys: rows of one `qkv`, or new queries over a cache.
struct Source<'a> {
    /// Rows of q, k and v; the first is `first_token`'s.
    q: &'a [f32],
    first_token: usize,
    kv: &'a [f32],
    kv_row: KvRow,
    /// What the products are computed in.
    precision: Precision,
}

/// What a tile knows between blocks of keys; per stacked row the largest score, and the sum of
/// `exp(score − largest)`.
struct Running<'a> {
    tile: Tile,
    q: &'a mut [f32],
    o: &'a mut [f32],
    largest: &'a mut [f32],
    sum: &'a mut [f32],
}

fn forward_group(
    shape: &AttentionShape,
    group: &[Tile],
    kv_head: usize,
    source: &Source,
    (o, lse): (&Shared, Option<&Shared>),
    workspace: &mut [f32],
) {
    let (d, heads) = (shape.head_dim, shape.num_heads / shape.num_kv_heads);
    let mut pieces = Pieces(workspace);
    let longest = key_blocks(0, keys_of(group).len()).map(|block| block.len()).max().unwrap_or(0);
    let packed_keys = pieces.take(PackedOperand::elements(d, longest));
    let packed_values = pieces.take(PackedOperand::elements(longest, d));
    let scores = pieces.take(heads * group[0].rows * ATTENTION_SCORE_STRIDE);
    let mut running: Vec<Running> = group
        .iter()
        .map(|&tile| {
            let stacked = heads * tile.rows;
            let (q, o) = (pieces.take(stacked * d), pieces.take(stacked * d));
            let (largest, sum) = (pieces.take(stacked), pieces.take(stacked));
            let rows = source.rows(tile);
            gather_heads(shape, rows, kv_head, (source.q, shape.qkv_width()), shape.scale, q);
            o.fill(0.0);
            largest.fill(f32::NEG_INFINITY);
            sum.fill(0.0);
            Running { tile, q, o, largest, sum }
        })
        .collect();
    let keys = keys_of(group);
    for block in key_blocks(keys.start, keys.end) {
        let (k, v) = source.kv_row.keys_and_values(shape, kv_head, source.kv, &block);
        let k = PackedOperand::pack(k.transposed(), packed_keys, source.precision);
        let v = PackedOperand::pack(v, packed_values, source.precision);
        for tile in &mut running {
            tile.add_block(shape, &block, (&k, &v), scores);
        }
    }
    for tile in running {
        tile.finish(shape, kv_head, source, (o, lse));
    }
}

impl Source<'_> {
    /// The tile as rows of q and o count: from the first token that has a query.
    fn rows(&self, tile: Tile) -> Tile {
        Tile { first: tile.first - self.first_token, ..tile }
    }
}

impl Running<'_> {
    /// Takes a block of keys and values into account.
    fn add_block(
        &mut self,
        shape: &AttentionShape,
        block: &Range<usize>,
        (k, v): (&PackedOperand, &PackedOperand),
        scores: &mut [f32],
    ) {
        let (d, tile) = (shape.head_dim, self.tile);
        let keys = tile.end().min(block.end).saturating_sub(block.start);
        if keys == 0 || tile.first_key >= block.end {
            return;
        }
        let stacked = self.largest.len();
        let view = (stacked, keys, ATTENTION_SCORE_STRIDE);
        let q = Matrix::new(self.q, (stacked, d, d));
        k.gemm(1.0, q, 0.0, MatrixMut::new(scores, view));
        let rows = scores.chunks_exact_mut(ATTENTION_SCORE_STRIDE).zip(self.o.chunks_exact_mut(d));
        let state = self.largest.iter_mut().zip(self.sum.iter_mut());
        for (row, ((scores, o), (largest, sum))) in rows.zip(state).enumerate() {
            let visible = tile.visible(row % tile.rows, shape.window, (block.start, keys));
            let scores = &mut scores[..keys];
            vectorized!({
                if let Some(cap) = shape.soft_cap {
                    scores[visible.clone()].iter_mut().for_each(|s| *s = cap * tanh(*s / cap));
                }
                softmax(scores, visible.clone(), (largest, sum), o);
            });
        }
        let o = MatrixMut::new(self.o, (stacked, d, d));
        v.gemm(1.0, Matrix::new(scores, view), 1.0, o);
    }

    /// Writes o and the log-sum-exp.
    fn finish(
        self,
        shape: &AttentionShape,
        kv_head: usize,
        source: &Source,
        (o, lse): (&Shared, Option<&Shared>),
    ) {
        let (d, heads) = (shape.head_dim, shape.num_heads / shape.num_kv_heads);
        for (o, sum) in self.o.chunks_exact_mut(d).zip(self.sum.iter()) {
            let inverse = 1.0 / sum;
            o.iter_mut().for_each(|value| *value *= inverse);
        }
        let tile = self.tile;
        let rows = source.rows(tile);
        scatter_heads(shape, rows, kv_head, self.o, (o, shape.q_width()), false);
        let Some(lse) = lse else { return };
        for (row, (largest, sum)) in self.largest.iter().zip(self.sum.iter()).enumerate() {
            let (token, head) = (tile.first + row % tile.rows, kv_head * heads + row / tile.rows);
            // SAFETY: this tile is the only one with this token and head.
            let slot = unsafe { lse.slice(token * shape.num_heads + head, 1) };
            slot[0] = largest + sum.ln();
        }
    }
}

/// `exp(score − largest)` in place, zero outside `visible`; what was summed up before, o included,
/// is scaled to the new largest score.
#[inline(always)]
fn softmax(
    scores: &mut [f32],
    visible: Range<usize>,
    (largest, sum): (&mut f32, &mut f32),
    o: &mut [f32],
) {
    scores[..visible.start].fill(0.0);
    scores[visible.end..].fill(0.0);
    if visible.is_empty() {
        return;
    }
    let row = &mut scores[visible];
    let before = *largest;
    let here = max(row);
    *largest = if here > before { here } else { before };
    let total: f32 = exp_below(row, *largest).iter().sum();
    if before == f32::NEG_INFINITY {
        *sum = total;
        return;
    }
    let factor = exp(before - *largest);
    *sum = *sum * factor + total;
    o.iter_mut().for_each(|value| *value *= factor);
}
