//! `config.json` and weights that do not belong together, and models that are not supported.

use std::fs;

use serde_json::{Value, json};

use crate::scene::{assert_not_quantized, assert_not_trained, assert_refused, edit_json};
use crate::training::Workplace;

/// A model whose config has `key` = `value`.
fn with(key: &str, value: Value) -> Workplace {
    let place = Workplace::new();
    edit_json(&place.path("model/config.json"), |config| config[key] = value);
    place
}

#[test]
fn shapes_that_the_config_does_not_imply() {
    for (key, value, tensor) in [
        ("intermediate_size", 100, "mlp"),
        ("vocab_size", 4096, "weight"),
        ("num_key_value_heads", 1, "self_attn.k_proj"),
        ("hidden_size", 8, "weight"),
    ] {
        let place = with(key, value.into());
        let says = ["tensor ", tensor, "has shape [", "config.json implies ["];
        assert_not_quantized(&place, &says);
        assert_not_trained(&place, 1, &[], &says);
    }
}

#[test]
fn more_layers_than_there_are_weights() {
    let place = with("num_hidden_layers", 7.into());
    assert_not_quantized(&place, &["model.layers.2.", "is not in the checkpoint"]);
}

#[test]
fn fewer_layers_than_there_are_weights() {
    let place = with("num_hidden_layers", 1.into());
    let says = ["model.layers.1.self_attn.q_proj.weight, config.json has 1 layers"];
    assert_not_quantized(&place, &says);
    assert_not_trained(&place, 1, &[], &says);
    let place = with("num_hidden_layers", 1_000_000_000_000_u64.into());
    assert_not_quantized(&place, &["num_hidden_layers is 1000000000000, expected at most 10000"]);
}

#[test]
fn an_unsupported_family() {
    let place = with("model_type", "mamba".into());
    let says = [
        "config.json",
        "model_type `mamba`",
        "llama, mistral, ministral3, qwen2, qwen3, smollm3, granite, granitemoehybrid, seed_oss, glm4, \
         olmo2, olmo3, gemma, gemma2, gemma3_text, phi3, gpt2",
    ];
    assert_not_quantized(&place, &says);
    assert_not_trained(&place, 1, &[], &says);
    let command = place.nibble(&["memory", "--model", "model", "--max-length", "32"]);
    assert_refused(&place, command, 1, &says);
}

#[test]
fn unsupported_switches() {
    for (key, value, says) in [
        ("hidden_act", json!("relu"), "hidden_act"),
        ("partial_rotary_factor", json!(0.5), "partial_rotary_factor"),
        ("rope_parameters", json!({"rope_type": "longrope"}), "longrope"),
        ("rope_parameters", json!({"rope_theta": "500000"}), "`rope_theta` must be a number"),
        ("rope_scaling", json!("linear"), "rope_scaling must be an object"),
        ("rope_parameters", json!({"type": ["yarn"]}), "rope_type must be text"),
        (
            "rope_parameters",
            json!({"rope_type": "yarn", "factor": 2.0, "truncate": "no"}),
            "`truncate` must be true or false",
        ),
        (
            "rope_parameters",
            json!({"rope_type": "yarn", "factor": 2.0, "beta_fast": "32"}),
            "`beta_fast` must be a number",
        ),
        ("head_dim", (1 << 24).into(), "num_attention_heads · head_dim is"),
        ("quantization_config", json!({"quant_method": "gptq"}), "gptq"),
    ] {
        let place = with(key, value);
        assert_not_quantized(&place, &["config.json", says]);
        fs::remove_file(place.path("model/model.safetensors")).unwrap();
        let memory = place.nibble(&["memory", "--model", "model", "--max-length", "32"]);
        assert_refused(&place, memory, 1, &["config.json", says]);
    }
}

#[test]
fn fields_of_the_wrong_type() {
    for (key, value, says) in [
        ("hidden_size", json!("wide"), "must be a non-negative whole number, got \"wide\""),
        ("num_attention_heads", json!(-4), "must be a non-negative whole number, got -4"),
        ("num_attention_heads", json!(0), "num_attention_heads (n_head) is 0"),
        ("num_key_value_heads", json!(3), "is not a multiple of num_key_value_heads 3"),
        ("hidden_size", json!(1u64 << 60), "is 1152921504606846976"),
        ("rms_norm_eps", json!([]), "must be a number, got []"),
        ("tie_word_embeddings", json!(1), "must be true or false, got 1"),
        ("model_type", json!(null), "field `model_type` is missing"),
    ] {
        assert_not_quantized(&with(key, value), &["config.json", says]);
    }
}

#[test]
fn a_config_that_is_no_json() {
    let place = Workplace::new();
    fs::write(place.path("model/config.json"), "{\"model_type\": ").unwrap();
    assert_not_quantized(&place, &["model/config.json", "not valid JSON", "line 1 column"]);
}

#[test]
fn a_path_that_is_no_model() {
    let place = Workplace::new();
    for (model, says) in
        [("modle", "modle does not exist"), ("train.jsonl", "neither"), (".", "no config.json")]
    {
        let command = place.nibble(&["quantize", "--model", model, "--out", "out"]);
        assert_refused(&place, command, 1, &[says, "Hugging Face model folder"]);
    }
}

/// What people give for a model that is something else: the hint says where it goes.
#[test]
fn a_path_that_is_something_else() {
    let place = Workplace::new();
    fs::create_dir(place.path("adapter")).unwrap();
    fs::write(place.path("adapter/adapter_config.json"), "{}").unwrap();
    fs::create_dir_all(place.path("cached/snapshots/0f3a")).unwrap();
    fs::create_dir(place.path("cached/refs")).unwrap();
    fs::write(place.path("cached/refs/main"), "0f3a").unwrap();
    fs::write(place.path("cached/snapshots/0f3a/config.json"), "{}").unwrap();
    fs::create_dir(place.path("download")).unwrap();
    fs::write(place.path("download/tiny.Q4_0.gguf"), "GGUF").unwrap();
    for (model, says) in [
        ("adapter", ["adapter is an adapter, not a model", "hint: `--model` is the model that"]),
        (
            "download",
            ["download has no config.json", "hint: give the file download/tiny.Q4_0.gguf"],
        ),
        ("owner/name", ["owner/name does not exist", "hint: models are not downloaded"]),
        ("cached", ["cached has no config.json", "hint: give the folder cached/snapshots/0f3a"]),
        ("model/name", ["model/name does not exist", "hint: give a Hugging Face model folder"]),
    ] {
        let command = place.nibble(&["quantize", "--model", model, "--out", "out"]);
        assert_refused(&place, command, 1, &says);
    }
}

#[test]
fn a_model_without_a_tokenizer() {
    let place = Workplace::new();
    fs::remove_file(place.path("model/tokenizer.json")).unwrap();
    assert_not_trained(&place, 1, &[], &["tokenizer.json", "save_pretrained"]);
}

#[test]
fn a_damaged_tokenizer() {
    let place = Workplace::new();
    let path = place.path("model/tokenizer.json");
    let sound = fs::read(&path).unwrap();
    fs::write(&path, "{\"model\": {\"type\": \"BPE\"").unwrap();
    assert_not_trained(&place, 1, &[], &["tokenizer.json"]);
    // The library panics over these when they are used, not when they are read.
    let absent = json!({"SpecialToken": {"id": "[NONE]", "type_id": 0}});
    let single = json!([absent, {"Sequence": {"id": "A", "type_id": 0}}]);
    let template = json!({
        "type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {},
    });
    let chunks = json!({"type": "FixedLength", "length": 0});
    for (key, value) in [("post_processor", template), ("pre_tokenizer", chunks)] {
        fs::write(&path, &sound).unwrap();
        edit_json(&path, |tokenizer| tokenizer[key] = value);
        assert_not_trained(&place, 1, &[], &["tokenizer.json"]);
    }
}

/// A link that leads nowhere is no file that was left out: as in a cache of the hub that was cleaned up.
#[cfg(unix)]
#[test]
fn a_tokenizer_that_is_gone() {
    let place = Workplace::new();
    let path = place.path("model/tokenizer.json");
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("nowhere", path).unwrap();
    let quantize = place.nibble(&["quantize", "--model", "model", "--out", "out"]);
    let (code, text) = crate::training::fail(quantize);
    assert!(code == 1 && text.contains("cannot open model/tokenizer.json"), "{code}: {text}");
    assert!(!place.path("out").exists());
}
