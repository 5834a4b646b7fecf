//! A Gemma 3 for text and images, of which the text model is taken.

use std::collections::BTreeMap;
use std::fs;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::tensors::of_folder;
use crate::training::{Workplace, stderr, succeed};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/models/gemma3_s0");

/// The golden text model inside a larger one, its tensors under the names that `stored` gives them.
fn write_model(place: &Workplace, name: &str, stored: impl Fn(&str) -> String) {
    let folder = place.path(name);
    fs::create_dir(&folder).unwrap();
    let mut text: Value =
        serde_json::from_slice(&fs::read(format!("{GOLDEN}/config.json")).unwrap()).unwrap();
    // Files of the hub have these outside.
    for key in ["eos_token_id", "bos_token_id", "dtype"] {
        text.as_object_mut().unwrap().remove(key);
    }
    let config = json!({
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
        "dtype": "float32", "bos_token_id": 1, "eos_token_id": [2, 3], "text_config": text,
        "vision_config": {"hidden_size": 32},
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let bytes = fs::read(format!("{GOLDEN}/model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut all: BTreeMap<String, TensorView> =
        tensors.tensors().into_iter().map(|(name, tensor)| (stored(&name), tensor)).collect();
    let pixels = [0u8; 4 * 6];
    for name in ["vision_tower.vision_model.embeddings.weight", "multi_modal_projector.weight"] {
        let tensor = TensorView::new(Dtype::F32, vec![2, 3], &pixels).unwrap();
        all.insert(name.to_string(), tensor);
    }
    safetensors::serialize_to_file(all, None, &folder.join("model.safetensors")).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(place.path("model").join(file), folder.join(file)).unwrap();
    }
}

#[test]
fn it_is_the_text_model_alone_wherever_its_tensors_lie() {
    let place = Workplace::new();
    fs::create_dir(place.path("text")).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(format!("{GOLDEN}/{file}"), place.path("text").join(file)).unwrap();
    }
    succeed(place.nibble(&["quantize", "--model", "text", "--out", "text-nf4"]));
    let expected = of_folder(&place.path("text-nf4"));
    let of_hub = |name: &str| format!("language_model.{name}");
    let of_modules = |name: &str| name.replacen("model.", "model.language_model.", 1);
    write_model(&place, "hub", of_hub);
    write_model(&place, "modules", of_modules);
    for model in ["hub", "modules"] {
        let out = format!("{model}-nf4");
        let output = succeed(place.nibble(&["quantize", "--model", model, "--out", &out]));
        let said = stderr(&output);
        assert!(said.contains("the text model alone; 2 tensors for images are left out"), "{said}");
        assert!(of_folder(&place.path(&out)) == expected, "{model}");
        let config = place.json(&format!("{out}/config.json"));
        assert_eq!(config["model_type"], "gemma3_text");
        assert_eq!(config["architectures"], json!(["Gemma3ForCausalLM"]));
        assert_eq!(config["eos_token_id"], json!([2, 3]));
        // Those who read the config alone see the same.
        let config = format!("{model}/config.json");
        succeed(place.nibble(&["memory", "--model", &config, "--max-length", "64"]));
        succeed(place.nibble(&["data", "--model", model, "--data", "train.jsonl"]));
    }
}
