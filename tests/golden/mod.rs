//! The golden cases as models and tensors.
#![allow(dead_code)] // each test binary uses a part of this module

use std::path::PathBuf;

use nibble::adapter::{Adapter, LoraTarget};
use nibble::checkpoint::Checkpoint;
use nibble::data::{Batch, Document};
use nibble::kernels::cpu::Cpu;
use nibble::model::families::spec_from_config;
use nibble::model::spec::ModelSpec;
use nibble::model::weights::Weights;
use nibble::model::{Model, Randomness};
use nibble::plan::{Policy, Settings};
use nibble_quant::BlockFormat;
use safetensors::SafeTensors;
use serde_json::Value;

/// Every family that Nibble trains.
pub const CASES: [&str; 19] = [
    "llama_s0",
    "llama_s1_qv",
    "llama_tied_s2",
    "mistral_s0",
    "qwen2_s0",
    "qwen3_s0",
    "ministral3_s0",
    "smollm3_s0",
    "granite_s0",
    "granite4_s0",
    "seed_oss_s0",
    "glm4_s0",
    "olmo2_s0",
    "olmo3_s0",
    "gemma_s0",
    "gemma2_s0",
    "gemma3_s0",
    "phi3_s0",
    "gpt2_s0",
];

/// Largest error in norm of a LoRA gradient in bf16 by transformers and PEFT themselves, against f32:
/// `scripts/golden/bf16_error.py`. These models are small and steep; ours may not be worse.
const TORCH_ERRORS: [(&str, f64); 19] = [
    ("llama_s0", 0.0366),
    ("llama_s1_qv", 0.0307),
    ("llama_tied_s2", 0.0627),
    ("mistral_s0", 0.0325),
    ("qwen2_s0", 0.0552),
    ("qwen3_s0", 0.0325),
    ("ministral3_s0", 0.0416),
    ("smollm3_s0", 0.0546),
    ("granite_s0", 0.0167),
    ("granite4_s0", 0.0144),
    ("seed_oss_s0", 0.0368),
    ("glm4_s0", 0.0424),
    ("olmo2_s0", 0.0323),
    ("olmo3_s0", 0.0464),
    ("gemma_s0", 0.0270),
    ("gemma2_s0", 0.0237),
    ("gemma3_s0", 0.0303),
    ("phi3_s0", 0.0474),
    ("gpt2_s0", 0.0193),
];

/// A run with `lora_dropout`.
pub fn with_dropout(probability: f32, seed: u64) -> Randomness {
    Randomness { seed, dropout: Some(probability), ..Randomness::default() }
}

/// Largest difference, relative to the largest expected value.
pub fn relative_error(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len());
    assert!(got.iter().all(|g| g.is_finite()));
    let largest = expected.iter().fold(0.0f32, |m, e| m.max(e.abs()));
    let error = got.iter().zip(expected).fold(0.0f32, |m, (g, e)| m.max((g - e).abs()));
    f64::from(error) / f64::from(largest)
}

/// A safetensors file in memory.
pub struct Tensors(Vec<u8>);

impl Tensors {
    pub fn f32(&self, name: &str) -> Vec<f32> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        bytemuck::allocation::pod_collect_to_vec(file.tensor(name).expect(name).data())
    }

    pub fn i64(&self, name: &str) -> (Vec<i64>, Vec<usize>) {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor(name).expect(name);
        (bytemuck::allocation::pod_collect_to_vec(tensor.data()), tensor.shape().to_vec())
    }

    /// Rows of equal length as documents.
    pub fn batch(&self, ids: &str, labels: &str) -> (Batch, Vec<usize>) {
        let ((ids, shape), (labels, _)) = (self.i64(ids), self.i64(labels));
        (rows_as_batch(&ids, &labels, shape[shape.len() - 1]), shape)
    }

    /// Step `step` of the training data.
    pub fn train_batch(&self, step: usize) -> Batch {
        let ((ids, shape), (labels, _)) = (self.i64("train_ids"), self.i64("train_labels"));
        let size = shape[1] * shape[2];
        let range = step * size..(step + 1) * size;
        rows_as_batch(&ids[range.clone()], &labels[range], shape[2])
    }

    /// The right-padded batch without its padding.
    pub fn padded_batch(&self) -> Batch {
        let ((ids, shape), (labels, _)) = (self.i64("pad.input_ids"), self.i64("pad.labels"));
        let (mask, _) = self.i64("pad.attention_mask");
        let documents: Vec<Document> = (0..shape[0])
            .map(|row| {
                let real = |v: &[i64]| -> Vec<i64> {
                    let range = row * shape[1]..(row + 1) * shape[1];
                    let kept = v[range.clone()].iter().zip(&mask[range]).filter(|(_, m)| **m == 1);
                    kept.map(|(v, _)| *v).collect()
                };
                document(&real(&ids), &real(&labels))
            })
            .collect();
        Batch::from_documents(&documents)
    }

    pub fn unpadded_logits(&self, vocab_size: usize) -> Vec<f32> {
        let (mask, _) = self.i64("pad.attention_mask");
        let logits = self.f32("pad.logits");
        let rows = logits.chunks(vocab_size).zip(mask).filter(|(_, m)| *m == 1);
        rows.flat_map(|(row, _)| row.to_vec()).collect()
    }
}

fn document(ids: &[i64], labels: &[i64]) -> Document {
    Document {
        input_ids: ids.iter().map(|&id| id as u32).collect(),
        labels: labels.iter().map(|&label| label as i32).collect(),
        line: 0,
    }
}

fn rows_as_batch(ids: &[i64], labels: &[i64], length: usize) -> Batch {
    let rows = ids.chunks(length).zip(labels.chunks(length));
    Batch::from_documents(&rows.map(|(ids, labels)| document(ids, labels)).collect::<Vec<_>>())
}

/// One folder of golden data.
pub struct Case {
    pub name: &'static str,
    pub path: PathBuf,
    pub info: Value,
}

impl Case {
    pub fn open(name: &'static str) -> Self {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/models").join(name);
        let info = serde_json::from_slice(&std::fs::read(path.join("case.json")).unwrap()).unwrap();
        Case { name, path, info }
    }

    pub fn json(&self, file: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.path.join(file)).unwrap()).unwrap()
    }

    pub fn tensors(&self, file: &str) -> Tensors {
        Tensors(std::fs::read(self.path.join(file)).unwrap())
    }

    pub fn noise(&self, key: &str) -> f64 {
        self.info["noise"][key].as_f64().unwrap()
    }

    /// [`TORCH_ERRORS`] of this case.
    pub fn bf16_error_of_torch(&self) -> f64 {
        TORCH_ERRORS.iter().find(|(name, _)| *name == self.name).unwrap().1
    }

    pub fn spec(&self) -> ModelSpec {
        spec_from_config(&self.json("config.json")).unwrap()
    }

    pub fn targets(&self, adapter: &str) -> Vec<LoraTarget> {
        Adapter::load(&self.path.join(adapter), &self.spec()).unwrap().targets
    }

    /// The model with f32 adapters; policies are repeated over the layers.
    pub fn model(
        &self,
        quantization: Option<BlockFormat>,
        adapter: Option<&str>,
        policies: &[Policy],
    ) -> Model {
        self.tiled_model(quantization, adapter, policies, None)
    }

    /// The same with an MLP that works on `tile` tokens at a time.
    pub fn tiled_model(
        &self,
        quantization: Option<BlockFormat>,
        adapter: Option<&str>,
        policies: &[Policy],
        tile: Option<usize>,
    ) -> Model {
        self.model_of(self.spec(), quantization, adapter, policies, tile)
    }

    /// The same of another spec.
    pub fn model_of(
        &self,
        spec: ModelSpec,
        quantization: Option<BlockFormat>,
        adapter: Option<&str>,
        policies: &[Policy],
        tile: Option<usize>,
    ) -> Model {
        self.model_on(Cpu::default(), spec, quantization, adapter, policies, tile)
    }

    /// The same with products in another precision.
    pub fn model_on(
        &self,
        cpu: Cpu,
        spec: ModelSpec,
        quantization: Option<BlockFormat>,
        adapter: Option<&str>,
        policies: &[Policy],
        tile: Option<usize>,
    ) -> Model {
        let targets = adapter.map(|adapter| self.targets(adapter)).unwrap_or_default();
        let checkpoint = Checkpoint::open(&self.path).unwrap();
        let weights = Weights::load(&checkpoint, &spec, quantization.as_ref(), None).unwrap();
        let settings = Settings {
            longest_document: 32,
            policies: policies.iter().copied().cycle().take(spec.num_layers).collect(),
            targets,
            bf16_working: false,
            cache_tokens: 40,
            mlp_tile_length: tile,
            ..Settings::of_pass(64, 10)
        };
        let mut model = Model::with_kernels(cpu, spec, weights, settings).unwrap();
        if let Some(adapter) = adapter {
            let adapter = Adapter::load(&self.path.join(adapter), model.spec()).unwrap();
            model.parameters_mut().load(&adapter);
        }
        model
    }
}
