//! Models, adapters and what they say.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::Output;

use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::training::{Workplace, stderr, succeed};

/// Every token in rows of equal length, and f32 logits of each.
pub struct Logits {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

impl Logits {
    /// Reads what `eval --save-logits` wrote.
    pub fn read(place: &Workplace, file: &str) -> Self {
        let bytes = place.read(file);
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let logits = file.tensor("logits").unwrap();
        assert_eq!(logits.dtype(), safetensors::Dtype::F32);
        let values = bytemuck::allocation::pod_collect_to_vec(logits.data());
        Logits { shape: logits.shape().to_vec(), values }
    }

    /// Logits of all tokens behind token `position` of `row`.
    pub fn at(&self, row: usize, position: usize) -> &[f32] {
        let [_, length, vocabulary] = self.shape[..] else { panic!() };
        &self.values[(row * length + position) * vocabulary..][..vocabulary]
    }

    /// The likeliest token behind token `position` of `row`.
    pub fn likeliest(&self, row: usize, position: usize) -> u64 {
        let logits = self.at(row, position);
        (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u64
    }
}

pub fn golden(path: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data")).join(path)
}

/// A folder with a golden model and a tokenizer.
pub fn add_model(place: &Workplace, case: &str) {
    let folder = place.path(case);
    fs::create_dir(&folder).unwrap();
    for (from, file) in [
        (golden("models").join(case), "config.json"),
        (golden("models").join(case), "model.safetensors"),
        (place.path("model"), "tokenizer.json"),
        (place.path("model"), "tokenizer_config.json"),
    ] {
        fs::copy(from.join(file), folder.join(file)).unwrap();
    }
}

/// Gives the model a chat template: `w90 system w91 w92 question w93 answer w94`.
pub fn add_template(place: &Workplace) {
    let path = place.path("model/tokenizer_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["chat_template"] = json!(
        "{% for m in messages %}{% if m.role == 'system' %}w90 {{ m.content }} w91 \
         {% elif m.role == 'user' %}w92 {{ m.content }} w93 \
         {% else %}{{ m.content }} w94 {% endif %}{% endfor %}"
    );
    fs::write(path, config.to_string()).unwrap();
}

/// The folder of an adapter that PEFT wrote for `model`.
pub fn adapter(name: &str) -> String {
    golden("adapters").join(name).to_str().unwrap().to_string()
}

/// `nibble generate` with the dense model, at most eight words; its answer.
pub fn generate(place: &Workplace, flags: &[&str]) -> String {
    let base = ["generate", "--quantization", "none", "--max-new-tokens", "8"];
    let mut command = place.nibble(&base);
    if !flags.contains(&"--model") {
        command.args(["--model", "model"]);
    }
    command.args(flags);
    stdout(&succeed(command))
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap().trim_end_matches('\n').to_string()
}

/// `nibble chat` with the dense model, fed with `lines`: its answers, and what it said besides.
pub fn chat(place: &Workplace, flags: &[&str], lines: &[&str]) -> (Vec<String>, String) {
    let base = ["chat", "--model", "model", "--quantization", "none", "--max-new-tokens", "6"];
    let mut command = place.nibble(&base);
    let mut child = command.args(flags).stdin(std::process::Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // `?` stands for a byte that is not UTF-8.
    let bytes = lines.join("\n").into_bytes().into_iter();
    let mut bytes: Vec<u8> = bytes.map(|byte| if byte == b'?' { 0xff } else { byte }).collect();
    bytes.push(b'\n');
    stdin.write_all(&bytes).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let answers = String::from_utf8(output.stdout.clone()).unwrap();
    (answers.lines().map(String::from).collect(), stderr(&output))
}

/// `w5 w6` as ids.
pub fn ids(words: &str) -> Vec<u64> {
    words.split_whitespace().map(|word| word[1..].parse().unwrap()).collect()
}

/// Writes rows of ids, every one trained.
pub fn write_rows(place: &Workplace, name: &str, rows: &[Vec<u64>]) {
    let lines: Vec<String> =
        rows.iter().map(|ids| json!({ "input_ids": ids }).to_string()).collect();
    fs::write(place.path(name), lines.join("\n")).unwrap();
}

/// The logits of `rows`.
pub fn logits(place: &Workplace, model: &str, rows: &[Vec<u64>], flags: &[&str]) -> Logits {
    write_rows(place, "rows.jsonl", rows);
    // What the comparison before left, which is not replaced.
    let _ = fs::remove_file(place.path("logits.safetensors"));
    let base = ["eval", "--quantization", "none", "--data", "rows.jsonl", "--model", model];
    let mut command = place.nibble(&base);
    command.args(["--save-logits", "logits.safetensors"]).args(flags);
    succeed(command);
    Logits::read(place, "logits.safetensors")
}
