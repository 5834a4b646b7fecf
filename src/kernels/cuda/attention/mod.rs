//! Causal attention inside documents: our flash kernels where they have the head's width, else, or
//! where it is asked for, the [exact](exact) path, which is also their oracle.
//! Formulas: src/kernels/cpu/attention/mod.rs.

mod exact;
mod flash;
mod implementation;
mod tiles;
mod work;

use super::Cuda;
use super::driver::{Argument, Driver};
use super::host::DeviceVector;
use super::launch::{launch, row_threads, rows as row_grid};
use super::memory::{Buffer, Rows};
use crate::kernels::{
    AttentionInputs, AttentionKernels, AttentionShape, Cache, CachedScratch, Direction, HeadNorms,
    RotaryTables, TokenLayout,
};
use crate::model::spec::RotaryPairs;
use exact::{Exact, backward_keys, blocks};
pub(super) use flash::shared_bytes;
use flash::{Sources, launch_flash};
pub use implementation::AttnImplementation;
pub(super) use tiles::{LAUNCH_FLOPS, heaviest_first, launch_flops};
pub use work::WorkLayout;

/// New tokens from which on a tile of the flash kernels is worth it.
const FLASH_ROWS: usize = 8;

impl<D: Driver> AttentionKernels for Cuda<D> {
    fn head_norms(
        &self,
        norms: &HeadNorms<DeviceVector<D>>,
        shape: &AttentionShape,
        qkv: &Buffer<D>,
        to: &mut Buffer<D>,
        rows: usize,
    ) {
        head_norms(self, "head_norms", norms, shape, (qkv, to), rows);
    }

    fn head_norms_backward(
        &self,
        norms: &HeadNorms<DeviceVector<D>>,
        shape: &AttentionShape,
        qkv: &Buffer<D>,
        dqkv: &mut Buffer<D>,
        rows: usize,
    ) {
        let kernel = "head_norms_backward";
        head_norms(self, kernel, norms, shape, (qkv, dqkv), rows);
    }

    fn rotary(
        &self,
        shape: &AttentionShape,
        tables: RotaryTables<Buffer<D>>,
        qkv: &mut Buffer<D>,
        rows: usize,
        direction: Direction,
    ) {
        let (half, qkv) = (rows * shape.rotary_dim / 2, qkv.rows(rows, shape.qkv_width()));
        let query_scale =
            tables.query_scale.map_or(Argument::Pointer(0), |scale| scale.argument(rows));
        launch!(self, "rotary", row_grid(rows), row_threads(shape.qkv_width() / 2);
            qkv.argument(), qkv.stride, tables.cos.argument(half), tables.sin.argument(half),
            query_scale, shape.num_heads, shape.num_heads + shape.num_kv_heads, shape.head_dim,
            shape.rotary_dim, shape.rotary_pairs == RotaryPairs::Neighbours,
            direction == Direction::Backward);
    }

    fn attention_forward(
        &self,
        shape: &AttentionShape,
        layout: &TokenLayout,
        qkv: &Buffer<D>,
        o: &mut Buffer<D>,
        lse: &mut Buffer<D>,
        work: &mut Buffer<D>,
    ) {
        let tokens = layout.tokens();
        let (o, lse) = (o.rows(tokens, shape.q_width()), lse.at(0..tokens * shape.num_heads));
        if let Some(flash) = self.attention.flash(shape.head_dim) {
            let outputs = [o.argument(), o.stride.into(), Argument::Pointer(lse)];
            let heads = shape.num_heads;
            let sources = Sources::of_tokens(shape, layout, qkv);
            return launch_flash(self, flash.forward, heads, shape, &sources, &outputs);
        }
        let exact = Exact::new(self, shape, layout, qkv, work, false);
        for document in layout.boundaries.windows(2) {
            for kv_head in 0..shape.num_kv_heads {
                for block in blocks(document[0], document[1], shape.window, kv_head) {
                    exact.multiply_queries(block);
                    exact.softmax(block, lse);
                    exact.output(block, o);
                }
            }
        }
    }

    fn attention_cached(
        &self,
        shape: &AttentionShape,
        qkv: &Buffer<D>,
        Cache { keys_values, past }: Cache<Buffer<D>>,
        rows: usize,
        o: &mut Buffer<D>,
        CachedScratch { lse, .. }: CachedScratch<Buffer<D>>,
    ) {
        const THREADS: u32 = 256;
        let kv = 2 * shape.kv_width();
        let (q, o) = (qkv.rows(rows, shape.qkv_width()), o.rows(rows, shape.q_width()));
        let (new, end) = (q.column(shape.q_width()), keys_values.at(past * kv..(past + rows) * kv));
        launch!(self, "scale_rows_bf16", row_grid(rows), row_threads(kv);
            new.argument(), new.stride, Argument::Pointer(end), kv, kv, 1f32, false);
        let k = Rows { address: keys_values.at(0..(past + rows) * kv), stride: kv };
        let v = k.column(shape.kv_width());
        let flash = self.attention.flash(shape.head_dim).filter(|_| rows >= FLASH_ROWS);
        if let Some(flash) = flash {
            let sources = Sources { boundaries: &[0, rows], past, q, k, v };
            let lse = Argument::Pointer(lse.at(0..rows * shape.num_heads));
            let outputs = [o.argument(), o.stride.into(), lse];
            return launch_flash(self, flash.forward, shape.num_heads, shape, &sources, &outputs);
        }
        launch!(self, "attention_decode", [rows as u32, shape.num_heads as u32, 1], THREADS;
            q.argument(), q.stride, k.argument(), v.argument(), k.stride, o.argument(), o.stride,
            shape.num_heads, shape.num_kv_heads, shape.head_dim, past, window(shape, past + rows),
            shape.scale, soft_cap(shape));
    }

    fn attention_backward(
        &self,
        shape: &AttentionShape,
        layout: &TokenLayout,
        AttentionInputs { qkv, o, lse, d_o }: AttentionInputs<Buffer<D>>,
        dqkv: &mut Buffer<D>,
        work: &mut Buffer<D>,
    ) {
        let (tokens, width) = (layout.tokens(), shape.q_width());
        let lse = lse.at(0..tokens * shape.num_heads);
        let (o, d_o) = (o.rows(tokens, width), d_o.at(0..tokens * width));
        let to = dqkv.rows(tokens, shape.qkv_width());
        let flash = self.attention.flash(shape.head_dim);
        let exact = flash.is_none().then(|| Exact::new(self, shape, layout, qkv, work, true));
        let delta =
            exact.as_ref().map_or(work.at(0..tokens * shape.num_heads), |exact| exact.delta);
        launch!(self, "attention_delta", row_grid(tokens), row_threads(256 * shape.num_heads);
            Argument::Pointer(d_o), width, o.argument(), o.stride, Argument::Pointer(delta),
            shape.num_heads, shape.head_dim);
        if let Some(flash) = flash {
            let gradients = [
                Argument::Pointer(d_o),
                width.into(),
                Argument::Pointer(lse),
                Argument::Pointer(delta),
            ];
            let sources = Sources::of_tokens(shape, layout, qkv);
            let column = |column: usize| to.column(column).argument();
            let mut keys = gradients.to_vec();
            keys.extend([column(width), column(width + shape.kv_width()), to.stride.into()]);
            launch_flash(self, flash.keys, shape.num_kv_heads, shape, &sources, &keys);
            let mut queries = gradients.to_vec();
            queries.extend([column(0), to.stride.into()]);
            launch_flash(self, flash.queries, shape.num_heads, shape, &sources, &queries);
        }
        let Some(exact) = exact else { return };
        for document in layout.boundaries.windows(2) {
            for kv_head in 0..shape.num_kv_heads {
                backward_keys(&exact, (document[0], document[1]), kv_head, (lse, d_o), to);
            }
        }
    }
}

/// `head_norms` from `qkv` to `to`, or `head_norms_backward` of `qkv` in `to`: they take the same.
fn head_norms<D: Driver>(
    cuda: &Cuda<D>,
    kernel: &'static str,
    norms: &HeadNorms<DeviceVector<D>>,
    shape: &AttentionShape,
    (qkv, to): (&Buffer<D>, &Buffer<D>),
    rows: usize,
) {
    let width = shape.qkv_width();
    let [qkv, to] = [qkv, to].map(|buffer| buffer.rows(rows, width));
    let [q_width, k_width] = [&norms.q, &norms.k].map(|norm| norm.weight.elements);
    let (q_norms, k_norms) = (shape.q_width() / q_width, shape.kv_width() / k_width);
    // A warp for each norm: more threads would find nothing to do.
    let threads = row_threads(width).min(32 * (q_norms + k_norms) as u32);
    launch!(cuda, kernel, row_grid(rows), threads;
        qkv.argument(), qkv.stride, norms.q.weight.argument(), norms.k.weight.argument(),
        norms.q.epsilon, to.argument(), to.stride, q_norms, k_norms, q_width, k_width,
        shape.kv_width());
}

/// Keys that a query sees, as the kernels take it: 0 is all of those that there are.
fn window(shape: &AttentionShape, keys: usize) -> usize {
    shape.window.filter(|&window| window < keys).unwrap_or(0)
}

/// What scores are capped with, as the kernels take it: 0 is nothing.
fn soft_cap(shape: &AttentionShape) -> f32 {
    shape.soft_cap.unwrap_or(0.0)
}
