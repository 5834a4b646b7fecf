//! The backward pass of a gated MLP with adapters on gate, up and down, in one pass over its widest
//! matrices.
//!
//! With F the width of the MLP, what lies between the products with frozen weights reads and writes,
//! in elements of a token:
//!
//! | | one by one | `mlp_adapters_backward` |
//! |---|---|---|
//! | h = a(g) ∘ u | 3·F | |
//! | dg, du from dh | 5·F | 5·F |
//! | gA of down: tᵀ·h | F | |
//! | t of gate and up: dg·B, du·B | 2·F | |
//! | gB of gate and up: dgᵀ·ax, duᵀ·ax | 2·F | |
//!
//! 13·F against 5·F, h is nowhere, and sums over columns and rows go through memory in f32, for rank
//! 16 a tenth of what is saved. What the adapters multiply is in shared memory while it is there; the
//! products themselves are few enough to hide behind the reading.

use super::Cuda;
use super::driver::{Address, Argument, Driver};
use super::elementwise::activation_code;
use super::frozen::{self, LoraInput, b_of, gradient_tail};
use super::launch::{FLAT_THREADS, flat, launch};
use super::low_rank;
use super::memory::{Buffer, Rows};
use super::together::Stacked;
use crate::model::block::{GatedMlp, Linear, LinearAdapter};
use crate::model::parameters::Parameters;

/// The kernel for adapters of up to so many columns, and its dynamic shared memory: kernels.cu.
const KERNELS: [(usize, &str, u32); 2] =
    [(16, "mlp_adapters_backward_16", 101_376), (32, "mlp_adapters_backward_32", 82_944)];
/// Columns of a block times those of the adapters.
const STRIP: usize = 8192;
/// Blocks of a pass at most, one or two for each multiprocessor; a strip has several where it can. Each
/// leaves sums over its rows, so these have `TILE_ROWS` at least four times.
const BLOCKS: usize = 256;
const CHUNK_ROWS: usize = 4 * TILE_ROWS;
/// Rows that a block works on at a time.
const TILE_ROWS: usize = 16;
/// Matrices with sums over rows: of dg, du and h.
const MATRICES: usize = 3;
/// What pieces of 16 bytes are made of.
const PIECE: usize = 8;

/// The kernels that work in shared memory, and its bytes.
pub(super) fn shared_bytes() -> impl Iterator<Item = (&'static str, u32)> {
    KERNELS.into_iter().map(|(_, kernel, bytes)| (kernel, bytes))
}

/// How a pass over `rows` is cut.
struct Cut {
    /// Columns of the adapters, as the kernel counts them.
    ranks: usize,
    kernel: &'static str,
    shared_bytes: u32,
    strips: usize,
    chunks: usize,
    chunk_rows: usize,
    /// f32 elements of the sums over columns, and over rows.
    inner: usize,
    gradients: usize,
}

impl Cut {
    /// For adapters of these ranks on gate, up and down; `None` where there is no kernel for them.
    fn new(ranks: [usize; 3], rows: usize, width: usize) -> Option<Self> {
        let fits = |&rank: &usize| rank > 0 && rank.is_multiple_of(PIECE);
        let most = *ranks.iter().max()?;
        let (ranks, kernel, shared_bytes) = KERNELS
            .into_iter()
            .find(|(columns, ..)| most <= *columns)
            .filter(|_| ranks.iter().all(fits) && width.is_multiple_of(PIECE))?;
        let strips = width.div_ceil(STRIP / ranks);
        let chunks = (BLOCKS / strips).max(1);
        let chunk_rows = rows.div_ceil(chunks).next_multiple_of(TILE_ROWS).max(CHUNK_ROWS);
        let chunks = rows.div_ceil(chunk_rows);
        let inner = strips * rows * 2 * ranks;
        let gradients = chunks * MATRICES * ranks * width;
        Some(Cut { ranks, kernel, shared_bytes, strips, chunks, chunk_rows, inner, gradients })
    }
}

/// f32 elements that the sums of a pass over `rows` take; `None` where there is no kernel for them.
pub(super) fn sum_elements(ranks: [usize; 3], rows: usize, width: usize) -> Option<usize> {
    Cut::new(ranks, rows, width).map(|cut| cut.inner + cut.gradients)
}

/// What the kernel reads 16 bytes at a time lies on 16 bytes.
fn aligned(rows: &Rows) -> bool {
    rows.address.is_multiple_of(16) && rows.stride.is_multiple_of(PIECE)
}

/// A linear's adapter and its matrices.
struct Part<'a, D: Driver> {
    linear: &'a Linear<Cuda<D>>,
    adapter: LinearAdapter,
    /// A, then B.
    pair: Buffer<D>,
    /// Addresses of their gradients.
    gradients: [Address; 2],
}

impl<'a, D: Driver> Part<'a, D> {
    fn new(
        parameters: &Parameters<Cuda<D>>,
        working: &Buffer<D>,
        gradients: &Buffer<D>,
        linear: &'a Linear<Cuda<D>>,
    ) -> Option<Self> {
        let adapter = linear.adapter?;
        let range = parameters.pair_range(adapter.index);
        let middle = range.start + adapter.shape.a_elements();
        let addresses = [range.start..middle, middle..range.end].map(|matrix| gradients.at(matrix));
        Some(Part { linear, adapter, pair: working.part(range), gradients: addresses })
    }

    fn rank(&self) -> usize {
        self.adapter.shape.rank
    }

    fn b(&self) -> Argument {
        b_of(&self.pair, &self.adapter.shape).argument()
    }

    /// `dx = dy·W + t·A`, or `+=`.
    fn input_gradient(
        &self,
        cuda: &Cuda<D>,
        (dy, t): (Rows, Rows),
        dx: &Buffer<D>,
        rows: usize,
        accumulate: bool,
    ) {
        let lora = Some(LoraInput { shape: &self.adapter.shape, pair: &self.pair, t });
        frozen::input_gradient(cuda, &self.linear.weight, lora, dy, dx, rows, accumulate);
    }
}

/// Gradients of all three adapters and `dx`, that of what gate and up read, from `dy`, that of what
/// down made; dg and du are left in `d_gate` and `d_up`. `false`, and nothing done, where the plan has
/// no room for it, an adapter is missing, or there is no kernel for their ranks.
#[allow(clippy::too_many_arguments)]
pub(super) fn backward<D: Driver>(
    cuda: &Cuda<D>,
    parameters: &Parameters<Cuda<D>>,
    mlp: &GatedMlp<Cuda<D>>,
    (dy, x): (&Buffer<D>, &Buffer<D>),
    [d_gate, d_up]: [&Buffer<D>; 2],
    dx: &Buffer<D>,
    t: &Buffer<D>,
    gradients: &Buffer<D>,
    rows: usize,
) -> bool {
    let tried =
        try_backward(cuda, parameters, mlp, (dy, x), [d_gate, d_up], dx, t, gradients, rows);
    tried.is_some()
}

#[allow(clippy::too_many_arguments)]
fn try_backward<D: Driver>(
    cuda: &Cuda<D>,
    parameters: &Parameters<Cuda<D>>,
    mlp: &GatedMlp<Cuda<D>>,
    (dy, x): (&Buffer<D>, &Buffer<D>),
    [d_gate, d_up]: [&Buffer<D>; 2],
    dx: &Buffer<D>,
    t: &Buffer<D>,
    gradients: &Buffer<D>,
    rows: usize,
) -> Option<()> {
    let (working, sums) = (parameters.working()?, cuda.mlp_sums()?);
    let part = |linear| Part::new(parameters, working, gradients, linear);
    let [gate, up, down] = [part(mlp.gate)?, part(mlp.up)?, part(mlp.down)?];
    let (ranks, width) = ([gate.rank(), up.rank(), down.rank()], mlp.gate.output.width);
    let cut = Cut::new(ranks, rows, width)?;
    if cut.inner + cut.gradients > sums.elements {
        return None;
    }
    let ax = &mlp.saved.lora_x;
    let [ax_gate, ax_up, ax_down] = [&gate, &up, &down].map(|p| ax.band(p.adapter.columns, rows));
    let dy_rows = dy.band(down.linear.output, rows);
    let t_down = gradient_tail((dy, down.linear.output), rows, down.rank())?;
    let [g, u] = [&mlp.saved.gate, &mlp.saved.up].map(|buffer| buffer.rows(rows, width));
    let [dg, du] = [d_gate, d_up].map(|buffer| buffer.rows(rows, width));
    let [t_gate, t_up] = [d_gate.tail(rows, gate.rank())?, d_up.tail(rows, up.rank())?];
    if ![g, u, dg, du, ax_gate, ax_up, t_down].iter().all(aligned) {
        return None;
    }
    let stack = Stacked::new(cuda, &[mlp.gate, mlp.up])?;

    let shape = &down.adapter.shape;
    low_rank::inner_gradient(cuda, shape, &down.pair, dy_rows, t_down, rows);
    low_rank::gradient_of_b(cuda, shape, (dy_rows, ax_down), down.gradients[1], rows);
    down.input_gradient(cuda, (dy_rows, t_down), d_gate, rows, false);

    let inner = sums.argument(cut.inner);
    let over_rows = Argument::Pointer(sums.at(cut.inner..cut.inner + cut.gradients));
    let mut arguments = [
        activation_code(mlp.activation).into(),
        g.argument(),
        g.stride.into(),
        u.argument(),
        u.stride.into(),
        dg.argument(),
        dg.stride.into(),
        dg.argument(),
        dg.stride.into(),
        du.argument(),
        du.stride.into(),
        gate.b(),
        gate.rank().into(),
        up.b(),
        up.rank().into(),
        ax_gate.argument(),
        ax_up.argument(),
        ax_gate.stride.into(),
        t_down.argument(),
        t_down.stride.into(),
        down.rank().into(),
        rows.into(),
        width.into(),
        cut.chunk_rows.into(),
        inner,
        over_rows,
    ];
    let grid = [cut.strips as u32, cut.chunks as u32, 1];
    cuda.launch_shared(cut.kernel, grid, FLAT_THREADS, cut.shared_bytes, &mut arguments);
    let (scale_gate, scale_up) = (gate.adapter.shape.scale, up.adapter.shape.scale);
    let both = t.rows(rows, gate.rank() + up.rank());
    launch!(cuda, "mlp_adapters_inner", flat(rows * cut.ranks), FLAT_THREADS;
        inner, cut.strips, rows, cut.ranks, gate.rank(), up.rank(), scale_gate, scale_up,
        t_gate.argument(), t_gate.stride, t_up.argument(), t_up.stride, both.argument(),
        both.stride);
    let grid =
        [width.div_ceil(FLAT_THREADS as usize) as u32, (MATRICES * cut.ranks / PIECE) as u32, 1];
    let [gb_gate, gb_up, ga_down] = [gate.gradients[1], up.gradients[1], down.gradients[0]];
    launch!(cuda, "mlp_adapters_gradients", grid, FLAT_THREADS;
        over_rows, cut.chunks, cut.ranks, width, gate.rank(), up.rank(), down.rank(), scale_gate,
        scale_up, Argument::Pointer(gb_gate), Argument::Pointer(gb_up), Argument::Pointer(ga_down));

    stack.add_gradient_of_a(cuda, parameters, (both, x), gradients, rows);
    gate.input_gradient(cuda, (dg, t_gate), dx, rows, false);
    up.input_gradient(cuda, (du, t_up), dx, rows, true);
    Some(())
}
