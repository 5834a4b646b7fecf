//! GPT-2's files name their tensors with the prefix `transformer.` or without it.

use std::fs;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

use super::tensors::of_folder;
use crate::training::{Workplace, error_of, fail, succeed};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/models/gpt2_s0");
const PREFIX: &str = "transformer.";
const HEAD: &str = "lm_head.weight";

/// The golden model as `base`, with `prefix`, another head, and `layers` in its config.
fn write_model(place: &Workplace, prefix: &str, layers: usize) {
    fs::create_dir(place.path("base")).unwrap();
    let config = fs::read(format!("{GOLDEN}/config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["n_layer"] = layers.into();
    fs::write(place.path("base/config.json"), config.to_string()).unwrap();
    let bytes = fs::read(format!("{GOLDEN}/model.safetensors")).unwrap();
    let stored = SafeTensors::deserialize(&bytes).unwrap();
    let shape = stored.tensor("transformer.wte.weight").unwrap().shape().to_vec();
    let head = vec![1u8; shape.iter().product::<usize>() * size_of::<f32>()];
    let head = TensorView::new(Dtype::F32, shape, &head).unwrap();
    let tensors = stored.tensors().into_iter();
    let tensors = tensors.map(|(name, tensor)| (name.replacen(PREFIX, prefix, 1), tensor));
    let tensors = tensors.filter(|(name, _)| name != HEAD).chain([(HEAD.to_string(), head)]);
    let file = place.path("base/model.safetensors");
    safetensors::serialize_to_file(tensors, None, &file).unwrap();
}

#[test]
fn both_are_the_same_model() {
    let packed = |prefix: &str| {
        let place = Workplace::new();
        write_model(&place, prefix, 2);
        succeed(place.nibble(&["quantize", "--model", "base", "--out", "packed"]));
        assert_eq!(place.json("packed/config.json")["tie_word_embeddings"], false, "{prefix:?}");
        of_folder(&place.path("packed"))
    };
    let (whole, inner) = (packed(PREFIX), packed(""));
    assert!(whole.contains_key(HEAD) && whole.contains_key("transformer.wte.weight"));
    assert!(inner == whole);
}

#[test]
fn a_layer_too_many_is_found_in_either() {
    for prefix in [PREFIX, ""] {
        let place = Workplace::new();
        write_model(&place, prefix, 1);
        let rows = ["--data", "train.jsonl", "--max-steps", "1"];
        let train = ["train", "--model", "base", "--out", "out"];
        let quantize = ["quantize", "--model", "base", "--out", "out"];
        for command in [quantize.to_vec(), [&train[..], &rows].concat()] {
            let (code, text) = fail(place.nibble(&command));
            let expected = "there is a tensor transformer.h.1.attn.c_attn.weight, \
                            config.json has 1 layers";
            assert!(code == 1 && error_of(&text).contains(expected), "{prefix:?}: {text}");
        }
    }
}
