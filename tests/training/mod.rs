//! A tiny model folder, data, and the real binary.
#![allow(dead_code)] // each test binary uses a part of this module

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use nibble::random::Stream;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Rows of embeddings of the tiny model.
const VOCABULARY: u64 = 128;

/// A folder with `model/`, `train.jsonl` and `eval.jsonl`.
pub struct Workplace(TempDir);

impl Workplace {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let place = Workplace(folder);
        let model = place.path("model");
        fs::create_dir(&model).unwrap();
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models/llama_s0");
        for file in ["config.json", "model.safetensors"] {
            fs::copy(golden.join(file), model.join(file)).unwrap();
        }
        fs::write(model.join("tokenizer.json"), tokenizer().to_string()).unwrap();
        let config = json!({"eos_token": "w2", "bos_token": "w1"});
        fs::write(model.join("tokenizer_config.json"), config.to_string()).unwrap();
        place.write_rows("train.jsonl", 24, 1);
        place.write_rows("eval.jsonl", 4, 2);
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Rows of ready tokens, 6 to 25 each; a simple rule makes them learnable.
    pub fn write_rows(&self, name: &str, count: u64, seed: u64) {
        let stream = Stream::new(seed, "rows");
        let row = |index: u64| {
            let (length, first) =
                (6 + stream.below(2 * index, 20), stream.below(2 * index + 1, 60));
            let ids: Vec<u64> = (0..length).map(|i| 3 + (first + 7 * i) % 120).collect();
            json!({ "input_ids": ids }).to_string()
        };
        let lines: Vec<String> = (0..count).map(row).collect();
        fs::write(self.path(name), lines.join("\n") + "\n").unwrap();
    }

    /// `nibble train` into `out`, with more flags; the process runs in this folder.
    pub fn train(&self, out: &str, flags: &[&str]) -> Command {
        let mut command = self.nibble(&["train", "--model", "model", "--data", "train.jsonl"]);
        command.args(["--out", out, "--threads", "2", "--max-length", "32"]).args(flags);
        command
    }

    pub fn nibble(&self, arguments: &[&str]) -> Command {
        nibble(self.0.path(), arguments)
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    pub fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&self.read(name)).unwrap()
    }

    /// Names in a folder, sorted; none if it does not exist.
    pub fn list(&self, name: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(name)).into_iter().flatten().flatten();
        let mut names: Vec<String> =
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

/// One word for each id.
fn tokenizer() -> Value {
    let vocabulary: serde_json::Map<String, Value> =
        (0..VOCABULARY).map(|id| (format!("w{id}"), json!(id))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    })
}

/// The real binary, run in `folder` with nothing to read.
pub fn nibble(folder: impl AsRef<Path>, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nibble"));
    command.current_dir(folder).args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs to the end; panics with its messages if it failed.
pub fn succeed(mut command: Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{:?}\n{}", output.status, stderr(&output));
    output
}

/// Runs to the end; the exit code and what it said.
pub fn fail(mut command: Command) -> (i32, String) {
    let output = command.output().unwrap();
    assert!(!output.status.success(), "expected an error\n{}", stderr(&output));
    (output.status.code().unwrap_or(-1), stderr(&output))
}

/// Runs to the end, which must be this exit code; what it said.
pub fn refused(expected: i32, command: Command) -> String {
    let (code, said) = fail(command);
    assert_eq!(code, expected, "{said}");
    said
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The value on standard output; panics with its messages if there is none.
pub fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}\n{}", stderr(output)))
}

/// Sends the signal of that name.
pub fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args(["-s", name, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

/// The error and hint at the end of what a run said.
pub fn error_of(stderr: &str) -> &str {
    stderr.find("error: ").map_or(stderr, |start| stderr[start..].trim_end())
}

/// Rewrites the tensors of a model of f32 in one file.
pub fn change_model(folder: &Path, change: impl Fn(&str, &mut [f32])) {
    let path = folder.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let changed: Vec<(String, Vec<usize>, Vec<f32>)> = tensors
        .iter()
        .map(|(name, view)| {
            let mut values: Vec<f32> = bytemuck::pod_collect_to_vec(view.data());
            change(name, &mut values);
            (name.to_string(), view.shape().to_vec(), values)
        })
        .collect();
    let views = changed.iter().map(|(name, shape, values)| {
        let data = bytemuck::cast_slice(values);
        (name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap())
    });
    safetensors::serialize_to_file(views, None, &path).unwrap();
}
