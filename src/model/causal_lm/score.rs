//! How well a model foretells the trained tokens of a batch.

use rayon::prelude::*;

use super::{Mode, Model};
use crate::data::Batch;
use crate::error::Result;
use crate::kernels::Kernels;

/// Scores of a batch's trained tokens.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Score {
    /// Sum of their losses.
    pub loss: f64,
    /// For each, in the order of the stream, whether no other token is likelier.
    pub likeliest: Vec<bool>,
}

impl<K: Kernels> Model<K> {
    /// [`evaluate`](Model::evaluate), and which tokens greedy decoding would choose. A document all
    /// of whose trained tokens are likeliest is one that greedy decoding writes word for word.
    ///
    /// # Errors
    /// As [`forward_backward`](Model::forward_backward).
    pub fn score(&mut self, batch: &Batch, adapters: bool) -> Result<Score> {
        let (tokens, targets) = self.begin(batch)?;
        self.forward(&batch.input_ids, &tokens, Mode { base_only: !adapters, ..Mode::default() });
        let (vocab, chunk) = (self.spec.vocab_size, self.settings.logit_rows);
        let mut score = Score::default();
        self.kernels.clear_loss(&mut self.loss);
        for (rows, ids) in targets.rows.chunks(chunk).zip(targets.ids.chunks(chunk)) {
            self.head_logits(rows);
            let Model { kernels, buffers, loss, .. } = self;
            let logits = &mut buffers.head.logits;
            let values = kernels.values(logits, 0..ids.len() * vocab)?;
            let right = values.par_chunks(vocab).zip(ids).map(|(row, &id)| {
                let chosen = row[id as usize];
                row.iter().all(|&logit| logit <= chosen)
            });
            score.likeliest.par_extend(right);
            kernels.cross_entropy(logits, ids, vocab, None, loss);
        }
        score.loss = self.kernels.read_loss(&self.loss)?;
        Ok(score)
    }
}
