//! Documents and the token streams that they are batched into.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use super::files::DataFiles;

/// Label of a token that is not trained.
pub const MASKED: i32 = -100;

/// One tokenized example.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Document {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// The label of each token itself (not shifted): its id if it is trained, else [`MASKED`].
    pub labels: Vec<i32>,
    /// Line counted through all files, from 1; [`DataFiles::locate`] gives file and line.
    pub line: usize,
}

/// A micro-batch: documents one after another, isolated from each other, without padding.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids of all documents.
    pub input_ids: Vec<u32>,
    /// The labels of the tokens, as in [`Document`].
    pub labels: Vec<i32>,
    /// `0, …, T`: where documents begin and end; positions restart at each.
    pub cu_seqlens: Vec<u32>,
    /// Tokens of the micro-batch before these, where they are a part of one: dropout goes on there.
    pub first_token: usize,
    /// [Lines](Document::line) of the documents.
    pub lines: Vec<usize>,
    /// The files that they are lines of, where these are known.
    pub files: Arc<DataFiles>,
}

impl Batch {
    /// The documents as one stream.
    pub fn from_documents<'a>(documents: impl IntoIterator<Item = &'a Document>) -> Self {
        let mut batch = Batch { cu_seqlens: vec![0], ..Batch::default() };
        for document in documents {
            batch.input_ids.extend_from_slice(&document.input_ids);
            batch.labels.extend_from_slice(&document.labels);
            batch.cu_seqlens.push(batch.input_ids.len() as u32);
            batch.lines.push(document.line);
        }
        batch
    }

    /// The places of the documents: `train.jsonl:7, 9`, or `lines 7, 9`; the first few.
    pub fn places(&self) -> String {
        const SHOWN: usize = 8;
        self.files.places(&self.lines, SHOWN)
    }

    /// These documents in passes of at most `most_tokens`, or of one document that is longer.
    pub fn split(&self, most_tokens: usize) -> Cow<'_, [Batch]> {
        if self.tokens() <= most_tokens {
            return Cow::Borrowed(std::slice::from_ref(self));
        }
        let ends: Vec<usize> = self.cu_seqlens.iter().map(|&end| end as usize).collect();
        let documents = ends.len() - 1;
        let (mut parts, mut first) = (Vec::new(), 0);
        while first < documents {
            let fits = |&last: &usize| ends[last + 1] - ends[first] <= most_tokens;
            let last = (first + 1..documents).take_while(fits).last().unwrap_or(first);
            parts.push(self.part(first..last + 1));
            first = last + 1;
        }
        Cow::Owned(parts)
    }

    /// Some of the documents.
    fn part(&self, documents: Range<usize>) -> Batch {
        let ends = &self.cu_seqlens[documents.start..=documents.end];
        let (first, end) = (ends[0] as usize, ends[documents.len()] as usize);
        Batch {
            input_ids: self.input_ids[first..end].to_vec(),
            labels: self.labels[first..end].to_vec(),
            cu_seqlens: ends.iter().map(|&end| end - first as u32).collect(),
            first_token: self.first_token + first,
            lines: self.lines.get(documents).unwrap_or_default().to_vec(),
            files: self.files.clone(),
        }
    }

    /// T.
    pub fn tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// Tokens of each document.
    pub fn documents(&self) -> impl Iterator<Item = Range<usize>> {
        self.cu_seqlens.windows(2).map(|ends| ends[0] as usize..ends[1] as usize)
    }

    /// Tokens that are trained, each predicted from the one before it in the same document.
    pub fn num_targets(&self) -> usize {
        self.documents().map(|document| targets(&self.labels[document]).count()).sum()
    }
}

/// Places of a document's tokens that are trained: not the first, which nothing is before.
pub fn targets(labels: &[i32]) -> impl Iterator<Item = usize> {
    (1..labels.len()).filter(|&token| labels[token] >= 0)
}

impl Document {
    /// Trained tokens after the shift: the first token has nothing to be predicted from.
    pub fn num_targets(&self) -> usize {
        targets(&self.labels).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(line: usize, length: usize) -> Document {
        let input_ids: Vec<u32> = (0..length as u32).map(|i| 10 * line as u32 + i).collect();
        let mut labels: Vec<i32> = input_ids.iter().map(|&id| id as i32).collect();
        labels[length / 2] = MASKED;
        Document { input_ids, labels, line }
    }

    #[test]
    fn parts_hold_the_same_documents_and_say_where_they_stood() {
        let documents: Vec<Document> =
            [4, 3, 6, 2, 2].into_iter().enumerate().map(|(i, n)| document(i + 1, n)).collect();
        let whole = Batch::from_documents(&documents);
        assert!(matches!(whole.split(17), Cow::Borrowed(parts) if parts.len() == 1));
        for (most, ends) in
            [(16, vec![4, 5]), (7, vec![2, 3, 5]), (4, vec![1, 2, 3, 5]), (1, vec![1, 2, 3, 4, 5])]
        {
            let (mut first, mut first_token) = (0, 0);
            for (part, end) in whole.split(most).iter().zip(&ends) {
                let plain = Batch::from_documents(&documents[first..*end]);
                assert_eq!(*part, Batch { first_token, ..plain }, "{most}: to {end}");
                (first, first_token) = (*end, first_token + part.tokens());
            }
            assert_eq!(whole.split(most).len(), ends.len());
        }
    }
}
