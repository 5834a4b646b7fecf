//! Causal attention inside documents: our flash kernels where they have the head's width, else, or
//! where it is asked for, the [exact](exact) path, which is also their oracle.
//! Formulas: src/kernels/cpu/attention/mod.rs.

mod exact;
mod tiles;

use clap::ValueEnum;

use super::Cuda;
use super::driver::{Argument, Driver};
use super::launch::{launch, row_threads, rows as row_grid};
use super::memory::{Buffer, Rows};
use crate::error::{Error, Result};
use crate::kernels::{AttentionShape, TokenLayout};
use crate::model::spec::ModelSpec;
use crate::plan::Settings;
use exact::{Exact, backward_keys, blocks};
use tiles::tiles_of_launch;
pub(super) use tiles::{LAUNCH_FLOPS, heaviest_first};

/// Query rows of a block of scores.
const BLOCK_ROWS: usize = 256;
/// Parts of the workspace begin on this many f32 elements.
const PART_ELEMENTS: usize = 64;

/// Head widths that the flash kernels have.
const FLASH_WIDTHS: [usize; 4] = [64, 96, 128, 256];
/// Columns of a head that `attention_decode` holds.
const WIDEST: usize = 256;

/// How attention is computed on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum AttnImplementation {
    /// Flash if there are kernels for the model's head size, else exact.
    #[default]
    Auto,
    /// Flash attention: scores are computed and used tile by tile.
    #[value(alias = "flash_attention_2")]
    Flash,
    /// Whole rows of scores: slower, for any head size.
    #[value(alias = "eager")]
    Exact,
}

impl AttnImplementation {
    /// Whether it has kernels for heads of this width.
    ///
    /// # Errors
    /// `Usage` for the flash kernels and a width that they lack, and for one that none has.
    pub fn check(self, head_dim: usize) -> Result<()> {
        if head_dim > WIDEST {
            let what =
                format_args!("heads of {head_dim} columns, the CUDA backend has up to {WIDEST}");
            return Err(Error::usage(what).hint("use `--device cpu`"));
        }
        if self != AttnImplementation::Flash || FLASH_WIDTHS.contains(&head_dim) {
            return Ok(());
        }
        let what = format_args!(
            "`--attn-implementation flash` has kernels for heads of {FLASH_WIDTHS:?}, this model's \
             have {head_dim} columns"
        );
        Err(Error::usage(what).hint("use `--attn-implementation exact`, or leave it to `auto`"))
    }

    /// The flash kernels, if heads of this width shall have them.
    fn flash(self, head_dim: usize) -> Option<Flash> {
        if self == AttnImplementation::Exact { None } else { flash_width(head_dim) }
    }
}

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
    pub fn new(spec: &ModelSpec, settings: &Settings, attention: AttnImplementation) -> Self {
        let heads = [spec.num_heads, spec.num_kv_heads, spec.head_dim];
        let (tokens, longest) = (settings.tokens, settings.longest_document);
        let exact = WorkLayout::exact(heads, tokens, longest, settings.training());
        match attention.flash(spec.head_dim) {
            Some(_) => WorkLayout { scores: 0, keys: 0, ..exact },
            None => exact,
        }
    }

    /// That of the exact path, for H and K heads of so many columns.
    fn exact(
        [num_heads, num_kv_heads, head_dim]: [usize; 3],
        tokens: usize,
        longest: usize,
        training: bool,
    ) -> Self {
        let group = num_heads / num_kv_heads;
        let in_training = |elements: usize| if training { padded(elements) } else { 0 };
        WorkLayout {
            scores: padded(group * BLOCK_ROWS.min(longest) * padded(longest)),
            keys: in_training(longest * head_dim),
            delta: in_training(tokens * num_heads),
            training,
        }
    }

    /// Scores in bf16.
    fn half_scores(&self) -> usize {
        padded(self.scores.div_ceil(2))
    }

    /// f32 elements of everything: products, probabilities (bf16), and their gradients.
    pub fn elements(&self) -> usize {
        let pair = self.scores + self.half_scores();
        self.delta + 2 * self.keys + if self.training { 2 * pair } else { pair }
    }
}

fn padded(elements: usize) -> usize {
    elements.next_multiple_of(PART_ELEMENTS)
}

/// Keys that a query sees, as the kernels take it: 0 is all of those that there are.
fn window(shape: &AttentionShape, keys: usize) -> usize {
    shape.window.filter(|&window| window < keys).unwrap_or(0)
}

/// What scores are capped with, as the kernels take it: 0 is nothing.
fn soft_cap(shape: &AttentionShape) -> f32 {
    shape.soft_cap.unwrap_or(0.0)
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
        64 => [18_432, 37_376, 18_432],
        96 => [26_624, 53_760, 26_624],
        128 => [32_768, 66_048, 32_768],
        _ => [67_584, 84_608, 84_480],
    };
    let keys_threads = if head_dim == 256 { 256 } else { 128 };
    Some(Flash {
        forward: (forward, shared[0], 128),
        keys: (keys, shared[1], keys_threads),
        queries: (queries, shared[2], 128),
    })
}

/// The kernels that work in shared memory, and its bytes.
pub(super) fn shared_bytes() -> impl Iterator<Item = (&'static str, u32)> {
    let widths = FLASH_WIDTHS.into_iter().filter_map(flash_width);
    let kernels = widths.flat_map(|flash| [flash.forward, flash.keys, flash.queries]);
    kernels.map(|(kernel, bytes, _)| (kernel, bytes))
}

/// Name, shared memory and threads of the three kernels.
struct Flash {
    forward: (&'static str, u32, u32),
    keys: (&'static str, u32, u32),
    queries: (&'static str, u32, u32),
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
    if let Some(flash) = cuda.attention.flash(shape.head_dim) {
        let outputs = [o.argument(), o.stride.into(), Argument::Pointer(lse)];
        let heads = shape.num_heads;
        let sources = Sources::of_tokens(shape, layout, qkv);
        return launch_flash(cuda, flash.forward, heads, shape, &sources, &outputs);
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
    let flash = cuda.attention.flash(shape.head_dim);
    let exact = flash.is_none().then(|| Exact::new(cuda, shape, layout, qkv, work, true));
    let delta = exact.as_ref().map_or(work.at(0..tokens * shape.num_heads), |exact| exact.delta);
    launch!(cuda, "attention_delta", row_grid(tokens), row_threads(256 * shape.num_heads);
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
        launch_flash(cuda, flash.keys, shape.num_kv_heads, shape, &sources, &keys);
        let mut queries = gradients.to_vec();
        queries.extend([column(0), to.stride.into()]);
        launch_flash(cuda, flash.queries, shape.num_heads, shape, &sources, &queries);
    }
    let Some(exact) = exact else { return };
    for document in layout.boundaries.windows(2) {
        for kv_head in 0..shape.num_kv_heads {
            backward_keys(&exact, (document[0], document[1]), kv_head, (lse, d_o), to);
        }
    }
}

/// From so many new tokens on a tile of the flash kernels is worth it.
const FLASH_ROWS: usize = 8;

/// Appends k and v to the cache and attends to all of it.
pub(super) fn cached<D: Driver>(
    cuda: &Cuda<D>,
    shape: &AttentionShape,
    qkv: &Buffer<D>,
    (cache, past): (&Buffer<D>, usize),
    (o, lse): (&Buffer<D>, &Buffer<D>),
    rows: usize,
) {
    const THREADS: u32 = 256;
    let kv = 2 * shape.kv_width();
    let (q, o) = (qkv.rows(rows, shape.qkv_width()), o.rows(rows, shape.q_width()));
    let (new, end) = (q.column(shape.q_width()), cache.at(past * kv..(past + rows) * kv));
    launch!(cuda, "scale_rows_bf16", row_grid(rows), row_threads(kv);
        new.argument(), new.stride, Argument::Pointer(end), kv, kv, 1f32, false);
    let k = Rows { address: cache.at(0..(past + rows) * kv), stride: kv };
    let v = k.column(shape.kv_width());
    let flash = cuda.attention.flash(shape.head_dim).filter(|_| rows >= FLASH_ROWS);
    if let Some(flash) = flash {
        let sources = Sources { boundaries: &[0, rows], past, q, k, v };
        let lse = Argument::Pointer(lse.at(0..rows * shape.num_heads));
        let outputs = [o.argument(), o.stride.into(), lse];
        return launch_flash(cuda, flash.forward, shape.num_heads, shape, &sources, &outputs);
    }
    launch!(cuda, "attention_decode", [rows as u32, shape.num_heads as u32, 1], THREADS;
        q.argument(), q.stride, k.argument(), v.argument(), k.stride, o.argument(), o.stride, shape.num_heads, shape.num_kv_heads, shape.head_dim, past,
        window(shape, past + rows), shape.scale, soft_cap(shape));
}

/// What the flash kernels read: documents of tokens, or one whose first keys were cached before.
struct Sources<'a> {
    boundaries: &'a [usize],
    /// Keys before the first query.
    past: usize,
    q: Rows,
    k: Rows,
    v: Rows,
}

impl<'a> Sources<'a> {
    fn of_tokens<D: Driver>(
        shape: &AttentionShape,
        layout: &'a TokenLayout,
        qkv: &Buffer<D>,
    ) -> Self {
        let q = qkv.rows(layout.tokens(), shape.qkv_width());
        let (k, v) = (q.column(shape.q_width()), q.column(shape.q_width() + shape.kv_width()));
        Sources { boundaries: &layout.boundaries, past: 0, q, k, v }
    }

    /// Keys of the longest document.
    fn longest(&self) -> usize {
        let lengths = self.boundaries.windows(2).map(|bounds| bounds[1] - bounds[0]);
        self.past + lengths.max().unwrap_or(0)
    }
}

fn launch_flash<D: Driver>(
    cuda: &Cuda<D>,
    (kernel, shared_bytes, threads): (&'static str, u32, u32),
    heads: usize,
    shape: &AttentionShape,
    sources: &Sources,
    rest: &[Argument],
) {
    let &Sources { boundaries, past, q, k, v } = sources;
    let Some(documents) = cuda.stage_documents(boundaries, past) else { return };
    let longest = sources.longest();
    const TILES: usize = 7;
    let mut arguments = vec![
        q.argument(),
        q.stride.into(),
        k.argument(),
        v.argument(),
        k.stride.into(),
        Argument::Pointer(documents.boundaries),
        Argument::Pointer(documents.key_boundaries),
        Argument::Pointer(documents.tiles),
        shape.num_heads.into(),
        shape.num_kv_heads.into(),
        window(shape, longest).into(),
        shape.scale.into(),
        soft_cap(shape).into(),
    ];
    arguments.extend_from_slice(rest);
    let at_once = tiles_of_launch(shape, longest, cuda.launch_flops);
    for first in (0..documents.count).step_by(at_once) {
        let tiles = at_once.min(documents.count - first);
        let blocks = u32::try_from(tiles * heads).expect("fewer blocks than addresses");
        let address = documents.tiles + (size_of::<[u32; 2]>() * first) as u64;
        arguments[TILES] = Argument::Pointer(address);
        cuda.launch_shared(kernel, [blocks, 1, 1], threads, shared_bytes, &mut arguments);
    }
}
