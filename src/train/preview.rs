//! Sample answers of a model in training: the likeliest token each time, so that two answers differ
//! only where the weights do.

use serde_json::{Map, json};

use crate::data::ChatTokenizer;
use crate::data::template::ChatTemplate;
use crate::error::Result;
use crate::model::Model;
use crate::sample::prompt_ids;

/// Renders prompts and decodes answers.
pub struct Preview {
    tokenizer: ChatTokenizer,
    template: Option<ChatTemplate>,
    max_new_tokens: usize,
}

impl Preview {
    /// For answers of at most `max_new_tokens`.
    ///
    /// # Errors
    /// `Input` when the chat template does not compile.
    pub fn new(tokenizer: ChatTokenizer, max_new_tokens: usize) -> Result<Self> {
        let template = tokenizer.compile_template()?;
        Ok(Preview { tokenizer, template, max_new_tokens })
    }

    /// Tokens of context that the longest of `prompts` and its answer take.
    ///
    /// # Errors
    /// `Input` when the template or the tokenizer refuses a prompt.
    pub fn context_tokens(&self, prompts: &[String]) -> Result<usize> {
        let lengths = prompts.iter().map(|prompt| Ok(self.encode(prompt)?.len()));
        let longest = lengths.collect::<Result<Vec<_>>>()?.into_iter().max();
        Ok(longest.map_or(0, |length| length + self.max_new_tokens))
    }

    /// The answer to `prompt`: a user's turn where there is a chat template, else text to continue.
    /// The prompt is fed in pieces of at most `piece` tokens.
    ///
    /// # Errors
    /// Those of tokenizer and model.
    pub fn answer(&self, model: &mut Model, prompt: &str, piece: usize) -> Result<String> {
        let ids = self.encode(prompt)?;
        model.clear_cache();
        let mut next = None;
        for part in ids.chunks(piece.max(1)) {
            next = Some(likeliest(model.decode(part)?));
        }
        let mut answer = Vec::new();
        while let Some(id) = next.filter(|id| !self.tokenizer.eos_ids().contains(id)) {
            answer.push(id);
            if answer.len() >= self.max_new_tokens {
                break;
            }
            next = Some(likeliest(model.decode(&[id])?));
        }
        self.tokenizer.decode(&answer, true)
    }

    fn encode(&self, prompt: &str) -> Result<Vec<u32>> {
        match &self.template {
            Some(template) => {
                let message = json!({"role": "user", "content": prompt});
                prompt_ids(&self.tokenizer, &template.render(&[message], &Map::new(), true)?)
            }
            None => prompt_ids(&self.tokenizer, prompt),
        }
    }
}

/// Index of the largest logit, the first of equals.
fn likeliest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (index, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = index;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_the_largest_wins() {
        assert_eq!(likeliest(&[-3.0, 2.0, 7.5, 7.5, 1.0]), 2);
    }
}
