//! A large tensor: memory does not grow with it, and a run that ends in the middle leaves nothing.
#![cfg(target_os = "linux")]

use std::fs::{self, OpenOptions};
use std::process::Command;
use std::time::Duration;

use crate::gguf_file::{Field, GgufFile};
use crate::training::{self, Workplace, error_of, fail, succeed};

/// 512 MiB in f32, 256 MiB as written.
const ROWS: u64 = 1 << 21;
const WIDTH: u64 = 64;
/// Far below any copy of the embedding; pieces, packed linears and the program itself fit.
const LIMIT_BYTES: u64 = 160 << 20;

/// Bytes of the process that are no mapped file; none once it has ended.
fn anonymous_bytes(process: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("RssAnon:"))?;
    Some(1024 * line.split_whitespace().nth(1)?.parse::<u64>().ok()?)
}

/// The tiny Llama with an embedding of zeros that takes no room on the disk.
fn large_vocabulary(place: &Workplace) {
    let mut file = GgufFile::tiny_llama();
    file.tensors.retain(|tensor| tensor.name != "output.weight");
    let embedding = file.tensors.iter().position(|t| t.name == "token_embd.weight").unwrap();
    let mut embedding = file.tensors.remove(embedding);
    (embedding.shape, embedding.data) = (vec![WIDTH, ROWS], Vec::new());
    file.tensors.push(embedding);
    file.set("llama.vocab_size", Field::U32(ROWS as u32));
    let bytes = file.bytes();
    fs::write(place.path("model.gguf"), &bytes).unwrap();
    let file = OpenOptions::new().write(true).open(place.path("model.gguf")).unwrap();
    file.set_len(bytes.len() as u64 + 4 * ROWS * WIDTH).unwrap();
}

#[test]
fn a_large_embedding_in_gguf_is_converted_piece_by_piece() {
    let place = Workplace::new();
    large_vocabulary(&place);
    let arguments = ["quantize", "--model", "model.gguf", "--out", "out", "--threads", "2"];
    let mut child = place.nibble(&arguments).spawn().unwrap();
    let mut peak_bytes = 0;
    while child.try_wait().unwrap().is_none() {
        peak_bytes = anonymous_bytes(child.id()).map_or(peak_bytes, |bytes| peak_bytes.max(bytes));
        std::thread::sleep(Duration::from_millis(1));
    }
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", training::stderr(&output));
    let written = fs::metadata(place.path("out/model.safetensors")).unwrap().len();
    assert!(written > 2 * ROWS * WIDTH, "the embedding was written");
    println!("peak anonymous memory {} MiB", peak_bytes >> 20);
    assert!(peak_bytes > 1 << 20, "nothing was measured");
    assert!(peak_bytes < LIMIT_BYTES, "{} MiB of anonymous memory", peak_bytes >> 20);
}

/// What is in the folder besides inputs.
fn written(place: &Workplace) -> Vec<String> {
    let inputs = ["model", "train.jsonl", "eval.jsonl", "model.gguf"];
    place.list("").into_iter().filter(|name| !inputs.contains(&name.as_str())).collect()
}

/// Sends `signal` once something is written; whether the run was still at work.
fn killed_at_work(place: &Workplace, arguments: &[&str], signal: &str) -> bool {
    let mut child = place.nibble(arguments).spawn().unwrap();
    let shard = place.path(".out.partial/model.safetensors");
    let begun = || fs::metadata(&shard).is_ok_and(|shard| shard.len() > ROWS * WIDTH / 4);
    while !begun() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_micros(200));
    }
    // It may have ended: then there is nobody to send it to.
    let process = child.id().to_string();
    let _ = std::process::Command::new("kill").args(["-s", signal, &process]).output().unwrap();
    !child.wait().unwrap().success()
}

#[test]
fn a_stopped_run_leaves_nothing_and_the_next_one_clears_up_after_a_killed_one() {
    let place = Workplace::new();
    large_vocabulary(&place);
    let arguments = ["quantize", "--model", "model.gguf", "--out", "out", "--threads", "1"];
    // Not INT, which shells let their background jobs ignore.
    for (signal, left) in [("KILL", &[".out.nibble-lock", ".out.partial"][..]), ("TERM", &[])] {
        // On a busy machine the run may be done before the signal is sent.
        let mut attempts = 0;
        while !killed_at_work(&place, &arguments, signal) {
            attempts += 1;
            assert!(attempts < 20, "{signal} never came in time");
            fs::remove_dir_all(place.path("out")).unwrap();
        }
        assert_eq!(written(&place), left, "{signal}");
        // What is there tells the next one that the work has begun.
        let _ = fs::remove_dir_all(place.path(".out.partial"));
        let _ = fs::remove_file(place.path(".out.nibble-lock"));
    }
    fs::create_dir(place.path(".out.partial")).unwrap();
    succeed(place.nibble(&arguments));
    assert_eq!(written(&place), ["out"]);
    let (code, _) = fail(place.nibble(&arguments));
    assert_eq!((code, written(&place)), (2, vec!["out".to_string()]), "it is not done twice");
}

/// `ulimit -f`, which ends a program by a signal unless it asked for an error.
#[test]
fn a_file_that_may_not_grow_is_an_error_that_leaves_nothing() {
    let place = Workplace::new();
    large_vocabulary(&place);
    let binary = env!("CARGO_BIN_EXE_nibble");
    let script = format!("ulimit -f 2048; exec {binary} quantize --model model.gguf --out out");
    let mut command = Command::new("sh");
    command.current_dir(place.path("")).args(["-c", &script]);
    let (code, text) = fail(command);
    assert_eq!(code, 1, "{text}");
    assert!(error_of(&text).contains("model.safetensors: File too large"), "{text}");
    assert!(written(&place).is_empty(), "{:?}", written(&place));
}
