//! NEFTune, arXiv 2310.05914: noise on the embeddings while training.
//!
//! To each element of the embeddings of a document of L tokens `α/√(L·D) · u` is added, u uniform in
//! `[−1, 1)`. As dropout, u is a function of the seed, the micro-batch and the element's place in it.

use crate::kernels::{Kernels, TokenLayout, UniformNoise};

/// Noise of one micro-batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct EmbeddingNoise {
    /// α: `neftune_noise_alpha`.
    pub alpha: f32,
    /// Seed of the run.
    pub seed: u64,
    /// Number of the micro-batch since the start of the run.
    pub step: u64,
    /// Tokens of the micro-batch before those of this pass.
    pub first_token: usize,
}

impl EmbeddingNoise {
    /// Adds it to x `[T, D]`, whose embeddings have been multiplied by the model's factor, if it has
    /// one: as transformers, whose embeddings come with it.
    pub fn add<K: Kernels>(
        &self,
        kernels: &K,
        tokens: &TokenLayout,
        (x, width): (&mut K::Buffer, usize),
    ) {
        for document in tokens.boundaries.windows(2).filter(|ends| ends[0] < ends[1]) {
            let rows = document[0]..document[1];
            let noise = UniformNoise {
                amplitude: self.alpha / ((rows.len() * width) as f32).sqrt(),
                seed: self.seed,
                stream: "neftune",
                step: self.step,
                first: ((self.first_token + rows.start) * width) as u64,
            };
            kernels.add_noise(&noise, x, rows, width);
        }
    }
}
