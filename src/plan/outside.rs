//! What a run has in memory beside its arena: rows of the memory report.

use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

use super::processor::Processor;
use crate::byte_size::sum_of_bytes;

/// What a run has beside its arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Outside {
    /// What the run computes on.
    #[serde(rename = "place")]
    pub processor: Processor,
    /// Bytes that are there before the weights: the program, its tokenizer and data; on a GPU what
    /// the driver and other programs have of it.
    pub process_bytes: u64,
    /// Bytes of the frozen weights.
    pub weights: WeightParts,
    /// Bytes of the host's memory that are pinned beside a GPU: offloaded inputs, streamed blocks on their way,
    /// an embedding, and what is staged.
    #[serde(default)]
    pub pinned_bytes: u64,
}

impl Outside {
    /// Bytes of weights and process, where the run computes.
    pub fn total(&self) -> u64 {
        self.process_bytes.saturating_add(self.weights.total())
    }
}

/// Bytes of frozen weights, by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WeightParts {
    /// Codes of 4-bit blocks: two weights a byte.
    pub codes: u64,
    /// Scales of 4-bit blocks, nested ones included.
    pub scales: u64,
    /// Linears that are not packed.
    pub dense_linears: u64,
    /// Embeddings of tokens and positions, and the head where it is a matrix of its own.
    pub tables: u64,
    /// Norms and biases.
    pub vectors: u64,
    /// The most at a time of what comes and goes when weights are streamed.
    pub streamed: u64,
}

impl WeightParts {
    /// A packed matrix of `elements` in `bytes`.
    pub fn packed(elements: usize, bytes: usize) -> Self {
        let codes = elements.div_ceil(2).min(bytes) as u64;
        WeightParts { codes, scales: bytes as u64 - codes, ..WeightParts::default() }
    }

    /// Bytes of all kinds.
    pub fn total(&self) -> u64 {
        sum_of_bytes(self.rows().map(|(_, bytes)| bytes))
    }

    /// Name and bytes of each kind.
    pub fn rows(&self) -> [(&'static str, u64); 6] {
        [
            ("4-bit codes", self.codes),
            ("scales of 4-bit blocks", self.scales),
            ("linear layers, not quantized", self.dense_linears),
            ("embeddings and head", self.tables),
            ("norms and biases", self.vectors),
            ("streamed weights", self.streamed),
        ]
    }
}

impl AddAssign for WeightParts {
    fn add_assign(&mut self, other: Self) {
        self.codes = self.codes.saturating_add(other.codes);
        self.scales = self.scales.saturating_add(other.scales);
        self.dense_linears = self.dense_linears.saturating_add(other.dense_linears);
        self.tables = self.tables.saturating_add(other.tables);
        self.vectors = self.vectors.saturating_add(other.vectors);
        self.streamed = self.streamed.saturating_add(other.streamed);
    }
}
