//! Loss and every LoRA gradient of random tiny models against the twin in f64.

use std::collections::HashMap;

use candle_core::DType;
use nibble::data::Batch;
use nibble::model::families::spec_from_config;
use nibble::plan::AdapterRegion;

use super::random_model::{self, Draws};
use super::twin::Twin;

type Gradients = HashMap<String, Vec<f64>>;

/// Largest difference of each tensor, over its largest value.
fn errors(got: &Gradients, expected: &Gradients) -> HashMap<String, f64> {
    let error = |(name, expected): (&String, &Vec<f64>)| {
        let got = &got[name];
        assert_eq!(got.len(), expected.len());
        let largest = expected.iter().fold(0.0_f64, |m, g| m.max(g.abs()));
        assert!(largest > 1e-6, "{name} has no gradient");
        let difference = got.iter().zip(expected).map(|(g, e)| (g - e).abs());
        (name.clone(), difference.fold(0.0, f64::max) / largest)
    };
    assert_eq!(got.len(), expected.len());
    expected.iter().map(error).collect()
}

/// Our gradients may be as far from the twin's in f64 as 10 times the twin's own in f32 are: the
/// weights are large, so that every term counts, and some of these models amplify rounding.
fn assert_gradients(family: &str, scaling: &str, seed: u64) {
    let draws = Draws(seed);
    let config = random_model::config(family, scaling, &draws);
    let case = format!("{family} {scaling} {seed}: {config}");
    let spec = spec_from_config(&config).unwrap();
    let weights = random_model::weights(&spec, &draws);
    let adapter = random_model::adapter(&spec, &draws);
    let documents = random_model::documents(&draws);
    let twin = |dtype| {
        let twin = Twin::new(&spec, &weights, &adapter, dtype).unwrap();
        twin.gradients(&documents).unwrap()
    };
    let ((expected_loss, expected), (_, rounded)) = (twin(DType::F64), twin(DType::F32));
    let noise = errors(&rounded, &expected).into_values().fold(1e-7, f64::max);
    assert!(noise < 1e-3, "{case}\nf32 is off by {noise:e}: a model that tests nothing");

    let (_folder, checkpoint) = random_model::checkpoint(&config, &spec, &weights);
    let mut model = random_model::model(&checkpoint, &spec, Some(&adapter));
    let batch = Batch::from_documents(&documents);
    let loss = model.forward_backward(&batch, 1.0, 0).unwrap().sum;
    assert!((loss / expected_loss - 1.0).abs() < 1e-5, "{case}\nloss {loss}, {expected_loss}");

    let got = model.parameters().all_values(AdapterRegion::Gradients).unwrap();
    let tensors = model.parameters().tensors().iter().map(|tensor| {
        let values = got[tensor.range.clone()].iter().map(|&g| f64::from(g)).collect();
        (tensor.name.clone(), values)
    });
    for (name, error) in errors(&tensors.collect(), &expected) {
        assert!(error < 10.0 * noise, "{case}\n{name} is off by {error:e}, f32 by {noise:e}");
    }
}

#[test]
fn llama_with_every_rope_scaling() {
    for scaling in ["default", "linear", "dynamic", "yarn", "longrope", "llama3"] {
        (0..4).for_each(|seed| assert_gradients("llama", scaling, seed));
    }
}

#[test]
fn mistral_with_sliding_windows() {
    (10..18).for_each(|seed| assert_gradients("mistral", "default", seed));
}

#[test]
fn ministral3_with_queries_that_grow() {
    (100..108).for_each(|seed| assert_gradients("ministral3", "yarn", seed));
}

#[test]
fn qwen2_with_biases_and_windows_in_some_layers() {
    (20..28).for_each(|seed| assert_gradients("qwen2", "yarn", seed));
}

#[test]
fn qwen3_with_norms_of_heads() {
    (40..48).for_each(|seed| assert_gradients("qwen3", "default", seed));
}

#[test]
fn smollm3_with_layers_that_turn_nothing() {
    (30..38).for_each(|seed| assert_gradients("smollm3", "yarn", seed));
}

#[test]
fn granite_with_four_factors() {
    (110..118).for_each(|seed| assert_gradients("granite", "default", seed));
    (118..122).for_each(|seed| assert_gradients("granitemoehybrid", "default", seed));
}

#[test]
fn olmo_with_norms_behind_and_one_of_all_heads() {
    (130..136).for_each(|seed| assert_gradients("olmo2", "default", seed));
    (136..144).for_each(|seed| assert_gradients("olmo3", "yarn", seed));
}

#[test]
fn glm4_with_neighbours_turned_as_pairs() {
    (150..158).for_each(|seed| assert_gradients("glm4", "default", seed));
}

#[test]
fn seed_oss_with_biases() {
    (160..164).for_each(|seed| assert_gradients("seed_oss", "yarn", seed));
}

#[test]
fn gemma_with_scaled_embeddings() {
    (50..56).for_each(|seed| assert_gradients("gemma", "default", seed));
}

#[test]
fn gemma2_with_four_norms_and_caps() {
    (60..70).for_each(|seed| assert_gradients("gemma2", "default", seed));
}

#[test]
fn gemma3_with_two_rotary_embeddings() {
    (70..80).for_each(|seed| assert_gradients("gemma3_text", "linear", seed));
}

#[test]
fn phi3_with_fused_linears_and_heads_that_turn_in_part() {
    (80..84).for_each(|seed| assert_gradients("phi3", "default", seed));
    (84..90).for_each(|seed| assert_gradients("phi3", "longrope", seed));
}

#[test]
fn gpt2_with_both_activations() {
    (30..38).for_each(|seed| assert_gradients("gpt2", "default", seed));
}
