//! What the frozen weights take in memory, before one is read.

use nibble_quant::{BlockFormat, FloatType};

use crate::checkpoint::{Checkpoint, CheckpointKind, StoredType, Weight};
use crate::kernels::cuda::matrix_bytes;
use crate::model::spec::{ModelSpec, TensorRole, TensorSpec};

/// Blocks that are in memory at a time when weights are streamed: the one at work, and the next.
const STREAMED_BLOCKS: u64 = 2;

/// What is mapped with a page that is read from the system's cache: `fault_around_bytes` of Linux.
const MAPPED_WITH_A_PAGE_BYTES: u64 = 64 << 10;

/// Where frozen weights are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the program's memory, as they are stored.
    Host,
    /// On a GPU: matrices in bf16 if they are not packed.
    Gpu,
}

/// Bytes of all frozen weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightBytes {
    /// All in memory.
    pub resident: u64,
    /// None where the weights are not in a file as they are used.
    pub streamed: Option<StreamedBytes>,
}

/// What streamed weights have in memory: at the blocks, the rows of the pass and two blocks; at the
/// logits, the head and one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamedBytes {
    /// What always stays: norms, biases, positions.
    pub outside: u64,
    /// The largest block's linears.
    pub block: u64,
    /// Blocks at a time.
    pub blocks: u64,
    /// The embedding, of which a pass reads the rows of its tokens.
    pub table: u64,
    /// A row of it.
    pub row: u64,
    /// What makes logits: the embedding again, where they are tied.
    pub head: u64,
    /// Embedding and head: one matrix where they are tied.
    pub tables: u64,
}

impl StreamedBytes {
    /// The same for every pass.
    #[cfg(test)]
    pub(super) fn of_outside(outside: u64) -> Self {
        StreamedBytes { outside, block: 0, blocks: 0, table: 0, row: 0, head: 0, tables: 0 }
    }

    /// Beside a GPU only the blocks' linears come and go: all else stays in its memory.
    fn on_gpu(&self) -> Self {
        let outside = self.outside + self.tables;
        StreamedBytes { outside, table: 0, row: 0, head: 0, tables: 0, ..*self }
    }

    /// The most of a pass over `tokens` that are all different.
    pub fn of_pass(&self, tokens: usize) -> u64 {
        let around = self.row.max(MAPPED_WITH_A_PAGE_BYTES);
        let rows = self.table.min(tokens as u64 * around);
        self.outside + (rows + self.blocks * self.block).max(self.head + self.block)
    }
}

impl WeightBytes {
    /// Of a checkpoint that is opened; `format` packs dense linears.
    pub fn of_checkpoint(
        checkpoint: &Checkpoint,
        spec: &ModelSpec,
        format: Option<&BlockFormat>,
        place: Place,
    ) -> Self {
        let bytes = |tensor: &TensorSpec| stored_bytes(checkpoint, tensor, format, place) as u64;
        let as_stored = match checkpoint.kind() {
            CheckpointKind::Bnb4bit => true,
            CheckpointKind::Dense => format.is_none(),
            CheckpointKind::Gguf => false,
        };
        Self::sum(spec, bytes, as_stored).used_at(place)
    }

    /// Of a model of which only the config is known, stored in `dtype`, its linears in `format` as
    /// `nibble quantize` writes them.
    pub fn of_config(
        spec: &ModelSpec,
        dtype: FloatType,
        format: Option<&BlockFormat>,
        place: Place,
    ) -> Self {
        let bytes = |tensor: &TensorSpec| {
            dense_bytes(tensor, dtype, tensor.shape.iter().product(), format, place) as u64
        };
        Self::sum(spec, bytes, true).used_at(place)
    }

    fn used_at(self, place: Place) -> Self {
        match place {
            Place::Host => self,
            Place::Gpu => {
                WeightBytes { streamed: self.streamed.map(|streamed| streamed.on_gpu()), ..self }
            }
        }
    }

    fn sum(spec: &ModelSpec, bytes: impl Fn(&TensorSpec) -> u64, as_stored: bool) -> Self {
        let (mut resident, mut table, mut head) = (0u64, 0, 0);
        let mut linears = vec![0; spec.num_layers];
        let module = |name: &str| format!("{name}.weight");
        let [embedding, head_name] = [spec.embedding_module(), spec.head_module()].map(module);
        let prefixes: Vec<String> =
            (0..spec.num_layers).map(|layer| format!("{}.", spec.layer_prefix(layer))).collect();
        for tensor in spec.inventory() {
            resident += bytes(&tensor);
            if tensor.name == embedding {
                table = bytes(&tensor);
            } else if tensor.name == head_name {
                head = bytes(&tensor);
            }
            let layer = prefixes.iter().position(|prefix| tensor.name.starts_with(prefix));
            if let (TensorRole::Linear(_), Some(layer)) = (tensor.role, layer) {
                linears[layer] += bytes(&tensor);
            }
        }
        let (in_blocks, block) = (linears.iter().sum::<u64>(), linears.iter().max());
        let (block, untied) = (block.copied().unwrap_or(0), !spec.tie_word_embeddings);
        let streamed = || StreamedBytes {
            outside: resident - in_blocks - table - if untied { head } else { 0 },
            block,
            blocks: STREAMED_BLOCKS.min(spec.num_layers as u64),
            table,
            row: table / spec.vocab_size as u64,
            head: if untied { head } else { table },
            tables: table + if untied { head } else { 0 },
        };
        WeightBytes { resident, streamed: as_stored.then(streamed) }
    }
}

fn stored_bytes(
    checkpoint: &Checkpoint,
    tensor: &TensorSpec,
    format: Option<&BlockFormat>,
    place: Place,
) -> usize {
    let short = tensor.name.strip_prefix("transformer.");
    let named = |name: &str| name == tensor.name || short == Some(name);
    let elements: usize = tensor.shape.iter().product();
    match checkpoint.tensors().iter().find(|info| named(&info.name)) {
        None => 0,
        Some(info) => match info.stored {
            StoredType::Packed => match (place, checkpoint.weight(&info.name)) {
                (Place::Gpu, Ok(Weight::Packed(weight))) => {
                    matrix_bytes(elements, Some(&weight.format()))
                }
                _ => info.bytes,
            },
            StoredType::Dense(dtype) => dense_bytes(tensor, dtype, elements, format, place),
        },
    }
}

fn dense_bytes(
    tensor: &TensorSpec,
    dtype: FloatType,
    elements: usize,
    format: Option<&BlockFormat>,
    place: Place,
) -> usize {
    let format = format.filter(|_| matches!(tensor.role, TensorRole::Linear(_)));
    match (tensor.role, format) {
        (TensorRole::Norm | TensorRole::Bias, _) => elements * size_of::<f32>(),
        _ if place == Place::Gpu => matrix_bytes(elements, format),
        (_, Some(format)) => format.packed_bytes(elements),
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
            let predicted =
                WeightBytes::of_checkpoint(&checkpoint, &spec, format.as_ref(), Place::Host);
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
            let format = Some(&BlockFormat::default());
            WeightBytes::of_config(&spec, FloatType::Bf16, format, Place::Host)
        };
        let (two, many) = (of(2, &mut config), of(20, &mut config));
        let (few, more) = (two.streamed.unwrap(), many.streamed.unwrap());
        assert_eq!((few.blocks, few.block, few.head), (more.blocks, more.block, more.head));
        let whole = few.outside + 2 * few.block + few.table + few.head;
        assert_eq!((whole, config["tie_word_embeddings"].as_bool()), (two.resident, Some(false)));
        // Two norms of each further block stay in memory, in f32.
        assert_eq!(more.outside - few.outside, 18 * 2 * 64 * 4);
    }

    #[test]
    fn the_most_is_at_the_blocks_or_at_the_head() {
        let (outside, block, blocks, row) = (1000, 3 << 20, 2, 8 << 10);
        let (table, head) = (50 << 20, 2 << 20);
        let small =
            StreamedBytes { outside, block, blocks, table, row, head, tables: table + head };
        let on_gpu = small.on_gpu();
        assert_eq!(on_gpu.of_pass(16), 1000 + (58 << 20));
        assert_eq!(on_gpu.of_pass(10_000), on_gpu.of_pass(16));
        assert_eq!(small.of_pass(16), 1000 + (7 << 20));
        assert_eq!(small.of_pass(10_000), 1000 + (56 << 20));
        let long = StreamedBytes { row: 128 << 10, ..small };
        assert_eq!(long.of_pass(16), 1000 + (8 << 20));
        let tied = StreamedBytes { head: 50 << 20, ..small };
        assert_eq!(tied.of_pass(16), 1000 + (53 << 20));
    }
}
