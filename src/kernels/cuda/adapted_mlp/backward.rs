//! From the gradient of h to those of gate, up and all adapters.

use super::{CHUNK_ROWS, PIECE, aligned, chunk_rows, most_chunks};
use crate::kernels::Write;
use crate::kernels::cuda::Cuda;
use crate::kernels::cuda::driver::{Address, Argument, Driver};
use crate::kernels::cuda::frozen::{self, LoraInput, b_of, gradient_tail};
use crate::kernels::cuda::launch::{FLAT_THREADS, flat, launch};
use crate::kernels::cuda::low_rank;
use crate::kernels::cuda::memory::{Buffer, Rows};
use crate::kernels::cuda::mlp::activation_code;
use crate::kernels::cuda::together::StackedAdapters;
use crate::model::block::{GatedMlp, GatedMlpGradients, Linear, LinearAdapter, SavedMlp};
use crate::model::parameters::Parameters;
use crate::model::spec::Activation;

/// The kernel for adapters of up to so many columns, and its dynamic shared memory: kernels.cu.
pub(super) const KERNELS: [(usize, &str, u32); 2] =
    [(16, "mlp_adapters_backward_16", 101_376), (32, "mlp_adapters_backward_32", 82_944)];
/// Columns of a block times those of the adapters.
const STRIP: usize = 8192;
/// Matrices with sums over rows: of dg, du and h.
const MATRICES: usize = 3;

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
    /// The cut for adapters of these ranks on gate, up and down; `None` where there is no kernel for them.
    fn new(ranks: [usize; 3], rows: usize, width: usize) -> Option<Self> {
        let fits = |&rank: &usize| rank > 0 && rank.is_multiple_of(PIECE);
        let most = *ranks.iter().max()?;
        let (ranks, kernel, shared_bytes) = KERNELS
            .into_iter()
            .find(|(columns, ..)| most <= *columns)
            .filter(|_| ranks.iter().all(fits) && width.is_multiple_of(PIECE))?;
        let strips = width.div_ceil(STRIP / ranks);
        let chunk_rows = chunk_rows(rows, strips);
        let chunks = rows.div_ceil(chunk_rows);
        let inner = strips * rows * 2 * ranks;
        let gradients = chunks * MATRICES * ranks * width;
        Some(Cut { ranks, kernel, shared_bytes, strips, chunks, chunk_rows, inner, gradients })
    }

    fn fits<D: Driver>(&self, sums: &Buffer<D>) -> bool {
        self.inner + self.gradients <= sums.elements
    }

    /// f32 elements that the sums of a pass over so many rows or fewer take: fewer may be more chunks.
    fn elements(&self, rows: usize) -> usize {
        let chunks = most_chunks(self.strips).min(rows.div_ceil(CHUNK_ROWS));
        self.inner + self.gradients / self.chunks.max(1) * chunks
    }
}

/// f32 elements that the sums of passes over up to `rows` take; `None` where there is no kernel for them.
pub(in crate::kernels::cuda) fn sum_elements(
    ranks: [usize; 3],
    rows: usize,
    width: usize,
) -> Option<usize> {
    Cut::new(ranks, rows, width).map(|cut| cut.elements(rows))
}

/// A linear's adapter and its matrices.
struct Adapted<'a, D: Driver> {
    linear: &'a Linear<Cuda<D>>,
    adapter: LinearAdapter,
    /// A, then B.
    pair: Buffer<D>,
    /// Addresses of their gradients.
    gradients: [Address; 2],
}

impl<'a, D: Driver> Adapted<'a, D> {
    fn new(
        parameters: &Parameters<Cuda<D>>,
        working: &Buffer<D>,
        gradients: &Buffer<D>,
        linear: &'a Linear<Cuda<D>>,
    ) -> Option<Self> {
        let adapter = linear.adapter?;
        let pair = working.part(parameters.pair_range(adapter.index));
        let gradients = parameters.matrix_ranges(adapter.index).map(|matrix| gradients.at(matrix));
        Some(Adapted { linear, adapter, pair, gradients })
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
        write: Write,
    ) {
        let lora = Some(LoraInput { shape: &self.adapter.shape, pair: &self.pair, t });
        frozen::input_gradient(cuda, &self.linear.weight, lora, dy, dx, rows, write);
    }
}

/// Whether [`backward`] takes an MLP with such adapters in this pass.
pub(in crate::kernels::cuda) fn goes_backward<D: Driver>(
    cuda: &Cuda<D>,
    mlp: &GatedMlp<Cuda<D>>,
) -> bool {
    let rank = |linear: &Linear<Cuda<D>>| linear.adapter.map_or(0, |adapter| adapter.shape.rank);
    let ranks = [mlp.gate, mlp.up, mlp.down].map(rank);
    let cut = cuda.mlp_sums().and_then(|sums| {
        Cut::new(ranks, mlp.rows, mlp.gate.output.width).filter(|cut| cut.fits(&sums))
    });
    let stacks = StackedAdapters::new(cuda, &[mlp.gate, mlp.up]).is_some();
    cut.is_some() && stacks && mlp.parameters.working_copies().is_some()
}

/// Gradients of all three adapters and of the activations, from `dy`, that of what down made. `None`, and
/// nothing done, where the plan has no room for it, an adapter is missing, or there is no kernel for their
/// ranks.
pub(in crate::kernels::cuda) fn backward<D: Driver>(
    cuda: &Cuda<D>,
    mlp: &GatedMlp<Cuda<D>>,
    saved: &SavedMlp<Buffer<D>>,
    (dy, x): (&Buffer<D>, &Buffer<D>),
    to: &GatedMlpGradients<Buffer<D>>,
    lora_gradients: &Buffer<D>,
    t: &Buffer<D>,
) -> Option<()> {
    let (parameters, rows) = (mlp.parameters, mlp.rows);
    let (working, sums) = (parameters.working_copies()?, cuda.mlp_sums()?);
    let part = |linear| Adapted::new(parameters, working, lora_gradients, linear);
    let parts = [part(mlp.gate)?, part(mlp.up)?, part(mlp.down)?];
    let work = Backward::new(mlp, saved, &parts, &sums, dy, to)?;
    let stack = StackedAdapters::new(cuda, &[mlp.gate, mlp.up])?;
    let [gate, up, down] = &parts;
    let ([t_gate, t_up, t_down], [.., ax_down]) = (work.t, work.ax);

    let (shape, dy) = (&down.adapter.shape, dy.band(mlp.down.output, rows));
    low_rank::inner_gradient(cuda, shape, &down.pair, dy, t_down, rows);
    low_rank::gradient_of_b(cuda, shape, (dy, ax_down), down.gradients[1], rows);
    down.input_gradient(cuda, (dy, t_down), to.gate, rows, Write::Over);

    work.share(cuda, mlp.activation, &parts);
    let both = t.rows(rows, gate.rank() + up.rank());
    work.add_up(cuda, &parts, both);

    stack.add_gradient_of_a(cuda, parameters, (both, x), lora_gradients, rows);
    // Up's weight was the last but one to be read forward, and may still be there.
    up.input_gradient(cuda, (work.du, t_up), to.input, rows, Write::Over);
    gate.input_gradient(cuda, (work.dg, t_gate), to.input, rows, Write::Add);
    Some(())
}

/// Where the matrices of a backward pass lie: of gate, up and down.
struct Backward {
    cut: Cut,
    rows: usize,
    width: usize,
    g: Rows,
    u: Rows,
    /// Before, in dg: dh.
    dg: Rows,
    du: Rows,
    ax: [Rows; 3],
    /// Behind the rows of what they are made of.
    t: [Rows; 3],
    /// Sums over columns, and over rows.
    inner: Argument,
    gradients: Argument,
}

impl Backward {
    /// `None` where something has no room, or lies where the kernel cannot read it.
    fn new<D: Driver>(
        mlp: &GatedMlp<Cuda<D>>,
        saved: &SavedMlp<Buffer<D>>,
        parts: &[Adapted<D>; 3],
        sums: &Buffer<D>,
        dy: &Buffer<D>,
        to: &GatedMlpGradients<Buffer<D>>,
    ) -> Option<Self> {
        let (rows, d_gate, d_up) = (mlp.rows, &*to.gate, &*to.up);
        let (ranks, width) = (parts.each_ref().map(Adapted::rank), mlp.gate.output.width);
        let cut = Cut::new(ranks, rows, width).filter(|cut| cut.fits(sums))?;
        let matrices = [&saved.gate, &saved.up, d_gate, d_up];
        let [g, u, dg, du] = matrices.map(|buffer| buffer.rows(rows, width));
        let ax = parts.each_ref().map(|part| saved.lora_x.band(part.adapter.columns, rows));
        let t = [
            d_gate.tail(rows, ranks[0])?,
            d_up.tail(rows, ranks[1])?,
            gradient_tail((dy, mlp.down.output), rows, ranks[2])?,
        ];
        let read = [g, u, dg, du, ax[0], ax[1], t[2]];
        let inner = sums.argument(cut.inner);
        let gradients = Argument::Pointer(sums.at(cut.inner..cut.inner + cut.gradients));
        let work = Backward { cut, rows, width, g, u, dg, du, ax, t, inner, gradients };
        read.iter().all(aligned).then_some(work)
    }

    /// dg and du from dh, and the sums of all blocks.
    fn share<D: Driver>(&self, cuda: &Cuda<D>, activation: Activation, parts: &[Adapted<D>; 3]) {
        let ([gate, up, down], [ax_gate, ax_up, _]) = (parts, self.ax);
        let Backward { cut, g, u, dg, du, t: [.., t_down], .. } = self;
        let mut arguments = [
            activation_code(activation).into(),
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
            self.rows.into(),
            self.width.into(),
            cut.chunk_rows.into(),
            self.inner,
            self.gradients,
        ];
        let grid = [cut.strips as u32, cut.chunks as u32, 1];
        cuda.launch_shared(cut.kernel, grid, FLAT_THREADS, cut.shared_bytes, &mut arguments);
    }

    /// t of gate and up, behind dg and du and in `both` side by side, and what the sums over rows add to
    /// the gradients of two B and an A.
    fn add_up<D: Driver>(&self, cuda: &Cuda<D>, [gate, up, down]: &[Adapted<D>; 3], both: Rows) {
        let Backward { cut, rows, width, t: [t_gate, t_up, _], inner, gradients, .. } = self;
        let (scale_gate, scale_up) = (gate.adapter.shape.scale, up.adapter.shape.scale);
        launch!(cuda, "mlp_adapters_inner", flat(rows * cut.ranks), FLAT_THREADS;
            *inner, cut.strips, *rows, cut.ranks, gate.rank(), up.rank(), scale_gate, scale_up,
            t_gate.argument(), t_gate.stride, t_up.argument(), t_up.stride, both.argument(),
            both.stride);
        let columns = width.div_ceil(FLAT_THREADS as usize);
        let grid = [columns as u32, (MATRICES * cut.ranks / PIECE) as u32, 1];
        let [gb_gate, gb_up, ga_down] =
            [gate.gradients[1], up.gradients[1], down.gradients[0]].map(Argument::Pointer);
        launch!(cuda, "mlp_adapters_gradients", grid, FLAT_THREADS;
            *gradients, cut.chunks, cut.ranks, *width, gate.rank(), up.rank(), down.rank(),
            scale_gate, scale_up, gb_gate, gb_up, ga_down);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_planned_is_enough_for_fewer_rows() {
        for (ranks, width) in [([16; 3], 14_336), ([32, 8, 16], 1536), ([8; 3], 160)] {
            for planned in [1, 64, 100, 600, 4096, 5000] {
                let room = sum_elements(ranks, planned, width).unwrap();
                for rows in 1..=planned {
                    let cut = Cut::new(ranks, rows, width).unwrap();
                    assert!(cut.inner + cut.gradients <= room, "{rows} of {planned}");
                    assert!((cut.chunks - 1) * cut.chunk_rows < rows, "no chunk is empty");
                    assert!(cut.chunks * cut.chunk_rows >= rows);
                }
            }
        }
    }

    #[test]
    fn there_are_kernels_for_ranks_of_whole_pieces() {
        let ranks_of = |ranks| Cut::new(ranks, 10, 64).map(|cut| cut.ranks);
        assert_eq!(ranks_of([8, 16, 8]), Some(16));
        assert_eq!(ranks_of([8, 24, 32]), Some(32));
        for ranks in [[12, 16, 16], [16, 0, 16], [16, 16, 64]] {
            assert_eq!(ranks_of(ranks), None);
        }
    }
}
