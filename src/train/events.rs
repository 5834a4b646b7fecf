//! What a run tells the world: one [`Event`] per thing that happened, handed to a [`RunLog`].
//!
//! The training loop knows nothing of files or curves; `metrics.jsonl`, `trainer_state.json`,
//! TensorBoard and the report are written by whoever implements [`RunLog`]. Events are plain data
//! and are kept in every checkpoint, so a resumed run starts with the history of the run that it
//! continues, and a log can drop what came after the checkpoint.

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::ledger::rows::Account;

/// Receives the events of one run, in order.
pub trait RunLog {
    /// Takes one event. An error stops the run, with its last checkpoint intact.
    fn record(&mut self, event: &Event) -> Result<()>;
}

/// Keeps every event, for tests.
impl RunLog for Vec<Event> {
    fn record(&mut self, event: &Event) -> Result<()> {
        self.push(event.clone());
        Ok(())
    }
}

/// What happened in a run, a line of its log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The run begins or resumes; always first.
    Start(StartEvent),
    /// `logging_steps` optimizer steps were made.
    Step(StepEvent),
    /// The evaluation set was scored.
    Eval(EvalEvent),
    /// The model was asked to answer a prompt.
    Sample(SampleEvent),
    /// A checkpoint was written.
    Save(SaveEvent),
    /// Memory ran short; the run goes on with smaller passes.
    OutOfMemory(OutOfMemoryEvent),
    /// The run is over; always last, also after an interrupt.
    End(EndEvent),
}

/// The run as it begins.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct StartEvent {
    /// Every setting of the run by its flag's name in snake case, defaults filled in.
    pub settings: serde_json::Value,
    /// The base model as the user named it.
    pub model: String,
    /// What computes, in words.
    #[serde(default)]
    pub device: String,
    /// Optimizer steps of the whole run.
    pub max_steps: u64,
    /// Optimizer steps of one pass over the training data.
    pub steps_per_epoch: u64,
    /// Passes over the training data.
    pub num_train_epochs: f64,
    /// Rows of a forward pass.
    pub train_batch_size: usize,
    /// Forward passes per optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Steps between [`StepEvent`]s.
    pub logging_steps: u64,
    /// Steps between [`EvalEvent`]s.
    pub eval_steps: Option<u64>,
    /// Steps between [`SaveEvent`]s.
    pub save_steps: Option<u64>,
    /// Numbers in the model.
    pub parameters: ParameterCounts,
    /// The data files.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<DataSummary>,
    /// Memory by named part, in bytes, as planned; empty when not planned.
    pub memory_plan: Vec<(String, u64)>,
    /// What the plan does, in words; empty when not planned.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub plan: String,
    /// Mean loss of the base model on the first tokens of the data, before any step.
    pub base_loss: Option<f64>,
    /// The checkpoint's step when the run resumes. Logs drop what they hold after it.
    pub resumed_from_step: Option<u64>,
    /// The events up to `resumed_from_step`, without `Start`, oldest first: a log can be rebuilt
    /// from these alone. Empty for a fresh run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<Event>,
}

/// Numbers in a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ParameterCounts {
    /// Parameters that are trained.
    pub trained: u64,
    /// Parameters of base and adapter together.
    pub total: u64,
}

/// What a run takes from a data file.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct DataSummary {
    /// What the data are for: `training` or `evaluation`.
    pub name: String,
    /// The file as the user named it.
    pub file: String,
    /// Documents.
    pub documents: u64,
    /// Tokens of all documents.
    pub tokens: u64,
    /// Tokens that carry loss.
    pub trained_tokens: u64,
    /// Tokens of the longest document.
    pub longest_document_tokens: u64,
    /// Rows of a forward pass: packed, or one for each document.
    pub rows: u64,
    /// What was left out or looks wrong, in words.
    pub notes: Vec<String>,
}

/// One line of the loss curve.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct StepEvent {
    /// Optimizer steps made, counted from 1.
    pub step: u64,
    /// Passes over the training data, with fraction.
    pub epoch: f64,
    /// Mean loss per trained token since the last `StepEvent`, averaged over steps.
    pub loss: f64,
    /// Share of the trained tokens since the last `StepEvent` that no other token was likelier than.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_token_accuracy: Option<f64>,
    /// Learning rate used by this step.
    pub learning_rate: f64,
    /// Global L2 norm of the gradient of this step, before clipping.
    pub grad_norm: f64,
    /// Tokens that went through the model since the run's first step.
    pub num_input_tokens_seen: u64,
    /// Tokens that carried loss.
    pub num_target_tokens_seen: u64,
    /// Tokens per second since the last `StepEvent`.
    pub tokens_per_second: f64,
    /// Seconds of training, earlier sessions of a resumed run included.
    pub elapsed_seconds: f64,
    /// Resident memory of the process now, in bytes.
    pub rss_bytes: u64,
    /// Memory of the GPU that is in use now, in bytes, by whomever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_bytes: Option<u64>,
}

impl StepEvent {
    /// Memory where the model is.
    pub fn memory_bytes(&self) -> u64 {
        self.gpu_bytes.unwrap_or(self.rss_bytes)
    }
}

/// The evaluation set, scored.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct EvalEvent {
    /// Optimizer steps made.
    pub step: u64,
    /// Passes over the training data, with fraction.
    pub epoch: f64,
    /// Mean loss per trained token.
    pub eval_loss: f64,
    /// Share of the trained tokens that no other token is likelier than.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_mean_token_accuracy: Option<f64>,
    /// Seconds that the evaluation took.
    pub eval_runtime: f64,
    /// Documents in the evaluation set.
    pub num_documents: u64,
    /// Forward passes.
    pub num_batches: u64,
    /// Tokens that carried loss.
    pub num_target_tokens: u64,
    /// Whether this is the lowest evaluation loss so far.
    pub is_best: bool,
}

/// An answer of the model in training.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct SampleEvent {
    /// Optimizer steps made; 0 is the base model.
    pub step: u64,
    /// Passes over the training data, with fraction.
    pub epoch: f64,
    /// What was asked.
    pub prompt: String,
    /// What came back.
    pub completion: String,
}

/// A checkpoint, complete on disk.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct SaveEvent {
    /// Optimizer steps made.
    pub step: u64,
    /// Folder name inside the output folder, such as `checkpoint-100`.
    pub checkpoint: String,
    /// Bytes written.
    pub bytes: u64,
    /// Seconds that saving took.
    pub seconds: f64,
    /// Whether this is the best checkpoint by evaluation loss.
    pub is_best: bool,
}

/// Memory ran short: what was being done is done again with a smaller plan. A step is of the same
/// tokens as before, and its gradient the same sum.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct OutOfMemoryEvent {
    /// Optimizer steps made.
    pub step: u64,
    /// Passes over the training data, with fraction.
    pub epoch: f64,
    /// What could not be had.
    pub reason: String,
    /// Most tokens in a forward pass before.
    pub from_tokens: u64,
    /// Most tokens in a forward pass from now on.
    pub to_tokens: u64,
    /// All that changed, for people.
    #[serde(default)]
    pub change: String,
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// All steps are done.
    #[default]
    Finished,
    /// The evaluation loss did not improve for `early_stopping_patience` evaluations.
    EarlyStopping,
    /// Ctrl-C or SIGTERM; a checkpoint was saved.
    Interrupted,
}

/// The run as it ended.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct EndEvent {
    /// Optimizer steps made.
    pub step: u64,
    /// Passes over the training data, with fraction.
    pub epoch: f64,
    /// Why it ended.
    pub reason: EndReason,
    /// Mean of the step losses of the whole run.
    pub train_loss: f64,
    /// Seconds of training, earlier sessions of a resumed run included.
    pub train_runtime: f64,
    /// Tokens per second over the whole run.
    pub tokens_per_second: f64,
    /// Lowest evaluation loss and the step that had it.
    pub best: Option<(f64, u64)>,
    /// Folder name of the best checkpoint inside the output folder.
    pub best_checkpoint: Option<String>,
    /// Peak resident memory of the process, in bytes.
    pub peak_rss_bytes: u64,
    /// Where the memory was, as planned and as measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Account>,
}

impl Event {
    /// Optimizer steps made when it happened; a resumed run's start counts what was done before.
    pub fn step(&self) -> u64 {
        match self {
            Event::Start(event) => event.resumed_from_step.unwrap_or(0),
            Event::Step(event) => event.step,
            Event::Eval(event) => event.step,
            Event::Sample(event) => event.step,
            Event::Save(event) => event.step,
            Event::OutOfMemory(event) => event.step,
            Event::End(event) => event.step,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_json_object_per_event_and_back() {
        let event = Event::Step(StepEvent { step: 3, loss: 0.1, ..StepEvent::default() });
        let text = serde_json::to_string(&event).unwrap();
        assert!(text.starts_with(r#"{"event":"step","step":3,"epoch":0.0,"loss":0.1,"#), "{text}");
        assert_eq!(serde_json::from_str::<Event>(&text).unwrap(), event);
    }
}
