//! Products with frozen weights, each by the module that is best at it: [`frozen`], one [`row`], or several
//! linears [`together`].

use super::driver::Driver;
use super::frozen::{self, LoraInput, beta};
use super::host::DeviceVector;
use super::memory::Buffer;
use super::weight::DeviceWeight;
use super::{Cuda, row, together};
use crate::kernels::{Columns, LinearKernels, LoraTerm};
use crate::model::block::Linear;
use crate::model::parameters::Parameters;

impl<D: Driver> LinearKernels for Cuda<D> {
    fn linear_forward(
        &self,
        weight: &DeviceWeight<D>,
        bias: Option<&DeviceVector<D>>,
        lora: Option<LoraTerm<Buffer<D>>>,
        x: &Buffer<D>,
        (y, band): (&mut Buffer<D>, Columns),
        rows: usize,
        accumulate: bool,
    ) {
        let to = y.band(band, rows);
        let extended = lora.as_ref().is_some_and(|term| {
            frozen::forward_extended(self, weight, term, x, to, rows, beta(accumulate)).is_some()
        });
        if !extended {
            frozen::forward_separate(self, weight, lora.as_ref(), x, to, rows, beta(accumulate));
        }
        if let Some(bias) = bias {
            frozen::add_bias(self, bias, to, band.width, rows);
        }
    }

    fn linear_row(
        &self,
        weight: &DeviceWeight<D>,
        bias: Option<&DeviceVector<D>>,
        lora: Option<LoraTerm<Buffer<D>>>,
        x: &Buffer<D>,
        (y, band): (&mut Buffer<D>, Columns),
        accumulate: bool,
    ) {
        row::forward(self, (weight, bias), lora, x, (y, band), accumulate);
    }

    fn linear_backward(
        &self,
        weight: &DeviceWeight<D>,
        lora: Option<LoraTerm<Buffer<D>>>,
        (dy, band): (&Buffer<D>, Columns),
        dx: &mut Buffer<D>,
        rows: usize,
        accumulate: bool,
    ) {
        let lora = lora.map(|LoraTerm { shape, pair, inner: (t, columns) }| {
            let tail = frozen::gradient_tail((dy, band), rows, shape.rank);
            LoraInput { shape, pair, t: tail.unwrap_or_else(|| t.band(columns, rows)) }
        });
        frozen::input_gradient(self, weight, lora, dy.band(band, rows), dx, rows, accumulate);
    }

    fn linears_forward(
        &self,
        parameters: &Parameters<Self>,
        linears: &[&Linear<Self>],
        x: &Buffer<D>,
        ys: &mut [&mut Buffer<D>],
        ax: &mut Buffer<D>,
        pair: &mut Buffer<D>,
        rows: usize,
        scale: f32,
    ) -> bool {
        together::forward(self, parameters, linears, x, ys, ax, pair, rows, scale)
    }

    fn linears_backward(
        &self,
        parameters: &Parameters<Self>,
        linears: &[&Linear<Self>],
        dys: &[&Buffer<D>],
        inputs: (&Buffer<D>, &Buffer<D>),
        dx: Option<&mut Buffer<D>>,
        t: &mut Buffer<D>,
        gradients: &mut Buffer<D>,
        pair: &mut Buffer<D>,
        rows: usize,
    ) -> bool {
        let dx = dx.as_deref();
        together::backward(self, parameters, linears, dys, inputs, dx, t, gradients, pair, rows)
    }
}
