//! Adapters that are damaged or belong to another model.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::scene::{assert_not_trained, assert_refused, edit_header, edit_json};
use crate::training::Workplace;

/// A model and the PEFT adapter `case` of the golden data in `adapter`.
fn with_adapter(case: &str) -> Workplace {
    let place = Workplace::new();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/adapters").join(case);
    fs::create_dir(place.path("adapter")).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(golden.join(file), place.path("adapter").join(file)).unwrap();
    }
    place
}

/// Every command that reads an adapter refuses this one.
fn assert_adapter_refused(place: &Workplace, says: &[&str]) {
    assert_not_trained(place, 1, &["--init-adapter", "adapter"], says);
    let base = ["--model", "model", "--adapter", "adapter"];
    for more in [
        &["merge", "--out", "merged"][..],
        &["generate", "--raw", "--prompt", "w1", "--max-new-tokens", "2"],
        &["eval", "--data", "eval.jsonl"],
    ] {
        let command = place.nibble(&[more, &base[..]].concat());
        assert_refused(place, command, 1, says);
    }
}

#[test]
fn an_adapter_for_another_model() {
    let place = with_adapter("gpt2_s0.plain");
    assert_adapter_refused(&place, &["another model", "trained on"]);
}

#[test]
fn an_adapter_for_another_width() {
    let place = with_adapter("llama_s0.plain");
    edit_header(&place.path("adapter/adapter_model.safetensors"), |header| {
        let tensors = header.as_object_mut().unwrap();
        let (_, tensor) =
            tensors.iter_mut().find(|(name, _)| name.contains("q_proj.lora_A")).unwrap();
        let shape = tensor["shape"].clone();
        tensor["shape"] = json!([shape[1], shape[0]]);
    });
    assert_adapter_refused(&place, &["adapter_model.safetensors", "q_proj", "expected"]);
}

/// It can be used, not trained.
#[test]
fn an_adapter_that_training_cannot_change() {
    let place = with_adapter("llama_s0.plain");
    edit_json(&place.path("adapter/adapter_config.json"), |config| config["lora_alpha"] = json!(0));
    let says = ["adapter: alpha of `lora_alpha` is 0", "no gradient"];
    assert_not_trained(&place, 1, &["--init-adapter", "adapter"], &says);
}

#[test]
fn a_truncated_adapter() {
    let place = with_adapter("llama_s0.plain");
    let path = place.path("adapter/adapter_model.safetensors");
    let bytes = fs::read(&path).unwrap();
    for length in [bytes.len() - 1, 50, 0] {
        fs::write(&path, &bytes[..length]).unwrap();
        assert_adapter_refused(&place, &["adapter_model.safetensors"]);
    }
}

#[test]
fn an_adapter_with_a_tensor_missing() {
    let place = with_adapter("llama_s0.plain");
    edit_header(&place.path("adapter/adapter_model.safetensors"), |header| {
        let tensors = header.as_object_mut().unwrap();
        let name = tensors.keys().find(|name| name.contains("v_proj.lora_B")).unwrap().clone();
        let tensor = tensors.shift_remove(&name).unwrap();
        tensors.insert("base_model.model.other.lora_B.weight".into(), tensor);
    });
    assert_adapter_refused(&place, &["v_proj.lora_B", "base_model.model.other.lora_B.weight"]);
}

#[test]
fn an_adapter_with_a_number_that_is_none() {
    let place = with_adapter("llama_s0.plain");
    let path = place.path("adapter/adapter_model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    assert_adapter_refused(&place, &["adapter_model.safetensors", "not a finite number"]);
}

#[test]
fn settings_that_are_not_understood() {
    for (key, value, says) in [
        ("peft_type", json!("PROMPT_TUNING"), "PROMPT_TUNING"),
        ("r", json!(0), "r"),
        ("r", json!("many"), "r"),
        ("r", json!(1u64 << 50), "r"),
        ("target_modules", json!(["no_such_proj"]), "unexpected base_model.model."),
        ("target_modules", json!("((("), "regular expression"),
        ("lora_alpha", json!("lots"), "lora_alpha"),
    ] {
        let place = with_adapter("llama_s0.plain");
        edit_json(&place.path("adapter/adapter_config.json"), |config| config[key] = value);
        assert_adapter_refused(&place, &["adapter", says]);
    }
}

#[test]
fn a_folder_that_is_no_adapter() {
    let place = Workplace::new();
    assert_adapter_refused(&place, &["adapter does not exist", "adapter_config.json"]);
    fs::write(place.path("adapter"), "GGUF").unwrap();
    assert_adapter_refused(&place, &["adapter is a file, not an adapter's folder"]);
    fs::remove_file(place.path("adapter")).unwrap();
    fs::create_dir(place.path("adapter")).unwrap();
    assert_adapter_refused(&place, &["adapter has no adapter_config.json"]);
    fs::write(place.path("adapter/config.json"), "{}").unwrap();
    assert_adapter_refused(&place, &["adapter is a model, not an adapter"]);
    fs::write(place.path("adapter/settings.toml"), "").unwrap();
    fs::remove_file(place.path("adapter/config.json")).unwrap();
    assert_adapter_refused(&place, &["hint: the run in it has not ended", "checkpoint-N"]);
    fs::write(place.path("adapter/adapter_config.json"), "{").unwrap();
    assert_adapter_refused(&place, &["adapter_config.json"]);
}
