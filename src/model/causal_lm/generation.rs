//! Token after token: decoding with cached keys and values.

use std::borrow::Cow;

use super::{Mode, Model};
use crate::error::{Error, Result};
use crate::kernels::{Kernels, TokenLayout};
use crate::model::rotary::Reach;

impl<K: Kernels> Model<K> {
    /// Forgets all decoded tokens.
    pub fn clear_cache(&mut self) {
        self.cached_tokens = 0;
    }

    /// Tokens that were decoded since the last [`clear_cache`](Model::clear_cache). For tests.
    pub fn cached_tokens(&self) -> usize {
        self.cached_tokens
    }

    /// Feeds tokens behind those decoded before; returns the logits `[V]` after the last one.
    ///
    /// # Errors
    /// `Usage` when the context is full (`Settings::cache_tokens`) or more tokens come at once than
    /// planned, `Input` when an id is outside the vocabulary.
    pub fn decode(&mut self, ids: &[u32]) -> Result<Cow<'_, [f32]>> {
        self.decode_piece(ids, 0)
    }

    /// [`decode`](Model::decode) of a piece of a prompt of `prompt_tokens` in all, by which dynamic rotary
    /// embeddings turn.
    ///
    /// # Errors
    /// As there.
    pub fn decode_piece(&mut self, ids: &[u32], prompt_tokens: usize) -> Result<Cow<'_, [f32]>> {
        let (past, count) = (self.cached_tokens, ids.len());
        let room = self.settings.cache_tokens.saturating_sub(past).min(self.settings.tokens);
        if count == 0 || count > room {
            return Err(Error::usage(format_args!(
                "{count} tokens behind {past} do not fit a context of {}",
                self.settings.cache_tokens
            )));
        }
        self.check_tokens(ids)?;
        let tokens = TokenLayout::continuing(&[0, count as u32], past as u32);
        self.fill_rotary(
            &tokens,
            Reach { prompt_tokens, context_tokens: self.settings.cache_tokens },
        );
        self.forward(ids, &tokens, Mode { cached: true, ..Mode::default() });
        self.cached_tokens += count;
        self.head_logits(&[count as u32 - 1], true);
        self.leave_head();
        self.capped_logits(1)
    }
}
