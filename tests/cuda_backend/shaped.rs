//! Models of a published shape and random 4-bit weights, made in memory, with an adapter on all
//! linears whose B is not zero.

use nibble::adapter::{Adapter, LoraConfig};
use nibble::checkpoint::{DenseTensor, Weight};
use nibble::data::Batch;
use nibble::error::Result;
use nibble::model::families::spec_from_config;
use nibble::model::spec::{ModelSpec, TensorRole};
use nibble::model::weights::{TensorSource, Weights};
use nibble::plan::{Policy, Processor, Settings, logit_rows};
use nibble::random::Stream;
use nibble_quant::{Absmax, FloatType, PackedParts, PackedWeight, QuantType};
use serde_json::json;

const SEED: u64 = 8;

/// Sizes of a Llama.
#[derive(Clone, Copy)]
pub struct Shape {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub vocab_size: usize,
}

impl Shape {
    /// Blocks of Llama-3.1-8B.
    pub fn of_8b(layers: usize, vocab_size: usize) -> Self {
        let (hidden_size, intermediate_size, heads, kv_heads) = (4096, 14_336, 32, 8);
        Shape { hidden_size, intermediate_size, layers, heads, kv_heads, vocab_size }
    }

    /// The same width of heads in little.
    pub fn small(layers: usize) -> Self {
        let (hidden_size, intermediate_size, heads, kv_heads) = (256, 640, 2, 1);
        Shape { hidden_size, intermediate_size, layers, heads, kv_heads, vocab_size: 256 }
    }

    pub fn spec(self) -> ModelSpec {
        spec_from_config(&json!({
            "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
            "hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "vocab_size": self.vocab_size,
            "max_position_embeddings": 8192, "tie_word_embeddings": false,
        }))
        .unwrap()
    }
}

/// Uniform bytes.
fn bytes(name: &str, count: usize) -> Vec<u8> {
    let stream = Stream::new(SEED, name);
    let words = (0..count.div_ceil(16) as u64).flat_map(|block| stream.block(block));
    words.flat_map(u32::to_le_bytes).take(count).collect()
}

/// A tensor of a model: 4-bit blocks for its linears, norms around 1, embeddings of deviation 1, as large as
/// what blocks add to them, and a head of deviation 0.02.
struct RandomTensors<'a>(&'a ModelSpec);

impl RandomTensors<'_> {
    /// Codes and scales at random; deviation 1/√in, so that a product keeps the size of its input.
    fn packed(&self, name: &str, shape: [usize; 2]) -> PackedWeight {
        const BLOCK: usize = 64;
        /// Deviation of the 16 code values, each as likely as the others.
        const DEVIATION_OF_CODES: f32 = 0.517;
        let blocks = shape[0] * shape[1] / BLOCK;
        let offset = (shape[1] as f32).sqrt().recip() / DEVIATION_OF_CODES;
        let nested = vec![0.3 * offset; blocks.div_ceil(256)];
        let absmax = Absmax::Nested {
            codes: bytes(&format!("{name}.absmax"), blocks).into(),
            absmax: nibble_quant::owned_bytes(nested),
            offset,
        };
        let codes = bytes(name, shape[0] * shape[1] / 2).into();
        let (quant_type, block_size, dtype) = (QuantType::Nf4, BLOCK, FloatType::Bf16);
        PackedWeight::from_parts(PackedParts {
            shape,
            dtype,
            quant_type,
            block_size,
            codes,
            absmax,
        })
        .unwrap()
    }
}

impl TensorSource for RandomTensors<'_> {
    fn contains(&self, name: &str) -> bool {
        self.0.inventory().iter().any(|tensor| tensor.name == name)
    }

    fn weight(&self, name: &str) -> Result<Weight> {
        let inventory = self.0.inventory();
        let tensor = inventory.into_iter().find(|tensor| tensor.name == name).expect("a tensor");
        let shape = tensor.shape;
        let is_linear = (0..self.0.num_layers)
            .any(|layer| shape.len() == 2 && name.starts_with(&self.0.layer_prefix(layer)));
        if is_linear {
            return Ok(Weight::Packed(self.packed(name, [shape[0], shape[1]])));
        }
        let (mean, deviation) = match tensor.role {
            TensorRole::Norm => (1.0, 0.1),
            TensorRole::Embedding => (0.0, 1.0),
            _ => (0.0, 0.02),
        };
        let mut values = vec![0f32; shape.iter().product()];
        Stream::new(SEED, name).fill_normal(0, deviation, &mut values);
        values.iter_mut().for_each(|value| *value += mean);
        let data = nibble_quant::owned_bytes(values);
        Ok(Weight::Dense(DenseTensor { dtype: FloatType::F32, shape, data }))
    }
}

pub fn weights(spec: &ModelSpec) -> Weights {
    Weights::load(&RandomTensors(spec), spec, None, None).unwrap()
}

/// Rank 16 on all linears.
pub fn adapter(spec: &ModelSpec) -> Adapter {
    let config = LoraConfig { r: 16, ..LoraConfig::default() };
    let mut adapter = Adapter::init(config, spec, SEED).unwrap();
    for (index, tensors) in adapter.tensors.iter_mut().enumerate() {
        Stream::new(SEED, "b").at(index as u64).fill_normal(0, 0.02, &mut tensors.b);
    }
    adapter
}

pub fn settings(spec: &ModelSpec, adapter: &Adapter, batch: &Batch, policy: Policy) -> Settings {
    let lengths = batch.cu_seqlens.windows(2).map(|document| document[1] - document[0]);
    Settings {
        longest_document: lengths.max().unwrap_or(0) as usize,
        policies: vec![policy; spec.num_layers],
        targets: adapter.targets.clone(),
        ..Settings::of_pass(batch.tokens(), logit_rows(spec, batch.tokens(), None, Processor::Gpu))
    }
}

/// Documents of random tokens that end at `ends`, all of them trained.
pub fn batch(spec: &ModelSpec, ends: &[u32]) -> Batch {
    let tokens = u64::from(*ends.last().unwrap());
    let stream = Stream::new(SEED, "tokens");
    let id = |index| stream.below(index, spec.vocab_size as u64) as u32;
    let input_ids: Vec<u32> = (0..tokens).map(id).collect();
    Batch {
        labels: input_ids.iter().map(|&id| id as i32).collect(),
        cu_seqlens: [&[0], ends].concat(),
        input_ids,
        ..Batch::default()
    }
}
