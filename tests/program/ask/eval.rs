//! Loss, perplexity and right answers; logits to a file.

use std::fs;

use safetensors::SafeTensors;
use serde_json::{Value, json};

use super::scene::{Logits, adapter, golden, logits, stdout, write_rows};
use crate::training::{Workplace, error_of, fail, stderr, succeed};

/// Ids and logits that PEFT computed, at the last positions of each row.
struct Expected {
    rows: Vec<Vec<u64>>,
    logits: Logits,
}

impl Expected {
    /// Made by `scripts/golden/gen_adapters.py` or `scripts/golden/gen_models.py`.
    fn read(file: &str) -> Self {
        let bytes = fs::read(golden(file)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let ids = file.tensor("input_ids").unwrap();
        let all: Vec<i64> = bytemuck::allocation::pod_collect_to_vec(ids.data());
        let rows = all.chunks(ids.shape()[1]).map(|row| row.iter().map(|&id| id as u64).collect());
        let logits = file.tensor("logits").unwrap();
        let values = bytemuck::allocation::pod_collect_to_vec(logits.data());
        Expected { rows: rows.collect(), logits: Logits { shape: logits.shape().to_vec(), values } }
    }

    /// Largest difference, relative to the largest logit.
    fn error(&self, got: &Logits) -> f32 {
        let [rows, positions, vocabulary] = self.logits.shape[..] else { panic!() };
        assert_eq!(got.shape, [rows, self.rows[0].len(), vocabulary]);
        let first = self.rows[0].len() - positions;
        let mut error = 0f32;
        for row in 0..rows {
            for position in 0..positions {
                let pairs = got.at(row, first + position).iter().zip(self.logits.at(row, position));
                error = pairs.fold(error, |most, (a, b)| most.max((a - b).abs()));
            }
        }
        error / self.logits.values.iter().fold(0f32, |most, logit| most.max(logit.abs()))
    }
}

#[test]
fn saved_logits_are_those_of_transformers_and_peft() {
    let place = Workplace::new();
    let base = Expected::read("models/llama_s0/ref.safetensors");
    let got = logits(&place, "model", &base.rows, &[]);
    assert!(base.error(&got) < 2e-6, "{:e}", base.error(&got));
    for name in ["llama_s0.plain", "llama_s0.dora", "llama_s0.modules_to_save"] {
        let expected = Expected::read(&format!("adapters/{name}/expected.safetensors"));
        let got = logits(&place, "model", &expected.rows, &["--adapter", &adapter(name)]);
        assert!(expected.error(&got) < 5e-6, "{name}: {:e}", expected.error(&got));
        assert!(expected.error(&logits(&place, "model", &expected.rows, &[])) > 1e-2, "{name}");
    }
    let bytes = place.read("logits.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = file.tensor("input_ids").unwrap();
    assert_eq!((ids.dtype(), ids.shape()[0]), (safetensors::Dtype::I64, base.rows.len()));
}

#[test]
fn rows_of_different_lengths_have_no_logits_tensor() {
    let place = Workplace::new();
    write_rows(&place, "rows.jsonl", &[vec![5, 6, 7], vec![5, 6]]);
    let mut command = place.nibble(&["eval", "--model", "model", "--data", "rows.jsonl"]);
    command.args(["--save-logits", "logits.safetensors"]);
    let (code, text) = fail(command);
    assert_eq!(code, 2);
    assert!(error_of(&text).contains("line 2 has 2 tokens, the first 3"), "{text}");
    assert!(!place.path("logits.safetensors").exists());
}

#[test]
fn a_file_that_is_there_is_not_written_over() {
    let place = Workplace::new();
    write_rows(&place, "rows.jsonl", &[vec![5, 6, 7]]);
    fs::write(place.path("precious"), "mine").unwrap();
    let eval = ["eval", "--model", "model", "--data", "rows.jsonl", "--save-logits", "precious"];
    let (code, text) = fail(place.nibble(&eval));
    assert_eq!(code, 2);
    assert!(
        error_of(&text).starts_with("error: --save-logits: precious is there already"),
        "{text}"
    );
    assert_eq!(place.read("precious"), b"mine");
}

#[test]
fn why_there_is_no_base_beside_a_merged_adapter_is_told() {
    let place = Workplace::new();
    write_rows(&place, "rows.jsonl", &[vec![5, 6, 7]]);
    for (name, merged) in [("llama_s0.dora", true), ("llama_s0.plain", false)] {
        let mut command = place.nibble(&["eval", "--model", "model", "--data", "rows.jsonl"]);
        command.args(["--json", "--adapter", &adapter(name)]);
        let output = succeed(command);
        let figures: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(figures["base"].is_null(), merged, "{figures}");
        assert_eq!(stderr(&output).contains("figures of the base alone are not shown"), merged);
    }
}

/// As `train` says it.
#[test]
fn what_is_cut_or_repeated_is_told() {
    let place = Workplace::new();
    let long: Vec<u64> = (5..45).collect();
    write_rows(&place, "rows.jsonl", &[vec![5, 6, 7], vec![5, 6, 7], long]);
    let eval = ["eval", "--model", "model", "--data", "rows.jsonl", "--max-length", "32"];
    let output = succeed(place.nibble(&[&eval[..], &["--truncation", "right"]].concat()));
    let text = stderr(&output);
    for note in ["8 tokens removed by truncation", "1 repeating an earlier one"] {
        assert!(text.contains(&format!("note: rows.jsonl: {note}\n")), "{note}: {text}");
    }
}

/// Loss, share of likeliest tokens and of rows that are right throughout, from saved logits.
fn figures(logits: &Logits, labels: &[Vec<i64>]) -> [f64; 3] {
    let (mut loss, mut right, mut targets, mut rows_right) = (0.0, 0.0, 0.0, 0.0);
    for (row, labels) in labels.iter().enumerate() {
        let mut all = true;
        for (position, &label) in
            labels.iter().enumerate().skip(1).filter(|(_, label)| **label >= 0)
        {
            let logits_here = logits.at(row, position - 1);
            let sum: f64 = logits_here.iter().map(|&logit| f64::from(logit).exp()).sum();
            loss += sum.ln() - f64::from(logits_here[label as usize]);
            let hit = logits.likeliest(row, position - 1) == label as u64;
            (right, all, targets) = (right + f64::from(u8::from(hit)), all && hit, targets + 1.0);
        }
        rows_right += f64::from(u8::from(all));
    }
    [loss / targets, right / targets, rows_right / labels.len() as f64]
}

#[test]
fn figures_are_those_of_the_logits() {
    let place = Workplace::new();
    let mut rows = Expected::read("models/llama_s0/ref.safetensors").rows;
    // A third row whose last token is the one that the adapter would say: right throughout.
    let plain = adapter("llama_s0.plain");
    let flags = ["--adapter", &plain];
    let guess = logits(&place, "model", &rows, &flags).likeliest(0, rows[0].len() - 2);
    let mut third = rows[0].clone();
    *third.last_mut().unwrap() = guess;
    rows.push(third);
    let trained = [9..17, 3..24, 23..24];
    let labels = |(ids, trained): (&Vec<u64>, &std::ops::Range<usize>)| -> Vec<i64> {
        let label =
            |(index, &id): (usize, &u64)| if trained.contains(&index) { id as i64 } else { -100 };
        ids.iter().enumerate().map(label).collect()
    };
    let labels: Vec<Vec<i64>> = rows.iter().zip(&trained).map(labels).collect();
    let adapted = figures(&logits(&place, "model", &rows, &flags), &labels);
    let base = figures(&logits(&place, "model", &rows, &[]), &labels);
    assert!(adapted[2] > 0.0);
    let line = |(ids, labels): (&Vec<u64>, &Vec<i64>)| {
        json!({"input_ids": ids, "labels": labels}).to_string()
    };
    let text: Vec<String> = rows.iter().zip(&labels).map(line).collect();
    fs::write(place.path("masked.jsonl"), text.join("\n")).unwrap();
    let eval = ["eval", "--model", "model", "--quantization", "none", "--data", "masked.jsonl"];
    let mut command = place.nibble(&eval);
    let output = succeed({
        command.args(flags).arg("--json");
        command
    });
    let got: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&got["documents"], &got["targets"]), (&json!(3), &json!(8 + 21 + 1)));
    for (name, [loss, right, rows_right]) in [("base", base), ("adapter", adapted)] {
        let number = |key: &str| got[name][key].as_f64().unwrap();
        assert!((number("loss") - loss).abs() < 1e-5, "{name}: {} {loss}", number("loss"));
        assert!((number("perplexity") / loss.exp() - 1.0).abs() < 1e-5);
        assert!((number("mean_token_accuracy") - right).abs() < 1e-12, "{name} {right}");
        assert_eq!(number("exact_match"), rows_right, "{name}");
    }
    let mut command = place.nibble(&eval);
    command.args(flags);
    let table = stdout(&succeed(command));
    assert!(table.contains(&format!("{:.4}", adapted[0])) && table.contains("of 3"), "{table}");
}

/// A merged model that is silently packed again would lose most of what was merged.
#[test]
fn packing_a_dense_model_does_not_go_unsaid() {
    let place = Workplace::new();
    succeed(place.nibble(&["quantize", "--model", "model", "--out", "packed"]));
    for (model, flags, says) in [
        ("model", &[][..], true),
        ("model", &["--quantization", "none"], false),
        ("packed", &[], false),
    ] {
        for command in
            [&["eval", "--data", "eval.jsonl"][..], &["generate", "--raw", "--prompt", "w5"]]
        {
            let arguments = [command, &["--model", model], flags].concat();
            let said = stderr(&succeed(place.nibble(&arguments)));
            let note = "model: linear layers are quantized to nf4; `--quantization none` leaves them as they are";
            assert_eq!(said.contains(note), says, "{arguments:?}: {said}");
        }
    }
}

/// Other settings than the run's would give other figures than the run's.
#[test]
fn the_settings_may_be_those_of_a_run() {
    let place = Workplace::new();
    let flags = ["--eval-data", "eval.jsonl", "--quantization", "fp4", "--train-on", "completion"];
    let run = succeed(place.train("run", &[&flags[..], &["--max-steps", "2"]].concat()));
    let figures = |flags: &[&str]| -> Value {
        let output = succeed(place.nibble(&[&["eval", "--json"], flags].concat()));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let settings = ["--config", "run/settings.toml", "--adapter", "run"];
    let got = figures(&settings);
    let loss = got["adapter"]["loss"].as_f64().unwrap();
    let said = format!("step 2: eval loss {loss:.4}");
    assert!(stderr(&run).contains(&said), "{said}: {}", stderr(&run));
    let typed =
        ["--model", "model", "--data", "eval.jsonl", "--quantization", "fp4", "--adapter", "run"];
    assert_eq!(figures(&typed)["adapter"], got["adapter"]);
    assert_ne!(figures(&[&settings[..], &["--quantization", "nf4"]].concat()), got);
    // What was held out is known by the seed.
    let split = ["--validation-split", "0.25", "--seed", "7", "--max-steps", "2"];
    let run = succeed(place.train("split", &[&flags[2..], &split].concat()));
    let split = ["--config", "split/settings.toml", "--adapter", "split"];
    let got = figures(&split);
    let loss = got["adapter"]["loss"].as_f64().unwrap();
    assert_eq!(got["documents"], 6);
    assert!(stderr(&run).contains(&format!("step 2: eval loss {loss:.4}")), "{loss}");
    // Files of the command line are whole, and a split of the command line is one of the run's data.
    let documents = |flags: &[&str]| figures(flags)["documents"].as_u64().unwrap();
    assert_eq!(documents(&[&split[..], &["--data", "eval.jsonl"]].concat()), 4);
    assert_eq!(documents(&[&split[..], &["--data", "train.jsonl"]].concat()), 24);
    assert_eq!(documents(&[&split[..], &["--validation-split", "0.5"]].concat()), 12);
    assert_eq!(documents(&[&settings[..], &["--validation-split", "0.5"]].concat()), 12);
    let other = figures(&[&split[..], &["--seed", "8"]].concat());
    assert!(other["documents"] == 6 && other["adapter"] != got["adapter"], "{other}");
    let (code, text) = fail(place.nibble(&[&["eval", "--seed", "8"][..], &typed].concat()));
    assert!(code == 2 && text.contains("`--seed` has no effect without"), "{text}");
    // The data that were trained on are none to evaluate.
    succeed(place.train("blind", &["--max-steps", "1"]));
    let (code, text) = fail(place.nibble(&["eval", "--config", "blind/settings.toml"]));
    assert!(code == 2 && error_of(&text).contains("--data <FILE>"), "{text}");
    let report = ["data", "--config", "run/settings.toml", "--json"];
    let report: Value = serde_json::from_slice(&succeed(place.nibble(&report)).stdout).unwrap();
    assert_eq!(report["documents"], 24, "{report}");
}
