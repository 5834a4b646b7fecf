//! What a run has to remember: counters and history in `state.json`, weights and moments in
//! `optimizer.safetensors`, both inside a checkpoint folder.
//!
//! There is no generator state: the order of the data, dropout and initial weights are functions
//! of the seed and of the step.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use super::events::Event;
use super::settings::SettingsEcho;
use super::trainee::Trainee;
use crate::checkpoint::atomic;
use crate::error::{Error, Result};
use crate::model::parameters::{ParameterTensor, Part};

/// Counters and history.
pub const STATE_FILE: &str = "state.json";
/// f32 weights (`master.KEY`) and AdamW's moments (`exp_avg.KEY`, `exp_avg_sq.KEY`).
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// Version of both files' layout.
const FORMAT: u32 = 1;

/// What must not change between the sessions of one run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Identity {
    /// All settings.
    pub settings: SettingsEcho,
    /// SHA-256 of the tokenized training data.
    pub data_sha256: String,
    /// SHA-256 of the tokenized evaluation data.
    pub eval_data_sha256: Option<String>,
    /// Mean loss of the base model on the first tokens: the model's fingerprint.
    pub base_loss: f64,
}

/// The lowest evaluation loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Mean loss per trained token.
    pub eval_loss: f64,
    /// The step that had it.
    pub step: u64,
}

/// Sums since the last log line.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Window {
    /// Sum of the steps' losses.
    pub loss_sum: f64,
    /// Steps.
    pub steps: u64,
    /// Tokens.
    pub tokens: u64,
    /// Seconds.
    pub seconds: f64,
}

/// Where a run stands after some optimizer step.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct TrainState {
    /// Layout of this file.
    pub format: u32,
    /// Optimizer steps made. The next one starts at `epoch` and `epoch_step`.
    pub step: u64,
    /// Optimizer steps of the whole run.
    pub max_steps: u64,
    /// Whole passes over the data.
    pub epoch: u64,
    /// Optimizer steps made in the current pass.
    pub epoch_step: u64,
    /// Tokens that went through the model.
    pub num_input_tokens_seen: u64,
    /// Tokens that carried loss.
    pub num_target_tokens_seen: u64,
    /// Seconds of training.
    pub elapsed_seconds: f64,
    /// Sum of the losses of all steps.
    pub loss_sum: f64,
    /// Sums since the last log line.
    pub window: Window,
    /// The last step after which the evaluation data were scored.
    pub evaluated_step: Option<u64>,
    /// The last step after which sample answers were made.
    pub sampled_step: Option<u64>,
    /// Lowest evaluation loss.
    pub best: Option<Best>,
    /// Evaluations since then.
    pub evaluations_without_improvement: u64,
    /// What the run is.
    pub identity: Identity,
    /// All events so far, except `Start`.
    pub history: Vec<Event>,
}

impl TrainState {
    /// A run that has not begun.
    pub fn new(identity: Identity, max_steps: u64) -> Self {
        TrainState { format: FORMAT, max_steps, identity, ..TrainState::default() }
    }

    /// Writes `state.json` into `folder`.
    ///
    /// # Errors
    /// `Io`.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self)
            .map_err(|e| Error::io("write", folder, std::io::Error::other(e)))?;
        atomic::write_file(&folder.join(STATE_FILE), &text)
    }

    /// Reads `state.json` from `folder`.
    ///
    /// # Errors
    /// `Io`, or `Input` when it is damaged or of another version.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(STATE_FILE);
        let text = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
        let state: TrainState = serde_json::from_slice(&text)
            .map_err(|e| Error::input(format_args!("{}: {e}", path.display())))?;
        if state.format != FORMAT {
            let (path, got) = (path.display(), state.format);
            return Err(Error::input(format_args!("{path} has format {got}, expected {FORMAT}")));
        }
        Ok(state)
    }
}

/// The flat buffers that a checkpoint holds, by the prefix of their keys.
const PARTS: [(&str, Part); 3] =
    [("master", Part::Master), ("exp_avg", Part::FirstMoment), ("exp_avg_sq", Part::SecondMoment)];

/// Writes weights and moments into `folder`.
///
/// # Errors
/// `Io`.
pub fn write_optimizer<M: Trainee>(model: &M, folder: &Path) -> Result<()> {
    let path = folder.join(OPTIMIZER_FILE);
    let tensors = model.tensors().to_vec();
    let mut views = Vec::with_capacity(PARTS.len() * tensors.len());
    let [master, first, second] = PARTS.map(|(_, part)| model.values(part));
    let values = [master?, first?, second?];
    for ((prefix, _), values) in PARTS.iter().zip(&values) {
        for tensor in &tensors {
            let bytes = bytemuck::cast_slice(&values[tensor.range.clone()]);
            let view = TensorView::new(Dtype::F32, tensor.shape.to_vec(), bytes)
                .map_err(|e| write_error(&path, e))?;
            views.push((format!("{prefix}.{}", tensor.name), view));
        }
    }
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize_to_file(views, Some(metadata), &path)
        .map_err(|e| write_error(&path, e))?;
    atomic::finish_file(&path)
}

fn write_error(path: &Path, error: SafeTensorError) -> Error {
    let source = match error {
        SafeTensorError::IoError(source) => source,
        other => std::io::Error::other(other),
    };
    Error::io("write", path, source)
}

/// Reads weights and moments from `folder` and refreshes the working copy.
///
/// # Errors
/// `Io`, or `Input` when the file is damaged or belongs to another adapter.
pub fn read_optimizer<M: Trainee>(model: &mut M, folder: &Path) -> Result<()> {
    let path = folder.join(OPTIMIZER_FILE);
    let bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|e| Error::input(format_args!("{}: {e}", path.display())))?;
    let tensors = model.tensors().to_vec();
    if file.len() != PARTS.len() * tensors.len() {
        let (got, expected) = (file.len(), PARTS.len() * tensors.len());
        return Err(
            Error::input(format_args!("{got} tensors, expected {expected}")).at(path.display())
        );
    }
    let mut values = vec![0.0; tensors.last().map_or(0, |tensor| tensor.range.end)];
    for (prefix, part) in PARTS {
        for tensor in &tensors {
            let key = format!("{prefix}.{}", tensor.name);
            copy(&file, &key, tensor, &mut values[tensor.range.clone()])
                .map_err(|error| error.at(path.display()))?;
        }
        model.set_values(part, &values);
    }
    Ok(())
}

fn copy(file: &SafeTensors, key: &str, tensor: &ParameterTensor, to: &mut [f32]) -> Result<()> {
    let view = file.tensor(key).map_err(|_| Error::input(format_args!("no tensor {key}")))?;
    if view.dtype() != Dtype::F32 || view.shape() != tensor.shape {
        let (dtype, shape) = (view.dtype(), view.shape());
        let expected = tensor.shape;
        return Err(Error::input(format_args!(
            "tensor {key} is {dtype:?} {shape:?}, expected F32 {expected:?}"
        )));
    }
    bytemuck::cast_slice_mut::<f32, u8>(to).copy_from_slice(view.data());
    Ok(())
}
