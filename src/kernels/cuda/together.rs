//! Linears that read the same rows: q, k and v, or gate and up.
//!
//! Their A are copied one below the other, so that x is read once for `x·Aᵀ` of all of them, and once
//! for the gradients of A. The outputs of q, k and v are bands of one matrix; their weights are dequantized
//! one below the other, and one product makes all three, one more the gradient of x:
//!
//! ```text
//! [q | k | v] = [x | ax]·[W | B]ᵀ     W = [Wq; Wk; Wv]    B = diag(s·Bq, s·Bk, s·Bv)
//! dx = [dq | dk | dv | t]·[W ; A]     A = [Aq; Ak; Av]
//! ```
//!
//! In elements moved for a token, for inputs of width K:
//!
//! | | one by one | together |
//! |---|---|---|
//! | `x·Aᵀ`, and gradients of A: n linears | n·K each | K each |
//! | dx of q, k and v | 9·K: written by q, read and written again by its adapter, k, its adapter, v | K |
//!
//! The zeros of B cost 2·R columns of a product with K (0.8 % for rank 16 at 4,096), the copies of A
//! nothing to speak of. Gate and up stay two products: one would need both dequantized at once, where
//! each is the largest weight by itself.

use super::Cuda;
use super::driver::{Argument, Driver, Gemm};
use super::frozen::{
    self, LoraInput, copy_columns, gradient_tail, operand, output, output_in_f32, transposed,
};
use super::launch::{FLAT_THREADS, columns as columns_grid, row_threads, rows as row_grid};
use super::low_rank::{gradient_of_b, inner_gradient};
use super::memory::{Buffer, Rows};
use super::weight::DeviceWeight;
use super::weight_buffers::STACKED;
use crate::kernels::{
    Columns, LinearInputs, LinearKernels, LinearTerms, LoraKernels, LoraTerm, Write,
};
use crate::model::block::{AdapterWork, Linear, LinearAdapter, LinearGroup};
use crate::model::parameters::Parameters;

/// Room for the matrices of the linears at work; see the module.
pub(super) struct StackRoom<D: Driver> {
    /// A of all, bf16 `[ΣR, K]`.
    pub a: Buffer<D>,
    /// Gradients of A of all, f32 `[ΣR, K]`; only where there is a backward pass.
    pub gradient: Option<Buffer<D>>,
}

impl<D: Driver> Clone for StackRoom<D> {
    fn clone(&self) -> Self {
        StackRoom { a: self.a.clone(), gradient: self.gradient.clone() }
    }
}

/// The adapters of linears that read the same rows.
struct Adapters {
    all: Vec<LinearAdapter>,
    /// ΣR.
    ranks: usize,
    /// K.
    inner: usize,
}

impl Adapters {
    fn of<D: Driver>(linears: &[&Linear<Cuda<D>>]) -> Self {
        let all: Vec<LinearAdapter> = linears.iter().filter_map(|linear| linear.adapter).collect();
        let adjacent = |pair: &[LinearAdapter]| {
            pair[0].columns.offset + pair[0].shape.rank == pair[1].columns.offset
        };
        assert!(
            all.windows(2).all(adjacent),
            "x·Aᵀ of linears that follow each other are adjacent"
        );
        let ranks = all.iter().map(|adapter| adapter.shape.rank).sum();
        Adapters { all, ranks, inner: linears[0].weight.shape[1] }
    }

    /// Columns of `x·Aᵀ` of all adapters.
    fn columns(&self) -> Columns {
        let first = self.all.first().map_or(Columns::all(0), |adapter| adapter.columns);
        Columns { width: self.ranks, ..first }
    }

    /// Columns of all ranks behind the rows of a matrix, where there is room for them.
    fn behind<D: Driver>(&self, matrix: &Buffer<D>, rows: usize) -> Option<Rows> {
        if self.ranks == 0 {
            Some(Rows { address: 0, stride: 0 })
        } else {
            matrix.tail(rows, self.ranks)
        }
    }

    /// Addresses of all A in `buffer`, which holds what [`Parameters::pair_range`] says, and the rows
    /// of the first ones: the arguments of the kernels that take them one below the other.
    fn a_arguments<D: Driver>(
        &self,
        parameters: &Parameters<Cuda<D>>,
        buffer: &Buffer<D>,
    ) -> impl Iterator<Item = Argument> + use<D> {
        let mut starts = [Argument::Pointer(0); STACKED];
        let mut rows = [Argument::from(0usize); STACKED];
        for (number, LinearAdapter { index, shape, .. }) in self.all.iter().enumerate() {
            let [a, _] = parameters.matrix_ranges(*index);
            starts[number] = Argument::Pointer(buffer.at(a));
            rows[number] = shape.rank.into();
        }
        starts.into_iter().chain(rows.into_iter().take(STACKED - 1))
    }

    /// Writes all A, one below the other.
    fn write_a<D: Driver>(&self, cuda: &Cuda<D>, parameters: &Parameters<Cuda<D>>, to: Rows) {
        let (kernel, from) = match parameters.working_copies() {
            Some(working) => ("stack_rows_bf16", working),
            None => ("stack_rows_f32_bf16", parameters.master_buffer()),
        };
        let arguments = self.a_arguments(parameters, from);
        let to = [self.inner.into(), to.argument(), to.stride.into()];
        let mut arguments: Vec<Argument> = arguments.chain(to).collect();
        cuda.launch(kernel, row_grid(self.ranks), row_threads(self.inner), &mut arguments);
    }
}

/// Adapters of linears that read the same rows, and room for the gradients of their A.
pub(super) struct StackedAdapters<D: Driver> {
    adapters: Adapters,
    gradient: Buffer<D>,
}

impl<D: Driver> StackedAdapters<D> {
    /// `None` where the plan has no room for it.
    pub fn new(cuda: &Cuda<D>, linears: &[&Linear<Cuda<D>>]) -> Option<Self> {
        let room = cuda.stack_room().filter(|_| linears.len() > 1);
        let gradient = room?.gradient?;
        Some(StackedAdapters { adapters: Adapters::of(linears), gradient })
    }

    /// `gA += tᵀ·x` of each, their t side by side.
    pub fn add_gradient_of_a(
        &self,
        cuda: &Cuda<D>,
        parameters: &Parameters<Cuda<D>>,
        (ts, x): (Rows, &Buffer<D>),
        gradients: &Buffer<D>,
        rows: usize,
    ) {
        let (inner, ranks) = (self.adapters.inner, self.adapters.ranks);
        if ranks == 0 {
            return;
        }
        let (a, b) = (transposed(ts), operand(x.rows(rows, inner)));
        let to = output_in_f32(self.gradient.rows(ranks, inner));
        cuda.gemm(Gemm::new([ranks, inner, rows], a, b, to));
        let from = self.gradient.argument(ranks * inner);
        let to = self.adapters.a_arguments(parameters, gradients);
        let mut arguments: Vec<Argument> =
            [from].into_iter().chain(to).chain([inner.into()]).collect();
        cuda.launch("add_stacked_f32", row_grid(ranks), row_threads(inner), &mut arguments);
    }
}

/// Writes `diag(scale · s · B)` of linears whose outputs are one below the other.
fn write_diagonal<D: Driver>(
    cuda: &Cuda<D>,
    &LinearGroup { linears, parameters, scale: factor, .. }: &LinearGroup<Cuda<D>>,
    to: Rows,
) {
    let (kernel, from) = match parameters.working_copies() {
        Some(working) => ("diagonal_bf16", working),
        None => ("diagonal_f32_bf16", parameters.master_buffer()),
    };
    let mut starts = [Argument::Pointer(0); STACKED];
    let [mut rows, mut ranks] = [[Argument::from(0usize); STACKED]; 2];
    let mut scales = [Argument::from(0f32); STACKED];
    let (mut outer, mut width) = (0, 0);
    for (number, linear) in linears.iter().enumerate() {
        rows[number] = linear.output.width.into();
        outer += linear.output.width;
        let Some(LinearAdapter { index, shape, .. }) = &linear.adapter else { continue };
        let [_, b] = parameters.matrix_ranges(*index);
        starts[number] = Argument::Pointer(from.at(b));
        ranks[number] = shape.rank.into();
        scales[number] = (shape.scale * factor).into();
        width += shape.rank;
    }
    let parts = starts.into_iter().chain(rows).chain(ranks).chain(scales);
    let mut arguments: Vec<Argument> = parts.chain([to.argument(), to.stride.into()]).collect();
    cuda.launch(kernel, columns_grid(outer, width), FLAT_THREADS, &mut arguments);
}

/// The linears' weights, and their rows together, where their outputs fill the rows of one matrix.
fn one_below_the_other<'a, D: Driver>(
    linears: &[&'a Linear<Cuda<D>>],
) -> Option<(Vec<&'a DeviceWeight<D>>, usize)> {
    let mut end = 0;
    let follows = |linear: &&Linear<Cuda<D>>| {
        end += linear.output.width;
        linear.output.offset + linear.output.width == end
    };
    let filled = linears.iter().all(follows) && linears[0].output.stride == end;
    filled.then(|| (linears.iter().map(|linear| &linear.weight).collect(), end))
}

/// `y = x·Wᵀ + bias + scale · s · ax · Bᵀ` of each, and ax; `false`, and nothing done, where the plan
/// has no room for it.
pub(super) fn forward<D: Driver>(
    cuda: &Cuda<D>,
    group: &LinearGroup<Cuda<D>>,
    x: &Buffer<D>,
    ys: &mut [&mut Buffer<D>],
    ax: &Buffer<D>,
    pair: &mut Buffer<D>,
) -> bool {
    let &LinearGroup { linears, parameters, rows, scale } = group;
    let Some(room) = cuda.stack_room().filter(|_| linears.len() > 1) else { return false };
    let adapters = Adapters::of(linears);
    if adapters.ranks > 0 {
        let inner = adapters.inner;
        let a = Rows { address: room.a.at(0..adapters.ranks * inner), stride: inner };
        adapters.write_a(cuda, parameters, a);
        let (a, b) = (operand(x.rows(rows, inner)), transposed(a));
        let to = output(ax.band(adapters.columns(), rows));
        cuda.gemm(Gemm::new([rows, adapters.ranks, inner], a, b, to));
    }
    if let [y] = ys
        && forward_in_one(cuda, group, &adapters, x, y, ax).is_some()
    {
        return true;
    }
    let last = ys.len() - 1;
    for (position, linear) in linears.iter().enumerate() {
        let shape = linear.adapter.map(|adapter| adapter.shape.scaled(scale));
        let lora = linear.adapter.as_ref().zip(shape.as_ref()).map(|(adapter, shape)| {
            cuda.load_pair(parameters, adapter.index, pair);
            LoraTerm { shape, pair: &*pair, inner: (ax, adapter.columns) }
        });
        let y = (&mut *ys[position.min(last)], linear.output);
        let terms = LinearTerms { weight: &linear.weight, bias: linear.bias.as_ref(), lora };
        cuda.linear_forward(terms, x, y, rows, Write::Over);
    }
    true
}

/// [`forward`] in one product; `None`, and nothing done, where that cannot be.
fn forward_in_one<D: Driver>(
    cuda: &Cuda<D>,
    group: &LinearGroup<Cuda<D>>,
    adapters: &Adapters,
    x: &Buffer<D>,
    y: &Buffer<D>,
    ax: &Buffer<D>,
) -> Option<()> {
    let &LinearGroup { linears, rows, .. } = group;
    let (weights, outer) = one_below_the_other(linears)?;
    let (inner, ranks) = (adapters.inner, adapters.ranks);
    let tail = adapters.behind(x, rows)?;
    let wide = cuda.dequantized(&weights, ranks)?;
    let b = wide.column(inner);
    if ranks > 0 {
        copy_columns(cuda, ax.band(adapters.columns(), rows), tail, (rows, ranks), 1.0);
        write_diagonal(cuda, group, b);
    }
    let (a, b) = (operand(x.rows(rows, inner)), transposed(wide));
    let to = y.rows(rows, outer);
    cuda.gemm(Gemm::new([rows, outer, inner + ranks], a, b, output(to)));
    for linear in linears {
        if let Some(bias) = &linear.bias {
            let to = y.band(linear.output, rows);
            frozen::add_bias(cuda, bias, to, linear.output.width, rows);
        }
    }
    Some(())
}

/// `gA += tᵀ x` and `gB += s · dyᵀ ax` of each, with `t = s · dy · B`, and `dx = Σ dy · W + t · A`;
/// `false`, and nothing done, where the plan has no room for it.
pub(super) fn backward<D: Driver>(
    cuda: &Cuda<D>,
    group: &LinearGroup<Cuda<D>>,
    dys: &[&Buffer<D>],
    LinearInputs { x, lora_x: ax }: LinearInputs<Buffer<D>>,
    dx: Option<&Buffer<D>>,
    lora_gradients: &Buffer<D>,
    work: &mut AdapterWork<Buffer<D>>,
) -> bool {
    let &LinearGroup { linears, parameters, rows, .. } = group;
    let Some(stacked) = StackedAdapters::new(cuda, linears) else { return false };
    let (pair, t) = work.of_backward();
    let (adapters, ranks) = (&stacked.adapters, stacked.adapters.ranks);
    // Side by side: behind the rows of the one gradient, or by themselves.
    let behind = if let [dy] = dys { adapters.behind(dy, rows) } else { None };
    let ts = behind.unwrap_or_else(|| t.rows(rows, ranks));
    let mut inputs: Vec<Option<Rows>> = Vec::with_capacity(linears.len());
    let mut column = 0;
    for (position, linear) in linears.iter().enumerate() {
        let (dy, band) = (dys[position.min(dys.len() - 1)], linear.output);
        let Some(LinearAdapter { index, shape, columns }) = linear.adapter else {
            inputs.push(None);
            continue;
        };
        cuda.load_pair(parameters, index, pair);
        let (own, from) = (ts.column(column), dy.band(band, rows));
        // Where the product for dx reads it, if that is not where it is already.
        let there = gradient_tail((dy, band), rows, shape.rank).filter(|_| behind.is_none());
        let made = there.unwrap_or(own);
        inner_gradient(cuda, &shape, pair, from, made, rows);
        if there.is_some() {
            copy_columns(cuda, made, own, (rows, shape.rank), 1.0);
        }
        let [_, gb] = parameters.matrix_ranges(index).map(|matrix| lora_gradients.at(matrix));
        gradient_of_b(cuda, &shape, (from, ax.band(columns, rows)), gb, rows);
        inputs.push(Some(made));
        column += shape.rank;
    }
    stacked.add_gradient_of_a(cuda, parameters, (ts, x), lora_gradients, rows);
    let Some(dx) = dx else { return true };
    if let [dy] = dys
        && backward_in_one(cuda, group, adapters, dy, dx).is_some()
    {
        return true;
    }
    // The last one first: its weight was the last of them to be read forward, and may still be there.
    for (part, (position, t)) in inputs.into_iter().enumerate().rev().enumerate() {
        let linear = linears[position];
        let from = dys[position.min(dys.len() - 1)].band(linear.output, rows);
        let lora = linear.adapter.as_ref().zip(t).map(|(LinearAdapter { index, shape, .. }, t)| {
            cuda.load_pair(parameters, *index, pair);
            LoraInput { shape, pair: &*pair, t }
        });
        frozen::input_gradient(cuda, &linear.weight, lora, from, dx, rows, Write::of_part(part));
    }
    true
}

/// dx in one product; `None`, and nothing done, where that cannot be.
fn backward_in_one<D: Driver>(
    cuda: &Cuda<D>,
    &LinearGroup { linears, parameters, rows, .. }: &LinearGroup<Cuda<D>>,
    adapters: &Adapters,
    dy: &Buffer<D>,
    dx: &Buffer<D>,
) -> Option<()> {
    let (weights, outer) = one_below_the_other(linears)?;
    let (inner, ranks) = (adapters.inner, adapters.ranks);
    adapters.behind(dy, rows)?;
    let wide = cuda.dequantized(&weights, ranks)?;
    adapters.write_a(cuda, parameters, wide.row(outer));
    let (a, b) = (operand(dy.rows(rows, outer)), operand(wide));
    let to = output(dx.rows(rows, inner));
    cuda.gemm(Gemm::new([rows, inner, outer + ranks], a, b, to));
    Some(())
}
