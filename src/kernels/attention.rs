//! Attention, and what happens to q and k before it.

use super::{
    AttentionShape, Cache, CachedScratch, Direction, HeadNorms, RotaryTables, Storage, TokenLayout,
};

/// What the gradients of q, k and v are computed from.
pub struct AttentionInputs<'a, B> {
    /// q, k and v as the forward pass read them.
    pub qkv: &'a B,
    /// `[T, H·head_dim]`.
    pub o: &'a B,
    /// `[T, H]`.
    pub lse: &'a B,
    /// The gradient of o, `[T, H·head_dim]`.
    pub d_o: &'a B,
}

/// Attention inside documents; rows of `qkv` are `[q | k | v]`, as [`AttentionShape`] says.
pub trait AttentionKernels: Storage {
    /// `to = [norm(q) | norm(k) | v]` of the rows of `qkv`: of each head, or of as much as a norm is wide.
    fn head_norms(
        &self,
        norms: &HeadNorms<Self::Vector>,
        shape: &AttentionShape,
        qkv: &Self::Buffer,
        to: &mut Self::Buffer,
        rows: usize,
    );

    /// Overwrites the gradients of norm(q) and norm(k) in `dqkv` with those of q and k in `qkv`; no
    /// gradient for the frozen weights.
    fn head_norms_backward(
        &self,
        norms: &HeadNorms<Self::Vector>,
        shape: &AttentionShape,
        qkv: &Self::Buffer,
        dqkv: &mut Self::Buffer,
        rows: usize,
    );

    /// Rotates q and k in place, backward by the opposite angle. The scale of q is its own transpose.
    fn rotary(
        &self,
        shape: &AttentionShape,
        tables: RotaryTables<Self::Buffer>,
        qkv: &mut Self::Buffer,
        rows: usize,
        direction: Direction,
    );

    /// Causal attention inside each document: `o [T, H·head_dim]` and the log-sum-exp `[T, H]`.
    fn attention_forward(
        &self,
        shape: &AttentionShape,
        layout: &TokenLayout,
        qkv: &Self::Buffer,
        o: &mut Self::Buffer,
        lse: &mut Self::Buffer,
        work: &mut Self::Buffer,
    );

    /// Attention of `rows` new tokens that follow those in the cache: appends their k and v to it and
    /// writes `o [rows, H·head_dim]`.
    fn attention_cached(
        &self,
        shape: &AttentionShape,
        qkv: &Self::Buffer,
        cache: Cache<Self::Buffer>,
        rows: usize,
        o: &mut Self::Buffer,
        scratch: CachedScratch<Self::Buffer>,
    );

    /// Overwrites `dqkv`; probabilities are recomputed from q, k and the log-sum-exp.
    fn attention_backward(
        &self,
        shape: &AttentionShape,
        layout: &TokenLayout,
        inputs: AttentionInputs<Self::Buffer>,
        dqkv: &mut Self::Buffer,
        work: &mut Self::Buffer,
    );
}
