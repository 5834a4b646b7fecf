//! What the frozen weights take in memory, before one is read.

use nibble_quant::{BlockFormat, FloatType};

use crate::checkpoint::{Checkpoint, CheckpointKind, StoredType};
use crate::model::spec::{ModelSpec, TensorRole, TensorSpec};

/// Blocks that are in memory at a time when weights are streamed: the one at work, and the next.
const STREAMED_BLOCKS: u64 = 2;

/// Bytes of all frozen weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightBytes {
    /// All in memory.
    pub resident: u64,
    /// The linears of two blocks and everything outside the blocks; none where the weights are not
    /// in a file as they are used.
    pub streamed: Option<u64>,
}

impl WeightBytes {
    /// Of a checkpoint that is opened; `format` packs dense linears.
    pub fn of_checkpoint(
        checkpoint: &Checkpoint,
        spec: &ModelSpec,
        format: Option<&BlockFormat>,
    ) -> Self {
        let bytes = |tensor: &TensorSpec| stored_bytes(checkpoint, tensor, format) as u64;
        let as_stored = match checkpoint.kind() {
            CheckpointKind::Bnb4bit => true,
            CheckpointKind::Dense => format.is_none(),
            CheckpointKind::Gguf => false,
        };
        Self::sum(spec, bytes, as_stored)
    }

    /// Of a model of which only the config is known, stored in `dtype`, its linears in `format` as
    /// `nibble quantize` writes them.
    pub fn of_config(spec: &ModelSpec, dtype: FloatType, format: Option<&BlockFormat>) -> Self {
        let bytes = |tensor: &TensorSpec| {
            dense_bytes(tensor, dtype, tensor.shape.iter().product(), format) as u64
        };
        Self::sum(spec, bytes, true)
    }

    fn sum(spec: &ModelSpec, bytes: impl Fn(&TensorSpec) -> u64, as_stored: bool) -> Self {
        let (mut resident, mut linears) = (0, vec![0; spec.num_layers]);
        let prefixes: Vec<String> =
            (0..spec.num_layers).map(|layer| format!("{}.", spec.layer_prefix(layer))).collect();
        for tensor in spec.inventory() {
            resident += bytes(&tensor);
            let layer = prefixes.iter().position(|prefix| tensor.name.starts_with(prefix));
            if let (TensorRole::Linear(_), Some(layer)) = (tensor.role, layer) {
                linears[layer] += bytes(&tensor);
            }
        }
        let (in_blocks, largest) = (linears.iter().sum::<u64>(), linears.iter().max());
        let working = STREAMED_BLOCKS * largest.copied().unwrap_or(0);
        let streamed = resident - in_blocks + working.min(in_blocks);
        WeightBytes { resident, streamed: as_stored.then_some(streamed) }
    }
}

fn stored_bytes(
    checkpoint: &Checkpoint,
    tensor: &TensorSpec,
    format: Option<&BlockFormat>,
) -> usize {
    let short = tensor.name.strip_prefix("transformer.");
    let named = |name: &str| name == tensor.name || short == Some(name);
    let elements: usize = tensor.shape.iter().product();
    match checkpoint.tensors().iter().find(|info| named(&info.name)) {
        None => 0,
        Some(info) => match info.stored {
            StoredType::Packed => info.bytes,
            StoredType::Dense(dtype) => dense_bytes(tensor, dtype, elements, format),
        },
    }
}

fn dense_bytes(
    tensor: &TensorSpec,
    dtype: FloatType,
    elements: usize,
    format: Option<&BlockFormat>,
) -> usize {
    match (tensor.role, format) {
        (TensorRole::Linear(_), Some(format)) => format.packed_bytes(elements),
        (TensorRole::Norm | TensorRole::Bias, _) => elements * size_of::<f32>(),
        // Products read bf16 and f32; f16 is widened.
        _ if dtype == FloatType::Bf16 => elements * FloatType::Bf16.size(),
        _ => elements * size_of::<f32>(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::families::spec_from_config;
    use crate::model::weights::Weights;

    #[test]
    fn weights_take_what_was_predicted() {
        let root = env!("CARGO_MANIFEST_DIR");
        let path = std::path::PathBuf::from(root).join("tests/data/models/llama_s0");
        let checkpoint = Checkpoint::open(&path).unwrap();
        let spec = spec_from_config(checkpoint.config()).unwrap();
        for format in [None, Some(BlockFormat::default())] {
            let weights = Weights::load(&checkpoint, &spec, format.as_ref(), None).unwrap();
            let linears = weights.blocks.iter().flat_map(|block| &block.linears);
            let norms = (2 * spec.num_layers + 1) * spec.hidden_size * 4;
            let bytes = linears.map(|linear| linear.weight.bytes()).sum::<usize>()
                + weights.embedding.bytes()
                + weights.head.as_ref().map_or(0, |head| head.bytes())
                + norms;
            let predicted = WeightBytes::of_checkpoint(&checkpoint, &spec, format.as_ref());
            assert_eq!(predicted.resident, bytes as u64);
            assert_eq!(predicted.streamed.is_some(), format.is_none());
        }
    }

    #[test]
    fn two_blocks_of_many_are_in_memory_when_streamed() {
        let text = include_str!("../../tests/data/models/llama_s0/config.json");
        let mut config: serde_json::Value = serde_json::from_str(text).unwrap();
        let of = |layers: u64, config: &mut serde_json::Value| {
            config["num_hidden_layers"] = layers.into();
            let spec = spec_from_config(config).unwrap();
            WeightBytes::of_config(&spec, FloatType::Bf16, Some(&BlockFormat::default()))
        };
        let (two, many) = (of(2, &mut config), of(20, &mut config));
        assert_eq!(two.streamed, Some(two.resident));
        // Two norms of each further block stay in memory, in f32.
        assert_eq!(many.streamed.unwrap() - two.resident, 18 * 2 * 64 * 4);
    }
}
