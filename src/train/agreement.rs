//! Whether a backend computes what the CPU does: tiny models of random weights on both.
//!
//! A GPU is a driver, a compiler in it, a library and a card, none of which was there when this
//! program was built. What they make of the kernels is compared with the CPU before each run on one.

use nibble_quant::{BlockFormat, FloatType, owned_bytes};
use serde_json::json;

use super::adamw::AdamW;
use super::backend::{TrainingKernels, Update};
use super::step;
use crate::adapter::{Adapter, LoraConfig, LoraPlus};
use crate::checkpoint::{DenseTensor, Weight};
use crate::data::Batch;
use crate::error::{Error, Result};
use crate::kernels::cpu::Cpu;
use crate::model::families::spec_from_config;
use crate::model::spec::{ModelSpec, TensorRole};
use crate::model::weights::{TensorSource, Weights};
use crate::model::{Model, Randomness};
use crate::plan::{AdapterRegion, Policy, Settings};
use crate::random::Stream;

/// All paths of the kernels. Heads: every width that has kernels of its own, and one that has none. Ranks:
/// some for each kernel of an adapted MLP, and one that has none. Families: with and without norms of heads,
/// caps, post-norms, norms before, fused linears, heads that are rotated in part, and neighbours in them.
const MODELS: [Tiny; 10] = [
    Tiny { family: "llama", head_dim: 64, rank: 16 },
    Tiny { family: "llama", head_dim: 96, rank: 32 },
    Tiny { family: "qwen3", head_dim: 128, rank: 12 },
    Tiny { family: "gemma", head_dim: 256, rank: 24 },
    Tiny { family: "gemma2", head_dim: 256, rank: 8 },
    Tiny { family: "gemma3_text", head_dim: 64, rank: 8 },
    Tiny { family: "phi3", head_dim: 128, rank: 8 },
    Tiny { family: "qwen3", head_dim: 32, rank: 8 },
    Tiny { family: "glm4", head_dim: 64, rank: 8 },
    Tiny { family: "olmo2", head_dim: 64, rank: 16 },
];

/// What is special in a tiny model.
#[derive(Clone, Copy)]
struct Tiny {
    family: &'static str,
    head_dim: usize,
    rank: usize,
}

/// Two documents.
const BOUNDARIES: [u32; 3] = [0, 41, 70];
/// Odd, so that rows of logits have room behind them.
const VOCABULARY: usize = 197;
/// Tokens that are decoded together: a prompt in pieces, behind more keys than a warp takes at once.
const DECODED: [usize; 5] = [9, 24, 1, 1, 1];
const SEED: u64 = 20;

/// The largest error in norm that bf16 explains, several times over: a wrong kernel is off by about 1.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Tolerance {
    loss: f64,
    gradients: f64,
    logits: f64,
    weights: f64,
}

const TOLERANCE: Tolerance = Tolerance { loss: 5e-3, gradients: 6e-2, logits: 6e-2, weights: 1e-5 };

/// Compares loss, gradients, an update and decoded logits, of every tiny model.
///
/// # Errors
/// `Gpu` with what differs and by how much; those of the backend.
pub fn check<K: TrainingKernels>(kernels: &K) -> Result<()> {
    MODELS.into_iter().try_for_each(|tiny| check_model(kernels, tiny))
}

fn check_model<K: TrainingKernels>(kernels: &K, tiny: Tiny) -> Result<()> {
    let mut device = model(kernels.clone(), tiny, Policy::Offload)?;
    // The CPU recomputes what the device offloads: it would offload to a file.
    let mut host = model(Cpu::default(), tiny, Policy::Checkpoint)?;
    let batch = batch();
    let differs = |what: &str, error: f64| {
        let Tiny { family, head_dim, rank } = tiny;
        let model = format_args!("a {family} with heads of {head_dim} and adapters of rank {rank}");
        let what = format!("{what} of {model} differ from the CPU's by {error:.1e}");
        Error::gpu(what).hint("use `--device cpu`, and try a newer driver")
    };
    // NaN is no agreement.
    let agree = |what: &str, error: f64, tolerance: f64| {
        if error <= tolerance { Ok(()) } else { Err(differs(what, error)) }
    };
    let scale = 1.0 / batch.num_targets() as f32;
    let [got, expected] =
        [device.forward_backward(&batch, scale, 0)?, host.forward_backward(&batch, scale, 0)?];
    agree("losses", (got.sum / expected.sum - 1.0).abs(), TOLERANCE.loss)?;
    let gradients = device.parameters().all_values(AdapterRegion::Gradients)?.into_owned();
    let error = error_in_norm(&gradients, &host.parameters().all_values(AdapterRegion::Gradients)?);
    agree("gradients", error, TOLERANCE.gradients)?;

    // One update from the same gradients.
    host.parameters_mut().replace(AdapterRegion::Gradients, &gradients);
    let norm = kernels.gradient_norm(device.parameters_mut())?;
    let error = (norm / Cpu::default().gradient_norm(host.parameters_mut())? - 1.0).abs();
    agree("norms of gradients", error, TOLERANCE.weights)?;
    let groups = step::rate_groups(host.parameters().tensors(), LoraPlus::default());
    let optimizer = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 };
    let (optimizer, groups) = (&optimizer, &groups[..]);
    let update = Update { optimizer, groups, step: 1, learning_rate: 1e-2, gradient_scale: 0.5 };
    kernels.update(device.parameters_mut(), &update)?;
    Cpu::default().update(host.parameters_mut(), &update)?;
    let updated = device.parameters().all_values(AdapterRegion::Master)?;
    let error = error_in_norm(&updated, &host.parameters().all_values(AdapterRegion::Master)?);
    agree("updates", error, TOLERANCE.weights)?;

    let mut rest = &batch.input_ids[..];
    for count in DECODED {
        let (piece, later) = rest.split_at(count);
        let logits = device.decode(piece)?.into_owned();
        let error = error_in_norm(&logits, &host.decode(piece)?);
        agree("logits", error, TOLERANCE.logits)?;
        rest = later;
    }
    Ok(())
}

/// ‖got − expected‖ / ‖expected‖.
fn error_in_norm(got: &[f32], expected: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let difference: f64 =
        got.iter().zip(expected).map(|(g, e)| square(f64::from(*g) - f64::from(*e))).sum();
    (difference / expected.iter().map(|&e| square(f64::from(e))).sum::<f64>()).sqrt()
}

fn batch() -> Batch {
    let tokens = u64::from(BOUNDARIES[2]);
    let stream = Stream::new(SEED, "tokens");
    let ids = (0..tokens).map(|index| stream.below(index, VOCABULARY as u64) as u32);
    let input_ids: Vec<u32> = ids.collect();
    Batch {
        // Some of them are not trained.
        labels: input_ids
            .iter()
            .map(|&id| if id.is_multiple_of(5) { -100 } else { id as i32 })
            .collect(),
        cu_seqlens: BOUNDARIES.to_vec(),
        input_ids,
        ..Batch::default()
    }
}

/// 4-bit weights, grouped heads, one block kept, adapters on all linears.
fn model<K: TrainingKernels>(kernels: K, tiny: Tiny, second: Policy) -> Result<Model<K>> {
    let spec = spec(tiny)?;
    let format = BlockFormat::default();
    let weights = Weights::load(&RandomTensors(&spec), &spec, Some(&format), None)?;
    let config = LoraConfig { r: tiny.rank, ..LoraConfig::default() };
    let mut adapter = Adapter::init(config, &spec, SEED)?;
    for (index, tensors) in adapter.tensors.iter_mut().enumerate() {
        Stream::new(SEED, "b").at(index as u64).fill_normal(0, 0.02, &mut tensors.b);
    }
    let settings = Settings {
        longest_document: BOUNDARIES[1] as usize,
        policies: vec![Policy::Keep, second],
        targets: adapter.targets.clone(),
        cache_tokens: DECODED.iter().sum(),
        ..Settings::of_pass(BOUNDARIES[2] as usize, 32)
    };
    let weights = weights.upload(&kernels)?;
    let random = Randomness { seed: SEED, neftune: Some(1.0), ..Randomness::default() };
    let mut model = Model::with_kernels(kernels, spec, weights, settings)?.with_randomness(random);
    model.parameters_mut().load(&adapter);
    model.parameters_mut().zero_gradients();
    Ok(model)
}

fn spec(Tiny { family, head_dim, .. }: Tiny) -> Result<ModelSpec> {
    let activation = if family.starts_with("gemma") { "gelu_pytorch_tanh" } else { "silu" };
    let mut spec = spec_from_config(&json!({
        "model_type": family, "hidden_act": activation, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
        "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": head_dim,
        "vocab_size": VOCABULARY, "max_position_embeddings": 128, "tie_word_embeddings": false,
        "partial_rotary_factor": if ["phi3", "glm4"].contains(&family) { 0.75 } else { 1.0 },
        "attention_bias": false, "mlp_bias": false, "sliding_window": 16, "sliding_window_pattern": 2,
        "final_logit_softcapping": 4.0,
    }))?;
    // As a Gemma 2's, so that no kernel is left out.
    spec.attention_soft_cap = family.starts_with("gemma").then_some(2.0);
    Ok(spec)
}

/// A checkpoint of random tensors: norms around 1, all else around 0.
struct RandomTensors<'a>(&'a ModelSpec);

impl TensorSource for RandomTensors<'_> {
    fn contains(&self, name: &str) -> bool {
        self.0.inventory().iter().any(|tensor| tensor.name == name)
    }

    fn weight(&self, name: &str) -> Result<Weight> {
        let tensor = self.0.inventory().into_iter().find(|tensor| tensor.name == name);
        let tensor = tensor.ok_or_else(|| Error::input(format_args!("no tensor {name}")))?;
        let is_factor = tensor.role == TensorRole::Norm && !self.0.norm_plus_one;
        let mean = if is_factor { 1.0 } else { 0.0 };
        let mut values = vec![0f32; tensor.shape.iter().product()];
        Stream::new(SEED, name).fill_normal(0, 0.08, &mut values);
        values.iter_mut().for_each(|value| *value += mean);
        let data = owned_bytes(values);
        Ok(Weight::Dense(DenseTensor { dtype: FloatType::F32, shape: tensor.shape, data }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_agrees_with_itself() {
        check(&Cpu::default()).unwrap();
    }

    #[test]
    fn every_part_of_the_model_is_in_the_comparison() {
        for tiny in MODELS {
            let mut host = model(Cpu::default(), tiny, Policy::Keep).unwrap();
            let batch = batch();
            let loss = host.forward_backward(&batch, 1.0 / batch.num_targets() as f32, 0).unwrap();
            let loss = loss.sum / batch.num_targets() as f64;
            assert!((loss / (VOCABULARY as f64).ln() - 1.0).abs() < 0.3, "{loss}");
            let gradients = host.parameters().gradients();
            for tensor in host.parameters().tensors() {
                let values = gradients[tensor.range.clone()].iter();
                let largest = values.fold(0f32, |m, g| m.max(g.abs()));
                assert!(largest > 1e-6, "{}: {largest:e}", tensor.name);
            }
        }
    }
}
