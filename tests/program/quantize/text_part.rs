//! Models for text and images, of which the text model is taken.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use super::tensors::of_folder;
use crate::training::{Workplace, stderr, succeed};

/// `model_type` of the whole and of its text, the golden model that is its text, and that one's class.
const MODELS: [[&str; 4]; 3] = [
    ["gemma3", "gemma3_text", "gemma3_s0", "Gemma3ForCausalLM"],
    ["mistral3", "mistral", "mistral_s0", "MistralForCausalLM"],
    ["qwen3_vl", "qwen3_vl_text", "qwen3_s0", "Qwen3ForCausalLM"],
];

fn golden(case: &str, file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models").join(case).join(file)
}

/// A golden text model inside a larger one, its tensors under the names that `stored` gives them.
fn write_model(
    place: &Workplace,
    name: &str,
    [whole, inner, case, _]: [&str; 4],
    stored: impl Fn(&str) -> String,
) {
    let folder = place.path(name);
    fs::create_dir(&folder).unwrap();
    let mut text: Value =
        serde_json::from_slice(&fs::read(golden(case, "config.json")).unwrap()).unwrap();
    text["model_type"] = inner.into();
    if whole == "qwen3_vl" {
        text["rope_parameters"]["mrope_section"] = json!([6, 3, 3]);
        text["rope_parameters"]["mrope_interleaved"] = true.into();
    }
    // Files of the hub have these outside.
    for key in ["eos_token_id", "bos_token_id", "dtype"] {
        text.as_object_mut().unwrap().remove(key);
    }
    let config = json!({
        "architectures": ["ForConditionalGeneration"], "model_type": whole,
        "dtype": "float32", "bos_token_id": 1, "eos_token_id": [2, 3], "text_config": text,
        "vision_config": {"hidden_size": 32},
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let bytes = fs::read(golden(case, "model.safetensors")).unwrap();
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
    for model in MODELS {
        let [_, _, case, class] = model;
        let place = Workplace::new();
        fs::create_dir(place.path("text")).unwrap();
        for file in ["config.json", "model.safetensors"] {
            fs::copy(golden(case, file), place.path("text").join(file)).unwrap();
        }
        succeed(place.nibble(&["quantize", "--model", "text", "--out", "text-nf4"]));
        let expected = of_folder(&place.path("text-nf4"));
        let of_hub = |name: &str| format!("language_model.{name}");
        let of_modules = |name: &str| name.replacen("model.", "model.language_model.", 1);
        write_model(&place, "hub", model, of_hub);
        write_model(&place, "modules", model, of_modules);
        for name in ["hub", "modules"] {
            let out = format!("{name}-nf4");
            let output = succeed(place.nibble(&["quantize", "--model", name, "--out", &out]));
            let said = stderr(&output);
            let note = "the text model alone; 2 tensors for images are left out";
            assert!(said.contains(note), "{said}");
            assert!(of_folder(&place.path(&out)) == expected, "{case} {name}");
            let mut config = place.json(&format!("{out}/config.json"));
            assert_eq!(config["architectures"], json!([class]));
            assert_eq!(config["eos_token_id"], json!([2, 3]));
            // But for where its texts end, it is the golden one's.
            let alone = place.json("text-nf4/config.json");
            config["eos_token_id"] = alone["eos_token_id"].clone();
            for key in ["model_type", "rope_parameters", "hidden_size", "tie_word_embeddings"] {
                assert_eq!(config[key], alone[key], "{case} {key}");
            }
            // Those who read the config alone see the same.
            let config = format!("{name}/config.json");
            succeed(place.nibble(&["memory", "--model", &config, "--max-length", "64"]));
            succeed(place.nibble(&["data", "--model", name, "--data", "train.jsonl"]));
        }
    }
}
