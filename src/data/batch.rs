//! Documents and the token streams that they are batched into.

use std::sync::Arc;

/// Label of a token that is not trained.
pub const MASKED: i32 = -100;

/// One tokenized example.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Document {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// For each token itself (not shifted): its id if it is trained, else [`MASKED`].
    pub labels: Vec<i32>,
    /// Line of the source file, from 1.
    pub line: usize,
}

/// A micro-batch: documents one after another, isolated from each other, without padding.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids of all documents.
    pub input_ids: Vec<u32>,
    /// As in [`Document`].
    pub labels: Vec<i32>,
    /// `0, …, T`: where documents begin and end; positions restart at each.
    pub cu_seqlens: Vec<u32>,
    /// Tokens that are predicted from a token before them in the same document.
    pub num_targets: usize,
    /// Source lines of the documents.
    pub lines: Vec<usize>,
    /// The file that they are lines of, where it is known.
    pub file: Option<Arc<str>>,
}

impl Batch {
    /// The documents as one stream.
    pub fn from_documents<'a>(documents: impl IntoIterator<Item = &'a Document>) -> Self {
        let mut batch = Batch { cu_seqlens: vec![0], ..Batch::default() };
        for document in documents {
            batch.input_ids.extend_from_slice(&document.input_ids);
            batch.labels.extend_from_slice(&document.labels);
            batch.cu_seqlens.push(batch.input_ids.len() as u32);
            batch.num_targets += document.num_targets();
            batch.lines.push(document.line);
        }
        batch
    }

    /// Where the documents come from: `train.jsonl:7, 9`, or `lines 7, 9`; the first few.
    pub fn places(&self) -> String {
        const SHOWN: usize = 8;
        let lines: Vec<String> = self.lines.iter().take(SHOWN).map(usize::to_string).collect();
        let more = if self.lines.len() > SHOWN { ", …" } else { "" };
        let lines = lines.join(", ");
        match &self.file {
            Some(file) => format!("{file}:{lines}{more}"),
            None => format!("lines {lines}{more}"),
        }
    }

    /// T.
    pub fn tokens(&self) -> usize {
        self.input_ids.len()
    }
}

impl Document {
    /// Trained tokens after the shift: the first token has nothing to be predicted from.
    pub fn num_targets(&self) -> usize {
        self.labels.iter().skip(1).filter(|&&label| label >= 0).count()
    }
}
