//! The adapters' own products: `x·Aᵀ`, and the gradients of A, B and x.

use super::{Columns, LoraShape, Storage};
use crate::model::parameters::Parameters;

/// What the gradients of A and B are computed from.
pub struct LoraInputs<'a, B> {
    /// The linear's columns of dy, `[rows, out]`.
    pub dy: (&'a B, Columns),
    /// x after dropout, `[rows, in]`.
    pub x: &'a B,
    /// The adapter's columns of ax, `[rows, R]`.
    pub ax: (&'a B, Columns),
}

/// Low-rank products of one linear's adapter; `pair` is what [`load_pair`](LoraKernels::load_pair) left.
pub trait LoraKernels: Storage {
    /// Makes `pair` hold target `index`'s A, then B, as the products below read them: it is filled, or,
    /// where a bf16 working copy can be read as it lies, becomes a view of that copy. So nobody may write
    /// to it, and its own memory may be out of reach from then on.
    fn load_pair(&self, parameters: &Parameters<Self>, index: usize, pair: &mut Self::Buffer);

    /// `ax[:, band] = x · Aᵀ`.
    fn lora_project(
        &self,
        shape: &LoraShape,
        pair: &Self::Buffer,
        x: &Self::Buffer,
        ax: (&mut Self::Buffer, Columns),
        rows: usize,
    );

    /// [`lora_project`](LoraKernels::lora_project) of one row that text is generated from: its sums may have
    /// another order than those of several rows.
    fn lora_project_row(
        &self,
        shape: &LoraShape,
        pair: &Self::Buffer,
        x: &Self::Buffer,
        ax: (&mut Self::Buffer, Columns),
    );

    /// `gA += tᵀ x`, `gB += scale · dyᵀ ax`, with `t = scale · dy[:, band] · B`, which is left for
    /// [`linear_backward`](super::LinearKernels::linear_backward). `gradients[offset..]` holds gA, gB.
    fn lora_backward(
        &self,
        shape: &LoraShape,
        pair: &Self::Buffer,
        inputs: LoraInputs<Self::Buffer>,
        t: &mut Self::Buffer,
        gradients: (&mut Self::Buffer, usize),
        rows: usize,
    );

    /// `dx = t · A`: for the path through dropout, which the rest of dx does not take.
    fn lora_input_gradient(
        &self,
        shape: &LoraShape,
        pair: &Self::Buffer,
        t: &Self::Buffer,
        dx: &mut Self::Buffer,
        rows: usize,
    );
}
