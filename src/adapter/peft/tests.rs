//! Round trips.

use std::fs;

use nibble_quant::FloatType;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::super::fixtures;
use super::settings::CONFIG_FILE;
use crate::adapter::{Adapter, InitLoraWeights, LoraConfig, LoraTensors};
use crate::error::{Error, Result};
use crate::model::spec::ModelSpec;
use crate::random::Stream;

/// An adapter with every setting away from its default and a non-zero B.
fn sample(spec: &ModelSpec, names: &str) -> Result<Adapter> {
    let config = LoraConfig {
        r: 4,
        lora_alpha: 7.5,
        lora_dropout: 0.05,
        target_modules: names.parse()?,
        exclude_modules: Some("layers.0.mlp.down_proj".parse()?),
        layers_to_transform: Some(vec![1, 0]),
        layers_pattern: vec!["layers".into()],
        rank_pattern: vec![("v_proj".into(), 3), ("q_proj".into(), 2)],
        alpha_pattern: vec![(r"layers\.1\..*q_proj".into(), 3.25), ("q_proj".into(), 5.0)],
        use_rslora: true,
        init_lora_weights: InitLoraWeights::Gaussian,
        fan_in_fan_out: false,
    };
    let mut adapter = Adapter::init(config, spec, 5)?;
    for (target, LoraTensors { b, .. }) in adapter.targets.iter().zip(&mut adapter.tensors) {
        Stream::new(1, &target.key_b()).fill_normal(0, 0.1, b);
    }
    adapter.base_model = Some("some/base".into());
    Ok(adapter)
}

#[test]
fn what_is_written_is_read_back_bit_for_bit() -> Result<()> {
    let spec = fixtures::llama(2);
    let dir = TempDir::new().unwrap();
    let adapter = sample(&spec, "q_proj,v_proj,down_proj")?;
    adapter.save(dir.path(), FloatType::F32)?;
    assert_eq!(Adapter::load(dir.path(), &spec)?, adapter);
    Ok(())
}

#[test]
fn all_linear_is_written_out_as_names() -> Result<()> {
    let spec = fixtures::llama(2);
    let dir = TempDir::new().unwrap();
    let adapter = sample(&spec, "all-linear")?;
    adapter.save(dir.path(), FloatType::F32)?;
    let config: Value =
        serde_json::from_str(&fs::read_to_string(dir.path().join(CONFIG_FILE)).unwrap()).unwrap();
    let names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    assert_eq!(config["target_modules"], json!(names));
    let loaded = Adapter::load(dir.path(), &spec)?;
    assert_eq!((loaded.targets, loaded.tensors), (adapter.targets, adapter.tensors));
    Ok(())
}

#[test]
fn half_precision_files_round_to_nearest_even() -> Result<()> {
    let spec = fixtures::gpt2();
    for dtype in [FloatType::Bf16, FloatType::F16] {
        let dir = TempDir::new().unwrap();
        let config = LoraConfig { r: 3, ..LoraConfig::default() };
        let adapter = Adapter::init(config, &spec, 9)?;
        adapter.save(dir.path(), dtype)?;
        let loaded = Adapter::load(dir.path(), &spec)?;
        for (ours, theirs) in adapter.tensors.iter().zip(&loaded.tensors) {
            let rounded = ours.a.iter().map(|&x| match dtype {
                FloatType::F16 => half::f16::from_f32(x).to_f32(),
                _ => half::bf16::from_f32(x).to_f32(),
            });
            assert_eq!(theirs.a, rounded.collect::<Vec<_>>());
        }
    }
    Ok(())
}

#[test]
fn settings_file_is_the_stable_core_of_peft_s() -> Result<()> {
    let dir = TempDir::new().unwrap();
    sample(&fixtures::llama(2), "q_proj,v_proj,down_proj")?.save(dir.path(), FloatType::F32)?;
    let text = fs::read_to_string(dir.path().join(CONFIG_FILE)).unwrap();
    assert_eq!(
        text,
        r#"{
  "alpha_pattern": {
    "layers\\.1\\..*q_proj": 3.25,
    "q_proj": 5
  },
  "base_model_name_or_path": "some/base",
  "bias": "none",
  "exclude_modules": [
    "layers.0.mlp.down_proj"
  ],
  "fan_in_fan_out": false,
  "inference_mode": true,
  "init_lora_weights": "gaussian",
  "layers_pattern": [
    "layers"
  ],
  "layers_to_transform": [
    1,
    0
  ],
  "lora_alpha": 7.5,
  "lora_dropout": 0.05,
  "modules_to_save": null,
  "peft_type": "LORA",
  "r": 4,
  "rank_pattern": {
    "v_proj": 3,
    "q_proj": 2
  },
  "revision": null,
  "target_modules": [
    "q_proj",
    "v_proj",
    "down_proj"
  ],
  "task_type": "CAUSAL_LM",
  "use_dora": false,
  "use_rslora": true
}
"#
    );
    Ok(())
}

#[test]
fn gpt2_adapters_say_fan_in_fan_out() -> Result<()> {
    let dir = TempDir::new().unwrap();
    Adapter::init(LoraConfig::default(), &fixtures::gpt2(), 0)?.save(dir.path(), FloatType::F32)?;
    let text = fs::read_to_string(dir.path().join(CONFIG_FILE)).unwrap();
    assert!(text.contains("\"fan_in_fan_out\": true"), "{text}");
    Ok(())
}

#[test]
fn model_card_names_the_base_and_the_library() -> Result<()> {
    let dir = TempDir::new().unwrap();
    sample(&fixtures::llama(2), "q_proj,v_proj,down_proj")?.save(dir.path(), FloatType::F32)?;
    let card = fs::read_to_string(dir.path().join("README.md")).unwrap();
    let front = "---\nbase_model: some/base\nlibrary_name: peft\npipeline_tag: text-generation\n\
                 tags:\n- base_model:adapter:some/base\n- lora\n- nibble\n- transformers\n---\n";
    assert!(card.starts_with(front), "{card}");
    assert!(card.contains("rank 4, alpha 7.5"), "{card}");
    assert!(card.contains(r#"from_pretrained("some/base")"#), "{card}");
    Ok(())
}

#[test]
fn saving_over_a_file_names_the_path() -> Result<()> {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("taken");
    fs::write(&file, "").unwrap();
    let adapter = Adapter::init(LoraConfig::default(), &fixtures::llama(1), 0)?;
    let error = adapter.save(&file, FloatType::F32).unwrap_err();
    assert!(matches!(error, Error::Io(..)));
    assert!(error.to_string().contains("taken"), "{error}");
    Ok(())
}
