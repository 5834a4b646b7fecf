//! Products with frozen weights, and what adapters add in the same product.

use super::{Columns, LoraTerm, Storage, Write};
use crate::model::block::{AdapterWork, LinearGroup};

/// What the output of a linear is the sum of.
pub struct LinearTerms<'a, K: Storage> {
    /// `[out, in]`.
    pub weight: &'a K::Weight,
    /// `[out]`.
    pub bias: Option<&'a K::Vector>,
    /// What the adapter adds.
    pub lora: Option<LoraTerm<'a, K::Buffer>>,
}

impl<'a, K: Storage> LinearTerms<'a, K> {
    /// The product of a matrix alone.
    pub fn of(weight: &'a K::Weight) -> Self {
        LinearTerms { weight, bias: None, lora: None }
    }
}

/// What the gradients of a linear's A and B are computed from, beside that of its output.
pub struct LinearInputs<'a, B> {
    /// What the linear read, `[rows, in]`.
    pub x: &'a B,
    /// `drop(x)·Aᵀ` of all adapters of its half of the block, side by side.
    pub lora_x: &'a B,
}

impl<B> Clone for LinearInputs<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for LinearInputs<'_, B> {}

/// Linears: frozen products, an adapter's share in them, and linears that read the same rows.
pub trait LinearKernels: Storage {
    /// `y[:, band] = x · Wᵀ + bias + scale · ax · Bᵀ`, or `+=`; x `[rows, in]`, `terms.lora` holds ax.
    fn linear_forward(
        &self,
        terms: LinearTerms<Self>,
        x: &Self::Buffer,
        y: (&mut Self::Buffer, Columns),
        rows: usize,
        write: Write,
    );

    /// [`linear_forward`](LinearKernels::linear_forward) of one row that text is generated from: its sums
    /// may have another order than those of several rows.
    fn linear_row(
        &self,
        terms: LinearTerms<Self>,
        x: &Self::Buffer,
        y: (&mut Self::Buffer, Columns),
        write: Write,
    ) {
        self.linear_forward(terms, x, y, 1, write);
    }

    /// `dx = dy[:, band] · W + t · A`, or `+=`; `lora` holds t.
    fn linear_backward(
        &self,
        weight: &Self::Weight,
        lora: Option<LoraTerm<Self::Buffer>>,
        dy: (&Self::Buffer, Columns),
        dx: &mut Self::Buffer,
        rows: usize,
        write: Write,
    );

    /// [`lora_project`](super::LoraKernels::lora_project) and
    /// [`linear_forward`](LinearKernels::linear_forward) of linears that read the same rows, with fewer
    /// reads and products than one after another. Their outputs are bands of one buffer, or a buffer for
    /// each. `false`, and nothing done, where the backend has nothing better.
    fn linears_forward(
        &self,
        _group: &LinearGroup<Self>,
        _x: &Self::Buffer,
        _ys: &mut [&mut Self::Buffer],
        _ax: &mut Self::Buffer,
        _work: &mut AdapterWork<Self::Buffer>,
    ) -> bool {
        false
    }

    /// [`lora_backward`](super::LoraKernels::lora_backward) and
    /// [`linear_backward`](LinearKernels::linear_backward) of the same linears, of which dx is the
    /// sum.
    fn linears_backward(
        &self,
        _group: &LinearGroup<Self>,
        _dys: &[&Self::Buffer],
        _inputs: LinearInputs<Self::Buffer>,
        _dx: Option<&mut Self::Buffer>,
        _lora_gradients: &mut Self::Buffer,
        _work: &mut AdapterWork<Self::Buffer>,
    ) -> bool {
        false
    }
}
