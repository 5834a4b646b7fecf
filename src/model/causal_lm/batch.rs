//! What a batch asks for, checked against the plan and the vocabulary.

use super::Model;
use crate::data::{Batch, targets};
use crate::error::{Error, Result};
use crate::kernels::{Kernels, TokenLayout};
use crate::model::rotary::Reach;

/// Tokens whose next token is trained, and those targets.
pub(super) struct Targets {
    pub(super) rows: Vec<u32>,
    pub(super) ids: Vec<u32>,
}

impl Targets {
    pub(super) fn of(batch: &Batch) -> Self {
        let (mut rows, mut ids) = (Vec::new(), Vec::new());
        for document in batch.documents() {
            let labels = &batch.labels[document.clone()];
            for token in targets(labels) {
                rows.push((document.start + token - 1) as u32);
                ids.push(labels[token] as u32);
            }
        }
        Targets { rows, ids }
    }
}

impl<K: Kernels> Model<K> {
    pub(super) fn begin(&mut self, batch: &Batch) -> Result<(TokenLayout, Targets)> {
        let tokens = TokenLayout::new(&batch.cu_seqlens);
        let (planned, longest) = (self.settings.tokens, self.settings.longest_document);
        if tokens.tokens() > planned || tokens.longest() > longest {
            let (got, document) = (tokens.tokens(), tokens.longest());
            return Err(Error::usage(format_args!(
                "batch of {got} tokens (longest document {document}) is larger than the planned \
                 {planned} ({longest})"
            )));
        }
        self.check_tokens(&batch.input_ids)?;
        if let Some(rows) = self.spec.learned_positions
            && tokens.longest() > rows
        {
            return Err(Error::input(format_args!(
                "document of {} tokens is longer than the model's {rows} positions",
                tokens.longest()
            ))
            .hint(format_args!("use `--max-length {rows}` or less")));
        }
        let targets = Targets::of(batch);
        let vocab = self.spec.vocab_size;
        if let Some(id) = targets.ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::input(format_args!(
                "label {id} is outside the vocabulary of {vocab}"
            )));
        }
        self.fill_rotary(&tokens, Reach::default());
        Ok((tokens, targets))
    }

    /// Whether the embedding has a row for each of `ids`.
    pub(super) fn check_tokens(&self, ids: &[u32]) -> Result<()> {
        let vocab = self.spec.vocab_size;
        let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) else { return Ok(()) };
        let what = format_args!("token id {id} is outside the vocabulary of {vocab}");
        Err(Error::input(what).hint("the tokenizer belongs to another model"))
    }
}
