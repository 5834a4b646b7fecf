//! Products with frozen weights, each by the module that is best at it: [`frozen`], one [`row`], or several
//! linears [`together`].

use super::driver::Driver;
use super::frozen::{self, LoraInput};
use super::memory::Buffer;
use super::weight::DeviceWeight;
use super::{Cuda, row, together};
use crate::kernels::{Columns, LinearInputs, LinearKernels, LinearTerms, LoraTerm, Write};
use crate::model::block::{AdapterWork, LinearGroup};

impl<D: Driver> LinearKernels for Cuda<D> {
    fn linear_forward(
        &self,
        LinearTerms { weight, bias, lora }: LinearTerms<Self>,
        x: &Buffer<D>,
        (y, band): (&mut Buffer<D>, Columns),
        rows: usize,
        write: Write,
    ) {
        let to = y.band(band, rows);
        let extended = lora.as_ref().is_some_and(|term| {
            frozen::forward_extended(self, weight, term, x, to, rows, write.beta()).is_some()
        });
        if !extended {
            frozen::forward_separate(self, weight, lora.as_ref(), x, to, rows, write.beta());
        }
        if let Some(bias) = bias {
            frozen::add_bias(self, bias, to, band.width, rows);
        }
    }

    fn linear_row(
        &self,
        terms: LinearTerms<Self>,
        x: &Buffer<D>,
        y: (&mut Buffer<D>, Columns),
        write: Write,
    ) {
        row::forward(self, terms, x, y, write);
    }

    fn linear_backward(
        &self,
        weight: &DeviceWeight<D>,
        lora: Option<LoraTerm<Buffer<D>>>,
        (dy, band): (&Buffer<D>, Columns),
        dx: &mut Buffer<D>,
        rows: usize,
        write: Write,
    ) {
        let lora = lora.map(|LoraTerm { shape, pair, inner: (t, columns) }| {
            let tail = frozen::gradient_tail((dy, band), rows, shape.rank);
            LoraInput { shape, pair, t: tail.unwrap_or_else(|| t.band(columns, rows)) }
        });
        frozen::input_gradient(self, weight, lora, dy.band(band, rows), dx, rows, write);
    }

    fn linears_forward(
        &self,
        group: &LinearGroup<Self>,
        x: &Buffer<D>,
        ys: &mut [&mut Buffer<D>],
        ax: &mut Buffer<D>,
        work: &mut AdapterWork<Buffer<D>>,
    ) -> bool {
        together::forward(self, group, x, ys, ax, &mut work.pair)
    }

    fn linears_backward(
        &self,
        group: &LinearGroup<Self>,
        dys: &[&Buffer<D>],
        inputs: LinearInputs<Buffer<D>>,
        dx: Option<&mut Buffer<D>>,
        lora_gradients: &mut Buffer<D>,
        work: &mut AdapterWork<Buffer<D>>,
    ) -> bool {
        together::backward(self, group, dys, inputs, dx.as_deref(), lora_gradients, work)
    }
}
