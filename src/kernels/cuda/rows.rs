//! Operations on rows and elements: embeddings, norms, dropout, noise, rows that move, conversions.

use std::ops::Range;

use super::Cuda;
use super::driver::{Argument, Driver};
use super::host::DeviceVector;
use super::launch::{as_rows, launch, row_threads, rows as row_grid};
use super::memory::Buffer;
use super::weight::{DeviceWeight, Form};
use crate::kernels::{DropoutMask, NormParameters, RowKernels, UniformNoise, Write};
use crate::model::spec::Norm;
use crate::plan::RegionType;
use crate::random;

impl<D: Driver> RowKernels for Cuda<D> {
    fn embed(
        &self,
        ids: &[u32],
        table: &DeviceWeight<D>,
        scale: f32,
        x: &mut Buffer<D>,
        write: Write,
    ) {
        let width = table.shape[1];
        let to = x.argument(ids.len() * width);
        let Some(ids_on_device) = self.stage(ids) else { return };
        let grid = row_grid(ids.len());
        match &table.form {
            Form::Dense(address) => launch!(self, "embed_bf16", grid, row_threads(width);
                ids_on_device, Argument::Pointer(*address), width, to, width, width, scale, write),
            Form::Packed(packed) => {
                let mut arguments = vec![ids_on_device];
                arguments.extend(packed.arguments());
                arguments.extend([to, width.into(), width.into(), scale.into(), write.into()]);
                self.launch("embed_4bit", grid, row_threads(width), &mut arguments);
            }
        }
    }

    fn norm_forward(
        &self,
        norm: &NormParameters<DeviceVector<D>>,
        x: &Buffer<D>,
        y: &mut Buffer<D>,
        stats: &mut Buffer<D>,
        rows: usize,
        write: Write,
    ) {
        let width = norm.weight.elements;
        let (x, y) = (x.rows(rows, width), y.rows(rows, width));
        let bias = norm.bias.as_ref().map_or(Argument::Pointer(0), DeviceVector::argument);
        launch!(self, "norm_forward", row_grid(rows), row_threads(width);
            x.argument(), x.stride, norm.weight.argument(), bias, norm.epsilon, y.argument(), y.stride,
            stats.argument(2 * rows), width, norm.kind == Norm::Layer, write);
    }

    fn norm_backward(
        &self,
        norm: &NormParameters<DeviceVector<D>>,
        dy: &Buffer<D>,
        x: &Buffer<D>,
        stats: &Buffer<D>,
        dx: &mut Buffer<D>,
        rows: usize,
    ) {
        let width = norm.weight.elements;
        let [dy, x, dx] = [dy, x, dx].map(|buffer| buffer.rows(rows, width));
        launch!(self, "norm_backward", row_grid(rows), row_threads(width);
            dy.argument(), dy.stride, x.argument(), x.stride, norm.weight.argument(),
            stats.argument(2 * rows), dx.argument(), dx.stride, width, norm.kind == Norm::Layer);
    }

    fn dropout(
        &self,
        mask: &DropoutMask,
        x: &Buffer<D>,
        y: &mut Buffer<D>,
        elements: usize,
        write: Write,
    ) {
        let ([key0, key1], step) = mask.stream.parts();
        let (threshold, kept) = random::dropout_factors(mask.probability);
        let (rows, width) = as_rows(elements);
        launch!(self, "dropout", row_grid(rows), row_threads(width);
            x.argument(elements), width, y.argument(elements), width, width, mask.first, key0, key1,
            step, threshold, kept, write);
    }

    fn add_noise(&self, noise: &UniformNoise, x: &mut Buffer<D>, rows: Range<usize>, width: usize) {
        let ([key0, key1], step) = noise.stream.parts();
        let count = rows.len();
        let x = x.part(rows.start * width..rows.end * width).rows(count, width);
        launch!(self, "add_noise", row_grid(count), row_threads(width);
            x.argument(), x.stride, width, noise.first, key0, key1, step, noise.amplitude);
    }

    fn gather_rows(&self, from: &Buffer<D>, rows: &[u32], to: &mut Buffer<D>, width: usize) {
        let Some(indices) = self.stage(rows) else { return };
        let (from, to) = (from.rows(0, width), to.rows(rows.len(), width));
        launch!(self, "gather_rows", row_grid(rows.len()), row_threads(width);
            from.argument(), from.stride, indices, to.argument(), to.stride, width);
    }

    fn scatter_rows(&self, from: &Buffer<D>, rows: &[u32], to: &mut Buffer<D>, width: usize) {
        let Some(indices) = self.stage(rows) else { return };
        let (from, to) = (from.rows(rows.len(), width), to.rows(0, width));
        launch!(self, "scatter_rows", row_grid(rows.len()), row_threads(width);
            from.argument(), from.stride, indices, to.argument(), to.stride, width);
    }

    fn copy_rows(
        &self,
        from: &Buffer<D>,
        to: &mut Buffer<D>,
        rows: usize,
        width: usize,
        write: Write,
    ) {
        let (from, to) = (from.rows(rows, width), to.rows(rows, width));
        launch!(self, "scale_rows_bf16", row_grid(rows), row_threads(width);
            from.argument(), from.stride, to.argument(), to.stride, width, 1f32, write);
    }

    fn copy(
        &self,
        (from, first): (&Buffer<D>, usize),
        (to, start): (&mut Buffer<D>, usize),
        elements: usize,
    ) {
        let size = from.size();
        let ((from, length), (to, room)) =
            (from.whole_rows(first, elements), to.whole_rows(start, elements));
        assert_eq!(length, room, "rows are copied between buffers of the same pitch");
        self.note(self.driver().copy(from, to, length * size));
    }

    fn zero(&self, buffer: &mut Buffer<D>, elements: usize) {
        let (address, length) = buffer.whole_rows(0, elements);
        self.note(self.driver().zero(address, length * buffer.size()));
    }
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
