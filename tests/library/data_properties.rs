//! What holds for any data: nothing is lost or reordered unsaid, whatever the threads and options.

use clap::ValueEnum;
use nibble::data::pack::pack;
use nibble::data::{Batch, DataFiles, DataOptions, Dataset, Encoder, TrainOn, Truncation, load};
use nibble::random::Stream;
use serde_json::json;

use crate::smollm2::{self, VOCAB, tokenizer};

/// Conversations, some long, some without an answer, some twice; bad lines between them.
fn conversations(count: u64) -> String {
    let random = Stream::new(5, "conversations");
    let words = ["red", " blue", "grün", " 1234", "\n", " 🤖", " the end", "<|im_end|>"];
    let mut lines = Vec::new();
    for index in 0..count {
        let draw = |slot: u64, below: u64| random.below(64 * index + slot, below);
        let text = |slot: u64, most: u64| -> String {
            let length = draw(slot, most);
            (0..length).map(|i| words[draw(20 + slot + i % 30, 8) as usize]).collect()
        };
        let mut messages = Vec::new();
        for turn in 0..1 + draw(1, 5) {
            let role = if turn % 2 == 0 { "user" } else { "assistant" };
            messages.push(json!({"role": role, "content": text(2 + turn, 40)}));
        }
        lines.push(match draw(0, 20) {
            0 => "{broken".to_string(),
            _ => json!({"messages": messages}).to_string(),
        });
    }
    lines.join("\n")
}

fn load_all(text: &str, options: &DataOptions) -> Dataset {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.jsonl");
    std::fs::write(&path, text).unwrap();
    let tokenizer = tokenizer();
    let encoder = Encoder::new(tokenizer, VOCAB, options.train_on).unwrap();
    let mut dataset = load(std::slice::from_ref(&path), &encoder, options, |_, _| ()).unwrap();
    // Its name is another each time.
    dataset.report.files = DataFiles::default();
    dataset
}

fn options(truncation: Truncation, max_length: usize) -> DataOptions {
    DataOptions { truncation, max_length, ..smollm2::options() }
}

#[test]
fn documents_do_not_depend_on_the_number_of_threads() {
    let text = conversations(3000);
    let with_threads = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| load_all(&text, &options(Truncation::Split, 64)))
    };
    let one = with_threads(1);
    let lines: Vec<usize> = one.documents.iter().map(|document| document.line).collect();
    assert!(lines.is_sorted() && lines.len() > 2000);
    for threads in [2, 7] {
        let more = with_threads(threads);
        assert_eq!(more.report, one.report);
        assert_eq!(more.documents, one.documents);
    }
}

#[test]
fn a_list_and_lines_are_the_same_data() {
    let text = conversations(300);
    let options = options(Truncation::Right, 100);
    let whole: Vec<&str> = text.lines().filter(|line| *line != "{broken").collect();
    let lines = load_all(&whole.join("\n"), &options);
    let list = load_all(&format!("[{}]", whole.join(",\n")), &options);
    assert_eq!(list.documents, lines.documents);
    assert_eq!(list.report, lines.report);
}

#[test]
fn masks_stay_aligned_in_every_truncation() {
    let text = conversations(400);
    let whole = load_all(&text, &options(Truncation::Error, 1 << 20));
    assert!(whole.report.too_long.is_empty());
    for &truncation in Truncation::value_variants() {
        for max_length in [2, 17, 64, 200] {
            let cut = load_all(&text, &options(truncation, max_length));
            let mut tokens = 0;
            for document in &cut.documents {
                let place = format!("{truncation:?} {max_length} line {}", document.line);
                let source = whole.documents.iter().find(|other| other.line == document.line);
                let source = source.expect("cut from a whole one");
                let (ids, labels) = (&document.input_ids, &document.labels);
                assert!(ids.len() <= max_length && ids.len() == labels.len(), "{place}");
                assert!(document.num_targets() > 0, "{place}");
                let at = |begin: usize| {
                    source.input_ids[begin..].starts_with(ids)
                        && source.labels[begin..].starts_with(labels)
                };
                let most = source.input_ids.len() - ids.len();
                let found = match truncation {
                    Truncation::Right => at(0),
                    Truncation::Left => at(most),
                    Truncation::Split => (0..=most).step_by(max_length).any(at),
                    Truncation::Error | Truncation::Drop => most == 0 && at(0),
                };
                assert!(found, "{place}");
                tokens += ids.len();
            }
            let report = &cut.report;
            assert_eq!((report.tokens, report.documents), (tokens, cut.documents.len()));
            let all = report.lengths.iter().map(|&length| length as usize);
            let refused = all.clone().filter(|&length| length > max_length).sum::<usize>();
            let removed = match truncation {
                Truncation::Error => refused,
                _ => report.tokens_removed,
            };
            assert_eq!(tokens + removed, all.sum::<usize>(), "{truncation:?} {max_length}");
        }
    }
}

#[test]
fn packing_and_batching_lose_no_token() {
    let documents = load_all(&conversations(600), &options(Truncation::Split, 128)).documents;
    let lengths: Vec<usize> = documents.iter().map(|document| document.input_ids.len()).collect();
    for seed in 0..5 {
        let rows = pack(&lengths, 128, seed);
        let mut seen = vec![0; documents.len()];
        for row in &rows {
            let batch = Batch::from_documents(row.iter().map(|&index| &documents[index]));
            assert!(batch.tokens() <= 128);
            assert_eq!(batch.lines.len(), row.len());
            let bounds = batch.cu_seqlens.windows(2);
            for (&index, bounds) in row.iter().zip(bounds) {
                let range = bounds[0] as usize..bounds[1] as usize;
                assert_eq!(batch.input_ids[range.clone()], documents[index].input_ids);
                assert_eq!(batch.labels[range], documents[index].labels);
                seen[index] += 1;
            }
            let targets = row.iter().map(|&index| documents[index].num_targets());
            assert_eq!(batch.num_targets(), targets.sum::<usize>());
        }
        assert!(seen.iter().all(|&count| count == 1));
    }
}

/// Bytes that are no data give an error or a report, never a panic.
#[test]
fn damaged_files_are_reported() {
    let random = Stream::new(9, "damage");
    let good = conversations(30);
    let tokenizer = tokenizer();
    let encoder = Encoder::new(tokenizer, VOCAB, TrainOn::Assistant).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.jsonl");
    for round in 0..300u64 {
        let mut bytes =
            if round % 2 == 0 { good.clone() } else { format!("[{good}]") }.into_bytes();
        for hit in 0..1 + round % 7 {
            let at = random.below(round * 64 + 2 * hit, bytes.len() as u64) as usize;
            bytes[at] = random.below(round * 64 + 2 * hit + 1, 256) as u8;
        }
        bytes.truncate(random.below(round * 64 + 63, bytes.len() as u64) as usize + 1);
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(dataset) =
            load(std::slice::from_ref(&path), &encoder, &options(Truncation::Left, 50), |_, _| ())
        {
            let report = &dataset.report;
            assert!(report.records >= report.rejected.len() + report.lengths.len());
        }
    }
}
