//! What the frozen weights take in memory, before one is read.

use clap::ValueEnum;
use nibble_quant::{BlockFormat, FloatType};

use crate::checkpoint::{Checkpoint, CheckpointKind, StoredType, Weight};
use crate::kernels::cuda::matrix_bytes;
use crate::model::spec::{ModelSpec, TensorRole, TensorSpec};
use crate::plan::{OnHost, Processor, WeightParts};

/// Where the frozen weights of the blocks are between their uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum WeightsMode {
    /// In memory, or streamed if that lets more blocks keep their activations
    #[default]
    Auto,
    /// In memory from their first use
    Resident,
    /// In their file: two blocks at a time are in memory, the next one is prefetched
    Stream,
}

impl WeightsMode {
    /// The mode that leaves no choice.
    pub(super) fn of(stream: bool) -> Self {
        if stream { WeightsMode::Stream } else { WeightsMode::Resident }
    }
}

/// Blocks that are in memory at a time when weights are streamed: the one at work, and the next.
pub(crate) const STREAMED_BLOCKS: usize = 2;

/// Bytes that are mapped with a page that is read from the system's cache: `fault_around_bytes` of Linux.
const MAPPED_WITH_A_PAGE_BYTES: u64 = 64 << 10;

/// Bytes of all frozen weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightBytes {
    /// Bytes where all weights are in memory.
    pub resident: WeightParts,
    /// What streamed weights take; `None` where the weights are not in a file as they are used.
    pub streamed: Option<StreamedBytes>,
    /// Bytes of the embedding, where it is not the head, too: it may be elsewhere.
    pub embedding: u64,
    /// Bytes of the matrix that makes logits: it may be elsewhere, too.
    pub head: u64,
    /// Whether any matrix is in 4-bit blocks.
    pub packs_any: bool,
}

/// What streamed weights have in memory: at the blocks, the rows of the pass and two blocks; at the
/// logits, the head and one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamedBytes {
    /// Bytes of norms and biases, which always stay.
    pub vectors: u64,
    /// Bytes of tables that always stay: of positions, and on a GPU all.
    pub kept_tables: u64,
    /// Bytes of the largest block's linears.
    pub block: u64,
    /// Blocks that are in memory at a time.
    pub blocks: u64,
    /// Bytes of the embedding, of which a pass reads the rows of its tokens.
    pub table: u64,
    /// Bytes of a row of the embedding.
    pub row: u64,
    /// Bytes of the matrix that makes logits: the embedding again, where they are tied.
    pub head: u64,
    /// Bytes of embedding and head: one matrix where they are tied.
    pub tables: u64,
}

impl StreamedBytes {
    /// Streamed weights that take the same for every pass.
    #[cfg(test)]
    pub(super) fn of_vectors(vectors: u64) -> Self {
        let (kept_tables, block, blocks, table, row, head, tables) = (0, 0, 0, 0, 0, 0, 0);
        StreamedBytes { vectors, kept_tables, block, blocks, table, row, head, tables }
    }

    /// What streamed weights take of a GPU: only the blocks' linears come and go, all else stays.
    fn on_gpu(&self) -> Self {
        let kept_tables = self.kept_tables + self.tables;
        StreamedBytes { kept_tables, table: 0, row: 0, head: 0, tables: 0, ..*self }
    }

    /// The most that a pass takes over `tokens` that are all different.
    pub fn of_pass(&self, tokens: usize) -> WeightParts {
        let around = self.row.max(MAPPED_WITH_A_PAGE_BYTES);
        let rows = self.table.min(tokens as u64 * around);
        let streamed = (rows + self.blocks * self.block).max(self.head + self.block);
        let (tables, vectors) = (self.kept_tables, self.vectors);
        WeightParts { tables, vectors, streamed, ..WeightParts::default() }
    }
}

impl WeightBytes {
    /// Bytes of the weights of a checkpoint that is opened; `format` packs dense linears, unless others are
    /// packed already.
    pub fn of_checkpoint(
        checkpoint: &Checkpoint,
        spec: &ModelSpec,
        format: Option<&BlockFormat>,
        processor: Processor,
    ) -> Self {
        let format = checkpoint.kind().packing(format);
        let bytes = |tensor: &TensorSpec| stored_bytes(checkpoint, tensor, format, processor);
        let as_stored = match checkpoint.kind() {
            CheckpointKind::Bnb4bit => true,
            CheckpointKind::Dense => format.is_none(),
            CheckpointKind::Gguf => false,
        };
        Self::sum(spec, bytes, as_stored).used_at(processor)
    }

    /// Bytes of the weights of a model of which only the config is known, stored in `dtype`, its linears in
    /// `format` as `nibble quantize` writes them.
    pub fn of_config(
        spec: &ModelSpec,
        dtype: FloatType,
        format: Option<&BlockFormat>,
        processor: Processor,
    ) -> Self {
        let bytes = |tensor: &TensorSpec| dense_bytes(tensor, dtype, format, processor);
        Self::sum(spec, bytes, true).used_at(processor)
    }

    /// Whether linears are in 4-bit blocks, or some of them.
    pub fn packs_linears(&self) -> bool {
        self.resident.codes > 0
    }

    /// Bytes of what is in the host's memory beside a GPU.
    pub fn on_host(&self, what: OnHost) -> u64 {
        match what {
            OnHost::Nothing => 0,
            OnHost::Input => self.embedding,
            OnHost::All => self.embedding + self.head,
        }
    }

    /// The weights that a GPU has where `what` is on the host.
    pub fn without(self, what: OnHost) -> Self {
        let moved = self.on_host(what);
        let tables = self.resident.tables - moved;
        let streamed = |bytes: StreamedBytes| StreamedBytes {
            kept_tables: bytes.kept_tables - moved,
            ..bytes
        };
        WeightBytes {
            resident: WeightParts { tables, ..self.resident },
            streamed: self.streamed.map(streamed),
            ..self
        }
    }

    fn used_at(self, processor: Processor) -> Self {
        match processor {
            Processor::Cpu => self,
            Processor::Gpu => {
                WeightBytes { streamed: self.streamed.map(|streamed| streamed.on_gpu()), ..self }
            }
        }
    }

    fn sum(spec: &ModelSpec, bytes: impl Fn(&TensorSpec) -> WeightParts, as_stored: bool) -> Self {
        let (mut resident, mut table, mut head) = (WeightParts::default(), 0, 0);
        let mut packs_any = false;
        let mut linears = vec![0; spec.num_layers];
        let module = |name: &str| format!("{name}.weight");
        let [embedding, head_name] = [spec.embedding_module(), spec.head_module()].map(module);
        let prefixes: Vec<String> =
            (0..spec.num_layers).map(|layer| format!("{}.", spec.layer_prefix(layer))).collect();
        for tensor in spec.inventory() {
            let parts = bytes(&tensor);
            packs_any |= parts.codes > 0;
            let parts = match tensor.role {
                TensorRole::Linear(_) | TensorRole::Norm | TensorRole::Bias => parts,
                _ => WeightParts { tables: parts.total(), ..WeightParts::default() },
            };
            resident += parts;
            if tensor.name == embedding {
                table = parts.total();
            } else if tensor.name == head_name {
                head = parts.total();
            }
            let layer = prefixes.iter().position(|prefix| tensor.name.starts_with(prefix));
            if let (TensorRole::Linear(_), Some(layer)) = (tensor.role, layer) {
                linears[layer] += parts.total();
            }
        }
        let untied_head = if spec.tie_word_embeddings { 0 } else { head };
        let streamed = || StreamedBytes {
            vectors: resident.vectors,
            kept_tables: resident.tables - table - untied_head,
            block: linears.iter().max().copied().unwrap_or(0),
            blocks: STREAMED_BLOCKS.min(spec.num_layers) as u64,
            table,
            row: table / spec.vocab_size as u64,
            head: if spec.tie_word_embeddings { table } else { head },
            tables: table + untied_head,
        };
        let (embedding, head) =
            if spec.tie_word_embeddings { (0, table) } else { (table, untied_head) };
        WeightBytes { resident, streamed: as_stored.then(streamed), embedding, head, packs_any }
    }
}

fn stored_bytes(
    checkpoint: &Checkpoint,
    tensor: &TensorSpec,
    format: Option<&BlockFormat>,
    processor: Processor,
) -> WeightParts {
    let elements: usize = tensor.shape.iter().product();
    match checkpoint.info(&tensor.name) {
        None => WeightParts::default(),
        Some(info) => match info.stored {
            StoredType::Packed => match (processor, checkpoint.weight(&info.name)) {
                (Processor::Gpu, Ok(Weight::Packed(weight))) => {
                    WeightParts::packed(elements, matrix_bytes(elements, Some(&weight.format())))
                }
                _ => WeightParts::packed(elements, info.bytes),
            },
            StoredType::Dense(dtype) => dense_bytes(tensor, dtype, format, processor),
        },
    }
}

/// Bytes of a tensor that is stored in `dtype`; linears are packed in `format`.
fn dense_bytes(
    tensor: &TensorSpec,
    dtype: FloatType,
    format: Option<&BlockFormat>,
    processor: Processor,
) -> WeightParts {
    let elements = tensor.shape.iter().product();
    let dense = match (processor, dtype) {
        (Processor::Gpu, _) => matrix_bytes(elements, None),
        // Products read bf16 and f32; f16 is widened.
        (Processor::Cpu, FloatType::Bf16) => elements * FloatType::Bf16.size(),
        (Processor::Cpu, _) => elements * size_of::<f32>(),
    } as u64;
    let none = WeightParts::default();
    match (tensor.role, format) {
        (TensorRole::Norm | TensorRole::Bias, _) => {
            WeightParts { vectors: (elements * size_of::<f32>()) as u64, ..none }
        }
        (TensorRole::Linear(_), Some(format)) => {
            let bytes = match processor {
                Processor::Gpu => matrix_bytes(elements, Some(format)),
                Processor::Cpu => format.packed_bytes(elements),
            };
            WeightParts::packed(elements, bytes)
        }
        (TensorRole::Linear(_), None) => WeightParts { dense_linears: dense, ..none },
        _ => WeightParts { tables: dense, ..none },
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
                + weights.untied_head.as_ref().map_or(0, |head| head.bytes())
                + norms;
            let predicted =
                WeightBytes::of_checkpoint(&checkpoint, &spec, format.as_ref(), Processor::Cpu);
            assert_eq!(predicted.resident.total(), bytes as u64);
            assert_eq!(predicted.resident.vectors, norms as u64);
            let linears = linears_of(&spec) as u64;
            let (codes, dense) = if format.is_some() { (linears / 2, 0) } else { (0, 4 * linears) };
            assert_eq!(
                (predicted.resident.codes, predicted.resident.dense_linears),
                (codes, dense)
            );
            assert_eq!(predicted.streamed.is_some(), format.is_none());
        }
    }

    /// Weights of all linears.
    fn linears_of(spec: &ModelSpec) -> usize {
        let linears = (0..spec.num_layers).flat_map(|layer| spec.linears(layer));
        linears.map(|linear| linear.in_features * linear.out_features).sum()
    }

    #[test]
    fn two_blocks_of_many_are_in_memory_when_streamed() {
        let text = include_str!("../../tests/data/models/llama_s0/config.json");
        let mut config: serde_json::Value = serde_json::from_str(text).unwrap();
        let of = |layers: u64, config: &mut serde_json::Value| {
            config["num_hidden_layers"] = layers.into();
            let spec = spec_from_config(config).unwrap();
            let format = Some(&BlockFormat::default());
            WeightBytes::of_config(&spec, FloatType::Bf16, format, Processor::Cpu)
        };
        let (two, many) = (of(2, &mut config), of(20, &mut config));
        let (few, more) = (two.streamed.unwrap(), many.streamed.unwrap());
        assert_eq!((few.blocks, few.block, few.head), (more.blocks, more.block, more.head));
        let whole = few.vectors + 2 * few.block + few.table + few.head;
        let resident = two.resident.total();
        assert_eq!((whole, config["tie_word_embeddings"].as_bool()), (resident, Some(false)));
        // Two norms of each further block stay in memory, in f32.
        assert_eq!(more.vectors - few.vectors, 18 * 2 * 64 * 4);
    }

    #[test]
    fn the_most_is_at_the_blocks_or_at_the_head() {
        let (vectors, kept_tables) = (1000, 500);
        let (block, blocks, row) = (3 << 20, 2, 8 << 10);
        let (table, head) = (50 << 20, 2 << 20);
        let tables = table + head;
        let small = StreamedBytes { vectors, kept_tables, block, blocks, table, row, head, tables };
        let streamed = |bytes: &StreamedBytes, tokens| {
            let parts = bytes.of_pass(tokens);
            assert_eq!(
                (parts.vectors, parts.total()),
                (1000, 1000 + parts.tables + parts.streamed)
            );
            (parts.tables, parts.streamed)
        };
        let on_gpu = small.on_gpu();
        assert_eq!(streamed(&on_gpu, 16), (500 + (52 << 20), 6 << 20));
        assert_eq!(on_gpu.of_pass(10_000), on_gpu.of_pass(16));
        assert_eq!(streamed(&small, 16), (500, 7 << 20));
        assert_eq!(streamed(&small, 10_000), (500, 56 << 20));
        let long = StreamedBytes { row: 128 << 10, ..small };
        assert_eq!(streamed(&long, 16), (500, 8 << 20));
        let tied = StreamedBytes { head: 50 << 20, ..small };
        assert_eq!(streamed(&tied, 16), (500, 53 << 20));
    }
}
