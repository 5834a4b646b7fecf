//! Mutated files against every reader: whatever is in them, a reader returns, without a panic and
//! without asking for memory that no file of that size needs.
//!
//! Runs for [`SECONDS`], or as long as `NIBBLE_FUZZ_SECONDS` says. A failure prints the round;
//! `NIBBLE_FUZZ_ROUND` runs one alone.

use std::fs;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use flate2::Compression;
use flate2::write::GzEncoder;
use nibble::adapter::Adapter;
use nibble::checkpoint::{Checkpoint, Weight};
use nibble::data::{BadRecords, ChatTokenizer, DataOptions, Encoder, TrainOn, Truncation, load};
use nibble::model::families::spec_from_config;
use nibble::model::spec::ModelSpec;
use nibble::model::weights::Weights;
use nibble::random::Stream;
use nibble::train::state::TrainState;
use serde_json::{Map, json};

use crate::gguf_file::GgufFile;
use crate::index::shard;
use crate::training::{Workplace, stderr, succeed};

const SECONDS: u64 = 12;
/// Values that lengths, offsets and counts break at.
const EXTREMES: [u64; 10] =
    [0, 1, 7, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, u64::MAX];
const JSON_VALUES: [&str; 9] =
    ["-1", "0", "1e300", "18446744073709551616", "null", "[]", "{}", "\"\\ud800\"", "[[[[[[[["];

/// A file that is mutated, and the folder or file that is then opened.
struct Target {
    file: &'static str,
    open: fn(&Workplace, &ModelSpec),
    is_text: bool,
}

fn read_model(place: &Workplace, name: &str) {
    let Ok(checkpoint) = Checkpoint::open(&place.path(name)) else { return };
    for info in checkpoint.tensors() {
        match checkpoint.weight(&info.name) {
            Ok(Weight::Dense(dense)) => drop(dense.to_f32()),
            Ok(Weight::Packed(packed)) => drop(packed.dequantize()),
            Err(_) => {}
        }
    }
    if let Ok(spec) = spec_from_config(checkpoint.config()) {
        drop(Weights::load(&checkpoint, &spec, None, None));
    }
}

fn read_tokenizer(place: &Workplace, name: &str) {
    let Ok(tokenizer) = ChatTokenizer::open(&place.path(name)) else { return };
    let _ = tokenizer.encode("w3 w4 ! \u{1F980}");
    let _ = tokenizer.decode(&[0, 3, 500, u32::MAX], true);
    let _ = tokenizer.compile_template();
}

fn read_data(place: &Workplace, spec: &ModelSpec, name: &str) {
    let tokenizer = ChatTokenizer::open(&place.path("whole")).unwrap();
    let encoder = Encoder::new(&tokenizer, spec.vocab_size, TrainOn::Assistant).unwrap();
    let options = DataOptions {
        format: None,
        train_on: TrainOn::Assistant,
        truncation: Truncation::Right,
        bad_records: BadRecords::Error,
        max_length: 16,
        positions: None,
        rename_columns: Vec::new(),
    };
    let files = [place.path(name)];
    if let Ok(data) = load(&files, &encoder, &options, |_, _| ()) {
        let _ = data.report.check(&files, &options);
    }
}

fn render_template(place: &Workplace) {
    let Ok(tokenizer) = ChatTokenizer::open(&place.path("whole")) else { return };
    let Ok(Some(template)) = tokenizer.compile_template() else { return };
    let messages = [("system", "w1"), ("user", "w2"), ("assistant", "w3")]
        .map(|(role, content)| json!({"role": role, "content": content}));
    let _ = template.render(&messages, &Map::new(), true);
}

/// Through the binary: a wrong command line ends the process.
fn read_settings(place: &Workplace, _: &ModelSpec) {
    let output = place.nibble(&["train", "--config", "run.toml"]).output().unwrap();
    assert!(matches!(output.status.code(), Some(1 | 2)), "{}", stderr(&output));
}

const TARGETS: &[Target] = &[
    Target { file: "model/model.safetensors", open: |p, _| read_model(p, "model"), is_text: false },
    Target { file: "model/config.json", open: |p, _| read_model(p, "model"), is_text: true },
    Target {
        file: "packed/model.safetensors",
        open: |p, _| read_model(p, "packed"),
        is_text: false,
    },
    Target { file: "packed/config.json", open: |p, _| read_model(p, "packed"), is_text: true },
    Target {
        file: "shards/model.safetensors.index.json",
        open: |p, _| read_model(p, "shards"),
        is_text: true,
    },
    Target { file: "model.gguf", open: |p, _| read_model(p, "model.gguf"), is_text: false },
    Target { file: "tok.gguf", open: |p, _| read_tokenizer(p, "tok.gguf"), is_text: false },
    Target { file: "model/tokenizer.json", open: |p, _| read_tokenizer(p, "model"), is_text: true },
    Target {
        file: "model/tokenizer_config.json",
        open: |p, _| read_tokenizer(p, "model"),
        is_text: true,
    },
    Target {
        file: "run/adapter_model.safetensors",
        open: |p, spec| drop(Adapter::load(&p.path("run"), spec)),
        is_text: false,
    },
    Target {
        file: "run/adapter_config.json",
        open: |p, spec| drop(Adapter::load(&p.path("run"), spec)),
        is_text: true,
    },
    Target {
        file: "run/checkpoint-1/state.json",
        open: |p, _| drop(TrainState::read(&p.path("run/checkpoint-1"))),
        is_text: true,
    },
    Target { file: "rows.jsonl", open: |p, spec| read_data(p, spec, "rows.jsonl"), is_text: true },
    Target { file: "rows.json", open: |p, spec| read_data(p, spec, "rows.json"), is_text: true },
    Target { file: "rows.csv", open: |p, spec| read_data(p, spec, "rows.csv"), is_text: true },
    Target {
        file: "rows.parquet",
        open: |p, spec| read_data(p, spec, "rows.parquet"),
        is_text: false,
    },
    Target {
        file: "rows.jsonl.gz",
        open: |p, spec| read_data(p, spec, "rows.jsonl.gz"),
        is_text: false,
    },
    Target {
        file: "rows.jsonl.zst",
        open: |p, spec| read_data(p, spec, "rows.jsonl.zst"),
        is_text: false,
    },
    Target { file: "whole/chat_template.jinja", open: |p, _| render_template(p), is_text: true },
    Target { file: "run.toml", open: read_settings, is_text: true },
];

/// All files that are mutated, whole.
fn workplace() -> Workplace {
    let place = Workplace::new();
    shard(&place, "shards");
    succeed(place.nibble(&["quantize", "--model", "model", "--out", "packed"]));
    succeed(place.train("run", &["--max-steps", "1", "--save-steps", "1"]));
    fs::create_dir(place.path("whole")).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(place.path("model").join(file), place.path("whole").join(file)).unwrap();
    }
    let template = include_str!("../../src/data/templates/llama-3.jinja");
    fs::write(place.path("whole/chat_template.jinja"), template).unwrap();
    let file = GgufFile::tiny_llama().bytes();
    fs::write(place.path("model.gguf"), &file).unwrap();
    fs::write(place.path("tok.gguf"), &file).unwrap();
    let rows = concat!(
        r#"{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}"#,
        "\n",
        r#"{"prompt": "w1 w2", "completion": "w3"}"#,
        "\n",
        r#"{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}"#,
        "\n",
        r#"{"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]}"#,
    );
    fs::write(place.path("rows.jsonl"), rows).unwrap();
    fs::write(place.path("rows.json"), format!("[{}]", rows.replace('\n', ",\n"))).unwrap();
    fs::write(place.path("rows.csv"), "prompt,completion\nw1,\"w2 \"\"w3\"\"\"\n\"w4\nw5\",w6\n")
        .unwrap();
    let table = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tables/messages.parquet");
    fs::copy(table, place.path("rows.parquet")).unwrap();
    let mut packed = GzEncoder::new(Vec::new(), Compression::default());
    packed.write_all(rows.as_bytes()).unwrap();
    fs::write(place.path("rows.jsonl.gz"), packed.finish().unwrap()).unwrap();
    let packed = zstd::encode_all(rows.as_bytes(), 0).unwrap();
    fs::write(place.path("rows.jsonl.zst"), packed).unwrap();
    let settings = "model = 'nowhere'\ndata = 'train.jsonl'\nout = 'o'\nlora-r = 4\n\
                    learning-rate = 1e-3\n[rank_pattern]\nq_proj = 2\n";
    fs::write(place.path("run.toml"), settings).unwrap();
    place
}

/// Where a file's lengths, offsets and names are: mutations elsewhere change numbers only.
fn header_end(file: &[u8], is_text: bool) -> usize {
    let end = match file {
        _ if is_text => file.len(),
        [b'G', b'G', b'U', b'F', ..] => 8 << 10,
        _ => 8 + file.first_chunk().map_or(0, |&length| u64::from_le_bytes(length) as usize),
    };
    end.min(file.len())
}

/// One to four mutations that depend on the round alone.
fn mutate(file: &mut Vec<u8>, is_text: bool, stream: &Stream) {
    let draw = |index: u64, bound: usize| stream.below(index, bound.max(1) as u64) as usize;
    for change in 0..1 + stream.below(0, 4) {
        let base = 1 + 8 * change;
        let region = if draw(base, 8) == 0 { file.len() } else { header_end(file, is_text) };
        let at = draw(base + 1, region);
        let kinds = if is_text { 7 } else { 5 };
        match draw(base + 2, kinds) {
            0 => file.truncate(at),
            1 => {
                for byte in file.iter_mut().skip(at).take(1 + draw(base + 3, 4)) {
                    *byte ^= 1 << draw(base + 4, 8);
                }
            }
            2 => {
                let value = EXTREMES[draw(base + 3, EXTREMES.len())].to_le_bytes();
                let width = [1, 4, 8][draw(base + 4, 3)];
                for (to, from) in file.iter_mut().skip(at).zip(&value[..width]) {
                    *to = *from;
                }
            }
            3 => {
                let (from, count) = (draw(base + 3, region), draw(base + 4, 64));
                let piece = file[from.min(file.len())..(from + count).min(file.len())].to_vec();
                let at = at.min(file.len());
                file.splice(at..at, piece);
            }
            4 => {
                let at = at.min(file.len());
                let end = (at + draw(base + 3, 64)).min(file.len());
                file.drain(at..end);
            }
            _ => replace_value(file, at, JSON_VALUES[draw(base + 3, JSON_VALUES.len())]),
        }
    }
}

/// Puts another value in the place of the one that follows the next colon or comma.
fn replace_value(file: &mut Vec<u8>, at: usize, value: &str) {
    let starts = |byte: &u8| matches!(byte, b':' | b'=' | b',' | b'[');
    let Some(begin) = file.iter().skip(at).position(starts).map(|found| at + found + 1) else {
        return;
    };
    let ends = |byte: &u8| matches!(byte, b',' | b'}' | b']' | b'\n');
    let length = file[begin..].iter().position(ends).unwrap_or(file.len() - begin);
    file.splice(begin..begin + length, value.bytes());
}

/// To what is far above what the readers of the small files below need.
fn limit_memory() {
    #[cfg(target_os = "linux")]
    {
        #![allow(unsafe_code)]
        const MEMORY_LIMIT: u64 = 16 << 30;
        let limit = libc::rlimit { rlim_cur: MEMORY_LIMIT, rlim_max: MEMORY_LIMIT };
        // SAFETY: sets a limit of this process; the pointer is to a live value.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) }, 0);
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a whole number"))
}

#[test]
fn no_reader_panics_on_mutated_files() {
    let place = workplace();
    let spec = spec_from_config(&place.json("model/config.json")).unwrap();
    limit_memory();
    let originals: Vec<Vec<u8>> = TARGETS.iter().map(|target| place.read(target.file)).collect();
    let end =
        Instant::now() + Duration::from_secs(number("NIBBLE_FUZZ_SECONDS").unwrap_or(SECONDS));
    let only = number("NIBBLE_FUZZ_ROUND");
    let mut round = only.unwrap_or(0);
    while Instant::now() < end {
        let stream = Stream::new(round, "fuzz");
        let index = round as usize % TARGETS.len();
        let target = &TARGETS[index];
        let mut file = originals[index].clone();
        mutate(&mut file, target.is_text, &stream);
        let path = place.path(target.file);
        write(&path, &file);
        let start = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| (target.open)(&place, &spec)));
        assert!(result.is_ok(), "round {round}: {} panicked", target.file);
        let seconds = start.elapsed().as_secs_f64();
        assert!(seconds < 10.0, "round {round}: {} took {seconds:.0} s", target.file);
        write(&path, &originals[index]);
        if only.is_some() {
            break;
        }
        round += 1;
    }
    println!("{round} rounds");
    assert!(only.is_some() || round > 500, "only {round} rounds: readers are too slow to fuzz");
}

/// In a new file: a reader may still have the old one mapped.
fn write(path: &Path, contents: &[u8]) {
    let _ = fs::remove_file(path);
    fs::write(path, contents).unwrap();
}
