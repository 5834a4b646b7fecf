//! The frozen model under a run.

use nibble_quant::BlockFormat;

use super::backend::TrainingKernels;
use super::fingerprint;
use super::meter::Meter;
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::model::spec::ModelSpec;
use crate::model::streaming::StreamedPages;
use crate::model::weights::Weights;

/// A base model before its weights are read, and how they are to be used.
#[derive(Debug, Clone, Copy)]
pub struct FrozenBase<'a> {
    /// The files of its weights.
    pub checkpoint: &'a Checkpoint,
    /// What the model is.
    pub spec: &'a ModelSpec,
    /// How dense linears are packed.
    pub format: Option<BlockFormat>,
    /// Whether the blocks' weights are streamed from their file.
    pub stream: bool,
}

/// A base model whose weights are there.
pub struct LoadedBase<K: TrainingKernels> {
    /// The weights where the backend works with them.
    pub weights: Weights<K>,
    /// [`fingerprint`] of the weights.
    pub fingerprint: Vec<f32>,
    /// What measures the run from before the weights were read.
    pub meter: Meter,
}

impl FrozenBase<'_> {
    /// Reads the weights.
    ///
    /// # Errors
    /// Those of [`Weights::load`] and of the backend.
    pub fn load<K: TrainingKernels>(&self, kernels: &K) -> Result<LoadedBase<K>> {
        let mut meter = Meter::begin(kernels)?;
        let weights = Weights::load(self.checkpoint, self.spec, self.format.as_ref(), None)?;
        let fingerprint = fingerprint::of(&weights);
        let weights = match self.stream {
            true => {
                weights.upload_streamed(kernels, StreamedPages::new(self.checkpoint, self.spec))?
            }
            false => weights.upload(kernels)?,
        };
        meter.loaded(kernels)?;
        Ok(LoadedBase { weights, fingerprint, meter })
    }
}
