//! Operations on rows and elements: norms, rotary embedding, dropout, the MLP's nonlinearity, rows
//! that move.

use std::ops::Range;

use super::Cuda;
use super::driver::{Argument, Driver};
use super::host::DeviceVector;
use super::launch::{as_rows, launch, row_threads, rows as row_grid};
use super::memory::{Buffer, Rows};
use super::weight::{DeviceWeight, Form};
use crate::kernels::{
    AttentionShape, Columns, DropoutMask, HeadNorms, NormParameters, RotaryTables, UniformNoise,
};
use crate::model::spec::{Activation, Norm};
use crate::plan::RegionType;
use crate::random;

pub(super) fn embed<D: Driver>(
    cuda: &Cuda<D>,
    ids: &[u32],
    table: &DeviceWeight<D>,
    scale: f32,
    x: &Buffer<D>,
    accumulate: bool,
) {
    let width = table.shape[1];
    let to = x.argument(ids.len() * width);
    let Some(ids_on_device) = cuda.stage(ids) else { return };
    let grid = row_grid(ids.len());
    match &table.form {
        Form::Dense(address) => launch!(cuda, "embed_bf16", grid, row_threads(width);
            ids_on_device, Argument::Pointer(*address), width, to, width, width, scale, accumulate),
        Form::Packed(packed) => {
            let mut arguments = vec![ids_on_device];
            arguments.extend(packed.arguments());
            arguments.extend([to, width.into(), width.into(), scale.into(), accumulate.into()]);
            cuda.launch("embed_4bit", grid, row_threads(width), &mut arguments);
        }
    }
}

pub(super) fn norm_forward<D: Driver>(
    cuda: &Cuda<D>,
    norm: &NormParameters<DeviceVector<D>>,
    x: &Buffer<D>,
    (y, stats): (&Buffer<D>, &Buffer<D>),
    rows: usize,
    accumulate: bool,
) {
    let width = norm.weight.elements;
    let (x, y) = (x.rows(rows, width), y.rows(rows, width));
    let bias = norm.bias.as_ref().map_or(Argument::Pointer(0), DeviceVector::argument);
    launch!(cuda, "norm_forward", row_grid(rows), row_threads(width);
        x.argument(), x.stride, norm.weight.argument(), bias, norm.epsilon, y.argument(), y.stride,
        stats.argument(2 * rows), width, norm.kind == Norm::Layer, accumulate);
}

pub(super) fn norm_backward<D: Driver>(
    cuda: &Cuda<D>,
    norm: &NormParameters<DeviceVector<D>>,
    (dy, x, stats): (&Buffer<D>, &Buffer<D>, &Buffer<D>),
    dx: &Buffer<D>,
    rows: usize,
) {
    let width = norm.weight.elements;
    let [dy, x, dx] = [dy, x, dx].map(|buffer| buffer.rows(rows, width));
    launch!(cuda, "norm_backward", row_grid(rows), row_threads(width);
        dy.argument(), dy.stride, x.argument(), x.stride, norm.weight.argument(),
        stats.argument(2 * rows), dx.argument(), dx.stride, width, norm.kind == Norm::Layer);
}

/// `head_norms` from `qkv` to `to`, or `head_norms_backward` of `qkv` in `to`: they take the same.
pub(super) fn head_norms<D: Driver>(
    cuda: &Cuda<D>,
    kernel: &'static str,
    norms: &HeadNorms<DeviceVector<D>>,
    shape: &AttentionShape,
    (qkv, to): (&Buffer<D>, &Buffer<D>),
    rows: usize,
) {
    let width = shape.qkv_width();
    let [qkv, to] = [qkv, to].map(|buffer| buffer.rows(rows, width));
    launch!(cuda, kernel, row_grid(rows), row_threads(width);
        qkv.argument(), qkv.stride, norms.q.weight.argument(), norms.k.weight.argument(),
        norms.q.epsilon, to.argument(), to.stride, shape.num_heads, shape.num_kv_heads,
        shape.head_dim);
}

pub(super) fn rotary<D: Driver>(
    cuda: &Cuda<D>,
    shape: &AttentionShape,
    tables: RotaryTables<Buffer<D>>,
    qkv: &Buffer<D>,
    rows: usize,
    backward: bool,
) {
    let (half, qkv) = (rows * shape.rotary_dim / 2, qkv.rows(rows, shape.qkv_width()));
    let query_scale = tables.query_scale.map_or(Argument::Pointer(0), |scale| scale.argument(rows));
    launch!(cuda, "rotary", row_grid(rows), row_threads(shape.qkv_width() / 2);
        qkv.argument(), qkv.stride, tables.cos.argument(half), tables.sin.argument(half),
        query_scale, shape.num_heads, shape.num_heads + shape.num_kv_heads, shape.head_dim,
        shape.rotary_dim, backward);
}

pub(super) fn dropout<D: Driver>(
    cuda: &Cuda<D>,
    mask: &DropoutMask,
    x: &Buffer<D>,
    y: &Buffer<D>,
    elements: usize,
    accumulate: bool,
) {
    let ([key0, key1], step) = random::Stream::new(mask.seed, mask.stream).at(mask.step).parts();
    let (threshold, kept) = random::dropout_factors(mask.probability);
    let (rows, width) = as_rows(elements);
    launch!(cuda, "dropout", row_grid(rows), row_threads(width);
        x.argument(elements), width, y.argument(elements), width, width, mask.first, key0, key1,
        step, threshold, kept, accumulate);
}

pub(super) fn add_noise<D: Driver>(
    cuda: &Cuda<D>,
    noise: &UniformNoise,
    x: &Buffer<D>,
    rows: Range<usize>,
    width: usize,
) {
    let ([key0, key1], step) = random::Stream::new(noise.seed, noise.stream).at(noise.step).parts();
    let count = rows.len();
    let x = x.part(rows.start * width..rows.end * width).rows(count, width);
    launch!(cuda, "add_noise", row_grid(count), row_threads(width);
        x.argument(), x.stride, width, noise.first, key0, key1, step, noise.amplitude);
}

/// Rows and width of buffers of `elements` each: their own where one of them has room behind its
/// rows, else what is best for a launch.
fn common_rows<D: Driver>(buffers: &[&Buffer<D>], elements: usize) -> (usize, usize) {
    let planned = buffers.iter().find_map(|buffer| buffer.pitched_rows(elements));
    planned.unwrap_or_else(|| as_rows(elements))
}

pub(super) fn activation_code(activation: Activation) -> i32 {
    match activation {
        Activation::Silu => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
    }
}

pub(super) fn mlp_forward<D: Driver>(
    cuda: &Cuda<D>,
    activation: Activation,
    (gate, up): (Option<&Buffer<D>>, &Buffer<D>),
    out: &Buffer<D>,
    elements: usize,
) {
    let (rows, width) = common_rows(&[up, out], elements);
    let gate = gate.map_or(Argument::Pointer(0), |gate| gate.argument(elements));
    let (up, out) = (up.rows(rows, width), out.rows(rows, width));
    launch!(cuda, "mlp_forward", row_grid(rows), row_threads(width);
        activation_code(activation), gate, width, up.argument(), up.stride, out.argument(),
        out.stride, width);
}

pub(super) fn mlp_backward<D: Driver>(
    cuda: &Cuda<D>,
    activation: Activation,
    (gate, up): (Option<&Buffer<D>>, &Buffer<D>),
    (d_out, d_up): (&Buffer<D>, &Buffer<D>),
    elements: usize,
) {
    let (rows, width) = common_rows(&[up, d_out, d_up], elements);
    let [up, d_out, d_up] = [up, d_out, d_up].map(|buffer| buffer.rows(rows, width));
    let null = Argument::Pointer(0);
    // Without a gate, d_out becomes the gradient of up.
    let (gate, d_gate, d_up) = match gate {
        Some(gate) => (gate.argument(elements), d_out.argument(), d_up),
        None => (null, null, d_out),
    };
    launch!(cuda, "mlp_backward", row_grid(rows), row_threads(width);
        activation_code(activation), gate, width, up.argument(), up.stride, d_out.argument(),
        d_out.stride, d_gate, d_out.stride, d_up.argument(), d_up.stride, width);
}

/// The halves of the rows of `gate_up`, each of `width` columns.
fn halves<D: Driver>(gate_up: &Buffer<D>, rows: usize, width: usize) -> [Rows; 2] {
    let whole = 2 * width;
    [0, width].map(|first| gate_up.band(Columns::band(first, width, whole), rows))
}

pub(super) fn fused_mlp_forward<D: Driver>(
    cuda: &Cuda<D>,
    activation: Activation,
    gate_up: &Buffer<D>,
    out: &Buffer<D>,
    (rows, width): (usize, usize),
) {
    let ([gate, up], out) = (halves(gate_up, rows, width), out.rows(rows, width));
    launch!(cuda, "mlp_forward", row_grid(rows), row_threads(width);
        activation_code(activation), gate.argument(), gate.stride, up.argument(), up.stride,
        out.argument(), out.stride, width);
}

pub(super) fn fused_mlp_backward<D: Driver>(
    cuda: &Cuda<D>,
    activation: Activation,
    gate_up: &Buffer<D>,
    d_out: &Buffer<D>,
    (rows, width): (usize, usize),
) {
    let ([gate, up], d_out) = (halves(gate_up, rows, width), d_out.rows(rows, width));
    launch!(cuda, "mlp_backward", row_grid(rows), row_threads(width);
        activation_code(activation), gate.argument(), gate.stride, up.argument(), up.stride,
        d_out.argument(), d_out.stride, gate.argument(), gate.stride, up.argument(), up.stride,
        width);
}

pub(super) fn gather_rows<D: Driver>(
    cuda: &Cuda<D>,
    from: &Buffer<D>,
    rows: &[u32],
    to: &Buffer<D>,
    width: usize,
) {
    let Some(indices) = cuda.stage(rows) else { return };
    let (from, to) = (from.rows(0, width), to.rows(rows.len(), width));
    launch!(cuda, "gather_rows", row_grid(rows.len()), row_threads(width);
        from.argument(), from.stride, indices, to.argument(), to.stride, width);
}

pub(super) fn scatter_rows<D: Driver>(
    cuda: &Cuda<D>,
    from: &Buffer<D>,
    rows: &[u32],
    to: &Buffer<D>,
    width: usize,
) {
    let Some(indices) = cuda.stage(rows) else { return };
    let (from, to) = (from.rows(rows.len(), width), to.rows(0, width));
    launch!(cuda, "scatter_rows", row_grid(rows.len()), row_threads(width);
        from.argument(), from.stride, indices, to.argument(), to.stride, width);
}

pub(super) fn copy<D: Driver>(
    cuda: &Cuda<D>,
    (from, first): (&Buffer<D>, usize),
    (to, start): (&Buffer<D>, usize),
    elements: usize,
) {
    let size = from.size();
    let ((from, length), (to, room)) =
        (from.whole_rows(first, elements), to.whole_rows(start, elements));
    assert_eq!(length, room, "rows are copied between buffers of the same pitch");
    cuda.note(cuda.driver().copy(from, to, length * size));
}

pub(super) fn zero<D: Driver>(cuda: &Cuda<D>, buffer: &Buffer<D>, elements: usize) {
    let (address, length) = buffer.whole_rows(0, elements);
    cuda.note(cuda.driver().zero(address, length * buffer.size()));
}

/// Converts between f32 and bf16, `elements` that lie one after another.
pub(super) fn convert<D: Driver>(
    cuda: &Cuda<D>,
    from: &Buffer<D>,
    to: &Buffer<D>,
    elements: usize,
) {
    if elements == 0 {
        return;
    }
    let (rows, width) = as_rows(elements);
    let (source, target) = (from.argument(elements), to.argument(elements));
    let mut arguments =
        [source, width.into(), target, width.into(), width.into(), 1f32.into(), false.into()];
    let kernel = match (from.dtype, to.dtype) {
        (RegionType::F32, RegionType::Bf16) => "scale_rows_f32_bf16",
        (RegionType::Bf16, RegionType::F32) => "scale_rows_bf16_f32",
        (RegionType::F32, RegionType::F32) => "scale_rows_f32",
        (RegionType::Bf16, RegionType::Bf16) => "scale_rows_bf16",
    };
    cuda.launch(kernel, row_grid(rows), row_threads(width), &mut arguments);
}
