//! What a run has to remember: counters and history in `state.json`, weights and moments in
//! `optimizer.safetensors` ([`super::optimizer_file`]), both inside a checkpoint folder.
//!
//! There is no generator state: the order of the data, dropout and initial weights are functions
//! of the seed and of the step.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize};

use super::events::Event;
use super::settings::SettingsEcho;
use crate::checkpoint::atomic;
use crate::error::{Error, Result};
use crate::plan::SumOrder;

/// Counters and history.
pub const STATE_FILE: &str = "state.json";
/// Version of [`STATE_FILE`]'s layout.
const FORMAT: u32 = 2;

/// What every version's file has.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

/// What must not change between the sessions of one run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Identity {
    /// All settings.
    pub settings: SettingsEcho,
    /// SHA-256 of the tokenized training data.
    pub data_sha256: String,
    /// SHA-256 of the tokenized evaluation data.
    pub eval_data_sha256: Option<String>,
    /// Mean loss of the base model on the first tokens.
    pub base_loss: f64,
    /// [`fingerprint`](super::fingerprint) of the base model's weights; empty in what older versions wrote.
    #[serde(default)]
    pub base_fingerprint: Vec<f32>,
    /// Whether the base loss was computed in bf16, as on every GPU.
    #[serde(default)]
    pub bf16: bool,
    /// How the run's plan adds up; a session that has to do otherwise goes on with other last bits.
    #[serde(default, deserialize_with = "if_it_is_known")]
    pub sum_order: Option<SumOrder>,
}

/// What another version wrote is no reason not to go on.
fn if_it_is_known<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<SumOrder>, D::Error> {
    Ok(serde_json::from_value(serde_json::Value::deserialize(deserializer)?).ok())
}

/// The lowest evaluation loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Mean loss per trained token.
    pub eval_loss: f64,
    /// The step that had it.
    pub step: u64,
}

/// Sums over the steps since the last log line.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct LogSums {
    /// Sum of the steps' losses.
    pub loss_sum: f64,
    /// Steps.
    pub steps: u64,
    /// Tokens that carried loss.
    #[serde(default)]
    pub targets: u64,
    /// Those of them that no other token was likelier than.
    #[serde(default)]
    pub hits: u64,
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
    /// Sums over the steps since the last log line.
    pub log_sums: LogSums,
    /// The last step after which the evaluation data were scored.
    pub evaluated_step: Option<u64>,
    /// The last step after which sample answers were made.
    pub sampled_step: Option<u64>,
    /// Lowest evaluation loss.
    pub best: Option<Best>,
    /// Evaluations since one was lower than the best by the threshold.
    pub evaluations_without_improvement: u64,
    /// What the run is.
    pub identity: Identity,
    /// All events so far, except `Start`.
    pub history: Vec<Event>,
}

impl LogSums {
    /// Share of the trained tokens that no other token was likelier than.
    pub fn token_accuracy(&self) -> f64 {
        self.hits as f64 / self.targets.max(1) as f64
    }

    /// Speed since the last log line.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds.max(f64::MIN_POSITIVE)
    }
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
        let damaged = |e| Error::input(format_args!("{}: {e}", path.display()));
        let Format { format } = serde_json::from_slice(&text).map_err(damaged)?;
        if format != FORMAT {
            let path = path.display();
            return Err(Error::input(format_args!(
                "{path} has format {format}, expected {FORMAT}"
            ))
            .hint("another version of Nibble wrote it, and can go on with it"));
        }
        serde_json::from_slice(&text).map_err(damaged)
    }
}
