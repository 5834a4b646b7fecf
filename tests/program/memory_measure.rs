//! `nibble memory --measure`: what it puts where, and what is in memory while it measures.

use std::fs;

use crate::training::{Workplace, fail, succeed};
use serde_json::{Value, json};

/// Inputs wait in a file without a name, in the folder that the command runs in: one for temporary files
/// is often memory.
#[test]
fn offloaded_inputs_wait_in_a_file_beside_the_run() {
    let place = Workplace::new();
    fs::create_dir(place.path("temporary")).unwrap();
    let measure = |activations: &str| {
        let model = place.path("model").display().to_string();
        let mut command = place.nibble(&["memory", "--model", &model, "--device", "cpu", "--json"]);
        command.args(["--max-length", "32", "--measure", "1", "--activations", activations]);
        command.env("TMPDIR", place.path("temporary"));
        command
    };
    let before = place.list("");
    let report: Value = serde_json::from_slice(&succeed(measure("offload")).stdout).unwrap();
    assert!(report["offloaded_bytes"].as_u64().unwrap() > 0, "{report}");
    assert_eq!(place.list(""), before);
    assert_eq!(place.list("temporary"), [""; 0]);
    if cfg!(target_os = "linux") {
        // A folder that takes no file of anybody.
        let there = |activations: &str| {
            let mut command = measure(activations);
            command.current_dir("/proc");
            command
        };
        succeed(there("keep"));
        let (_, text) = fail(there("offload"));
        assert!(text.contains("error: cannot offload to a file in .: "), "{text}");
    }
}

/// Found before a step, not when the trial saves.
#[test]
#[cfg(unix)]
fn a_folder_for_temporary_files_that_is_not_there_is_told_first() {
    let place = Workplace::new();
    let mut command = place.nibble(&["memory", "--model", "model", "--measure", "1"]);
    command.args(["--device", "cpu", "--max-length", "32"]).env("TMPDIR", "nowhere");
    let (code, text) = fail(command);
    assert_eq!(code, 1);
    assert!(!text.contains("step 1"), "{text}");
    assert!(text.contains("error: cannot create a folder in nowhere"), "{text}");
    assert!(text.contains("hint: set `TMPDIR` to a folder that can be written"), "{text}");
}

/// A run has its tokenizer all the time, and so has a trial of it: given back before, it would be a free
/// part of the heap.
#[test]
fn a_trial_has_the_tokenizer_in_memory() {
    const MORE_WORDS: usize = 300_000;
    let place = Workplace::new();
    let rows = || {
        let flags = ["--device", "cpu", "--json", "--max-length", "32", "--measure", "1"];
        let mut command = place.nibble(&["memory", "--model", "model"]);
        command.args(flags);
        let report: Value = serde_json::from_slice(&succeed(command).stdout).unwrap();
        let rows = report["measured"]["rows"].as_array().unwrap().clone();
        ["program, tokenizer, data", "heap fragmentation"].map(|name| {
            let row = rows.iter().find(|row| row["name"] == name).unwrap();
            row["measured_bytes"].as_u64().unwrap()
        })
    };
    let [small, _] = rows();
    let mut tokenizer = place.json("model/tokenizer.json");
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    let first = vocabulary.len();
    vocabulary.extend((first..first + MORE_WORDS).map(|id| (format!("word{id}"), json!(id))));
    fs::write(place.path("model/tokenizer.json"), tokenizer.to_string()).unwrap();
    let [large, free] = rows();
    // Each word has its letters and a place in two tables, from word to number and back.
    let words = (MORE_WORDS * 2 * (size_of::<String>() + "word300000".len())) as u64;
    assert!(large > small + words, "{large} with {MORE_WORDS} more words, {small} without");
    assert!(free < words / 4, "{free} of {words} bytes of words are free");
}
