//! Sample answers of a model in training: the likeliest token each time, so that two answers differ
//! only where the weights do.

use crate::error::Result;
use crate::kernels::Kernels;
use crate::model::Model;
use crate::sample::{Limits, Sampler, SamplingOptions, Speaker, Wish};

/// Prompts a model in training.
pub struct Preview {
    speaker: Speaker,
    max_new_tokens: usize,
}

impl Preview {
    /// For answers of at most `max_new_tokens`.
    pub fn new(speaker: Speaker, max_new_tokens: usize) -> Self {
        Preview { speaker, max_new_tokens }
    }

    /// Tokens of context that the longest of `prompts` and its answer take.
    ///
    /// # Errors
    /// `Input` when the template or the tokenizer refuses a prompt.
    pub fn context_tokens(&self, prompts: &[String]) -> Result<usize> {
        let length = |prompt: &String| Ok(self.speaker.ids(&self.speaker.prompt(prompt)?)?.len());
        let lengths = prompts.iter().map(length).collect::<Result<Vec<_>>>()?;
        Ok(lengths.into_iter().max().map_or(0, |length| length + self.max_new_tokens))
    }

    /// The answer to `prompt`: a user's turn where there is a chat template, else text to continue.
    /// The prompt is fed in pieces of at most `prefill_tokens`.
    ///
    /// # Errors
    /// Those of tokenizer and model.
    pub fn answer<K: Kernels>(
        &self,
        model: &mut Model<K>,
        prompt: &str,
        prefill_tokens: usize,
    ) -> Result<String> {
        let prompt = self.speaker.prompt(prompt)?;
        let context_tokens = self.speaker.ids(&prompt)?.len() + self.max_new_tokens;
        let limits = Limits { max_new_tokens: self.max_new_tokens, context_tokens, prefill_tokens };
        let mut sampler = Sampler::new(SamplingOptions::greedy())?;
        let mut answer = String::new();
        self.speaker.answer(model, &prompt, &mut sampler, limits, |piece| {
            answer.push_str(piece);
            Ok(Wish::Continue)
        })?;
        Ok(answer)
    }
}
