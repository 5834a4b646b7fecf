//! PEFT's own answers: `tests/data/peft_targets.json` by `scripts/golden/gen_targets.py`,
//! `tests/data/adapters` by `scripts/golden/gen_adapters.py`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::fixtures;
use super::peft::{PeftAdapter, PeftSettings};
use crate::checkpoint::read_json;
use crate::error::{Error, Result};
use crate::model::families::spec_from_config;
use crate::model::spec::ModelSpec;

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

/// The reference model that a case's name starts with.
fn model_of(case: &str) -> PathBuf {
    data("models").join(case.split('.').next().unwrap_or(case))
}

fn spec_of(case: &str) -> ModelSpec {
    spec_from_config(&read_json(&model_of(case).join("config.json")).unwrap()).unwrap()
}

/// Shape and values by name.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// The f32 tensors of a file, and its metadata's entry `changed`.
fn load(path: &Path) -> (Tensors, BTreeSet<String>) {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.iter().map(|(name, view)| {
        let words = view.data().chunks_exact(4);
        let values = words.map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        (name.to_string(), (view.shape().to_vec(), values))
    });
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().clone().unwrap_or_default();
    let changed = metadata.get("changed").map(String::as_str).unwrap_or_default();
    (tensors.collect(), changed.split(',').map(String::from).collect())
}

#[test]
fn modules_ranks_and_scales_are_those_of_peft() -> Result<()> {
    let text = std::fs::read_to_string(data("peft_targets.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 34);
    for case in cases {
        let mut settings = case["settings"].clone();
        let defaults = [("peft_type", "LORA".into()), ("r", 8.into()), ("lora_alpha", 16.into())];
        for (key, value) in defaults {
            settings.as_object_mut().unwrap().entry(key).or_insert(value);
        }
        let settings = PeftSettings::from_json(&settings)?;
        let spec = match case["model"].as_str() {
            Some("gpt2") => fixtures::gpt2(),
            _ => fixtures::llama(12),
        };
        let selected = settings.lora.select(&spec, &settings.modules_to_save)?;
        let expected = case["adapted"].as_object().unwrap();
        assert_eq!(selected.len(), expected.len(), "{}", case["settings"]);
        for target in selected {
            let [r, scale] = [&expected[&target.module.path][0], &expected[&target.module.path][1]];
            assert_eq!(target.r as u64, r.as_u64().unwrap(), "{}", case["settings"]);
            assert_eq!(target.scale, scale.as_f64().unwrap() as f32, "{}", case["settings"]);
        }
    }
    Ok(())
}

fn transposed(values: &[f32], rows: usize) -> Vec<f32> {
    let columns = values.len() / rows;
    (0..values.len()).map(|i| values[i % rows * columns + i / rows]).collect()
}

/// Checks every kept tensor of the merged model, and which tensors change at all.
fn check_merged(case: &str) -> Result<()> {
    let spec = spec_of(case);
    let adapter = PeftAdapter::open(&data("adapters").join(case), &spec)?;
    let merge = adapter.merge(&spec)?;
    let (base, _) = load(&model_of(case).join("model.safetensors"));
    let (merged, changed) = load(&data(&format!("adapters/{case}/merged.safetensors")));
    assert!(!merged.is_empty(), "{case}");
    for tensor in spec.inventory() {
        let ours = merge.changes(&tensor.name);
        assert_eq!(ours, changed.contains(&tensor.name), "{case}: {}", tensor.name);
    }
    for (name, (shape, expected)) in &merged {
        let inventory = spec.inventory();
        let flip = inventory.iter().any(|tensor| tensor.name == *name && tensor.transposed);
        let layout = |values: &Vec<f32>| match flip {
            true => transposed(values, shape[0]),
            false => values.clone(),
        };
        let got = merge.merged_weight(name, layout(&base[name].1))?;
        // Both sides sum R products in f32, in their own order: a few units in the last place of
        // the largest value.
        let expected = layout(expected);
        let largest = expected.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
        let tolerance = 4.0 * f32::EPSILON * largest;
        for (index, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert!(
                (got - expected).abs() <= tolerance,
                "{case}: {name}[{index}] {got} {expected}"
            );
        }
    }
    Ok(())
}

macro_rules! merged_weights_are_those_of_peft {
    ($($test:ident: $case:literal;)*) => {
        mod merged_weights_are_those_of_peft {
            $(#[test]
            fn $test() -> crate::error::Result<()> {
                super::check_merged($case)
            })*
        }
    };
}

merged_weights_are_those_of_peft! {
    llama_plain: "llama_s0.plain";
    llama_rslora: "llama_s0.rslora";
    llama_dora: "llama_s0.dora";
    llama_rank_pattern: "llama_s0.rank_pattern";
    llama_layers_to_transform: "llama_s0.layers_to_transform";
    llama_regex: "llama_s0.regex";
    llama_exclude: "llama_s0.exclude";
    llama_modules_to_save: "llama_s0.modules_to_save";
    llama_embed_tokens: "llama_s0.embed_tokens";
    llama_token_rows: "llama_s0.token_rows";
    llama_dora_on_embedding_and_head: "llama_s0.dora_embed";
    llama_saved_mlp: "llama_s0.saved_mlp";
    gpt2_plain: "gpt2_s0.plain";
    gpt2_rslora: "gpt2_s0.rslora";
    gpt2_dora: "gpt2_s0.dora";
    gpt2_saved_fc: "gpt2_s0.saved_fc";
    gpt2_token_rows: "gpt2_s0.wte";
    qwen2_lora_bias: "qwen2_s0.lora_bias";
    qwen2_bias_lora_only: "qwen2_s0.bias_lora_only";
    qwen2_bias_all: "qwen2_s0.bias_all";
    qwen2_tied_token_rows: "qwen2_s0.token_rows";
}

#[test]
fn every_variant_is_trainable_or_says_what_it_has() -> Result<()> {
    for (case, feature) in [
        ("llama_s0.plain", None),
        ("llama_s0.rslora", None),
        ("llama_s0.rank_pattern", None),
        ("llama_s0.layers_to_transform", None),
        ("llama_s0.regex", None),
        ("llama_s0.exclude", None),
        ("gpt2_s0.plain", None),
        ("gpt2_s0.rslora", None),
        ("llama_s0.dora", Some("DoRA")),
        ("llama_s0.embed_tokens", Some("LoRA on `model.embed_tokens`")),
        ("llama_s0.modules_to_save", Some("a full `lm_head.weight`")),
        ("llama_s0.saved_mlp", Some("a full `model.layers.0.mlp.gate_proj.weight`")),
        ("llama_s0.token_rows", Some("trainable_token_indices")),
        ("qwen2_s0.lora_bias", Some("lora_bias")),
        ("qwen2_s0.bias_lora_only", Some("trained base biases")),
    ] {
        let result = super::Adapter::load(&data("adapters").join(case), &spec_of(case));
        match (result, feature) {
            (Ok(adapter), None) => assert!(adapter.parameters() > 0),
            (Err(Error::Input(message)), Some(feature)) => {
                assert!(message.what.contains(feature), "{}", message.what);
                assert!(message.hint.unwrap_or_default().contains("nibble merge"));
            }
            (result, _) => panic!("{case}: {result:?}"),
        }
    }
    Ok(())
}

/// The model of the `interop` adapters: V 100, F 128, biases on q, k, v and o.
fn interop_spec() -> ModelSpec {
    ModelSpec { vocab_size: 100, intermediate_size: 128, qkv_bias: true, ..fixtures::llama(2) }
}

#[test]
fn every_interop_adapter_is_read_or_refused_with_its_reason() -> Result<()> {
    let open = |case: &str, spec: &ModelSpec| {
        PeftAdapter::open(&data("interop").join(case), spec).map(|adapter| adapter.beyond_lora())
    };
    let spec = interop_spec();
    for (case, expected) in [
        ("bias", vec!["trained base biases"]),
        ("dora", vec!["DoRA"]),
        ("lbias", vec!["lora_bias"]),
        ("tt", vec!["trainable_token_indices"]),
        ("mts", vec!["a full `lm_head.weight`", "a full `model.embed_tokens.weight`"]),
        ("lora", vec![]),
        (
            "emb",
            vec![
                "LoRA on `model.embed_tokens`",
                "LoRA on `lm_head`",
                "a full `lm_head.weight`",
                "a full `model.embed_tokens.weight`",
            ],
        ),
    ] {
        assert_eq!(open(case, &spec)?, expected, "{case}");
    }
    assert_eq!(open("gpt2", &fixtures::gpt2())?, Vec::<String>::new());
    for (case, kind) in [("prefix", "PREFIX_TUNING"), ("prompt", "PROMPT_TUNING")] {
        let error = open(case, &spec).unwrap_err().to_string();
        assert!(error.contains(&format!("`peft_type` is {kind}, expected LORA")), "{error}");
    }
    Ok(())
}
