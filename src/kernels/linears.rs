//! Products with frozen weights, and what adapters add in the same product.

use super::{Columns, LoraTerm, Storage};
use crate::model::block::Linear;
use crate::model::parameters::Parameters;

/// Linears: frozen products, an adapter's share in them, and linears that read the same rows.
pub trait LinearKernels: Storage {
    /// `y[:, band] = x · Wᵀ + bias + scale · ax · Bᵀ`, or `+=`; x `[rows, in]`, `lora` holds ax.
    #[allow(clippy::too_many_arguments)]
    fn linear_forward(
        &self,
        weight: &Self::Weight,
        bias: Option<&Self::Vector>,
        lora: Option<LoraTerm<Self::Buffer>>,
        x: &Self::Buffer,
        y: (&mut Self::Buffer, Columns),
        rows: usize,
        accumulate: bool,
    );

    /// [`linear_forward`](LinearKernels::linear_forward) of one row that text is generated from: its sums
    /// may have another order than those of several rows.
    fn linear_row(
        &self,
        weight: &Self::Weight,
        bias: Option<&Self::Vector>,
        lora: Option<LoraTerm<Self::Buffer>>,
        x: &Self::Buffer,
        y: (&mut Self::Buffer, Columns),
        accumulate: bool,
    ) {
        self.linear_forward(weight, bias, lora, x, y, 1, accumulate);
    }

    /// `dx = dy[:, band] · W + t · A`, or `+=`; `lora` holds t.
    fn linear_backward(
        &self,
        weight: &Self::Weight,
        lora: Option<LoraTerm<Self::Buffer>>,
        dy: (&Self::Buffer, Columns),
        dx: &mut Self::Buffer,
        rows: usize,
        accumulate: bool,
    );

    /// [`lora_project`](super::LoraKernels::lora_project) and
    /// [`linear_forward`](LinearKernels::linear_forward) of linears that read the same rows, with fewer
    /// reads and products than one after another. Their outputs are bands of one buffer, or a buffer for
    /// each; `scale` is a factor on the adapters'. `false`, and nothing done, where the backend has nothing
    /// better.
    #[allow(clippy::too_many_arguments)]
    fn linears_forward(
        &self,
        _parameters: &Parameters<Self>,
        _linears: &[&Linear<Self>],
        _x: &Self::Buffer,
        _ys: &mut [&mut Self::Buffer],
        _ax: &mut Self::Buffer,
        _pair: &mut Self::Buffer,
        _rows: usize,
        _scale: f32,
    ) -> bool {
        false
    }

    /// [`lora_backward`](super::LoraKernels::lora_backward) and
    /// [`linear_backward`](LinearKernels::linear_backward) of the same linears, of which dx is the sum;
    /// `inputs` are x and ax.
    #[allow(clippy::too_many_arguments)]
    fn linears_backward(
        &self,
        _parameters: &Parameters<Self>,
        _linears: &[&Linear<Self>],
        _dys: &[&Self::Buffer],
        _inputs: (&Self::Buffer, &Self::Buffer),
        _dx: Option<&mut Self::Buffer>,
        _t: &mut Self::Buffer,
        _gradients: &mut Self::Buffer,
        _pair: &mut Self::Buffer,
        _rows: usize,
    ) -> bool {
        false
    }
}
