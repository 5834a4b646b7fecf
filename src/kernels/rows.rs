//! Rows and elements: embeddings, norms, dropout, noise, and rows that move.

use std::ops::Range;

use super::{DropoutMask, NormParameters, Storage, UniformNoise, Write};

/// Operations that take every row, or every element, by itself.
pub trait RowKernels: Storage {
    /// `x[t] = scale · table[ids[t]]`, or `+=`; x `[T, D]`, table `[V, D]`.
    fn embed(
        &self,
        ids: &[u32],
        table: &Self::Weight,
        scale: f32,
        x: &mut Self::Buffer,
        write: Write,
    );

    /// y = norm(x), or `+=`, rows of D; `stats` keeps `(mean, 1/σ)` of each row for the backward pass.
    fn norm_forward(
        &self,
        norm: &NormParameters<Self::Vector>,
        x: &Self::Buffer,
        y: &mut Self::Buffer,
        stats: &mut Self::Buffer,
        rows: usize,
        write: Write,
    );

    /// `dx += ∂norm/∂x · dy`; no gradient for the frozen weight and bias.
    fn norm_backward(
        &self,
        norm: &NormParameters<Self::Vector>,
        dy: &Self::Buffer,
        x: &Self::Buffer,
        stats: &Self::Buffer,
        dx: &mut Self::Buffer,
        rows: usize,
    );

    /// `y = x ∘ mask / (1 − p)` over `[rows, width]`, or `+=`.
    fn dropout(
        &self,
        mask: &DropoutMask,
        x: &Self::Buffer,
        y: &mut Self::Buffer,
        elements: usize,
        write: Write,
    );

    /// Adds noise to `rows` of x, which are `width` wide.
    fn add_noise(
        &self,
        noise: &UniformNoise,
        x: &mut Self::Buffer,
        rows: Range<usize>,
        width: usize,
    );

    /// `to[i] = from[rows[i]]`, rows of `width`.
    fn gather_rows(&self, from: &Self::Buffer, rows: &[u32], to: &mut Self::Buffer, width: usize);

    /// `to[rows[i]] = from[i]`.
    fn scatter_rows(&self, from: &Self::Buffer, rows: &[u32], to: &mut Self::Buffer, width: usize);

    /// `to = from`, or `+=`: `rows` of `width`.
    fn copy_rows(
        &self,
        from: &Self::Buffer,
        to: &mut Self::Buffer,
        rows: usize,
        width: usize,
        write: Write,
    );

    /// Copies `elements`, from and to the given offsets.
    fn copy(&self, from: (&Self::Buffer, usize), to: (&mut Self::Buffer, usize), elements: usize);

    /// Zeroes the first `elements`.
    fn zero(&self, buffer: &mut Self::Buffer, elements: usize);
}
