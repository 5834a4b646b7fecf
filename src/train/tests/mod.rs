//! The loop as a whole, on a model that is checked by hand.

mod ending;
mod resuming;
mod saving;
mod shortage;

use std::cell::Cell;
use std::io::ErrorKind;
use std::path::Path;

use super::adamw::AdamW;
use super::checkpoints;
use super::events::{EndReason, EvalEvent, Event, RunLog, StepEvent};
use super::feed::Feed;
use super::progress::Progress;
use super::recipe::{EvalRecipe, Length, Recipe, SaveRecipe};
use super::schedule::{SchedulerType, Warmup};
use super::scheduler_kwargs::SchedulerKwargs;
use super::settings::SettingsEcho;
use super::start::{AdapterOrigin, begin};
use super::state::Identity;
use super::toy::{Toy, documents};
use super::trainer::{RunContext, Trainer};
use crate::adapter::LoraPlus;
use crate::data::Batch;
use crate::error::{Error, Message, Result};

/// 13 batches in steps of 3, so that each epoch ends with a short one; evaluation every 2 steps.
pub(in crate::train) fn recipe() -> Recipe {
    Recipe {
        per_device_train_batch_size: 1,
        gradient_accumulation_steps: 3,
        learning_rate: 0.05,
        scheduler_type: SchedulerType::Cosine,
        warmup: Warmup::Ratio(0.1),
        min_lr_rate: 0.1,
        scheduler_kwargs: SchedulerKwargs::default(),
        length: Length::Epochs(3.0),
        max_grad_norm: 0.5,
        optimizer: AdamW { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.01 },
        loraplus: LoraPlus { lr_ratio: 4.0 },
        logging_steps: 2,
        evaluation: EvalRecipe {
            steps: Some(2),
            patience: None,
            threshold: 0.0,
            load_best_at_end: false,
        },
        saving: SaveRecipe { steps: 3, total_limit: 2 },
        sample_steps: Some(4),
        self_checks: true,
        longest_first_step: true,
    }
}

/// A recipe that overshoots, and stops when two evaluations in a row are no better.
fn impatient() -> Recipe {
    let mut recipe = recipe();
    recipe.learning_rate = 1.0;
    recipe.scheduler_type = SchedulerType::Constant;
    recipe.evaluation.patience = Some(2);
    recipe
}

fn feed() -> Feed {
    let documents = documents(&[4, 6, 9, 3, 5, 8, 7, 4, 6, 5, 9, 3, 4]);
    let rows = (0..documents.len()).map(|index| vec![index]).collect();
    Feed::new(documents, rows, 1, Some(11)).unwrap()
}

fn settings(pairs: &[(&str, &str)]) -> SettingsEcho {
    pairs.iter().map(|(name, value)| (name.to_string(), vec![value.to_string()])).collect()
}

/// The run of `feed`'s data with a seed of 1.
fn identity(feed: &Feed) -> Identity {
    Identity {
        settings: settings(&[("seed", "1")]),
        data_sha256: feed.fingerprint(),
        ..Identity::default()
    }
}

/// What one session leaves behind.
struct Session {
    result: Result<EndReason>,
    toy: Toy,
    events: Vec<Event>,
    /// How often the run asked whether to stop.
    questions: usize,
}

/// Runs until the end, or until `stop` has been asked `questions` times.
fn session(out: &Path, recipe: &Recipe, questions: usize, resume: bool) -> Session {
    session_of(Toy::new(), out, recipe, questions, resume)
}

fn session_of(toy: Toy, out: &Path, recipe: &Recipe, questions: usize, resume: bool) -> Session {
    session_on(feed(), toy, out, recipe, questions, resume)
}

fn session_on(
    mut feed: Feed,
    mut toy: Toy,
    out: &Path,
    recipe: &Recipe,
    questions: usize,
    resume: bool,
) -> Session {
    let identity = identity(&feed);
    let found = if resume { checkpoints::newest(out, &mut |_| ()) } else { None };
    let origin = AdapterOrigin::Fresh;
    let start = match begin(&mut toy, recipe, &mut feed, identity, origin, found) {
        Ok(start) => start,
        Err(error) => return Session { result: Err(error), toy, events: Vec::new(), questions: 0 },
    };
    let mut events = start.state.history.clone();
    let evaluation = [Batch::from_documents(&documents(&[12, 9])[1..])];
    let asked = Cell::new(0);
    let context = RunContext {
        recipe,
        feed: &mut feed,
        evaluation: &evaluation,
        prompts: &["what".to_string()],
        out,
        log: &mut events,
        progress: &Progress::silent(),
        stop: &|| {
            asked.set(asked.get() + 1);
            asked.get() > questions
        },
    };
    let result = Trainer::new(&mut toy, context, start.state, start.checks).run();
    let result = result.map(|end| end.reason);
    Session { result, toy, events, questions: asked.get() }
}

const NEVER: usize = usize::MAX;

/// Everything of the history that does not depend on the clock.
fn numbers(events: &[Event]) -> Vec<Event> {
    let timeless = |event: &Event| match event {
        Event::Step(event) => Some(Event::Step(StepEvent {
            tokens_per_second: 0.0,
            elapsed_seconds: 0.0,
            rss_bytes: 0,
            gpu_bytes: None,
            ..event.clone()
        })),
        Event::Eval(event) => Some(Event::Eval(EvalEvent { eval_runtime: 0.0, ..event.clone() })),
        Event::Sample(_) => Some(event.clone()),
        Event::Start(_) | Event::Save(_) | Event::OutOfMemory(_) | Event::End(_) => None,
    };
    events.iter().filter_map(timeless).collect()
}

/// Steps of the checkpoints that were told of.
fn saves(events: &[Event]) -> Vec<u64> {
    let saves = events.iter().filter(|event| matches!(event, Event::Save(_)));
    saves.map(Event::step).collect()
}

#[test]
fn training_lowers_the_loss() {
    let out = tempfile::tempdir().unwrap();
    let run = session(out.path(), &recipe(), NEVER, false);
    assert_eq!(run.result.unwrap(), EndReason::Finished);
    let steps = numbers(&run.events).into_iter().filter_map(|event| match event {
        Event::Step(event) => Some(event),
        _ => None,
    });
    let steps: Vec<_> = steps.collect();
    let logged: Vec<u64> = steps.iter().map(|event| event.step).collect();
    assert_eq!(logged, [2, 4, 6, 8, 10, 12, 14, 15], "15 steps: 3 epochs of ⌈13 / 3⌉");
    assert!(steps[7].loss < 0.95 * steps[0].loss, "{} {}", steps[0].loss, steps[7].loss);
    assert_eq!(steps[7].epoch, 3.0);
    assert_eq!(steps[4].epoch, 2.0, "a short last step ends the epoch");
    assert!(out.path().join("adapter_model.safetensors").exists());
    assert!(!out.path().join(".adapter.partial").exists());
}

/// A log that cannot be written is no reason to lose steps.
#[test]
fn a_log_that_cannot_be_written_costs_no_step() {
    let out = tempfile::tempdir().unwrap();
    let mut recipe = recipe();
    (recipe.evaluation.steps, recipe.sample_steps) = (None, None);
    recipe.saving = SaveRecipe { steps: 100, total_limit: 2 };
    let (mut toy, mut feed) = (Toy::new(), feed());
    let identity = Identity { data_sha256: feed.fingerprint(), ..Identity::default() };
    let fresh = AdapterOrigin::Fresh;
    let start = begin(&mut toy, &recipe, &mut feed, identity, fresh, None).unwrap();
    let context = RunContext {
        recipe: &recipe,
        feed: &mut feed,
        evaluation: &[],
        prompts: &[],
        out: out.path(),
        log: &mut RefusingLog { from_step: 8 },
        progress: &Progress::silent(),
        stop: &|| false,
    };
    let error = Trainer::new(&mut toy, context, start.state, start.checks).run().unwrap_err();
    assert!(error.to_string().contains("cannot write the log"), "{error}");
    let state = checkpoints::newest(out.path(), &mut |_| ()).unwrap().state;
    let step = |event: &Event| matches!(event, Event::Step(_)).then(|| event.step());
    let logged: Vec<u64> = state.history.iter().filter_map(step).collect();
    assert_eq!((state.step, logged), (8, vec![2, 4, 6, 8]));
}

struct RefusingLog {
    from_step: u64,
}

impl RunLog for RefusingLog {
    fn record(&mut self, event: &Event) -> Result<()> {
        if event.step() < self.from_step {
            return Ok(());
        }
        Err(Error::Io(Message::new("cannot write the log"), ErrorKind::PermissionDenied.into()))
    }
}

#[test]
fn numbers_that_go_wrong_stop_the_run_and_name_the_way_back() {
    let out = tempfile::tempdir().unwrap();
    session(out.path(), &recipe(), 40, false);
    let newest = checkpoints::steps(out.path())[0];
    let mut toy = Toy::new();
    toy.poison = Some(documents(&[4, 6, 9])[2].input_ids[0]);
    let run = session_of(toy, out.path(), &recipe(), NEVER, true);
    let error = run.result.unwrap_err();
    assert!(matches!(error, Error::Numeric(_)));
    let text = error.to_string();
    assert!(text.starts_with("step ") && text.contains("toy.lora_B.weight"), "{text}");
    assert!(text.contains("(lines 3)"), "{text}");
    let found = checkpoints::newest(out.path(), &mut |_| ()).unwrap();
    assert!(found.state.step >= newest);
    let way = format!(
        "hint: try a lower `--learning-rate`, or look at these records with `nibble data --show`; \
         `--init-adapter {}` goes on from the last checkpoint with other settings, in another `--out`",
        found.folder.display()
    );
    assert!(text.ends_with(&way), "{text}");
}
