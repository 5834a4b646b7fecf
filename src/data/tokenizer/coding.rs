//! From text to ids and back.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::ChatTokenizer;
use crate::error::{Error, Result};

impl ChatTokenizer {
    /// Ids of `text` without any added special token; special tokens *in* the text are recognised.
    ///
    /// # Errors
    /// `Input` when the tokenizer refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = guarded(|| self.tokenizer.encode_fast(text, false))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids of text that no template wrote, behind a BOS if the tokenizer wants one and the text has none.
    ///
    /// # Errors
    /// As [`encode`](ChatTokenizer::encode).
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text)?;
        if let Some(bos) = self.bos().filter(|_| self.adds_bos())
            && ids.first() != Some(&bos.id)
        {
            ids.insert(0, bos.id);
        }
        Ok(ids)
    }

    /// Ids of `text` with the byte range that each came from.
    ///
    /// # Errors
    /// `Input` when the tokenizer refuses the text.
    pub fn encode_with_offsets(&self, text: &str) -> Result<(Vec<u32>, Vec<Range<usize>>)> {
        let encoding = guarded(|| self.tokenizer.encode(text, false))?;
        let offsets = encoding.get_offsets().iter().map(|&(begin, end)| begin..end).collect();
        Ok((encoding.get_ids().to_vec(), offsets))
    }

    /// Text of `ids`.
    ///
    /// # Errors
    /// `Input` when an id is outside the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        guarded(|| self.tokenizer.decode(ids, skip_special_tokens))
    }
}

/// What the library gives; where it panics over some damaged tokenizer, an error like others.
///
/// # Errors
/// `Input`.
pub(in crate::data) fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done.map_err(|e| Error::input(format_args!("tokenizer: {e}"))),
        Err(_) => Err(Error::input("tokenizer.json: the `tokenizers` library fails over it")
            .hint("the file is damaged: get it again")),
    }
}
