//! Heads that are stored beside the embedding, whatever the config says of them.

use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::{Value, json};

use super::tensors::of_folder;
use crate::training::{Workplace, fail, stderr, succeed};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/models/llama_s0");
const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// The golden model, untied, with another claim in its config; its head is the tensor `head`.
fn write_model(folder: &Path, claims: &Value, head: &str) {
    fs::create_dir(folder).unwrap();
    let config = fs::read(format!("{GOLDEN}/config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config.as_object_mut().unwrap().extend(claims.as_object().unwrap().clone());
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let bytes = fs::read(format!("{GOLDEN}/model.safetensors")).unwrap();
    let stored = SafeTensors::deserialize(&bytes).unwrap();
    let source = |name: &str| if name == HEAD { head.to_string() } else { name.to_string() };
    let tensors = stored.names().into_iter().map(|name| {
        let tensor = stored.tensor(&source(name)).unwrap();
        (name.to_string(), tensor)
    });
    safetensors::serialize_to_file(tensors, None, &folder.join("model.safetensors")).unwrap();
}

#[test]
fn a_head_that_is_stored_is_the_head_unless_it_is_the_embedding() {
    let place = Workplace::new();
    let packed = |name: &str, claims: Value, head| {
        write_model(&place.path(name), &claims, head);
        let out = format!("{name}-nf4");
        succeed(place.nibble(&["quantize", "--model", name, "--out", &out]));
        let config = place.json(&format!("{out}/config.json"));
        (of_folder(&place.path(&out)), config["tie_word_embeddings"].as_bool())
    };
    let (expected, tied) = packed("untied", json!({"tie_word_embeddings": false}), HEAD);
    assert_eq!(tied, Some(false));
    let claim = json!({"tie_word_embeddings": true});
    assert!(packed("claimed", claim.clone(), HEAD) == (expected.clone(), tied));
    // A family that is tied where its config is silent.
    let silent = json!({"model_type": "smollm3", "tie_word_embeddings": null});
    assert!(packed("silent", silent, HEAD) == (expected, tied));
    let (same, tied) = packed("same", claim, EMBEDDING);
    assert_eq!((same.contains_key(HEAD), tied), (false, Some(true)));
    // Who reads the config alone looks beside it.
    let bytes = |model: &str| {
        let memory = ["memory", "--json", "--max-length", "64", "--model", model];
        let output = succeed(place.nibble(&memory));
        let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
        plan["weight_bytes"].as_u64().unwrap()
    };
    assert_eq!(bytes("claimed/config.json"), bytes("untied/config.json"));
    assert!(bytes("same/config.json") < bytes("untied/config.json"));
    // What was packed while the embedding was taken for the head is not that model.
    let merge = ["merge", "--model", "same-nf4", "--original", "claimed", "--out", "merged"];
    let adapter = format!("{GOLDEN}/adapter_init");
    let (code, error) = fail(place.nibble(&[&merge[..], &["--adapter", &adapter]].concat()));
    assert!(code == 1 && error.contains("--original has a head of its own"), "{error}");
    let merge = ["merge", "--model", "claimed-nf4", "--original", "same", "--out", "merged"];
    let (code, error) = fail(place.nibble(&[&merge[..], &["--adapter", &adapter]].concat()));
    assert!(code == 1 && error.contains("--model has a head of its own"), "{error}");
    // Without whole weights it is the config that counts, and that is said.
    fs::write(place.path("same/model.safetensors"), "no weights").unwrap();
    let memory = ["memory", "--model", "same/config.json", "--max-length", "64"];
    let text = stderr(&succeed(place.nibble(&memory)));
    assert!(text.contains("note: the plan is by config.json alone: "), "{text}");
}
