//! What the sizes of a run's buffers depend on, beside the model.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use super::moments::{MomentLayout, Optim};
use super::weights::Place;
use crate::adapter::LoraTarget;
use crate::model::spec::{LinearRole, ModelSpec};

/// The MLP is tiled above this many tokens: enough rows to pay for widening a weight once more.
pub const AUTOMATIC_TILE_TOKENS: usize = 4096;

/// Tokens of a tile of the MLP where memory is short.
const SMALL_TILE_TOKENS: usize = 1024;
/// Rows of logits where memory is short, at least.
pub(super) const LEAST_LOGIT_ROWS: usize = 64;

/// Rows of a head on the host that are on the GPU at a time, about: enough for whole tiles of a product.
const HOST_HEAD_TILE: usize = 8192;
/// Rows of its input that each reading of it serves, at most. Each takes 10·D bytes; from 4,000 on a
/// product would take as long as a reading over PCIe 4.0, of which half are behind two products.
const HOST_HEAD_ROWS: usize = 2048;

/// What happens to a layer's activations between forward and backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Kept: no recomputation.
    Keep,
    /// Only the block's input is kept; the rest is recomputed in the backward pass.
    Checkpoint,
    /// As checkpoint, and the input waits outside of the working memory: two buffers of it are all
    /// that offloaded layers share there.
    Offload,
}

/// Buffers for the inputs of layers that are offloaded: one at work, one that is copied.
pub const OFFLOAD_SLOTS: usize = 2;

/// Rows of logits that exist at a time: 128 MiB (in f32, on a GPU in bf16), at least 64 rows; no more
/// than `most`, where that is given, nor than `tokens`. Products of whole tiles of rows waste nothing.
pub fn logit_rows(
    spec: &ModelSpec,
    tokens: usize,
    most: Option<NonZeroUsize>,
    place: Place,
) -> usize {
    const CHUNK_BYTES: usize = 128 << 20;
    const TILE_ROWS: usize = 256;
    let size = if place == Place::Gpu { 2 } else { 4 };
    let rows = CHUNK_BYTES / (spec.vocab_size * size);
    let whole = if rows >= TILE_ROWS { TILE_ROWS } else { LEAST_LOGIT_ROWS };
    let rows = (rows / whole * whole).max(LEAST_LOGIT_ROWS).min(tokens);
    most.map_or(rows, |most| rows.min(most.get()))
}

/// What the sizes depend on, beside the model.
#[derive(Debug, Clone)]
pub struct Settings {
    /// T: tokens of the largest micro-batch.
    pub tokens: usize,
    /// Tokens of the longest document in it.
    pub longest_document: usize,
    /// Rows of logits that exist at a time.
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
    /// Tokens that the MLP works on at a time, at most; by itself [`AUTOMATIC_TILE_TOKENS`].
    pub mlp_tile_length: Option<usize>,
    /// Folder of the file that the CPU offloads to; the system's for temporary files if absent.
    pub scratch_folder: Option<PathBuf>,
    /// On a GPU: whether 4-bit weights have a second buffer, in which the next one is widened while a
    /// product runs.
    pub widen_ahead: bool,
    /// On a GPU: whether the head is in the host's memory.
    pub head_on_host: bool,
}

/// What the head works with at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadSizes {
    /// Rows of its input and of their gradients.
    pub rows: usize,
    /// Logits, of these rows or of a tile of the vocabulary for each.
    pub logits: usize,
    /// Rows whose logits are there all at once.
    pub whole_rows: usize,
}

impl Settings {
    /// Whether there is a backward pass.
    pub fn training(&self) -> bool {
        !self.policies.is_empty()
    }

    /// Layers of a policy.
    pub fn count(&self, policy: Policy) -> usize {
        self.policies.iter().filter(|its| **its == policy).count()
    }

    /// The same with the MLP and the logits in smaller pieces than usual, and on a GPU one buffer for
    /// widened weights.
    pub fn in_pieces(&self) -> Self {
        let tile = self.mlp_tile_length.unwrap_or(SMALL_TILE_TOKENS);
        let rows = (self.logit_rows / 4).max(LEAST_LOGIT_ROWS).min(self.logit_rows);
        Settings {
            mlp_tile_length: Some(tile),
            widen_ahead: false,
            logit_rows: rows,
            ..self.clone()
        }
    }

    /// Where the moments of A and B of each target lie.
    pub fn moments(&self) -> MomentLayout {
        let pair = |t: &LoraTarget| [t.r * t.in_features, t.r * t.out_features];
        MomentLayout::new(self.optim, self.targets.iter().flat_map(pair))
    }

    /// Whether a layer recomputes what it did not keep.
    pub fn recomputes(&self) -> bool {
        self.count(Policy::Keep) < self.policies.len()
    }

    /// Of a head of `vocab_size` rows. One on the host comes in tiles, twice for as many rows of its
    /// input as there are: more of them, and no more logits than otherwise.
    pub fn head(&self, vocab_size: usize) -> HeadSizes {
        let (rows, logits) = (self.logit_rows, self.logit_rows * vocab_size);
        if !self.head_on_host {
            return HeadSizes { rows, logits, whole_rows: rows };
        }
        let tile = HOST_HEAD_TILE.min(vocab_size);
        let rows = (logits / tile).min(HOST_HEAD_ROWS).min(self.tokens);
        let logits = (rows * tile).max(vocab_size);
        HeadSizes { rows, logits, whole_rows: logits / vocab_size }
    }

    /// Layers whose input is offloaded, in order.
    pub fn offloaded(&self) -> Vec<usize> {
        let offload = |layer: &usize| self.policies[*layer] == Policy::Offload;
        (0..self.policies.len()).filter(offload).collect()
    }

    /// Tokens of a tile of the MLP; all of them where one tile holds them. The last one may be shorter.
    /// A constant length, so that longer passes never need less memory.
    pub fn mlp_tile(&self) -> usize {
        let length = self.mlp_tile_length.unwrap_or(AUTOMATIC_TILE_TOKENS);
        length.max(1).min(self.tokens)
    }

    /// Whether the MLP works on a part of the tokens at a time.
    pub fn tiled(&self) -> bool {
        self.mlp_tile() < self.tokens
    }
}

/// The halves of a block, which keep `x·Aᵀ` of their adapters apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// q, k, v and the output projection.
    Attention,
    /// Gate, up and down.
    Mlp,
}

impl Half {
    /// Where a linear belongs.
    pub fn of(role: LinearRole) -> Self {
        match role {
            LinearRole::Gate | LinearRole::Up | LinearRole::Down => Half::Mlp,
            _ => Half::Attention,
        }
    }

    /// Sum of the adapters' ranks in this half of `layer`.
    pub fn rank_sum(self, targets: &[LoraTarget], layer: usize) -> usize {
        let here = |target: &&LoraTarget| target.layer == layer && Half::of(target.role) == self;
        targets.iter().filter(here).map(|target| target.r).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_passes_are_tiled_by_themselves() {
        let of = |tokens, mlp_tile_length| {
            let settings = Settings {
                tokens,
                longest_document: tokens,
                logit_rows: 1,
                policies: Vec::new(),
                targets: Vec::new(),
                lora_dropout: false,
                bf16_working: true,
                optim: Optim::default(),
                threads: 1,
                cache_tokens: 0,
                mlp_tile_length,
                scratch_folder: None,
                widen_ahead: true,
                head_on_host: false,
            };
            (settings.mlp_tile(), settings.tiled())
        };
        assert_eq!(of(4096, None), (4096, false));
        assert_eq!(of(4097, None), (4096, true));
        assert_eq!(of(512, None), (512, false));
        assert_eq!((of(512, Some(100)), of(512, Some(512))), ((100, true), (512, false)));
        assert_eq!((of(512, Some(600)), of(0, None)), ((512, false), (0, false)));
    }
}
