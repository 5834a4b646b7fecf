//! Memory that the system refuses: a run goes on with smaller passes and the same sums.

use crate::golden::{Case, with_dropout};
use nibble::adapter::Adapter;
use nibble::checkpoint::Checkpoint;
use nibble::model::Model;
use nibble::model::weights::Weights;
use nibble::plan::{AdapterRegion, Policy, Settings};

/// Losses and gradients of a batch in one pass, and in parts after the buffers shrank; dropout
/// masks are those of the whole.
#[test]
fn parts_of_a_batch_have_the_sums_of_the_whole() {
    for name in ["llama_s0", "gpt2_s0", "qwen2_s0"] {
        let case = Case::open(name);
        let (batch, shape) = case.tensors("ref.safetensors").batch("input_ids", "labels");
        let scale = 1.0 / batch.num_targets() as f32;
        let settings = Settings {
            longest_document: shape[1],
            policies: vec![Policy::Keep; case.spec().num_layers],
            targets: case.targets("adapter_init"),
            lora_dropout: true,
            mlp_tile_length: Some(16),
            ..Settings::of_pass(batch.tokens(), 10)
        };
        let weights =
            Weights::load(&Checkpoint::open(&case.path).unwrap(), &case.spec(), None, None);
        let mut model = Model::new(case.spec(), weights.unwrap(), settings)
            .unwrap()
            .with_randomness(with_dropout(0.3, 5));
        let adapter = Adapter::load(&case.path.join("adapter_init"), &case.spec()).unwrap();
        model.parameters_mut().load(&adapter);
        let loss = model.forward_backward(&batch, scale, 9).unwrap().sum;
        let gradients = model.parameters().gradients().to_vec();
        let moments = vec![0.5; gradients.len()];
        model.parameters_mut().replace(AdapterRegion::FirstMoment, &moments);
        let (before, master) =
            (model.arena_bytes(), model.parameters().all_values(AdapterRegion::Master));
        let master = master.unwrap().into_owned();
        let mut model = model.with_smaller_plan().unwrap();
        assert!(model.arena_bytes() < before);
        assert_eq!(*model.parameters().all_values(AdapterRegion::Master).unwrap(), *master);
        assert_eq!(*model.parameters().all_values(AdapterRegion::FirstMoment).unwrap(), *moments);
        let parts = batch.split(model.settings().tokens);
        assert!(parts.len() > 1, "{name}");
        let sums = parts.iter().map(|part| model.forward_backward(part, scale, 9).unwrap().sum);
        let sum: f64 = sums.sum();
        assert!((sum / loss - 1.0).abs() < 1e-6, "{name}: {sum} {loss}");
        let largest = gradients.iter().fold(0f32, |m, g| m.max(g.abs()));
        for (index, (got, expected)) in
            model.parameters().gradients().iter().zip(&gradients).enumerate()
        {
            assert!((got - expected).abs() < 1e-5 * largest, "{name} {index}: {got} {expected}");
        }
    }
}

/// `RLIMIT_AS` lets the system refuse the mapping of the plan in the child process.
#[cfg(target_os = "linux")]
#[test]
fn a_refused_mapping_shrinks_the_run() {
    use crate::training::{Workplace, stderr, succeed};
    use serde_json::Value;
    use std::process::Command;

    let place = Workplace::new();
    place.write_rows("train.jsonl", 3000, 1);
    let flags = ["--per-device-train-batch-size", "3000", "--gradient-accumulation-steps", "1"];
    let flags =
        [&flags[..], &["--max-steps", "3", "--packing", "false", "--threads", "1"]].concat();
    let run = |out: &str, kibibytes: &str| {
        let mut shell = Command::new("sh");
        shell.current_dir(place.path("")).stdout(std::process::Stdio::piped());
        shell.stderr(std::process::Stdio::piped()).stdin(std::process::Stdio::null());
        shell.args(["-c", "ulimit -v \"$1\"; shift; exec \"$@\"", "sh", kibibytes]);
        shell.arg(env!("CARGO_BIN_EXE_nibble"));
        shell.args(["train", "--model", "model", "--data", "train.jsonl", "--out", out]);
        shell.args(["--max-length", "32", "--activations", "keep"]).args(&flags);
        stderr(&succeed(shell))
    };
    let free = run("free", "unlimited");
    assert!(!free.contains("continuing with"), "{free}");
    let limited = run("limited", "300000");
    assert!(limited.contains("step 0: ") && limited.contains("continuing with"), "{limited}");

    let text = String::from_utf8(place.read("limited/metrics.jsonl")).unwrap();
    let events: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let event = events.iter().find(|event| event["event"] == "out_of_memory").unwrap();
    let tokens = |name: &str| event[name].as_u64().unwrap();
    assert!(tokens("to_tokens") <= tokens("from_tokens") / 2 && tokens("to_tokens") >= 25);
    assert!(String::from_utf8(place.read("limited/report.html")).unwrap().contains("ran out"));
    let end = events.iter().find(|event| event["event"] == "end").unwrap();
    let rows = end["memory"]["rows"].as_array().unwrap();
    // The first rows are not the arena's, the last one is what the heap has free.
    for row in &rows[2..rows.len() - 1] {
        let bytes = |key: &str| row[key].as_u64().unwrap();
        let (planned, measured) = (bytes("planned_bytes"), bytes("measured_bytes"));
        assert!(measured <= planned + 8192, "{row}");
        // The last of the parts may be short; the plan of the whole batch is four times as large.
        assert!(measured + 8192 >= planned / 2, "{row}");
    }
    let losses = |out: &str| -> Vec<f64> {
        let text = String::from_utf8(place.read(&format!("{out}/metrics.jsonl"))).unwrap();
        let events = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        events
            .filter(|event| event["event"] == "step")
            .map(|e| e["loss"].as_f64().unwrap())
            .collect()
    };
    let (free, limited) = (losses("free"), losses("limited"));
    assert_eq!(free.len(), 3);
    for (a, b) in free.iter().zip(&limited) {
        assert!((a / b - 1.0).abs() < 1e-5, "{a} {b}");
    }
}
