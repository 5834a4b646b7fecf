//! How well a model foretells the trained tokens of a batch.

use rayon::prelude::*;

use super::{Mode, Model};
use crate::data::Batch;
use crate::error::Result;
use crate::kernels::Kernels;
use crate::kernels::cpu::Cpu;

/// Scores of a batch's trained tokens.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Score {
    /// Sum of their losses.
    pub loss: f64,
    /// For each, in the order of the stream, whether no other token is likelier.
    pub likeliest: Vec<bool>,
}

impl Model {
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
        for (rows, ids) in targets.rows.chunks(chunk).zip(targets.ids.chunks(chunk)) {
            self.head_logits(rows);
            let logits = &mut self.buffers.head.logits;
            let right = logits.par_chunks(vocab).zip(ids).map(|(row, &id)| {
                let chosen = row[id as usize];
                row.iter().all(|&logit| logit <= chosen)
            });
            score.likeliest.par_extend(right);
            score.loss += Cpu.cross_entropy(logits, ids, vocab, None);
        }
        Ok(score)
    }
}
