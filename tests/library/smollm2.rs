//! SmolLM2's tokenizer, and the options that most tests read records with.

use std::path::Path;
use std::sync::LazyLock;

use nibble::data::{BadRecords, ChatTokenizer, DataOptions, TrainOn, Truncation};

pub const VOCAB: usize = 49152;

pub fn tokenizer() -> &'static ChatTokenizer {
    static TOKENIZER: LazyLock<ChatTokenizer> = LazyLock::new(|| {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tokenizer/smollm2");
        ChatTokenizer::open(Path::new(folder)).unwrap()
    });
    &TOKENIZER
}

pub fn options() -> DataOptions {
    DataOptions {
        format: None,
        train_on: TrainOn::Assistant,
        truncation: Truncation::Error,
        bad_records: BadRecords::Error,
        max_length: 512,
        positions: None,
        rename_columns: Vec::new(),
    }
}
