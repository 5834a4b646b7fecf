//! Causal attention inside documents: our flash kernels where they have the head's width, else exact
//! attention in blocks of query rows through batched products.
//!
//! Exact: for each document and key head, blocks of [`BLOCK_ROWS`] queries of all its query heads:
//! `s = q·kᵀ` in f32, softmax, `o = p·v`; backward `dv += pᵀ·do`, `dp = do·vᵀ`,
//! `ds = p ∘ (dp − δ)`, `dq = ds·k`, `dk += dsᵀ·q`, with dk and dv of the document in f32. It is
//! the oracle of the flash kernels, and works for every width, window and cap.
//! Formulas: src/kernels/cpu/attention.rs.

use super::Cuda;
use super::driver::{Address, Argument, Driver, Gemm, Operand, Product};
use super::launch::{FLAT_THREADS, ROW_THREADS, launch, rows as row_grid};
use super::memory::{Buffer, Rows};
use crate::kernels::{AttentionShape, TokenLayout};
use crate::model::spec::ModelSpec;
use crate::plan::Settings;

/// Query rows of a block of scores.
const BLOCK_ROWS: usize = 256;
/// Parts of the workspace begin on this many f32 elements.
const PART_ELEMENTS: usize = 64;
/// Tokens that a block of the flash kernels handles.
const FLASH_TOKENS: usize = 64;

/// Where the parts of the workspace lie, in f32 elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkLayout {
    /// Scores of one part: rows · keys of a group of heads.
    scores: usize,
    /// dk and dv of one document and key head, each.
    keys: usize,
    /// δ of all tokens and heads.
    delta: usize,
    training: bool,
}

impl WorkLayout {
    /// For the largest document of a plan.
    pub fn new(spec: &ModelSpec, settings: &Settings) -> Self {
        let padded = |elements: usize| elements.next_multiple_of(PART_ELEMENTS);
        let training = settings.training();
        let exact = flash_width(spec.head_dim).is_none();
        let longest = settings.longest_document;
        let group = spec.num_heads / spec.num_kv_heads;
        let scores = group * BLOCK_ROWS.min(longest) * padded(longest);
        WorkLayout {
            scores: if exact { padded(scores) } else { 0 },
            keys: if exact && training { padded(longest * spec.head_dim) } else { 0 },
            delta: if training { padded(settings.tokens * spec.num_heads) } else { 0 },
            training,
        }
    }

    /// f32 elements of everything: products, probabilities (bf16), and their gradients.
    pub fn elements(&self) -> usize {
        let pair = self.scores + self.scores.div_ceil(2).next_multiple_of(PART_ELEMENTS);
        self.delta + 2 * self.keys + if self.training { 2 * pair } else { pair }
    }
}

/// The width if there are flash kernels for it.
fn flash_width(head_dim: usize) -> Option<Flash> {
    let [forward, keys, queries] = match head_dim {
        64 => ["flash_forward_64", "flash_backward_keys_64", "flash_backward_queries_64"],
        96 => ["flash_forward_96", "flash_backward_keys_96", "flash_backward_queries_96"],
        128 => ["flash_forward_128", "flash_backward_keys_128", "flash_backward_queries_128"],
        256 => ["flash_forward_256", "flash_backward_keys_256", "flash_backward_queries_256"],
        _ => return None,
    };
    // Shared memory as kernels.cu lists it.
    let shared = match head_dim {
        64 => [18_432, 37_376, 36_864],
        96 => [26_624, 53_760, 53_248],
        128 => [34_816, 70_144, 69_632],
        _ => [67_584, 84_608, 84_480],
    };
    let keys_threads = if head_dim == 256 { 256 } else { 128 };
    Some(Flash {
        forward: (forward, shared[0], 128),
        keys: (keys, shared[1], keys_threads),
        queries: (queries, shared[2], 128),
    })
}

/// Name, shared memory and threads of the three kernels.
struct Flash {
    forward: (&'static str, u32, u32),
    keys: (&'static str, u32, u32),
    queries: (&'static str, u32, u32),
}

/// A block of query rows of one document, for the query heads of one key head.
#[derive(Clone, Copy)]
struct Block {
    first: usize,
    rows: usize,
    first_key: usize,
    keys: usize,
    kv_head: usize,
}

fn blocks(begin: usize, end: usize, window: Option<usize>, kv_head: usize) -> Vec<Block> {
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
struct Exact<'a, D: Driver> {
    cuda: &'a Cuda<D>,
    shape: &'a AttentionShape,
    qkv: Address,
    products: Address,
    probabilities: Address,
    d_products: Address,
    d_probabilities: Address,
    dk: Address,
    dv: Address,
    delta: Address,
}

impl<'a, D: Driver> Exact<'a, D> {
    fn new(
        cuda: &'a Cuda<D>,
        shape: &'a AttentionShape,
        layout: &TokenLayout,
        qkv: &Buffer<D>,
        work: &Buffer<D>,
        training: bool,
    ) -> Self {
        let padded = |elements: usize| elements.next_multiple_of(PART_ELEMENTS);
        let (group, longest) = (shape.num_heads / shape.num_kv_heads, layout.longest());
        let scores = padded(group * BLOCK_ROWS.min(longest) * padded(longest));
        let mut next = 0;
        let mut take = |elements: usize| {
            let address = work.at(next..next + elements);
            next += elements;
            address
        };
        let both = |elements| if training { elements } else { 0 };
        let half = padded(scores.div_ceil(2));
        Exact {
            cuda,
            shape,
            qkv: qkv.at(0..layout.tokens() * shape.qkv_width()),
            products: take(scores),
            probabilities: take(half),
            d_products: take(both(half)),
            d_probabilities: take(both(scores)),
            dk: take(both(padded(longest * shape.head_dim))),
            dv: take(both(padded(longest * shape.head_dim))),
            delta: take(both(padded(layout.tokens() * shape.num_heads))),
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

    fn wide_scores(&self, address: Address, block: Block) -> Product {
        let Operand { stride, batch_stride, .. } = self.scores(address, block);
        Product { address, stride, wide: true, batch_stride }
    }

    fn gemm(&self, shape: [usize; 3], a: Operand, b: Operand, c: Product) {
        let batches = self.group();
        let gemm = Gemm { shape, alpha: 1.0, a, b, beta: 0.0, c, batches };
        self.cuda.note(self.cuda.driver().gemm(&gemm));
    }

    /// `products = q·kᵀ` of all heads of the group.
    fn multiply_queries(&self, block: Block) {
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

    fn softmax(&self, block: Block, lse: Address) {
        let (shape, (head_stride, stride)) = (self.shape, self.score_strides(block));
        let grid = [block.rows as u32, self.group() as u32, 1];
        launch!(self.cuda, "attention_softmax", grid, FLAT_THREADS;
            Argument::Pointer(self.products), head_stride, stride,
            Argument::Pointer(self.probabilities), head_stride, stride,
            Argument::Pointer(lse), shape.num_heads, block.kv_head * self.group(), block.first,
            block.first_key, block.keys, shape.window.unwrap_or(0), shape.scale(), 0f32);
    }

    fn softmax_backward(&self, block: Block, lse: Address) {
        let (shape, (head_stride, stride)) = (self.shape, self.score_strides(block));
        let grid = [block.rows as u32, self.group() as u32, 1];
        launch!(self.cuda, "attention_softmax_backward", grid, FLAT_THREADS;
            Argument::Pointer(self.products), Argument::Pointer(self.d_probabilities), head_stride,
            stride, Argument::Pointer(self.probabilities), Argument::Pointer(self.d_products),
            head_stride, stride, Argument::Pointer(lse), Argument::Pointer(self.delta),
            shape.num_heads, block.kv_head * self.group(), block.first, block.first_key,
            block.keys, shape.window.unwrap_or(0), shape.scale(), 0f32);
    }

    /// `o = p·v`.
    fn output(&self, block: Block, o: Rows) {
        let (d, stride) = (self.shape.head_dim, o.stride);
        let Operand { address, batch_stride, .. } = self.queries(o.address, stride, block);
        let c = Product { address, stride, wide: false, batch_stride };
        let p = self.scores(self.probabilities, block);
        self.gemm([block.rows, d, block.keys], p, self.v(block), c);
    }

    /// Gradients of one block: dq written, dk and dv of the document added to.
    fn block_backward(&self, block: Block, begin: usize, lse: Address, d_o: Operand, dq: Product) {
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
            let to = |address| Product { address, stride: d, wide: true, batch_stride: 0 };
            let shape = [block.keys, d, block.rows];
            let p = Operand { transposed: true, ..of(self.scores(self.probabilities, block)) };
            self.cuda.gemm(shape, (1.0, 1.0), (p, of(d_o)), to(self.dv + 4 * row));
            let ds = Operand { transposed: true, ..of(ds) };
            self.cuda.gemm(shape, (1.0, 1.0), (ds, of(q)), to(self.dk + 4 * row));
        }
    }
}

/// o and the log-sum-exp.
pub(super) fn forward<D: Driver>(
    cuda: &Cuda<D>,
    shape: &AttentionShape,
    layout: &TokenLayout,
    qkv: &Buffer<D>,
    (o, lse): (&Buffer<D>, &Buffer<D>),
    work: &Buffer<D>,
) {
    let tokens = layout.tokens();
    let (o, lse) = (o.rows(tokens, shape.q_width()), lse.at(0..tokens * shape.num_heads));
    if let Some(flash) = flash_width(shape.head_dim) {
        let outputs = [o.argument(), o.stride.into(), Argument::Pointer(lse)];
        let grid = [layout.longest().div_ceil(FLASH_TOKENS) as u32, shape.num_heads as u32];
        return launch_flash(cuda, flash.forward, grid, shape, layout, qkv, &outputs);
    }
    let exact = Exact::new(cuda, shape, layout, qkv, work, false);
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

/// Overwrites dqkv.
pub(super) fn backward<D: Driver>(
    cuda: &Cuda<D>,
    shape: &AttentionShape,
    layout: &TokenLayout,
    (qkv, o, lse, d_o): (&Buffer<D>, &Buffer<D>, &Buffer<D>, &Buffer<D>),
    dqkv: &Buffer<D>,
    work: &Buffer<D>,
) {
    let (tokens, width) = (layout.tokens(), shape.q_width());
    let lse = lse.at(0..tokens * shape.num_heads);
    let (o, d_o) = (o.rows(tokens, width), d_o.at(0..tokens * width));
    let to = dqkv.rows(tokens, shape.qkv_width());
    let flash = flash_width(shape.head_dim);
    let exact = flash.is_none().then(|| Exact::new(cuda, shape, layout, qkv, work, true));
    let delta = exact.as_ref().map_or(work.at(0..tokens * shape.num_heads), |exact| exact.delta);
    launch!(cuda, "attention_delta", row_grid(tokens), ROW_THREADS;
        Argument::Pointer(d_o), width, o.argument(), o.stride, Argument::Pointer(delta),
        shape.num_heads, shape.head_dim);
    if let Some(flash) = flash {
        let gradients = [
            Argument::Pointer(d_o),
            width.into(),
            Argument::Pointer(lse),
            Argument::Pointer(delta),
        ];
        let column = |column: usize| to.column(column).argument();
        let blocks = layout.longest().div_ceil(FLASH_TOKENS) as u32;
        let mut keys = gradients.to_vec();
        keys.extend([column(width), column(width + shape.kv_width()), to.stride.into()]);
        let grid = [blocks, shape.num_kv_heads as u32];
        launch_flash(cuda, flash.keys, grid, shape, layout, qkv, &keys);
        let mut queries = gradients.to_vec();
        queries.extend([column(0), to.stride.into()]);
        let grid = [blocks, shape.num_heads as u32];
        launch_flash(cuda, flash.queries, grid, shape, layout, qkv, &queries);
    }
    let Some(exact) = exact else { return };
    for document in layout.boundaries.windows(2) {
        for kv_head in 0..shape.num_kv_heads {
            backward_keys(&exact, (document[0], document[1]), kv_head, (lse, d_o), to);
        }
    }
}

/// The exact backward pass of one document and key head.
fn backward_keys<D: Driver>(
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
        let dq = Product { address, stride, wide: false, batch_stride };
        exact.block_backward(block, begin, lse, d_o, dq);
    }
    let keys = shape.q_width() + kv_head * d;
    for (gradient, column) in [(exact.dk, keys), (exact.dv, keys + shape.kv_width())] {
        let target = to.column(begin * stride + column);
        launch!(cuda, "scale_rows_f32_bf16", row_grid(length), ROW_THREADS;
            Argument::Pointer(gradient), d, target.argument(), stride, d, 1f32, false);
    }
}

/// Appends k and v to the cache and attends to all of it.
pub(super) fn cached<D: Driver>(
    cuda: &Cuda<D>,
    shape: &AttentionShape,
    qkv: &Buffer<D>,
    (cache, past): (&Buffer<D>, usize),
    o: &Buffer<D>,
    rows: usize,
) {
    const THREADS: u32 = 128;
    let (stride, kv) = (shape.qkv_width(), 2 * shape.kv_width());
    let (source, o) = (qkv.at(0..rows * stride), o.rows(rows, shape.q_width()));
    let end = cache.at(past * kv..(past + rows) * kv);
    launch!(cuda, "scale_rows_bf16", row_grid(rows), ROW_THREADS;
        Argument::Pointer(source + 2 * shape.q_width() as u64), stride, Argument::Pointer(end), kv,
        kv, 1f32, false);
    let keys = cache.at(0..(past + rows) * kv);
    launch!(cuda, "attention_decode", [rows as u32, shape.num_heads as u32, 1], THREADS;
        Argument::Pointer(source), stride, Argument::Pointer(keys),
        Argument::Pointer(keys + 2 * shape.kv_width() as u64), kv,
        o.argument(), o.stride, shape.num_heads, shape.num_kv_heads, shape.head_dim, past,
        shape.window.unwrap_or(0), shape.scale(), 0f32);
}

fn launch_flash<D: Driver>(
    cuda: &Cuda<D>,
    (kernel, shared_bytes, threads): (&'static str, u32, u32),
    [blocks, heads]: [u32; 2],
    shape: &AttentionShape,
    layout: &TokenLayout,
    qkv: &Buffer<D>,
    rest: &[Argument],
) {
    let Some(boundaries) = cuda.stage_boundaries(layout) else { return };
    let stride = shape.qkv_width();
    let source = qkv.at(0..layout.tokens() * stride);
    let column = |column: usize| Argument::Pointer(source + 2 * column as u64);
    let mut arguments = vec![
        column(0),
        stride.into(),
        column(shape.q_width()),
        column(shape.q_width() + shape.kv_width()),
        stride.into(),
        boundaries,
        boundaries,
        shape.num_heads.into(),
        shape.num_kv_heads.into(),
        shape.window.unwrap_or(0).into(),
        shape.scale().into(),
        0f32.into(),
    ];
    arguments.extend_from_slice(rest);
    let documents = layout.boundaries.len().saturating_sub(1) as u32;
    cuda.launch_shared(kernel, [blocks, heads, documents], threads, shared_bytes, &mut arguments);
}
