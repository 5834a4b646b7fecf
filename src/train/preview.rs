//! Sample answers of a model in training: the likeliest token each time, so that two answers differ
//! only where the weights do.

use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::model::Model;
use crate::model::spec::ModelSpec;
use crate::sample::{Limits, Sampler, SamplingOptions, Speaker, Wish};

/// Prompts a model in training.
pub struct Preview {
    speaker: Speaker,
    max_new_tokens: usize,
    /// Tokens that the model has positions for.
    longest: usize,
}

impl Preview {
    /// A preview of answers of at most `max_new_tokens` by the model of `spec`.
    pub fn new(speaker: Speaker, max_new_tokens: usize, spec: &ModelSpec) -> Self {
        Preview { speaker, max_new_tokens, longest: spec.possible_length(usize::MAX) }
    }

    /// Tokens of context that the longest of `prompts` and its answer take.
    ///
    /// # Errors
    /// `Input` when the template or the tokenizer refuses a prompt; `Usage` for one that leaves no position for
    /// an answer.
    pub fn context_tokens(&self, prompts: &[String]) -> Result<usize> {
        let length = |prompt: &String| Ok(self.speaker.ids(&self.speaker.prompt(prompt)?)?.len());
        let lengths = prompts.iter().map(length).collect::<Result<Vec<_>>>()?;
        let Some(most) = lengths.into_iter().max() else { return Ok(0) };
        if most >= self.longest {
            let what = format_args!(
                "--sample-prompt: {most} tokens, the model has positions for {}",
                self.longest
            );
            return Err(Error::usage(what).hint("shorten it, so that an answer can follow"));
        }
        Ok(self.with_answer(most))
    }

    /// Tokens of a prompt of `prompt_tokens` and its answer.
    fn with_answer(&self, prompt_tokens: usize) -> usize {
        prompt_tokens.saturating_add(self.max_new_tokens).min(self.longest)
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
        let context_tokens = self.with_answer(self.speaker.ids(&prompt)?.len());
        let max_new_tokens = self.max_new_tokens;
        let limits = Limits { max_new_tokens, context_tokens, prefill_tokens, stop_strings: &[] };
        let mut sampler = Sampler::new(SamplingOptions::greedy())?;
        let mut answer = String::new();
        self.speaker.answer(model, &prompt, &mut sampler, limits, |piece| {
            answer.push_str(piece);
            Ok(Wish::Continue)
        })?;
        Ok(answer)
    }
}
