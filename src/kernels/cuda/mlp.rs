//! The MLP's nonlinearity by itself; [`super::adapted_mlp`] has it together with the adapters around it.

use super::driver::{Argument, Driver};
use super::launch::{as_rows, launch, row_threads, rows as row_grid};
use super::memory::{Buffer, Rows};
use super::{Cuda, adapted_mlp};
use crate::kernels::{Columns, MlpKernels};
use crate::model::block::{GatedMlp, GatedMlpGradients, SavedMlp};
use crate::model::spec::Activation;

impl<D: Driver> MlpKernels for Cuda<D> {
    fn mlp_forward(
        &self,
        activation: Activation,
        gate: Option<&Buffer<D>>,
        up: &Buffer<D>,
        out: &mut Buffer<D>,
        elements: usize,
    ) {
        let (rows, width) = common_rows(&[up, out], elements);
        let gate = gate.map_or(Argument::Pointer(0), |gate| gate.argument(elements));
        let (up, out) = (up.rows(rows, width), out.rows(rows, width));
        launch!(self, "mlp_forward", row_grid(rows), row_threads(width);
            activation_code(activation), gate, width, up.argument(), up.stride, out.argument(),
            out.stride, width);
    }

    fn mlp_backward(
        &self,
        activation: Activation,
        gate: Option<&Buffer<D>>,
        up: &Buffer<D>,
        d_out: &mut Buffer<D>,
        d_up: &mut Buffer<D>,
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
        launch!(self, "mlp_backward", row_grid(rows), row_threads(width);
            activation_code(activation), gate, width, up.argument(), up.stride, d_out.argument(),
            d_out.stride, d_gate, d_out.stride, d_up.argument(), d_up.stride, width);
    }

    fn fused_mlp_forward(
        &self,
        activation: Activation,
        gate_up: &Buffer<D>,
        out: &mut Buffer<D>,
        rows: usize,
        width: usize,
    ) {
        let ([gate, up], out) = (halves(gate_up, rows, width), out.rows(rows, width));
        launch!(self, "mlp_forward", row_grid(rows), row_threads(width);
            activation_code(activation), gate.argument(), gate.stride, up.argument(), up.stride,
            out.argument(), out.stride, width);
    }

    fn fused_mlp_backward(
        &self,
        activation: Activation,
        gate_up: &mut Buffer<D>,
        d_out: &Buffer<D>,
        rows: usize,
        width: usize,
    ) {
        let ([gate, up], d_out) = (halves(gate_up, rows, width), d_out.rows(rows, width));
        launch!(self, "mlp_backward", row_grid(rows), row_threads(width);
            activation_code(activation), gate.argument(), gate.stride, up.argument(), up.stride,
            d_out.argument(), d_out.stride, gate.argument(), gate.stride, up.argument(), up.stride,
            width);
    }

    fn adapted_mlp_forward(
        &self,
        mlp: &GatedMlp<Self>,
        saved: &mut SavedMlp<Buffer<D>>,
        h: Option<&mut Buffer<D>>,
    ) -> bool {
        adapted_mlp::forward(self, mlp, saved, h.as_deref()).is_some()
    }

    fn adapts_mlp_backward(&self, mlp: &GatedMlp<Self>) -> bool {
        adapted_mlp::goes_backward(self, mlp)
    }

    fn adapted_mlp_backward(
        &self,
        mlp: &GatedMlp<Self>,
        saved: &SavedMlp<Buffer<D>>,
        inputs: (&Buffer<D>, &Buffer<D>),
        to: GatedMlpGradients<Buffer<D>>,
        lora_gradients: &mut Buffer<D>,
        t: &mut Buffer<D>,
    ) -> bool {
        adapted_mlp::backward(self, mlp, saved, inputs, &to, lora_gradients, t).is_some()
    }
}

/// What the kernels call it.
pub(super) fn activation_code(activation: Activation) -> i32 {
    match activation {
        Activation::Silu => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
    }
}

/// Rows and width of buffers of `elements` each: their own where one of them has room behind its
/// rows, else what is best for a launch.
fn common_rows<D: Driver>(buffers: &[&Buffer<D>], elements: usize) -> (usize, usize) {
    let planned = buffers.iter().find_map(|buffer| buffer.pitched_rows(elements));
    planned.unwrap_or_else(|| as_rows(elements))
}

/// The halves of the rows of `gate_up`, each of `width` columns.
fn halves<D: Driver>(gate_up: &Buffer<D>, rows: usize, width: usize) -> [Rows; 2] {
    let whole = 2 * width;
    [0, width].map(|first| gate_up.band(Columns::band(first, width, whole), rows))
}
