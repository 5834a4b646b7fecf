//! What is written: shards, what stays dense, the table.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use nibble::checkpoint::Checkpoint;
use nibble::kernels::cpu::FrozenMatrix;
use nibble::model::families::spec_from_config;
use nibble::model::weights::Weights;
use nibble::plan::{Processor, WeightBytes};
use nibble_quant::{BlockFormat, Floats, PackedWeight, QuantType};
use serde_json::{Value, json};

use super::tensors::{Tensor, of_file, of_folder, shards};
use crate::training::{Workplace, fail, succeed};

fn quantize(place: &Workplace, model: &str, out: &str, flags: &[&str]) -> String {
    let arguments = ["quantize", "--model", model, "--out", out];
    let output = succeed(place.nibble(&[&arguments[..], flags].concat()));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn linears_are_packed_as_the_library_packs_them_and_the_rest_is_copied() {
    let place = Workplace::new();
    let source = of_folder(&place.path("model"));
    for (quant_type, block_size, double_quant) in
        [(QuantType::Nf4, 64, true), (QuantType::Fp4, 32, false), (QuantType::Nf4, 4096, true)]
    {
        let out = format!("{}-{block_size}", quant_type.as_str());
        let (size, double) = (block_size.to_string(), double_quant.to_string());
        let flags = ["--quant-type", quant_type.as_str(), "--block-size", &size];
        quantize(&place, "model", &out, &[&flags[..], &["--double-quant", &double]].concat());
        let format = BlockFormat { quant_type, block_size, double_quant };
        let got = of_folder(&place.path(&out));
        let mut packed = 0;
        for (name, tensor) in &source {
            if !name.contains("_proj.") {
                assert_eq!(&got[name], tensor, "{name}");
                continue;
            }
            let (values, shape) = (tensor.values(), [tensor.shape[0], tensor.shape[1]]);
            let weight = PackedWeight::quantize(Floats::F32(&values), shape, &format).unwrap();
            assert!(got[name].data == weight.codes()[..], "{name}");
            packed += 1;
        }
        assert_eq!(packed, 14);
        let config = place.json(&format!("{out}/config.json"));
        let config = &config["quantization_config"];
        assert_eq!(config["bnb_4bit_quant_type"], quant_type.as_str());
        assert_eq!(config["bnb_4bit_use_double_quant"], double_quant);
        assert_eq!(config["llm_int8_skip_modules"], Value::Null);
    }
}

#[test]
fn shards_are_no_larger_than_asked_and_hold_everything() {
    let place = Workplace::new();
    quantize(&place, "model", "whole", &[]);
    quantize(&place, "model", "parts", &["--max-shard-size", "40KB"]);
    let (whole, parts) = (of_folder(&place.path("whole")), of_folder(&place.path("parts")));
    assert_eq!(whole, parts);
    let files = shards(&place.path("parts"));
    assert!(files.len() > 2, "{files:?}");
    for file in &files {
        let tensors = of_file(file);
        let bytes: usize = tensors.values().map(|tensor| tensor.data.len()).sum();
        assert!(bytes <= 40_000, "{}: {bytes} bytes", file.display());
    }
    let index = place.json("parts/model.safetensors.index.json");
    let map = index["weight_map"].as_object().unwrap();
    assert_eq!(map.keys().collect::<BTreeSet<_>>(), parts.keys().collect());
    let total: usize = parts.values().map(|tensor| tensor.data.len()).sum();
    assert_eq!(index["metadata"]["total_size"], total);
    // A sharded folder is read like a single file.
    quantize(&place, "parts", "again", &["--check"]);
    assert_eq!(of_folder(&place.path("again")), whole);
}

#[test]
fn a_pattern_that_skips_nothing_is_refused() {
    let place = Workplace::new();
    let arguments = ["quantize", "--model", "model", "--out", "out", "--skip", "q_prj"];
    let (code, error) = fail(place.nibble(&arguments));
    assert!(code == 2 && error.contains("--skip: `q_prj` matches no tensor"), "{error}");
    assert!(error.contains("hint: names are such as model.layers.0.self_attn.q_proj"), "{error}");
}

#[test]
fn only_a_models_folder_is_overwritten() {
    let place = Workplace::new();
    quantize(&place, "model", "out", &[]);
    quantize(&place, "model", "out", &["--overwrite", "--quant-type", "fp4"]);
    fs::write(place.path("out/thesis.tex"), "mine").unwrap();
    let arguments = ["quantize", "--model", "model", "--out", "out", "--overwrite"];
    let (code, error) = fail(place.nibble(&arguments));
    assert!(code == 2 && error.contains("out holds `thesis.tex`"), "{error}");
    assert_eq!(place.read("out/thesis.tex"), b"mine");
}

#[test]
fn skipped_linears_stay_dense_and_the_config_says_so() {
    let place = Workplace::new();
    quantize(&place, "model", "out", &["--skip", r"layers\.0\.mlp", "--skip", "k_proj"]);
    let (source, got) = (of_folder(&place.path("model")), of_folder(&place.path("out")));
    let skipped = |name: &str| name.contains("layers.0.mlp") || name.contains("k_proj");
    let mut modules = vec!["lm_head".to_string()];
    for (name, tensor) in source.iter().filter(|(name, _)| name.contains("_proj.")) {
        assert_eq!(&got[name] == tensor, skipped(name), "{name}");
        if skipped(name) {
            modules.push(name.trim_end_matches(".weight").to_string());
        }
    }
    let config = place.json("out/config.json");
    let said = config["quantization_config"]["llm_int8_skip_modules"].as_array().unwrap();
    let said: BTreeSet<&str> = said.iter().map(|name| name.as_str().unwrap()).collect();
    assert_eq!(said, modules.iter().map(String::as_str).collect());

    // And are used as they are, by whatever reads them.
    let checkpoint = Checkpoint::open(&place.path("out")).unwrap();
    let spec = spec_from_config(checkpoint.config()).unwrap();
    let format = Some(BlockFormat::default());
    let weights = Weights::load(&checkpoint, &spec, format.as_ref(), None).unwrap();
    let mut dense = 0;
    for linear in weights.blocks.iter().flat_map(|block| &block.linears) {
        let is_packed = matches!(linear.weight, FrozenMatrix::Packed(_));
        assert_eq!(is_packed, !skipped(&linear.module), "{}", linear.module);
        dense += if is_packed { 0 } else { linear.weight.bytes() as u64 };
    }
    let planned = WeightBytes::of_checkpoint(&checkpoint, &spec, format.as_ref(), Processor::Cpu);
    assert_eq!(planned.resident.dense_linears, dense);
    let measure = |more: &[&str]| {
        let mut command = place.nibble(&["memory", "--model", "out", "--json", "--device", "cpu"]);
        command.args(["--max-length", "32", "--measure", "1"]).args(more);
        let found: Value = serde_json::from_slice(&succeed(command).stdout).unwrap();
        let rows = found["measured"]["rows"].as_array().unwrap().clone();
        rows.into_iter().filter(|row| row["name"] != "program, tokenizer, data").collect::<Vec<_>>()
    };
    let name = "linear layers, not quantized";
    let rows = measure(&[]);
    let row = rows.iter().find(|row| row["name"] == name).unwrap();
    assert_eq!((&row["planned_bytes"], &row["measured_bytes"]), (&json!(dense), &json!(dense)));
    assert!(measure(&["--weights", "stream"]).iter().all(|row| row["name"] != name));
}

#[test]
fn the_table_has_the_bytes_of_the_files() {
    let place = Workplace::new();
    let text = quantize(&place, "model", "out", &["--json", "--check"]);
    let table: Value = serde_json::from_str(&text).unwrap();
    let got = of_folder(&place.path("out"));
    let sum = |key: &str| -> u64 {
        table["roles"].as_object().unwrap().values().map(|role| role[key].as_u64().unwrap()).sum()
    };
    let bytes = |tensors: &BTreeMap<String, Tensor>| -> u64 {
        tensors.values().map(|tensor| tensor.data.len() as u64).sum()
    };
    let source = of_folder(&place.path("model"));
    assert_eq!(sum("bytes_before"), bytes(&source));
    assert_eq!(sum("tensors"), source.len() as u64);
    // The table leaves out what is the same for every packed tensor: code tables and settings, but
    // for the offset of its scales.
    const OFFSETS: u64 = 14 * 4;
    let own = |name: &str| !name.contains("quant_map") && !name.contains("quant_state");
    let after = bytes(&got.into_iter().filter(|(name, _)| own(name)).collect());
    assert_eq!(sum("bytes_after"), after + OFFSETS);
    assert_eq!(table["checked"], true);
    let q = &table["roles"]["q"];
    let (bits, error) = (q["bits_per_weight"].as_f64().unwrap(), &q["relative_rms_error"]);
    assert!((4.1..5.0).contains(&bits), "{q}");
    assert!((0.05..0.15).contains(&error.as_f64().unwrap()), "{q}");
    let words = quantize(&place, "model", "out2", &[]);
    let (first, last) = (words.lines().next().unwrap(), words.lines().last().unwrap());
    assert!(first.starts_with("role") && first.ends_with("worst block"), "{first}");
    assert!(last.starts_with("wrote out2 (") && last.contains("GB/s read"), "{last}");
}
