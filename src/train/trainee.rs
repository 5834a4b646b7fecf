//! What the training loop needs of a model.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

use super::backend::Update;
use crate::checkpoint::tensor_file::{PIECE_BYTES, pieces};
use crate::data::Batch;
use crate::error::{Error, Message, Result};
use crate::kernels::TokenLosses;
use crate::ledger::rows::Account;
use crate::model::Variant;
use crate::model::parameters::ParameterTensor;
use crate::plan::{AdapterRegion, MomentLayout, SumOrder};

/// What is smaller since memory ran short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shrunk {
    /// Most tokens in a pass, as planned.
    pub from_tokens: usize,
    /// Most tokens in a pass from now on.
    pub to_tokens: usize,
    /// All that changed, for people.
    pub change: String,
}

/// The flat buffers of an adapter in training: weights, gradients and moments.
pub trait AdapterBuffers {
    /// The trained tensors and where they lie in the flat buffers.
    fn tensors(&self) -> &[ParameterTensor];

    /// Where each tensor's moments are.
    fn moments(&self) -> &MomentLayout;

    /// Words of one of the flat buffers; a copy where the program does not see it.
    ///
    /// # Errors
    /// `Budget` where the host has no memory for a copy, or those of the backend.
    fn values(&self, region: AdapterRegion, words: Range<usize>) -> Result<Cow<'_, [f32]>>;

    /// Shows words of one of the flat buffers to `found`, piece by piece, until it says yes; whether it
    /// did.
    ///
    /// # Errors
    /// Those of [`values`](AdapterBuffers::values).
    fn any_piece(
        &self,
        region: AdapterRegion,
        words: Range<usize>,
        mut found: impl FnMut(&[f32]) -> bool,
    ) -> Result<bool> {
        for piece in pieces(words, PIECE_BYTES / size_of::<f32>()) {
            if found(&self.values(region, piece)?) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Overwrites words of one of the flat buffers from `first` on.
    fn set_values(&mut self, region: AdapterRegion, first: usize, values: &[f32]);

    /// Makes what the forward pass reads of the master, once that was overwritten.
    fn refresh_working(&mut self);
}

/// What can do with less memory.
pub trait Shrinkable {
    /// Makes room where memory ran short: from now on a micro-batch is computed in smaller parts, or
    /// with less kept of it, with the same sums. `None` where no plan is smaller.
    ///
    /// # Errors
    /// `Budget` when not even the smaller buffers can be had, or those of the backend.
    fn shrink(&mut self) -> Result<Option<Shrunk>> {
        Ok(None)
    }

    /// [`shrink`](Shrinkable::shrink), where that is the only way on.
    ///
    /// # Errors
    /// `message`, which says what ran short, where no plan is smaller; those of `shrink`.
    fn shrink_or(&mut self, message: Message) -> Result<Shrunk> {
        self.shrink()?.ok_or(Error::Budget(message))
    }

    /// The order in which the model adds up now, where that can change.
    fn sum_order(&self) -> Option<SumOrder> {
        None
    }

    /// What the model had to do without before the first step; told once.
    fn shrunk_at_start(&mut self) -> Option<Shrunk> {
        None
    }
}

/// A model whose adapter can be trained. The loop knows nothing else of it.
pub trait Trainee: AdapterBuffers + Shrinkable {
    /// Losses of the batch's trained tokens; adds `scale ·` their gradient to the
    /// gradients. `micro_batch` counts from the start of the run: dropout depends on it.
    fn forward_backward(
        &mut self,
        batch: &Batch,
        scale: f32,
        micro_batch: u64,
    ) -> Result<TokenLosses>;

    /// Losses of the batch's trained tokens, without dropout.
    fn evaluate(&mut self, batch: &Batch, variant: Variant) -> Result<TokenLosses>;

    /// Zeroes the gradients.
    fn zero_gradients(&mut self);

    /// `√Σ g²` over all gradients.
    fn gradient_norm(&mut self) -> Result<f64>;

    /// Updates the weights with the gradients at hand.
    ///
    /// # Errors
    /// Those of the backend: the weights are then neither the old nor the new ones.
    fn update(&mut self, update: &Update) -> Result<()>;

    /// Where in the forward pass of the last training batch the numbers stopped being finite.
    fn first_bad_activation(&mut self) -> Option<String> {
        None
    }

    /// Where the model's memory is, as planned and as measured so far.
    fn memory(&self) -> Option<Account> {
        None
    }

    /// Memory of the GPU that is in use now, where the model is on one.
    fn gpu_bytes(&self) -> Option<u64> {
        None
    }

    /// What was measured above the memory that the user allows, if it is.
    fn over_budget(&self) -> Option<String> {
        None
    }

    /// Writes the adapter, as the forward pass sees it, to PEFT's files in `folder`.
    ///
    /// # Errors
    /// `Io`, or `Budget` where memory runs short.
    fn write_adapter(&self, folder: &Path) -> Result<()>;

    /// The model's answer to a prompt.
    fn sample(&mut self, prompt: &str) -> Result<String>;
}
