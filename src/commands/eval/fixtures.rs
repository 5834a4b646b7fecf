//! Data for the tests of `eval`.

use std::path::Path;

use tempfile::TempDir;

use crate::data::{
    BadRecords, ChatTokenizer, DataOptions, Dataset, Encoder, Format, TrainOn, Truncation, load,
};

/// What is read from a folder whose files, `0.jsonl` and so on, are these records of tokens.
pub(super) fn dataset(files: &[&str]) -> (TempDir, Dataset) {
    let folder = tempfile::tempdir().unwrap();
    for (index, text) in files.iter().enumerate() {
        std::fs::write(folder.path().join(format!("{index}.jsonl")), text).unwrap();
    }
    let home = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tokenizer/smollm2");
    let tokenizer = ChatTokenizer::open(Path::new(home)).unwrap();
    let options = DataOptions {
        format: Some(Format::Tokens),
        train_on: TrainOn::Assistant,
        truncation: Truncation::Error,
        bad_records: BadRecords::Error,
        max_length: 16,
        positions: None,
        rename_columns: Vec::new(),
    };
    let encoder = Encoder::new(&tokenizer, 49_152, options.train_on).unwrap();
    let dataset = load(&[folder.path().to_path_buf()], &encoder, &options, |_, _| ()).unwrap();
    (folder, dataset)
}
