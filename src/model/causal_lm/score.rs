//! How well a model foretells the trained tokens of a batch.

use super::buffers::HeadBuffers;
use super::{Mode, Model};
use crate::data::Batch;
use crate::error::Result;
use crate::kernels::{HeadChunk, Kernels, LogitShape};
use crate::model::Variant;

/// Scores of a batch's trained tokens.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Score {
    /// Sum of their losses.
    pub loss: f64,
    /// Of each trained token, in the order of the stream, whether no other token is likelier.
    pub likeliest: Vec<bool>,
}

impl<K: Kernels> Model<K> {
    /// [`evaluate`](Model::evaluate), and which tokens greedy decoding would choose. A document all
    /// of whose trained tokens are likeliest is one that greedy decoding writes word for word.
    ///
    /// # Errors
    /// As [`forward_backward`](Model::forward_backward).
    pub fn score(&mut self, batch: &Batch, variant: Variant) -> Result<Score> {
        let (tokens, targets) = self.begin(batch)?;
        self.forward(&batch.input_ids, &tokens, Mode { variant, ..Mode::default() });
        let shape = LogitShape::of(&self.spec);
        let chunk = self.settings.head(shape.vocab_size).rows;
        let mut likeliest = Vec::with_capacity(targets.ids.len());
        self.kernels.clear_loss(&mut self.loss);
        for (rows, ids) in targets.rows.chunks(chunk).zip(targets.ids.chunks(chunk)) {
            self.head_inputs(rows);
            let Model { kernels, weights, buffers, loss, .. } = self;
            let HeadBuffers { norm, logits, .. } = &mut buffers.head;
            let chunk = HeadChunk { head: weights.head(), logits, targets: ids, shape };
            likeliest.extend(kernels.head_score(chunk, norm, loss)?);
        }
        self.leave_head();
        Ok(Score { loss: self.kernels.read_loss(&self.loss)?.sum, likeliest })
    }
}
