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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::random::Stream;

    fn tokenizer() -> ChatTokenizer {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tokenizer/smollm2");
        ChatTokenizer::open(Path::new(path)).unwrap()
    }

    /// The pieces as they come.
    fn pieces(tokenizer: &ChatTokenizer, ids: &[u32]) -> Vec<String> {
        let mut stream = TextStream::new(tokenizer);
        let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        pieces.push(stream.finish().unwrap());
        pieces
    }

    #[test]
    fn characters_of_several_tokens_come_whole() {
        let tokenizer = tokenizer();
        for text in ["Grüße an 👩‍🚀 und 🇯🇵!", "日本語の文字、漢字", "plain words\n\n  indented"]
        {
            let ids = tokenizer.encode(text).unwrap();
            let pieces = pieces(&tokenizer, &ids);
            assert_eq!(pieces.concat(), text);
            assert!(pieces.iter().all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER)));
            assert!(pieces.iter().filter(|piece| !piece.is_empty()).count() > 3, "{pieces:?}");
        }
        let astronaut = tokenizer.encode("👩‍🚀").unwrap();
        assert!(astronaut.len() > 3, "several tokens for one character");
    }

    #[test]
    fn whatever_a_model_says_nothing_is_lost() {
        let tokenizer = tokenizer();
        let stream = Stream::new(7, "ids");
        for round in 0..200 {
            let draw = |index: u64| stream.below(40 * round + index, 49_152) as u32;
            let ids: Vec<u32> = (0..40).map(draw).collect();
            let whole = tokenizer.decode(&ids, true).unwrap();
            assert_eq!(pieces(&tokenizer, &ids).concat(), whole, "{ids:?}");
        }
    }
}
