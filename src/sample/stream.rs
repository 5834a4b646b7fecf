//! Text as it is generated: whole characters only.

use crate::data::ChatTokenizer;
use crate::error::Result;

/// Turns tokens into text piece by piece. A character may take several tokens; its bytes are held
/// back until it is complete.
pub struct TextStream<'a> {
    tokenizer: &'a ChatTokenizer,
    ids: Vec<u32>,
    /// Tokens whose text was handed out.
    done: usize,
    /// First token of the window that is decoded: some text depends on what stands before.
    window: usize,
}

impl<'a> TextStream<'a> {
    /// An empty stream.
    pub fn new(tokenizer: &'a ChatTokenizer) -> Self {
        TextStream { tokenizer, ids: Vec::new(), done: 0, window: 0 }
    }

    /// Takes a token; returns the text that it completes.
    ///
    /// # Errors
    /// `Input` when the id is outside the vocabulary.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let before = self.tokenizer.decode(&self.ids[self.window..self.done], true)?;
        let after = self.tokenizer.decode(&self.ids[self.window..], true)?;
        if after.ends_with(char::REPLACEMENT_CHARACTER) || after.len() <= before.len() {
            return Ok(String::new());
        }
        let text = after.get(before.len()..).unwrap_or_default().to_string();
        (self.window, self.done) = (self.done, self.ids.len());
        Ok(text)
    }

    /// What was held back at the end.
    ///
    /// # Errors
    /// As [`push`](TextStream::push).
    pub fn finish(&mut self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[self.window..self.done], true)?;
        let after = self.tokenizer.decode(&self.ids[self.window..], true)?;
        self.done = self.ids.len();
        Ok(after.get(before.len()..).unwrap_or_default().to_string())
    }
}
