//! Logits of every row of every document, for comparisons with other programs.

use std::io::Write;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};

use crate::checkpoint::atomic::AtomicFile;
use crate::data::{Batch, Dataset, Document};
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::model::Model;
use crate::system::interrupt::Interrupt;

/// Documents of one length.
pub(super) struct SavedLogits<'a> {
    documents: &'a [Document],
    /// Tokens of each document.
    length: usize,
}

impl<'a> SavedLogits<'a> {
    /// What is wrong with the file or the documents is found before the model is read.
    ///
    /// # Errors
    /// `Usage` when documents differ in length, or the file is there already.
    pub(super) fn new(dataset: &'a Dataset, path: &Path) -> Result<Self> {
        let documents = &dataset.documents;
        let length = documents[0].input_ids.len();
        if let Some(other) = documents.iter().find(|document| document.input_ids.len() != length) {
            let what = format_args!(
                "--save-logits needs sequences of equal length: {} has {} tokens, the first {length}",
                dataset.report.files.line(other.line),
                other.input_ids.len()
            );
            let shortest = documents.iter().map(|document| document.input_ids.len()).min();
            let shortest = shortest.unwrap_or(length);
            return Err(Error::usage(what).hint(format_args!(
                "give records of one length, or cut them with `--max-length {shortest} --truncation right`"
            )));
        }
        super::check_is_new("--save-logits", path)?;
        Ok(SavedLogits { documents, length })
    }

    /// Writes a safetensors file: `input_ids` (I64, `[documents, length]`) and `logits` (F32,
    /// `[documents, length, vocabulary]`).
    ///
    /// # Errors
    /// Those of the forward pass and of [`AtomicFile::commit`], `Io`, and `Interrupted`.
    pub(super) fn write<K: Kernels>(
        &self,
        model: &mut Model<K>,
        mut file: AtomicFile,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let rows: Vec<u32> = (0..self.length as u32).collect();
        let mut logits = Vec::new();
        for document in self.documents {
            interrupt.check()?;
            logits.extend(model.logits(&Batch::from_documents([document]), &rows)?);
        }
        let ids = self.documents.iter().flat_map(|document| &document.input_ids);
        let ids: Vec<i64> = ids.map(|&id| id.into()).collect();
        let shape = vec![self.documents.len(), self.length];
        let logits_shape = [&shape[..], &[model.spec().vocab_size]].concat();
        let tensors = || {
            let ids = TensorView::new(Dtype::I64, shape, bytemuck::cast_slice(&ids))?;
            let logits = TensorView::new(Dtype::F32, logits_shape, bytemuck::cast_slice(&logits))?;
            safetensors::serialize([("input_ids", ids), ("logits", logits)], None)
        };
        let bytes = tensors().map_err(|e| Error::usage(format_args!("--save-logits: {e}")))?;
        let written = file.write_all(&bytes);
        written.map_err(|e| Error::io("write", file.destination(), e))?;
        file.commit().map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_other_lengths_are_named_with_what_would_cut_them() {
        let line = |ids: &[u32]| format!("{{\"input_ids\": {ids:?}}}");
        let (folder, dataset) =
            super::super::fixtures::dataset(&[&line(&[1, 2, 3]), &line(&[1, 2])]);
        let error = SavedLogits::new(&dataset, Path::new("none")).err().unwrap().to_string();
        let place = folder.path().join("1.jsonl").display().to_string();
        assert!(error.contains(&format!("{place}:1 has 2 tokens, the first 3")), "{error}");
        assert!(error.contains("`--max-length 2 --truncation right`"), "{error}");
    }
}
