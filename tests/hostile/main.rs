//! Bad input through the real binary: the message names the place and the way out, nothing is
//! written or lost, nothing panics. The readers are fuzzed in `fuzz.rs`.

#[path = "../training/mod.rs"]
mod training;

mod fuzz;
mod gguf;

use std::fs;

use safetensors::SafeTensors;
use serde_json::{Value, json};
use training::{Workplace, error_of, fail, succeed};

/// Runs `arguments`, which must be refused with `code` and all of `parts`, leaving no `out`.
#[track_caller]
fn refused(place: &Workplace, arguments: &[&str], code: i32, parts: &[&str]) {
    let (got, text) = fail(place.nibble(arguments));
    let error = error_of(&text);
    assert_eq!(got, code, "{text}");
    assert!(!text.contains("panicked"), "{text}");
    assert!(error.starts_with("error: "), "{text}");
    for part in parts.iter().chain(&["hint: "]) {
        assert!(error.contains(part), "no `{part}` in: {error}");
    }
    assert!(!place.path("out").exists(), "left {:?}", place.list("out"));
}

const TRAIN: [&str; 9] =
    ["train", "--model", "model", "--data", "train.jsonl", "--out", "out", "--max-length", "32"];
const QUANTIZE: [&str; 5] = ["quantize", "--model", "model", "--out", "out"];

/// Both commands that read a model refuse it in the same words.
#[track_caller]
fn model_refused(place: &Workplace, parts: &[&str]) {
    refused(place, &QUANTIZE, 1, parts);
    refused(place, &TRAIN, 1, parts);
}

fn edit_json(place: &Workplace, name: &str, edit: impl FnOnce(&mut Value)) {
    let mut value = place.json(name);
    edit(&mut value);
    fs::write(place.path(name), value.to_string()).unwrap();
}

/// Rewrites the JSON header of the model's file; the data stay.
fn edit_header(place: &Workplace, edit: impl FnOnce(&mut Value)) {
    let file = place.read("model/model.safetensors");
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
    edit(&mut header);
    let header = header.to_string().into_bytes();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header);
    out.extend(&file[8 + length..]);
    fs::write(place.path("model/model.safetensors"), out).unwrap();
}

/// Copies the model into `folder`, as two shards with an index.
fn shard_into(place: &Workplace, folder: &str) {
    let file = place.read("model/model.safetensors");
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let mut map = serde_json::Map::new();
    let mut shards = [("a.safetensors", Vec::new()), ("b.safetensors", Vec::new())];
    for (index, (name, view)) in tensors.tensors().into_iter().enumerate() {
        let (shard, list) = &mut shards[index % 2];
        map.insert(name.clone(), (*shard).into());
        list.push((name, view));
    }
    fs::create_dir(place.path(folder)).unwrap();
    let to = |name: &str| place.path(folder).join(name);
    for (name, list) in shards {
        fs::write(to(name), safetensors::serialize(list, None).unwrap()).unwrap();
    }
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(place.path("model").join(name), to(name)).unwrap();
    }
    let index = json!({"metadata": {}, "weight_map": map});
    fs::write(to("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// Makes `model` sharded.
fn shard(place: &Workplace) {
    shard_into(place, "shards");
    fs::remove_dir_all(place.path("model")).unwrap();
    fs::rename(place.path("shards"), place.path("model")).unwrap();
}

#[test]
fn truncated_safetensors() {
    for keep in [0, 4, 9, 2000, 100_000] {
        let place = Workplace::new();
        let file = place.read("model/model.safetensors");
        fs::write(place.path("model/model.safetensors"), &file[..keep]).unwrap();
        model_refused(&place, &["model.safetensors", "truncated"]);
    }
}

#[test]
fn a_safetensors_header_that_lies() {
    const Q: &str = "model.layers.0.self_attn.q_proj.weight";
    type Edit = fn(&mut Value);
    let lies: [(&str, Edit); 5] = [
        ("offsets past the end", |h| h[Q]["data_offsets"] = json!([0, 1u64 << 40])),
        ("offsets that overlap", |h| {
            h[Q]["data_offsets"] = h["lm_head.weight"]["data_offsets"].clone()
        }),
        ("offsets that overflow", |h| h[Q]["data_offsets"] = json!([u64::MAX - 3, u64::MAX])),
        ("a type of another width", |h| h[Q]["dtype"] = "F16".into()),
        ("a shape that is larger than its data", |h| h[Q]["shape"] = json!([1u64 << 62, 64])),
    ];
    for (lie, edit) in lies {
        let place = Workplace::new();
        edit_header(&place, edit);
        eprintln!("{lie}");
        model_refused(&place, &["model.safetensors"]);
    }
    let place = Workplace::new();
    let mut file = place.read("model/model.safetensors");
    file[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(place.path("model/model.safetensors"), file).unwrap();
    model_refused(&place, &["model.safetensors", "header"]);
}

#[test]
fn a_missing_shard() {
    let place = Workplace::new();
    shard(&place);
    fs::remove_file(place.path("model/b.safetensors")).unwrap();
    model_refused(&place, &["shard b.safetensors is missing"]);
}

#[test]
fn an_index_that_names_absent_tensors() {
    let place = Workplace::new();
    shard(&place);
    let index = "model/model.safetensors.index.json";
    edit_json(&place, index, |json| json["weight_map"]["ghost.weight"] = "a.safetensors".into());
    model_refused(&place, &["index.json", "ghost.weight", "a.safetensors"]);
    edit_json(&place, index, |json| json["weight_map"]["ghost.weight"] = "../a.safetensors".into());
    model_refused(&place, &["index.json", "ghost.weight", "../a.safetensors"]);
    fs::write(place.path(index), "{\"weight_map\": [").unwrap();
    model_refused(&place, &["index.json"]);
}

#[test]
fn shapes_that_the_config_denies() {
    let place = Workplace::new();
    edit_json(&place, "model/config.json", |config| config["intermediate_size"] = 192.into());
    model_refused(&place, &["mlp.", "[192, 64]", "[160, 64]"]);
    let place = Workplace::new();
    edit_json(&place, "model/config.json", |config| config["num_hidden_layers"] = 3.into());
    model_refused(&place, &["model.layers.2."]);
}

#[test]
fn configs_that_are_not_supported() {
    type Edit = fn(&mut Value);
    let edits: [(Edit, &[&str]); 6] = [
        (|c| c["model_type"] = "mamba".into(), &["model_type", "mamba", "llama"]),
        (|c| c["hidden_act"] = "relu6".into(), &["hidden_act", "relu6"]),
        (|c| c["num_attention_heads"] = 0.into(), &["num_attention_heads"]),
        (|c| c["num_key_value_heads"] = 3.into(), &["num_key_value_heads", "3"]),
        (|c| c["hidden_size"] = "wide".into(), &["hidden_size", "wide"]),
        (|c| c["rope_parameters"]["rope_type"] = "spiral".into(), &["rope_type", "spiral"]),
    ];
    for (edit, parts) in edits {
        let place = Workplace::new();
        edit_json(&place, "model/config.json", edit);
        model_refused(&place, parts);
    }
    let place = Workplace::new();
    fs::write(place.path("model/config.json"), "{\"model_type\": ").unwrap();
    model_refused(&place, &["config.json"]);
}

#[test]
fn a_weight_that_is_not_finite() {
    let place = Workplace::new();
    let mut file = place.read("model/model.safetensors");
    let header = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let json: Value = serde_json::from_slice(&file[8..8 + header]).unwrap();
    let name = "model.layers.1.mlp.up_proj.weight";
    let begin = json[name]["data_offsets"][0].as_u64().unwrap() as usize;
    let at = 8 + header + begin + 4 * 777;
    file[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(place.path("model/model.safetensors"), file).unwrap();
    model_refused(&place, &[name, "777"]);
}

#[test]
fn corrupt_gguf() {
    let place = Workplace::new();
    let whole = gguf::llama().bytes();
    let quantize = ["quantize", "--model", "model.gguf", "--out", "out"];
    let attempt = |bytes: &[u8], parts: &[&str]| {
        fs::write(place.path("model.gguf"), bytes).unwrap();
        refused(&place, &quantize, 1, parts);
    };
    for keep in [0, 3, 11, 200, 3000, whole.len() - 40] {
        attempt(&whole[..keep], &["model.gguf", "GGUF"]);
    }
    let with = |at: usize, value: &[u8]| {
        let mut bytes = whole.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        bytes
    };
    attempt(&with(0, b"GGML"), &["model.gguf", "GGUF"]);
    attempt(&with(4, &9u32.to_le_bytes()), &["version 9", "1 to 3"]);
    attempt(&with(8, &u64::MAX.to_le_bytes()), &["model.gguf"]);
    attempt(&with(16, &u64::MAX.to_le_bytes()), &["model.gguf"]);
    attempt(&with(24, &(1u64 << 60).to_le_bytes()), &["model.gguf", "bytes expected"]);
    let mut unaligned = gguf::llama();
    unaligned.number("general.alignment", 0);
    attempt(&unaligned.bytes(), &["general.alignment", "power of two"]);
    let name = b"token_embd.weight";
    let at = whole.windows(name.len()).position(|window| window == name).unwrap() + name.len();
    attempt(&with(at, &77u32.to_le_bytes()), &["token_embd.weight", "77 dimensions"]);
    attempt(&with(at + 4, &(1u64 << 63).to_le_bytes()), &["token_embd.weight", "shape"]);
    attempt(&with(at + 20, &99u32.to_le_bytes()), &["token_embd.weight", "block type 99"]);
    attempt(&with(at + 24, &(1u64 << 50).to_le_bytes()), &["token_embd.weight", "end of the file"]);
}

#[test]
fn a_gguf_file_is_the_model_it_was_made_from() {
    let place = Workplace::new();
    fs::write(place.path("model.gguf"), gguf::llama().bytes()).unwrap();
    let dense = ["--skip", ".", "--dtype", "float32"];
    let mut command = place.nibble(&["quantize", "--model", "model.gguf", "--out", "out"]);
    command.args(dense);
    succeed(command);
    let (ours, theirs) =
        (place.read("out/model.safetensors"), place.read("model/model.safetensors"));
    let ours = SafeTensors::deserialize(&ours).unwrap();
    for (name, tensor) in SafeTensors::deserialize(&theirs).unwrap().tensors() {
        assert!(ours.tensor(&name).unwrap().data() == tensor.data(), "{name}");
    }
}

#[test]
fn a_foreign_tokenizer() {
    let place = Workplace::new();
    let row = json!({"text": "w500 w2 w3"}).to_string();
    fs::write(place.path("train.jsonl"), row).unwrap();
    edit_json(&place, "model/tokenizer.json", |json| json["model"]["vocab"]["w500"] = 500.into());
    refused(&place, &TRAIN, 1, &["tokenizer", "128"]);
    let place = Workplace::new();
    fs::write(place.path("train.jsonl"), json!({"input_ids": [3, 500, 2]}).to_string()).unwrap();
    refused(&place, &TRAIN, 1, &["500", "128"]);
    fs::write(place.path("model/tokenizer.json"), "{\"model\": 3}").unwrap();
    refused(&place, &TRAIN, 1, &["tokenizer.json"]);
}

#[test]
fn a_bad_line_of_data() {
    let place = Workplace::new();
    let mut text = String::from_utf8(place.read("train.jsonl")).unwrap();
    text.push_str("{\"input_ids\": [1, 2\n");
    fs::write(place.path("train.jsonl"), text).unwrap();
    refused(&place, &TRAIN, 1, &["train.jsonl:25"]);
}

#[test]
fn empty_data() {
    let place = Workplace::new();
    for text in ["", "\n\n", "[]"] {
        fs::write(place.path("train.jsonl"), text).unwrap();
        refused(&place, &TRAIN, 1, &["train.jsonl"]);
    }
}

#[test]
fn data_without_a_trained_token() {
    let place = Workplace::new();
    let row = json!({"input_ids": [3, 4, 5], "labels": [-100, -100, -100]}).to_string();
    fs::write(place.path("train.jsonl"), format!("{row}\n{row}\n")).unwrap();
    refused(&place, &TRAIN, 1, &["train.jsonl"]);
}

#[test]
fn an_adapter_for_another_model() {
    let place = Workplace::new();
    succeed(place.train("adapter", &["--max-steps", "1", "--lora-r", "4"]));
    edit_json(&place, "model/config.json", |config| config["num_hidden_layers"] = 1.into());
    for command in [
        &["generate", "--model", "model", "--adapter", "adapter", "--prompt", "w1"][..],
        &["eval", "--model", "model", "--adapter", "adapter", "--data", "eval.jsonl"],
        &["merge", "--model", "model", "--adapter", "adapter", "--out", "out"],
        &[&TRAIN[..], &["--init-adapter", "adapter"]].concat(),
    ] {
        refused(&place, command, 1, &["adapter", "model.layers.1."]);
    }
    fs::write(place.path("adapter/adapter_model.safetensors"), b"short").unwrap();
    let merge = ["merge", "--model", "model", "--adapter", "adapter", "--out", "out"];
    refused(&place, &merge, 1, &["adapter_model.safetensors"]);
}

#[test]
fn an_output_folder_with_files_in_it() {
    let place = Workplace::new();
    fs::create_dir(place.path("taken")).unwrap();
    fs::write(place.path("taken/thesis.txt"), "years of work").unwrap();
    for arguments in [
        &["quantize", "--model", "model", "--out", "taken"][..],
        &["train", "--model", "model", "--data", "train.jsonl", "--out", "taken"],
    ] {
        let (_, text) = fail(place.nibble(arguments));
        assert!(error_of(&text).contains("taken") && text.contains("hint: "), "{text}");
        assert_eq!(place.read("taken/thesis.txt"), b"years of work");
        assert_eq!(place.list("taken"), ["thesis.txt"]);
    }
}

#[test]
fn flags_and_values_that_do_not_exist() {
    let place = Workplace::new();
    for (arguments, part) in [
        (&["quantize", "--model", "model", "--out", "out", "--quant-type", "nf5"][..], "nf4"),
        (&["quantize", "--model", "model", "--out", "out", "--block-size", "60"], "power of two"),
        (&["quantize", "--modle", "model"], "--model"),
        (&["trian"], "train"),
    ] {
        let (code, text) = fail(place.nibble(arguments));
        assert_eq!(code, 2, "{text}");
        assert!(text.contains(part) && !text.contains("panicked"), "{text}");
        assert!(place.list("out").is_empty());
    }
}

#[test]
fn models_that_are_not_there() {
    let place = Workplace::new();
    for model in ["nowhere", "train.jsonl", "nowhere.gguf"] {
        let arguments = ["quantize", "--model", model, "--out", "out"];
        let (code, text) = fail(place.nibble(&arguments));
        assert!((1..=2).contains(&code) && text.contains(model), "{text}");
    }
    assert!(!place.path("out").exists());
}
