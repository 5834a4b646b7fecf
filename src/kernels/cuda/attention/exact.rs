//! Exact attention in blocks of query rows through batched products: for every width and window.
//!
//! For each document and key head, blocks of [`BLOCK_ROWS`] queries of all its query heads:
//! `s = q·kᵀ` in f32, softmax, `o = p·v`; backward `dv += pᵀ·do`, `dp = do·vᵀ`,
//! `ds = p ∘ (dp − δ)`, `dq = ds·k`, `dk += dsᵀ·q`, with dk and dv of the document in f32.

use super::{WorkLayout, soft_cap, window};
use crate::kernels::cuda::Cuda;
use crate::kernels::cuda::driver::{Address, Argument, Driver, Gemm, Operand, Output};
use crate::kernels::cuda::frozen::output_in_f32;
use crate::kernels::cuda::launch::{launch, row_threads, rows as row_grid};
use crate::kernels::cuda::memory::{Buffer, Rows};
use crate::kernels::{AttentionShape, TokenLayout};
use crate::plan::RegionType;

/// Query rows of a block of scores.
pub(super) const BLOCK_ROWS: usize = 256;

/// A block of query rows of one document, for the query heads of one key head.
#[derive(Clone, Copy)]
pub(super) struct Block {
    first: usize,
    rows: usize,
    first_key: usize,
    keys: usize,
    kv_head: usize,
}

pub(super) fn blocks(
    begin: usize,
    end: usize,
    window: Option<usize>,
    kv_head: usize,
) -> Vec<Block> {
    let firsts = (begin..end).step_by(BLOCK_ROWS);
    firsts
        .map(|first| {
            let rows = BLOCK_ROWS.min(end - first);
            let first_key = window.map_or(begin, |w| (first + 1).saturating_sub(w).max(begin));
            Block { first, rows, first_key, keys: first + rows - first_key, kv_head }
        })
        .collect()
}

/// What the exact path works with.
pub(super) struct Exact<'a, D: Driver> {
    cuda: &'a Cuda<D>,
    shape: &'a AttentionShape,
    qkv: Address,
    products: Address,
    probabilities: Address,
    d_products: Address,
    d_probabilities: Address,
    dk: Address,
    dv: Address,
    pub delta: Address,
}

impl<'a, D: Driver> Exact<'a, D> {
    pub fn new(
        cuda: &'a Cuda<D>,
        shape: &'a AttentionShape,
        layout: &TokenLayout,
        qkv: &Buffer<D>,
        work: &Buffer<D>,
        training: bool,
    ) -> Self {
        let heads = [shape.num_heads, shape.num_kv_heads, shape.head_dim];
        let parts = WorkLayout::exact(heads, layout.tokens(), layout.longest(), training);
        let (scores, half) = (parts.scores, parts.half_scores());
        let mut next = 0;
        let mut take = |elements: usize| {
            let address = work.at(next..next + elements);
            next += elements;
            address
        };
        let both = |elements| if training { elements } else { 0 };
        Exact {
            cuda,
            shape,
            qkv: qkv.at(0..layout.tokens() * shape.qkv_width()),
            products: take(scores),
            probabilities: take(half),
            d_products: take(both(half)),
            d_probabilities: take(both(scores)),
            dk: take(parts.keys),
            dv: take(parts.keys),
            delta: take(parts.delta),
        }
    }

    fn group(&self) -> usize {
        self.shape.num_heads / self.shape.num_kv_heads
    }

    /// Elements from one row of scores to the next.
    fn score_stride(&self, block: Block) -> usize {
        block.keys.next_multiple_of(8)
    }

    /// Rows of the block's first query head in a matrix whose heads lie side by side.
    fn queries(&self, matrix: Address, stride: usize, block: Block) -> Operand {
        let head = block.kv_head * self.group() * self.shape.head_dim;
        let address = matrix + 2 * (block.first * stride + head) as u64;
        Operand { address, stride, transposed: false, batch_stride: self.shape.head_dim }
    }

    /// Keys (or, `column` further, values) that the block sees; all heads of the group share them.
    fn keys(&self, block: Block, column: usize) -> Operand {
        let stride = self.shape.qkv_width();
        let column = column + block.kv_head * self.shape.head_dim;
        let address = self.qkv + 2 * (block.first_key * stride + column) as u64;
        Operand { address, stride, transposed: false, batch_stride: 0 }
    }

    fn k(&self, block: Block) -> Operand {
        self.keys(block, self.shape.q_width())
    }

    fn v(&self, block: Block) -> Operand {
        self.keys(block, self.shape.q_width() + self.shape.kv_width())
    }

    /// A block of scores.
    fn scores(&self, address: Address, block: Block) -> Operand {
        let stride = self.score_stride(block);
        Operand { address, stride, transposed: false, batch_stride: block.rows * stride }
    }

    fn wide_scores(&self, address: Address, block: Block) -> Output {
        let Operand { stride, batch_stride, .. } = self.scores(address, block);
        Output { address, stride, dtype: RegionType::F32, batch_stride }
    }

    /// A product for each head of the group.
    fn gemm(&self, shape: [usize; 3], a: Operand, b: Operand, c: Output) {
        self.cuda.gemm(Gemm { batches: self.group(), ..Gemm::new(shape, a, b, c) });
    }

    /// `products = q·kᵀ` of all heads of the group.
    pub fn multiply_queries(&self, block: Block) {
        let q = self.queries(self.qkv, self.shape.qkv_width(), block);
        let k = Operand { transposed: true, ..self.k(block) };
        let c = self.wide_scores(self.products, block);
        self.gemm([block.rows, block.keys, self.shape.head_dim], q, k, c);
    }

    /// `[products, probabilities]` strides, as the softmax kernels take them.
    fn score_strides(&self, block: Block) -> (i64, usize) {
        let stride = self.score_stride(block);
        ((block.rows * stride) as i64, stride)
    }

    pub fn softmax(&self, block: Block, lse: Address) {
        let (shape, (head_stride, stride)) = (self.shape, self.score_strides(block));
        let grid = [block.rows as u32, self.group() as u32, 1];
        launch!(self.cuda, "attention_softmax", grid, row_threads(8 * block.keys);
            Argument::Pointer(self.products), head_stride, stride,
            Argument::Pointer(self.probabilities), head_stride, stride,
            Argument::Pointer(lse), shape.num_heads, block.kv_head * self.group(), block.first,
            block.first_key, block.keys, window(shape, block.keys), shape.scale, soft_cap(shape));
    }

    fn softmax_backward(&self, block: Block, lse: Address) {
        let (shape, (head_stride, stride)) = (self.shape, self.score_strides(block));
        let grid = [block.rows as u32, self.group() as u32, 1];
        launch!(self.cuda, "attention_softmax_backward", grid, row_threads(8 * block.keys);
            Argument::Pointer(self.products), Argument::Pointer(self.d_probabilities), head_stride,
            stride, Argument::Pointer(self.probabilities), Argument::Pointer(self.d_products),
            head_stride, stride, Argument::Pointer(lse), Argument::Pointer(self.delta),
            shape.num_heads, block.kv_head * self.group(), block.first, block.first_key,
            block.keys, window(shape, block.keys), shape.scale, soft_cap(shape));
    }

    /// `o = p·v`.
    pub fn output(&self, block: Block, o: Rows) {
        let (d, stride) = (self.shape.head_dim, o.stride);
        let Operand { address, batch_stride, .. } = self.queries(o.address, stride, block);
        let c = Output { address, stride, dtype: RegionType::Bf16, batch_stride };
        let p = self.scores(self.probabilities, block);
        self.gemm([block.rows, d, block.keys], p, self.v(block), c);
    }

    /// Gradients of one block: dq written, dk and dv of the document added to.
    fn block_backward(&self, block: Block, begin: usize, lse: Address, d_o: Operand, dq: Output) {
        let (d, q) = (self.shape.head_dim, self.queries(self.qkv, self.shape.qkv_width(), block));
        self.multiply_queries(block);
        let v = Operand { transposed: true, ..self.v(block) };
        let to = self.wide_scores(self.d_probabilities, block);
        self.gemm([block.rows, block.keys, d], d_o, v, to);
        self.softmax_backward(block, lse);
        let ds = self.scores(self.d_products, block);
        self.gemm([block.rows, d, block.keys], ds, self.k(block), dq);
        let row = ((block.first_key - begin) * d) as u64;
        for head in 0..self.group() {
            let of = |operand: Operand| {
                let address = operand.address + 2 * (head * operand.batch_stride) as u64;
                Operand { address, ..operand }
            };
            let to = |address| output_in_f32(Rows { address, stride: d });
            let shape = [block.keys, d, block.rows];
            let add = |a, b, c| self.cuda.gemm(Gemm { beta: 1.0, ..Gemm::new(shape, a, b, c) });
            let p = Operand { transposed: true, ..of(self.scores(self.probabilities, block)) };
            add(p, of(d_o), to(self.dv + 4 * row));
            let ds = Operand { transposed: true, ..of(ds) };
            add(ds, of(q), to(self.dk + 4 * row));
        }
    }
}

/// The exact backward pass of one document and key head.
pub(super) fn backward_keys<D: Driver>(
    exact: &Exact<D>,
    (begin, end): (usize, usize),
    kv_head: usize,
    (lse, d_o): (Address, Address),
    to: Rows,
) {
    let (cuda, shape, stride) = (exact.cuda, exact.shape, to.stride);
    let (d, length) = (shape.head_dim, end - begin);
    for gradient in [exact.dk, exact.dv] {
        cuda.note(cuda.driver().zero(gradient, 4 * length * d));
    }
    for block in blocks(begin, end, shape.window, kv_head) {
        let d_o = exact.queries(d_o, shape.q_width(), block);
        let Operand { address, batch_stride, .. } = exact.queries(to.address, stride, block);
        let dq = Output { address, stride, dtype: RegionType::Bf16, batch_stride };
        exact.block_backward(block, begin, lse, d_o, dq);
    }
    let keys = shape.q_width() + kv_head * d;
    for (gradient, column) in [(exact.dk, keys), (exact.dv, keys + shape.kv_width())] {
        let target = to.column(begin * stride + column);
        launch!(cuda, "scale_rows_f32_bf16", row_grid(length), row_threads(d);
            Argument::Pointer(gradient), d, target.argument(), stride, d, 1f32, false);
    }
}
