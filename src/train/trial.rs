//! Real training steps on random tokens, watched: what a plan takes in truth.

use std::time::Instant;

use nibble_quant::FloatType;

use super::adamw::AdamW;
use super::backend::{TrainingKernels, Update};
use super::base::{FrozenBase, LoadedBase};
use super::{clip, step};
use crate::adapter::{Adapter, LoraConfig};
use crate::data::{Batch, Document};
use crate::error::{Error, Result};
use crate::ledger::rows::Measured;
use crate::ledger::{self, Phase};
use crate::model::{Model, Randomness, Variant};
use crate::plan::Settings;
use crate::random::Stream;
use crate::system::allocator;

/// What is tried.
pub struct Trial<'a> {
    /// The base model.
    pub base: FrozenBase<'a>,
    /// The plan's.
    pub settings: &'a Settings,
    /// The adapter's.
    pub lora: LoraConfig,
    /// Type of its file.
    pub dtype: FloatType,
    /// Rows of a forward pass.
    pub rows: usize,
    /// Tokens of a row.
    pub length: usize,
}

/// A step that was made.
#[derive(Debug, Clone, Copy)]
pub struct TrialStep {
    /// Counted from 1.
    pub number: u64,
    /// Mean loss of a token.
    pub loss: f64,
    /// Tokens in a second.
    pub tokens_per_second: f64,
    /// Bytes in memory after it, of the process or of the GPU.
    pub used_bytes: u64,
}

impl Trial<'_> {
    /// Loads the model, makes `steps` optimizer steps, one evaluation and one checkpoint of the
    /// adapter, which is deleted again.
    ///
    /// # Errors
    /// `Budget` when there is less memory than planned; those of the backend and the disk.
    pub fn run<K: TrainingKernels>(
        &self,
        kernels: K,
        steps: usize,
        mut on_step: impl FnMut(TrialStep),
    ) -> Result<Measured> {
        let folder = tempfile::tempdir().map_err(|e| {
            let error = Error::io("create a folder in", &std::env::temp_dir(), e);
            error.hint("set `TMPDIR` to a folder that can be written")
        })?;
        let LoadedBase { weights, mut meter, .. } = self.base.load(&kernels)?;
        let random = Randomness { dropout: self.lora.dropout(), ..Randomness::default() };
        let adapter = Adapter::init(self.lora.clone(), self.base.spec, 0)?;
        let (spec, settings) = (self.base.spec.clone(), self.settings.clone());
        let mut model =
            Model::with_kernels(kernels.clone(), spec, weights, settings)?.with_randomness(random);
        model.parameters_mut().load(&adapter);
        let files = adapter.into_files();
        allocator::give_back();
        let batch = self.batch();
        for number in 1..=steps as u64 {
            let start = Instant::now();
            let loss = train_step(&kernels, &mut model, &batch, number)?;
            let tokens_per_second = batch.tokens() as f64 / start.elapsed().as_secs_f64();
            let used_bytes = meter.look(&kernels)?;
            on_step(TrialStep { number, loss, tokens_per_second, used_bytes });
        }
        ledger::enter(Phase::Eval);
        model.evaluate(&batch, Variant::Adapted)?;
        meter.look(&kernels)?;
        ledger::enter(Phase::Save);
        model.parameters().save(&files, folder.path(), self.dtype)?;
        meter.measured(&model)
    }

    /// Rows of the longest length, every token trained.
    fn batch(&self) -> Batch {
        let (stream, length) = (Stream::new(0, "measure"), self.length);
        let id = |index: usize| stream.below(index as u64, self.base.spec.vocab_size as u64) as u32;
        let document = |row: usize| {
            let input_ids: Vec<u32> = (row * length..(row + 1) * length).map(id).collect();
            let labels = input_ids.iter().map(|&id| id as i32).collect();
            Document { input_ids, labels, line: row + 1 }
        };
        Batch::from_documents(&(0..self.rows).map(document).collect::<Vec<_>>())
    }
}

/// Mean loss of a token.
fn train_step<K: TrainingKernels>(
    kernels: &K,
    model: &mut Model<K>,
    batch: &Batch,
    number: u64,
) -> Result<f64> {
    const LEARNING_RATE: f64 = 1e-4;
    ledger::enter(Phase::Forward);
    model.parameters_mut().zero_gradients();
    let targets = batch.num_targets().max(1);
    let loss = model.forward_backward(batch, 1.0 / targets as f32, number)?;
    ledger::enter(Phase::Optimizer);
    let groups = step::rate_groups(model.parameters().tensors(), Default::default());
    let norm = kernels.gradient_norm(model.parameters_mut())?;
    let optimizer = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };
    let update = Update {
        optimizer: &optimizer,
        groups: &groups,
        step: number,
        learning_rate: LEARNING_RATE,
        gradient_scale: clip::gradient_scale(norm, 1.0),
    };
    kernels.update(model.parameters_mut(), &update)?;
    Ok(loss.sum / targets as f64)
}
