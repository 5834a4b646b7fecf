//! What the training loop needs of a model.

use std::path::Path;

use super::buffers::Buffers;
use crate::data::Batch;
use crate::error::Result;
use crate::model::parameters::ParameterTensor;

/// A model whose adapter can be trained. The loop knows nothing else of it.
pub trait Trainee {
    /// Sum of the losses of the batch's trained tokens; adds `scale ·` their gradient to the
    /// gradients. `micro_batch` counts from the start of the run: dropout depends on it.
    fn forward_backward(&mut self, batch: &Batch, scale: f32, micro_batch: u64) -> Result<f64>;

    /// Sum of the losses of the batch's trained tokens, without dropout.
    fn evaluate(&mut self, batch: &Batch) -> Result<f64>;

    /// The same without the adapter.
    fn evaluate_base(&mut self, batch: &Batch) -> Result<f64>;

    /// The trained tensors and where they lie in the flat buffers.
    fn tensors(&self) -> &[ParameterTensor];

    /// Weights, gradients and moments.
    fn buffers(&mut self) -> Buffers<'_>;

    /// Where in the forward pass of the last training batch the numbers stopped being finite.
    fn first_bad_activation(&self) -> Option<String> {
        None
    }

    /// Writes the adapter, as the forward pass sees it, to PEFT's files in `folder`.
    fn write_adapter(&self, folder: &Path) -> Result<()>;

    /// The model's answer to a prompt.
    fn sample(&mut self, prompt: &str) -> Result<String>;
}
