//! Heads that are stored beside the embedding, whatever the config says of them.

use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::Value;

use crate::tensors::of_folder;
use crate::training::{Workplace, succeed};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/models/llama_s0");
const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// The golden model, untied, with another claim in its config; its head is the tensor `head`.
fn write_model(folder: &Path, tied: bool, head: &str) {
    fs::create_dir(folder).unwrap();
    let config = fs::read(format!("{GOLDEN}/config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["tie_word_embeddings"] = tied.into();
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
    let packed = |name: &str, tied, head| {
        write_model(&place.path(name), tied, head);
        let out = format!("{name}-nf4");
        succeed(place.nibble(&["quantize", "--model", name, "--out", &out]));
        let config = place.json(&format!("{out}/config.json"));
        (of_folder(&place.path(&out)), config["tie_word_embeddings"].as_bool())
    };
    let (expected, tied) = packed("untied", false, HEAD);
    assert_eq!(tied, Some(false));
    assert!(packed("claimed", true, HEAD) == (expected, tied));
    let (same, tied) = packed("same", true, EMBEDDING);
    assert_eq!((same.contains_key(HEAD), tied), (false, Some(true)));
}
