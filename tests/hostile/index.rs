//! Sharded checkpoints that are not whole.

use std::fs;

use serde_json::{Value, json};

use crate::scene::{
    assert_not_quantized, edit_header, edit_json, safetensors_bytes, safetensors_parts,
};
use crate::training::Workplace;

const INDEX: &str = "model/model.safetensors.index.json";
const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

/// The model in two shards.
fn sharded() -> Workplace {
    let place = Workplace::new();
    shard(&place, "shards");
    fs::remove_dir_all(place.path("model")).unwrap();
    fs::rename(place.path("shards"), place.path("model")).unwrap();
    place
}

/// Copies the model into `folder`, as two shards with an index.
pub fn shard(place: &Workplace, folder: &str) {
    let folder = place.path(folder);
    fs::create_dir(&folder).unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(place.path("model").join(name), folder.join(name)).unwrap();
    }
    let (header, data) = safetensors_parts(&place.path("model/model.safetensors"));
    let mut map = serde_json::Map::new();
    let mut shards = [(json!({}), Vec::new()), (json!({}), Vec::new())];
    let tensors = header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__");
    for (number, (name, tensor)) in tensors.enumerate() {
        let at = |i: usize| tensor["data_offsets"][i].as_u64().unwrap() as usize;
        let (shard, bytes) = &mut shards[number % 2];
        let begin = bytes.len();
        bytes.extend_from_slice(&data[at(0)..at(1)]);
        shard[name] = tensor.clone();
        shard[name]["data_offsets"] = json!([begin, bytes.len()]);
        map.insert(name.clone(), SHARDS[number % 2].into());
    }
    for ((shard, bytes), name) in shards.iter().zip(SHARDS) {
        fs::write(folder.join(name), safetensors_bytes(shard, bytes)).unwrap();
    }
    let index = json!({"metadata": {"total_size": data.len()}, "weight_map": map});
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

fn edit_index(place: &Workplace, edit: impl FnOnce(&mut Value)) {
    edit_json(&place.path(INDEX), edit);
}

/// The hint is about what is there in their place.
#[test]
fn weights_under_no_name_of_theirs() {
    let place = sharded();
    fs::remove_file(place.path(INDEX)).unwrap();
    let says =
        ["model has no model.safetensors and no", "hint: the shards of a model are listed in"];
    assert_not_quantized(&place, &says);
    for shard in SHARDS {
        fs::remove_file(place.path("model").join(shard)).unwrap();
    }
    assert_not_quantized(&place, &["hint: download the weights, too"]);
    let other = place.path("model/consolidated.safetensors");
    fs::write(&other, "").unwrap();
    assert_not_quantized(&place, &["hint: its tensors may have other names than transformers'"]);
    fs::remove_file(other).unwrap();
    fs::write(place.path("model/pytorch_model.bin"), "PK").unwrap();
    assert_not_quantized(&place, &["hint: Nibble reads safetensors; convert `pytorch_model.bin`"]);
}

/// As in transformers: whoever saves a small model over a large one leaves the large one's index behind.
#[test]
fn an_index_beside_a_whole_file() {
    let place = sharded();
    fs::remove_file(place.path("model").join(SHARDS[0])).unwrap();
    let whole = Workplace::new().read("model/model.safetensors");
    fs::write(place.path("model/model.safetensors"), whole).unwrap();
    crate::training::succeed(place.nibble(&["quantize", "--model", "model", "--out", "out"]));
}

/// As transformers reads them: paths that begin in the folder, and a mark of the order of bytes.
#[test]
fn an_index_of_paths() {
    let place = sharded();
    edit_index(&place, |index| {
        for file in index["weight_map"].as_object_mut().unwrap().values_mut() {
            *file = format!("./{}", file.as_str().unwrap()).into();
        }
    });
    for file in [INDEX, "model/config.json"] {
        let text = place.read(file);
        fs::write(place.path(file), [b"\xef\xbb\xbf".as_slice(), &text].concat()).unwrap();
    }
    crate::training::succeed(place.nibble(&["quantize", "--model", "model", "--out", "out"]));
}

#[test]
fn the_undamaged_shards_are_read() {
    let place = sharded();
    let command = place.nibble(&["quantize", "--model", "model", "--out", "out"]);
    crate::training::succeed(command);
}

#[test]
fn a_missing_shard() {
    let place = sharded();
    fs::remove_file(place.path("model").join(SHARDS[1])).unwrap();
    assert_not_quantized(&place, &[SHARDS[1], "missing", "download"]);
}

#[test]
fn a_truncated_shard() {
    let place = sharded();
    let path = place.path("model").join(SHARDS[1]);
    let bytes = fs::read(&path).unwrap();
    fs::write(path, &bytes[..bytes.len() - 7]).unwrap();
    assert_not_quantized(&place, &[SHARDS[1], "damaged"]);
}

#[test]
fn an_index_that_names_an_absent_tensor() {
    let place = sharded();
    edit_index(&place, |index| index["weight_map"]["model.layers.9.mlp"] = SHARDS[0].into());
    assert_not_quantized(&place, &["index.json", "model.layers.9.mlp", SHARDS[0]]);
}

#[test]
fn shards_without_a_tensor_that_the_config_implies() {
    let place = sharded();
    let absent = "model.norm.weight";
    edit_index(&place, |index| {
        drop(index["weight_map"].as_object_mut().unwrap().shift_remove(absent));
    });
    for shard in SHARDS {
        edit_header(&place.path("model").join(shard), |header| {
            if let Some(tensor) = header.as_object_mut().unwrap().shift_remove(absent) {
                header["another.weight"] = tensor;
            }
        });
    }
    assert_not_quantized(&place, &[absent, "is not in the checkpoint"]);
}

#[test]
fn an_index_that_leaves_the_folder() {
    let place = sharded();
    edit_index(&place, |index| index["weight_map"]["lm_head.weight"] = "../secret".into());
    assert_not_quantized(&place, &["index.json", "lm_head.weight", "../secret"]);
}

#[test]
fn an_index_without_a_map() {
    let place = sharded();
    edit_index(&place, |index| *index = json!([1, 2]));
    assert_not_quantized(&place, &["index.json", "weight_map"]);
}

#[test]
fn an_index_that_is_no_json() {
    let place = sharded();
    fs::write(place.path(INDEX), "{\"weight_map\": {").unwrap();
    assert_not_quantized(&place, &["index.json", "not valid JSON", "line 1 column"]);
}
