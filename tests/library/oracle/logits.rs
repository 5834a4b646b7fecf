//! Logits of random tiny Llamas against candle-transformers' Llama.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Llama, LlamaConfig};
use nibble::data::{Batch, Document};
use nibble::model::families::spec_from_config;

use super::random_model::{self, Draws};

/// A config that candle-transformers reads too: no biases, heads that fill the width.
fn config(seed: u64, scaling: &str) -> serde_json::Value {
    let mut config = random_model::config("llama", scaling, &Draws(seed));
    let size = |key: &str| config[key].as_u64().unwrap();
    let width = size("num_attention_heads") * size("head_dim");
    config["hidden_size"] = width.into();
    config["attention_bias"] = false.into();
    config["mlp_bias"] = false.into();
    // The spelling of transformers 4.
    let mut rope = config["rope_parameters"].take();
    config.as_object_mut().unwrap().shift_remove("rope_parameters");
    config["rope_theta"] = rope["rope_theta"].take();
    if scaling != "default" {
        rope.as_object_mut().unwrap().shift_remove("rope_theta");
        config["rope_scaling"] = rope;
    }
    config["max_position_embeddings"] = 64.into();
    config
}

fn assert_logits(seed: u64, scaling: &str) {
    let (draws, config) = (Draws(seed), config(seed, scaling));
    let spec = spec_from_config(&config).unwrap();
    let weights = random_model::weights(&spec, &draws);
    let (folder, checkpoint) = random_model::checkpoint(&config, &spec, &weights);
    let mut model = random_model::model(&checkpoint, &spec, None);
    let candle: LlamaConfig = serde_json::from_value(config.clone()).unwrap();
    let (candle, file) = (candle.into_config(false), folder.path().join("model.safetensors"));
    let tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    let builder = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let llama = Llama::load(builder, &candle).unwrap();

    let ids: Vec<u32> = (0..20).map(|i| (i * 7 + seed as u32) % 41).collect();
    let document = Document { labels: vec![0; ids.len()], input_ids: ids.clone(), line: 0 };
    let batch = Batch::from_documents([&document]);
    let rows: Vec<u32> = (0..ids.len() as u32).collect();
    let got = model.logits(&batch, &rows).unwrap();
    for (row, got) in got.chunks(spec.vocab_size).enumerate() {
        // It gives the logits after the last token only.
        let mut cache = Cache::new(false, DType::F32, &candle, &Device::Cpu).unwrap();
        let input = Tensor::new(&ids[..=row], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let expected = llama.forward(&input, 0, &mut cache).unwrap();
        let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
        let largest = expected.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
        let error = got.iter().zip(&expected).fold(0.0_f32, |m, (g, e)| m.max((g - e).abs()));
        assert!(error < 1e-5 * largest, "{config}\nrow {row} is off by {error:e} of {largest}");
    }
}

#[test]
fn random_llamas() {
    (0..8).for_each(|seed| assert_logits(seed, "default"));
}

#[test]
fn random_llamas_with_llama3_scaling() {
    (0..4).for_each(|seed| assert_logits(seed, "llama3"));
}
