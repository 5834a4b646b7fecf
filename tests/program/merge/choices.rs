//! What the flags choose: base, type, shards, tokenizer.

use std::fs;

use nibble::checkpoint::{Checkpoint, CheckpointKind};
use serde_json::Value;

use super::tools::{Merge, copy, model_of, text, values};

#[test]
fn untying_is_written_into_the_config() {
    let head = "lm_head.weight";
    let (untied, _) = Merge::new("qwen2_s0.tied_head").run("out", &[]);
    assert_eq!(untied.config()["tie_word_embeddings"], false);
    assert!(untied.contains(head));
    let (tied, _) = Merge::new("qwen2_s0.token_rows").run("out", &[]);
    assert_eq!(tied.config()["tie_word_embeddings"], true);
    assert!(!tied.contains(head));
}

#[test]
fn a_4_bit_model_is_merged_as_training_saw_it() {
    for case in ["llama_s0.plain", "gpt2_s0.dora"] {
        let dense = Merge::new(case);
        let (from_dense, _) = dense.run("out", &["--onto", "dequantized"]);
        let four_bit = Merge::new(case).quantized();
        let (from_four_bit, _) = four_bit.run("out", &[]);
        assert_eq!(from_four_bit.kind(), CheckpointKind::Dense);
        assert!(from_four_bit.config().get("quantization_config").is_none());
        assert_eq!(values(&from_dense), values(&from_four_bit), "{case}");
        let (onto_original, _) = dense.run("original", &[]);
        assert_ne!(values(&from_dense), values(&onto_original), "{case}");
    }
}

#[test]
fn a_4_bit_model_with_its_original_is_merged_into_the_original() {
    let case = "llama_s0.rslora";
    let original = model_of(case);
    let merge = Merge::new(case).quantized();
    let (merged, report) = merge.run("out", &["--original", text(&original), "--json"]);
    let (expected, direct) = Merge::new(case).run("out", &["--json"]);
    assert_eq!(values(&merged), values(&expected));
    // The same difference, once from the stored 4-bit weights and once by quantizing again.
    let figure = |report: &str| {
        let json: Value = serde_json::from_str(report).unwrap();
        json["adapted_linears"]["four_bit_vs_original_rms"].as_f64().unwrap()
    };
    assert_eq!(figure(&report), figure(&direct));
    assert!(figure(&report) > 0.0);
    let other = merge.run("other", &["--original", text(&original), "--onto", "dequantized"]);
    assert_ne!(values(&other.0), values(&expected));
}

#[test]
fn rounding_is_to_nearest_even_and_reported() {
    let merge = Merge::new("llama_s0.plain");
    let (exact, _) = merge.run("f32", &[]);
    for (dtype, kind) in [("bfloat16", "bf16"), ("float16", "f16")] {
        let (rounded, report) = merge.run(kind, &["--dtype", kind, "--json"]);
        assert_eq!(rounded.config()["dtype"], dtype);
        let round = |x: &f32| match kind {
            "bf16" => half::bf16::from_f32(*x).to_f32(),
            _ => half::f16::from_f32(*x).to_f32(),
        };
        let (mut squares, mut count) = (0.0, 0);
        let rounded = values(&rounded);
        for (name, exact) in values(&exact) {
            let expected: Vec<f32> = exact.iter().map(round).collect();
            assert_eq!(rounded[&name], expected, "{name}");
            if name.ends_with("_proj.weight") {
                let differences = exact.iter().zip(&expected).map(|(a, b)| f64::from(a - b));
                squares += differences.map(|d| d * d).sum::<f64>();
                count += exact.len();
            }
        }
        let report: Value = serde_json::from_str(&report).unwrap();
        let figure = report["adapted_linears"]["rounding_rms"].as_f64().unwrap();
        let expected = (squares / f64::from(count as u32)).sqrt();
        // The command adds 256 squares in f32 before it goes on in f64.
        assert!((figure / expected - 1.0).abs() < 1e-5, "{figure} {expected}");
        assert_eq!(report["adapted_linears"]["linears"], 14);
    }
}

#[test]
fn the_report_names_what_the_choice_costs() {
    let (_, report) = Merge::new("llama_s0.plain").run("out", &[]);
    for words in ["14 adapted linear layers", "adapter update", "quantization error", "original"] {
        assert!(report.contains(words), "{report}");
    }
    let (_, report) = Merge::new("llama_s0.plain").quantized().run("out", &[]);
    assert!(report.contains("unknown") && report.contains("dequantized"), "{report}");
}

#[test]
fn shards_hold_the_same_tensors() {
    let merge = Merge::new("llama_s0.dora");
    let (whole, _) = merge.run("whole", &[]);
    let (sharded, _) = merge.run("sharded", &["--max-shard-size", "100KB"]);
    assert!(merge.path("sharded/model.safetensors.index.json").exists());
    assert_eq!(values(&whole), values(&sharded));
}

#[test]
fn unchanged_tensors_keep_their_bytes() {
    let merge = Merge::new("llama_s0.layers_to_transform");
    let (merged, report) = merge.run("out", &[]);
    assert!(report.contains("2 of them changed"), "{report}");
    let (base, merged) = (values(&Checkpoint::open(&merge.model).unwrap()), values(&merged));
    let changed: Vec<&String> = base.keys().filter(|name| base[*name] != merged[*name]).collect();
    let attention = "model.layers.1.self_attn";
    let expected = [format!("{attention}.q_proj.weight"), format!("{attention}.v_proj.weight")];
    assert_eq!(changed, expected.iter().collect::<Vec<_>>());
}

#[test]
fn the_tokenizer_comes_along_and_the_adapter_s_own_wins() {
    let mut merge = Merge::new("llama_s0.plain");
    let (model, adapter) = (merge.path("model"), merge.path("adapter"));
    copy(&merge.model, &model);
    copy(&merge.adapter, &adapter);
    for name in ["tokenizer.json", "chat_template.jinja", "generation_config.json"] {
        fs::write(model.join(name), "base").unwrap();
    }
    (merge.model, merge.adapter) = (model, adapter);
    let read = |out: &str, name: &str| fs::read_to_string(merge.path(out).join(name)).ok();
    merge.run("base", &[]);
    assert_eq!(read("base", "chat_template.jinja").as_deref(), Some("base"));
    fs::write(merge.adapter.join("tokenizer.json"), "adapter").unwrap();
    merge.run("adapter-tokenizer", &[]);
    assert_eq!(read("adapter-tokenizer", "tokenizer.json").as_deref(), Some("adapter"));
    assert_eq!(read("adapter-tokenizer", "chat_template.jinja"), None);
    assert_eq!(read("adapter-tokenizer", "generation_config.json").as_deref(), Some("base"));
}
