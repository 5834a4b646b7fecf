//! Losses and scores under a head whose logits are there all at once.

use rayon::prelude::*;

use super::{Columns, Kernels, LogitShape};
use crate::error::Result;

/// [`Kernels::head_loss`] of its three operations: logits, their gradient in place, and that of x,
/// which nobody reads any more.
#[allow(clippy::too_many_arguments)]
pub(super) fn loss_at_once<K: Kernels>(
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

/// [`Kernels::head_score`] of logits that the program sees.
pub(super) fn score_at_once<K: Kernels>(
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
