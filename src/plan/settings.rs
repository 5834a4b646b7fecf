//! What the sizes of a run's buffers depend on, beside the model.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use super::moments::{MomentLayout, Optim};
use super::processor::Processor;
use crate::adapter::LoraTarget;
use crate::model::spec::ModelSpec;

/// The MLP is tiled above this many tokens: enough rows to pay for dequantizing a weight once more.
const AUTOMATIC_TILE_TOKENS: usize = 4096;

/// Tokens of a tile of the MLP where memory is short.
const SMALL_TILE_TOKENS: usize = 1024;
/// Rows of logits where memory is short, at least.
pub(super) const LEAST_LOGIT_ROWS: usize = 64;

/// Rows of a head on the host that are on the GPU at a time, at most.
const HOST_HEAD_TILE: usize = 8192;
/// Rows of a head's tile are a multiple of this.
const HEAD_TILE_MULTIPLE: usize = 8;
/// Rows of input that each reading of a head on the host serves, at most. Each takes 10·D bytes of memory.
/// Of 2,048 a product takes half as long as a reading over PCIe 4.0, and half of the readings are behind
/// two products.
const HOST_HEAD_ROWS: usize = 2048;
/// Chunks of a head on the GPU that read one on the host together.
const CHUNKS_TO_SHARE_A_HEAD: usize = 4;

/// What happens to a layer's activations between forward and backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// All activations are kept: no recomputation.
    Keep,
    /// The block's input and the output of attention are kept; the rest is recomputed, attention is not.
    Attention,
    /// Only the block's input is kept; the rest is recomputed in the backward pass.
    Checkpoint,
    /// The block's input waits outside of the working memory, in which offloaded layers share two buffers for
    /// it; the rest is recomputed.
    Offload,
    /// The output of attention is kept, and the block's input waits as with offload.
    #[serde(rename = "offload-input")]
    AttentionOffloadInput,
    /// The output of attention and the block's input both wait as with offload.
    OffloadAttention,
}

impl Policy {
    /// Whether the input waits outside of the working memory.
    pub fn offloads(self) -> bool {
        matches!(self, Policy::Offload | Policy::AttentionOffloadInput | Policy::OffloadAttention)
    }

    /// Whether the output of attention is kept or waits, and nothing else that the block makes.
    pub fn skips_attention_recompute(self) -> bool {
        matches!(self, Policy::Attention | Policy::AttentionOffloadInput | Policy::OffloadAttention)
    }
}

/// What is made in smaller pieces than usual, where memory is short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pieces {
    /// The MLP, in tiles of 1,024 tokens.
    pub tiles: bool,
    /// The logits, a quarter of the rows at a time.
    pub logits: bool,
    /// Dequantized weights, in one buffer on a GPU.
    pub one_buffer: bool,
}

impl Pieces {
    /// No smaller pieces than usual.
    pub const NONE: Pieces = Pieces { tiles: false, logits: false, one_buffer: false };
    /// Smaller pieces of everything.
    pub const ALL: Pieces = Pieces { tiles: true, logits: true, one_buffer: true };

    /// All sets of smaller pieces, the smallest set first; with one buffer only where there could be two.
    pub fn ways(two_buffers: bool) -> impl Iterator<Item = Pieces> {
        let bit = |set: u32, bit: u32| set >> bit & 1 == 1;
        let sets = [0b000, 0b001, 0b010, 0b100, 0b011, 0b101, 0b110, 0b111];
        let pieces = sets.into_iter().map(move |set| Pieces {
            tiles: bit(set, 0),
            logits: bit(set, 1),
            one_buffer: bit(set, 2),
        });
        pieces.filter(move |pieces| two_buffers || !pieces.one_buffer)
    }
}

/// What decides the order of a plan's sums, and with it their last bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SumOrder {
    tokens: usize,
    mlp_tile: usize,
    logit_rows: usize,
    head_on_host: bool,
}

/// Buffers for the inputs of layers that are offloaded, and for the output of their attention: one at
/// work, one that is copied.
pub const OFFLOAD_SLOTS: usize = 2;

/// Rows of logits that exist at a time: about 128 MiB (in f32, on a GPU in bf16), at least 64 rows; no
/// more than `most`, where that is given, nor than `tokens`. Products of whole tiles of rows waste
/// nothing.
pub fn logit_rows(
    spec: &ModelSpec,
    tokens: usize,
    most: Option<NonZeroUsize>,
    processor: Processor,
) -> usize {
    const CHUNK_BYTES: usize = 128 << 20;
    const TILE_ROWS: usize = 256;
    let size = if processor == Processor::Gpu { 2 } else { 4 };
    // Rounded up: a vocabulary just over 2^18 has whole tiles, too.
    let rows = CHUNK_BYTES.div_ceil(spec.vocab_size * size);
    let whole = if rows >= TILE_ROWS { TILE_ROWS } else { LEAST_LOGIT_ROWS };
    let rows = (rows / whole * whole).max(LEAST_LOGIT_ROWS).min(tokens);
    most.map_or(rows, |most| rows.min(most.get()))
}

/// Rows of a head on the host that are on the GPU at a time: `min(V/4, 8192)` of V = `vocab_size`, in
/// eights.
pub fn host_head_tile(vocab_size: usize) -> usize {
    let tile = vocab_size.div_ceil(CHUNKS_TO_SHARE_A_HEAD).min(HOST_HEAD_TILE);
    tile.next_multiple_of(HEAD_TILE_MULTIPLE)
}

/// What the sizes of a run's buffers depend on, beside the model.
#[derive(Debug, Clone)]
pub struct Settings {
    /// T: tokens of the longest forward pass; a larger micro-batch is computed in parts.
    pub tokens: usize,
    /// Tokens of the longest document.
    pub longest_document: usize,
    /// Tokens of a pass that have a loss, at most: only these have logits.
    pub trained_tokens: usize,
    /// Rows of logits that exist at a time, at most.
    pub logit_rows: usize,
    /// Policy of every layer; empty for a model that never runs backward.
    pub policies: Vec<Policy>,
    /// Adapted linears.
    pub targets: Vec<LoraTarget>,
    /// Whether dropout needs a masked copy of a linear's input.
    pub lora_dropout: bool,
    /// Whether bf16 working copies exist beside the f32 master (`--adapter-dtype bf16`).
    pub bf16_working: bool,
    /// How the optimizer keeps its moments.
    pub optim: Optim,
    /// Worker threads.
    pub threads: usize,
    /// Tokens of context for generating text; 0 where nothing is generated.
    pub cache_tokens: usize,
    /// Tokens that the MLP works on at a time, at most; by itself 4,096.
    pub mlp_tile_length: Option<usize>,
    /// Folder of the file that the CPU offloads to; the system's for temporary files if absent.
    pub scratch_folder: Option<PathBuf>,
    /// Whether 4-bit weights have a second buffer on a GPU, in which the next one is dequantized while a
    /// product runs.
    pub dequantize_ahead: bool,
    /// Blocks whose 4-bit weights have room in bf16 on a GPU besides, until others need it. With one, no block
    /// dequantizes the same weight twice in a row; with as many as there are, each is dequantized once.
    pub dequantized_blocks: usize,
    /// Whether the head is in the host's memory beside a GPU.
    pub head_on_host: bool,
    /// Whether matrices of the base are in 4-bit blocks, which a GPU's products read from buffers in bf16.
    pub packed_base: bool,
}

/// What the head works with at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadSizes {
    /// Rows of the head's input and of their gradients.
    pub rows: usize,
    /// Elements of logits: those of all rows, or for each row those of a tile of the vocabulary.
    pub logits: usize,
    /// Rows whose logits are there all at once.
    pub whole_rows: usize,
}

impl Settings {
    /// Settings of passes over at most `tokens`, one document, on all threads: with no adapter, no backward
    /// pass and no generated text until `targets`, `policies` and `cache_tokens` are set.
    pub fn of_pass(tokens: usize, logit_rows: usize) -> Self {
        Settings {
            tokens,
            longest_document: tokens,
            trained_tokens: tokens,
            logit_rows,
            policies: Vec::new(),
            targets: Vec::new(),
            lora_dropout: false,
            bf16_working: true,
            optim: Optim::default(),
            threads: rayon::current_num_threads(),
            cache_tokens: 0,
            mlp_tile_length: None,
            scratch_folder: None,
            dequantize_ahead: true,
            dequantized_blocks: 0,
            head_on_host: false,
            packed_base: true,
        }
    }

    /// The same settings with passes of at most `tokens`.
    pub fn shorter(&self, tokens: usize) -> Self {
        let tokens = self.tokens.min(tokens);
        Settings {
            tokens,
            longest_document: self.longest_document.min(tokens),
            trained_tokens: self.trained_tokens.min(tokens),
            logit_rows: self.logit_rows.min(tokens),
            ..self.clone()
        }
    }

    /// Whether there is a backward pass.
    pub fn training(&self) -> bool {
        !self.policies.is_empty()
    }

    /// Number of layers that have a policy.
    pub fn count(&self, policy: Policy) -> usize {
        self.policies.iter().filter(|its| **its == policy).count()
    }

    /// The same settings with some things in smaller pieces than usual.
    pub fn in_pieces(self, pieces: Pieces) -> Self {
        let tile = self.mlp_tile_length.unwrap_or(SMALL_TILE_TOKENS);
        let rows = (self.logit_rows / 4).max(LEAST_LOGIT_ROWS).min(self.logit_rows);
        Settings {
            mlp_tile_length: if pieces.tiles { Some(tile) } else { self.mlp_tile_length },
            logit_rows: if pieces.logits { rows } else { self.logit_rows },
            dequantize_ahead: self.dequantize_ahead && !pieces.one_buffer,
            ..self
        }
    }

    /// Where the moments of A and B of each target lie.
    pub fn moments(&self) -> MomentLayout {
        let pair = |target: &LoraTarget| [target.shape.a_elements(), target.shape.b_elements()];
        MomentLayout::new(self.optim, self.targets.iter().flat_map(pair))
    }

    /// Whether any layer recomputes what it did not keep.
    pub fn recomputes(&self) -> bool {
        self.count(Policy::Keep) < self.policies.len()
    }

    /// Which blocks keep what, for people.
    pub fn kept_in_words(&self) -> String {
        let kept = self.count(Policy::Keep);
        let attended = self.layers_keeping_attention_in_memory();
        let words = format!("{kept} of {} blocks keep their activations", self.policies.len());
        if attended == 0 { words } else { format!("{words}, {attended} the output of attention") }
    }

    /// Layers that keep the output of attention in memory, and nothing else that they make.
    pub fn layers_keeping_attention_in_memory(&self) -> usize {
        self.count(Policy::Attention) + self.count(Policy::AttentionOffloadInput)
    }

    /// Layers that make no attention again, but all the rest.
    pub fn layers_skipping_attention_recompute(&self) -> usize {
        self.policies.iter().filter(|policy| policy.skips_attention_recompute()).count()
    }

    /// Whether layers take turns with one buffer for what attention makes: those that make it again, or
    /// all where nothing is trained.
    pub fn needs_shared_attention_buffer(&self) -> bool {
        let has = |policy: Policy| self.count(policy) > 0;
        !self.training() || has(Policy::Checkpoint) || has(Policy::Offload)
    }

    /// What a head of V = `vocab_size` rows works with. On the host it comes in tiles, twice for each
    /// chunk of rows, which is therefore four times as long: `min(4·logit_rows, 2048, trained)` rows of
    /// `min(V/4, 8192)` logits, no more of these than `logit_rows·V`.
    pub fn head(&self, vocab_size: usize) -> HeadSizes {
        let trained = self.trained_tokens.max(1);
        if !self.head_on_host {
            let rows = self.logit_rows.min(trained);
            return HeadSizes { rows, logits: rows * vocab_size, whole_rows: rows };
        }
        let rows = (CHUNKS_TO_SHARE_A_HEAD * self.logit_rows).min(HOST_HEAD_ROWS).min(trained);
        let logits = (rows * host_head_tile(vocab_size)).max(vocab_size);
        HeadSizes { rows, logits, whole_rows: logits / vocab_size }
    }

    /// Layers whose input is offloaded, in order.
    pub fn offloaded(&self) -> Vec<usize> {
        self.layers(Policy::offloads)
    }

    /// Layers the output of whose attention is offloaded, in order.
    pub fn offloaded_attention(&self) -> Vec<usize> {
        self.layers(|policy| policy == Policy::OffloadAttention)
    }

    fn layers(&self, of: impl Fn(Policy) -> bool) -> Vec<usize> {
        (0..self.policies.len()).filter(|&layer| of(self.policies[layer])).collect()
    }

    /// What is offloaded, for people; `None` where nothing is.
    pub fn offloaded_in_words(&self) -> Option<String> {
        match (self.offloaded().len(), self.offloaded_attention().len()) {
            (0, _) => None,
            (_, 0) => Some("inputs".to_string()),
            (all, some) if some < all => Some(format!("inputs and attention of {some} blocks")),
            _ => Some("inputs and attention".to_string()),
        }
    }

    /// Tokens of a tile of the MLP; all of them where one tile holds them. The last one may be shorter.
    /// A constant length, so that longer passes never need less memory.
    pub fn mlp_tile(&self) -> usize {
        let length = self.mlp_tile_length.unwrap_or(AUTOMATIC_TILE_TOKENS);
        length.max(1).min(self.tokens)
    }

    /// In which order a run adds up; policies, streaming and buffers make no difference.
    pub fn sum_order(&self) -> SumOrder {
        let Settings { tokens, logit_rows, head_on_host, .. } = *self;
        SumOrder { tokens, mlp_tile: self.mlp_tile(), logit_rows, head_on_host }
    }

    /// The same settings with passes as short as those of a run that goes on, whose memory ran short.
    pub fn as_short_as(self, order: SumOrder) -> Self {
        let possible = self.longest_document..self.tokens;
        if possible.contains(&order.tokens) { self.shorter(order.tokens) } else { self }
    }

    /// Whether the MLP works on a part of the tokens at a time.
    pub fn tiled(&self) -> bool {
        self.mlp_tile() < self.tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_passes_are_tiled_by_themselves() {
        let of = |tokens, mlp_tile_length| {
            let settings = Settings { threads: 1, mlp_tile_length, ..Settings::of_pass(tokens, 1) };
            (settings.mlp_tile(), settings.tiled())
        };
        assert_eq!(of(4096, None), (4096, false));
        assert_eq!(of(4097, None), (4096, true));
        assert_eq!(of(512, None), (512, false));
        assert_eq!((of(512, Some(100)), of(512, Some(512))), ((100, true), (512, false)));
        assert_eq!((of(512, Some(600)), of(0, None)), ((512, false), (0, false)));
    }
}
