//! Losses and scores: of logits that are there, and of a head that makes them.

use rayon::prelude::*;

use super::{Columns, LinearKernels, LogitShape};
use crate::error::Result;

/// The head and its loss.
pub trait HeadKernels: LinearKernels {
    /// Adds the sum over rows of `−log softmax(logits)[target]` to `loss`; `logits [rows, V]`, as they
    /// are before they are capped, become `scale ·` their gradient if there is one to compute.
    fn cross_entropy(
        &self,
        logits: &mut Self::Buffer,
        targets: &[u32],
        shape: LogitShape,
        scale: Option<f32>,
        loss: &mut Self::LossSum,
    );

    /// Adds the sum over rows of `−log softmax(x · Wᵀ)[target]` to `loss`, W `[V, in]` the head; with
    /// `scale`, x `[rows, in]` becomes `scale ·` its gradient. `logits` and `sum` are buffers to
    /// work in, as the plan has them: for the logits of these rows, or of a tile of the head, and for the
    /// gradient of x where the head comes in tiles.
    #[allow(clippy::too_many_arguments)]
    fn head_loss(
        &self,
        head: &Self::Weight,
        x: &mut Self::Buffer,
        logits: &mut Self::Buffer,
        _sum: Option<&mut Self::Buffer>,
        targets: &[u32],
        shape: LogitShape,
        scale: Option<f32>,
        loss: &mut Self::LossSum,
    ) {
        loss_at_once(self, head, x, logits, targets, shape, scale, loss);
    }

    /// Adds the same losses, and tells of each row whether no logit is larger than its target's.
    ///
    /// # Errors
    /// What went wrong in the operations before.
    #[allow(clippy::too_many_arguments)]
    fn head_score(
        &self,
        head: &Self::Weight,
        x: &Self::Buffer,
        logits: &mut Self::Buffer,
        targets: &[u32],
        shape: LogitShape,
        loss: &mut Self::LossSum,
    ) -> Result<Vec<bool>> {
        score_at_once(self, head, x, logits, targets, shape, loss)
    }
}

/// [`HeadKernels::head_loss`] of its three operations: logits, their gradient in place, and that of x,
/// which nobody reads any more.
#[allow(clippy::too_many_arguments)]
pub(super) fn loss_at_once<K: HeadKernels>(
    kernels: &K,
    head: &K::Weight,
    x: &mut K::Buffer,
    logits: &mut K::Buffer,
    targets: &[u32],
    shape: LogitShape,
    scale: Option<f32>,
    loss: &mut K::LossSum,
) {
    let (rows, all) = (targets.len(), Columns::all(shape.vocab_size));
    kernels.linear_forward(head, None, None, x, (logits, all), rows, false);
    kernels.cross_entropy(logits, targets, shape, scale, loss);
    if scale.is_some() {
        kernels.linear_backward(head, None, (logits, all), x, rows, false);
    }
}

/// [`HeadKernels::head_score`] of logits that the program sees.
pub(super) fn score_at_once<K: HeadKernels>(
    kernels: &K,
    head: &K::Weight,
    x: &K::Buffer,
    logits: &mut K::Buffer,
    targets: &[u32],
    shape: LogitShape,
    loss: &mut K::LossSum,
) -> Result<Vec<bool>> {
    let (rows, vocab_size) = (targets.len(), shape.vocab_size);
    kernels.linear_forward(head, None, None, x, (logits, Columns::all(vocab_size)), rows, false);
    let values = kernels.values(logits, 0..rows * vocab_size)?;
    let likeliest = values.par_chunks(vocab_size).zip(targets).map(|(row, &target)| {
        let chosen = row[target as usize];
        row.iter().all(|&logit| logit <= chosen)
    });
    let likeliest = likeliest.collect();
    kernels.cross_entropy(logits, targets, shape, None, loss);
    Ok(likeliest)
}
