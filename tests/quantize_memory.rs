//! `nibble quantize` streams: its memory does not grow with the tensors.
#![cfg(target_os = "linux")]

mod gguf_file;
mod training;

use std::fs::{self, OpenOptions};
use std::time::Duration;

use gguf_file::{Field, GgufFile};
use training::Workplace;

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
