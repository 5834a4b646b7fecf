//! Losses and scores: of logits that are there, and of a head that makes them.

use rayon::prelude::*;

use super::{Columns, LinearKernels, LinearTerms, LogitShape, Storage, Write};
use crate::error::Result;

/// Rows that have a target, under a head.
pub struct HeadChunk<'a, K: Storage> {
    /// W, `[V, D]`.
    pub head: &'a K::Weight,
    /// To work in, as the plan has it: for the logits of these rows, or of a tile of the head.
    pub logits: &'a mut K::Buffer,
    /// The target of each row.
    pub targets: &'a [u32],
    /// V, and what logits are capped with.
    pub shape: LogitShape,
}

/// The head and its loss.
pub trait HeadKernels: LinearKernels {
    /// Adds the sum over rows of `−log softmax(logits)[target]` to `loss`, and in how many of them no logit is
    /// larger than the target's; `logits [rows, V]`, as they are before they are capped, become `scale ·` their
    /// gradient if there is one to compute.
    fn cross_entropy(
        &self,
        logits: &mut Self::Buffer,
        targets: &[u32],
        shape: LogitShape,
        scale: Option<f32>,
        loss: &mut Self::LossSum,
    );

    /// Adds the same of `x · Wᵀ` to `loss`; with `scale`, x `[rows, D]`
    /// becomes `scale ·` its gradient. `sum` is to work in where the head comes in tiles: for the gradient
    /// of x.
    fn head_loss(
        &self,
        chunk: HeadChunk<Self>,
        x: &mut Self::Buffer,
        _sum: Option<&mut Self::Buffer>,
        scale: Option<f32>,
        loss: &mut Self::LossSum,
    ) {
        loss_at_once(self, chunk, x, scale, loss);
    }

    /// Adds the same losses, and tells of each row whether no logit is larger than its target's.
    ///
    /// # Errors
    /// What went wrong in the operations before.
    fn head_score(
        &self,
        chunk: HeadChunk<Self>,
        x: &Self::Buffer,
        loss: &mut Self::LossSum,
    ) -> Result<Vec<bool>> {
        score_at_once(self, chunk, x, loss)
    }
}

/// [`HeadKernels::head_loss`] of its three operations: logits, their gradient in place, and that of x,
/// which nobody reads any more.
pub(super) fn loss_at_once<K: HeadKernels>(
    kernels: &K,
    HeadChunk { head, logits, targets, shape }: HeadChunk<K>,
    x: &mut K::Buffer,
    scale: Option<f32>,
    loss: &mut K::LossSum,
) {
    let (rows, all) = (targets.len(), Columns::all(shape.vocab_size));
    kernels.linear_forward(LinearTerms::of(head), x, (logits, all), rows, Write::Over);
    kernels.cross_entropy(logits, targets, shape, scale, loss);
    if scale.is_some() {
        kernels.linear_backward(head, None, (logits, all), x, rows, Write::Over);
    }
}

/// [`HeadKernels::head_score`] of logits that the program sees.
fn score_at_once<K: HeadKernels>(
    kernels: &K,
    HeadChunk { head, logits, targets, shape }: HeadChunk<K>,
    x: &K::Buffer,
    loss: &mut K::LossSum,
) -> Result<Vec<bool>> {
    let (rows, vocab_size) = (targets.len(), shape.vocab_size);
    let all = Columns::all(vocab_size);
    kernels.linear_forward(LinearTerms::of(head), x, (logits, all), rows, Write::Over);
    let values = kernels.values(logits, 0..rows * vocab_size)?;
    let likeliest = values.par_chunks(vocab_size).zip(targets).map(|(row, &target)| {
        let chosen = row[target as usize];
        row.iter().all(|&logit| logit <= chosen)
    });
    let likeliest = likeliest.collect();
    kernels.cross_entropy(logits, targets, shape, None, loss);
    Ok(likeliest)
}
