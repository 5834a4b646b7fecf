//! The settings of the training loop, after all checks: plain numbers, no files.

use super::adamw::AdamW;
use super::schedule::{Schedule, SchedulerType, Warmup};
use super::scheduler_kwargs::SchedulerKwargs;
use super::state::TrainState;
use crate::adapter::LoraPlus;

/// When a run is over.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Length {
    /// After this many optimizer steps.
    Steps(u64),
    /// After this many passes over the data.
    Epochs(f64),
}

impl Length {
    /// Optimizer steps, of which a pass over the data has `steps_per_epoch`.
    pub fn steps(self, steps_per_epoch: u64) -> u64 {
        match self {
            Length::Steps(steps) => steps,
            Length::Epochs(epochs) => (epochs * steps_per_epoch as f64).ceil() as u64,
        }
    }
}

/// How often something is done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Every {
    /// After so many optimizer steps.
    Steps(u64),
    /// After this share of all steps, rounded up, as transformers does.
    Ratio(f64),
    /// After a pass over the data.
    Epoch,
    /// At the end of the run alone.
    Run,
}

impl Every {
    /// Optimizer steps from one time to the next, in a run of `max_steps`; 1 at least.
    pub fn steps(self, max_steps: u64, steps_per_epoch: u64) -> u64 {
        let steps = match self {
            Every::Steps(steps) => steps,
            Every::Ratio(ratio) => (max_steps as f64 * ratio).ceil() as u64,
            Every::Epoch => steps_per_epoch,
            Every::Run => max_steps,
        };
        steps.max(1)
    }
}

/// Optimizer steps in a pass over `num_batches` forward passes; the last one may be short.
pub fn steps_per_epoch(num_batches: usize, gradient_accumulation_steps: usize) -> u64 {
    num_batches.div_ceil(gradient_accumulation_steps).max(1) as u64
}

/// Settings of the training loop; the flags of `nibble train` tell what each is for.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// Rows in a forward pass.
    pub per_device_train_batch_size: usize,
    /// Forward passes in an optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Course of the learning rate.
    pub scheduler_type: SchedulerType,
    /// Length of the rise.
    pub warmup: Warmup,
    /// Floor of schedules that have one.
    pub min_lr_rate: f64,
    /// What else the schedule is told.
    pub scheduler_kwargs: SchedulerKwargs,
    /// Length of the run.
    pub length: Length,
    /// Clipping; 0 is off.
    pub max_grad_norm: f64,
    /// Optimizer.
    pub optimizer: AdamW,
    /// Learning rate of B over that of A.
    pub loraplus: LoraPlus,
    /// Steps between log lines.
    pub logging_steps: u64,
    /// Evaluation.
    pub evaluation: EvalRecipe,
    /// Checkpoints.
    pub saving: SaveRecipe,
    /// Steps between sample answers; before the first and after the last step there are some anyway.
    pub sample_steps: Option<u64>,
    /// Whether the first steps are checked for dead parameters.
    pub self_checks: bool,
    /// Whether the largest batch is tried before the first step.
    pub longest_first_step: bool,
}

/// Settings of evaluation.
#[derive(Debug, Clone, PartialEq)]
pub struct EvalRecipe {
    /// Steps between evaluations; without them, once at the end.
    pub steps: Option<u64>,
    /// Evaluations without improvement before the run stops.
    pub patience: Option<u64>,
    /// Improvement that counts.
    pub threshold: f64,
    /// End with the best weights.
    pub load_best_at_end: bool,
}

impl EvalRecipe {
    /// Evaluations from step `step` on, the one after it included, to the last step, which always has one.
    pub fn left(&self, step: u64, last: u64) -> u64 {
        let Some(every) = self.steps else { return 1 };
        let before = step.saturating_sub(1) / every;
        last / every - before + u64::from(!last.is_multiple_of(every))
    }
}

/// Settings of checkpoints.
#[derive(Debug, Clone, PartialEq)]
pub struct SaveRecipe {
    /// Steps between checkpoints.
    pub steps: u64,
    /// How many are kept, beside the best.
    pub total_limit: usize,
}

impl Recipe {
    /// [`steps_per_epoch`] of this run.
    pub fn steps_per_epoch(&self, num_batches: usize) -> u64 {
        steps_per_epoch(num_batches, self.gradient_accumulation_steps)
    }

    /// Optimizer steps of the whole run.
    pub fn max_steps(&self, num_batches: usize) -> u64 {
        self.length.steps(self.steps_per_epoch(num_batches))
    }

    /// Whether the evaluation loss has not fallen for too long.
    pub fn is_out_of_patience(&self, state: &TrainState) -> bool {
        let patience = self.evaluation.patience;
        patience.is_some_and(|patience| state.evaluations_without_improvement >= patience)
    }

    /// The learning rate of every step of a run of `max_steps`.
    pub fn schedule(&self, max_steps: u64) -> Schedule {
        Schedule {
            scheduler_type: self.scheduler_type,
            learning_rate: self.learning_rate,
            warmup_steps: self.warmup.steps(max_steps),
            max_steps,
            min_lr_rate: self.min_lr_rate,
            kwargs: self.scheduler_kwargs.clone(),
        }
    }
}
