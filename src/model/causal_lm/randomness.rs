//! What training passes do at random: dropout before the adapters, noise on the embeddings.
//!
//! There is no generator with a state: what is drawn is a function of the seed, the micro-batch, a name and an
//! index, the same on every backend and in every way to recompute it.

use crate::kernels::{Kernels, TokenLayout, UniformNoise};
use crate::model::block::Dropout;
use crate::random::Stream;

/// What a run does at random while it trains.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Randomness {
    /// Seed of the run.
    pub seed: u64,
    /// `lora_dropout`, if it is not 0; the plan must have room for it
    /// ([`Settings::lora_dropout`](crate::plan::Settings::lora_dropout)).
    pub dropout: Option<f32>,
    /// `neftune_noise_alpha`.
    pub neftune: Option<f32>,
}

/// The random numbers of one micro-batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draws {
    /// Seed of the run.
    pub seed: u64,
    /// Number of the micro-batch since the start of the run.
    pub step: u64,
    /// Tokens of the micro-batch before those of this pass.
    pub first_token: usize,
}

impl Draws {
    /// The random numbers `name` of this micro-batch, one for each element.
    pub fn stream(&self, name: &str) -> Stream {
        Stream::new(self.seed, name).at(self.step)
    }

    /// Index of the first element of row `row` of this pass in rows of `width`.
    pub fn index(&self, row: usize, width: usize) -> u64 {
        (self.first_token + row) as u64 * width as u64
    }
}

impl Randomness {
    /// Dropout of a micro-batch.
    pub(super) fn dropout(&self, draws: Draws) -> Option<Dropout> {
        self.dropout.map(|probability| Dropout { probability, draws })
    }

    /// NEFTune, arXiv 2310.05914: adds `α/√(L·D) · u` to each element of the embeddings of a document of L
    /// tokens, u uniform in `[−1, 1)`, times `scale`
    /// ([`ModelSpec::noise_scale`](crate::model::spec::ModelSpec::noise_scale)). x is `[T, D]`.
    pub(super) fn add_noise<K: Kernels>(
        &self,
        kernels: &K,
        draws: Draws,
        tokens: &TokenLayout,
        scale: f32,
        (x, width): (&mut K::Buffer, usize),
    ) {
        let Some(alpha) = self.neftune else { return };
        let stream = draws.stream("neftune");
        for document in tokens.boundaries.windows(2).filter(|ends| ends[0] < ends[1]) {
            let rows = document[0]..document[1];
            let amplitude = scale * alpha / ((rows.len() * width) as f32).sqrt();
            let noise = UniformNoise { amplitude, stream, first: draws.index(rows.start, width) };
            kernels.add_noise(&noise, x, rows, width);
        }
    }
}
