//! The loop as a whole, on a model that is checked by hand.

mod shortage;

use std::cell::Cell;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use super::adamw::AdamW;
use super::checkpoints::{self, Found};
use super::events::{EndReason, EvalEvent, Event, RunLog, StepEvent};
use super::feed::Feed;
use super::progress::Progress;
use super::recipe::{EvalRecipe, Length, Recipe, SaveRecipe};
use super::schedule::{SchedulerType, Warmup};
use super::settings::SettingsEcho;
use super::start::{AdapterOrigin, begin};
use super::state::Identity;
use super::toy::{Toy, documents};
use super::trainer::{RunContext, Trainer};
use crate::adapter::LoraPlus;
use crate::data::Batch;
use crate::error::{Error, Message, Result};
use crate::plan::Settings;

/// 13 batches in windows of 3, so that each epoch ends with a short one; evaluation every 2 steps.
fn recipe() -> Recipe {
    Recipe {
        per_device_train_batch_size: 1,
        gradient_accumulation_steps: 3,
        learning_rate: 0.05,
        scheduler_type: SchedulerType::Cosine,
        warmup: Warmup::Ratio(0.1),
        min_lr_rate: 0.1,
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

/// One that overshoots, and stops when two evaluations in a row are no better.
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
    let identity = Identity {
        settings: settings(&[("seed", "1")]),
        data_sha256: feed.fingerprint(),
        ..Identity::default()
    };
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
    assert_eq!(steps[4].epoch, 2.0, "a short last window ends the epoch");
    assert!(out.path().join("adapter_model.safetensors").exists());
    assert!(!out.path().join(".adapter.partial").exists());
}

#[test]
fn a_run_stopped_anywhere_continues_bit_for_bit() {
    let whole_out = tempfile::tempdir().unwrap();
    let whole = session(whole_out.path(), &recipe(), NEVER, false);
    let adapter = |out: &Path| fs::read(out.join("adapter_model.safetensors")).unwrap();
    // The last question is asked by the evaluation after the last step.
    let last = whole.questions - 1;
    for questions in [1, 3, 4, 5, 9, 17, 30, 44, last - 1, last] {
        let out = tempfile::tempdir().unwrap();
        let first = session(out.path(), &recipe(), questions, false);
        assert!(matches!(first.result, Err(Error::Interrupted(_))), "{questions}");
        assert!(!out.path().join("adapter_config.json").exists(), "{questions}: not finished");
        let second = session(out.path(), &recipe(), NEVER, true);
        assert_eq!(second.result.unwrap(), EndReason::Finished);
        assert_eq!(second.toy.master, whole.toy.master, "stopped after {questions} questions");
        assert_eq!(numbers(&second.events), numbers(&whole.events), "{questions}");
        let saved = saves(&second.events);
        assert!(saves(&whole.events).iter().all(|step| saved.contains(step)), "{saved:?}");
        assert!(saved.is_sorted_by(|a, b| a < b), "each is told of once: {saved:?}");
        assert_eq!(adapter(out.path()), adapter(whole_out.path()));
        let last = |out: &Path| fs::read(out.join("checkpoint-15/optimizer.safetensors")).unwrap();
        assert_eq!(last(out.path()), last(whole_out.path()), "moments, too");
    }
}

#[test]
fn a_damaged_checkpoint_is_skipped_and_reported() {
    let whole_out = tempfile::tempdir().unwrap();
    let whole = session(whole_out.path(), &recipe(), NEVER, false);
    for file in ["optimizer.safetensors", "state.json", "adapter_model.safetensors", "SHA256SUMS"] {
        let out = tempfile::tempdir().unwrap();
        session(out.path(), &recipe(), 40, false);
        let [newest, previous, ..] = checkpoints::steps(out.path())[..] else { panic!() };
        let path = out.path().join(checkpoints::name(newest)).join(file);
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, bytes).unwrap();
        let mut reports = Vec::new();
        let found = checkpoints::newest(out.path(), &mut |text| reports.push(text.to_string()));
        assert_eq!(found.unwrap().state.step, previous, "{file}");
        assert_eq!(reports.len(), 1);
        assert!(reports[0].starts_with(&format!("skipping checkpoint-{newest}: ")), "{reports:?}");
        let resumed = session(out.path(), &recipe(), NEVER, true);
        assert_eq!(resumed.toy.master, whole.toy.master);
    }
}

#[test]
fn a_checkpoint_with_a_missing_file_is_not_used() {
    let out = tempfile::tempdir().unwrap();
    session(out.path(), &recipe(), 40, false);
    let steps = checkpoints::steps(out.path());
    for &step in &steps {
        let found = checkpoints::newest(out.path(), &mut |_| ());
        assert_eq!(found.map(|found| found.state.step), Some(step));
        fs::remove_file(out.path().join(checkpoints::name(step)).join("state.json")).unwrap();
    }
    assert!(checkpoints::newest(out.path(), &mut |_| ()).is_none());
}

/// What the sums name may be anything: a device has no end.
#[cfg(unix)]
#[test]
fn a_checkpoint_whose_sums_name_no_file_of_its_own_is_not_used() {
    let out = tempfile::tempdir().unwrap();
    session(out.path(), &recipe(), 40, false);
    let folder = checkpoints::newest(out.path(), &mut |_| ()).unwrap().folder;
    let sums = folder.join(checkpoints::SUMS_FILE);
    let sound = fs::read_to_string(&sums).unwrap();
    std::os::unix::fs::symlink("/dev/zero", folder.join("endless")).unwrap();
    for name in ["/dev/zero", "../state.json", "endless"] {
        fs::write(&sums, format!("{sound}00  {name}\n")).unwrap();
        let error = checkpoints::verify(&folder).unwrap_err().to_string();
        assert!(error.contains(&format!("names `{name}`, which is no file")), "{error}");
    }
}

/// A run that goes back behind damaged checkpoints keeps those that it makes there.
#[test]
fn damaged_checkpoints_displace_none_that_is_made_behind_them() {
    let out = tempfile::tempdir().unwrap();
    let mut recipe = recipe();
    recipe.evaluation.steps = None;
    recipe.saving = SaveRecipe { steps: 3, total_limit: 3 };
    session(out.path(), &recipe, NEVER, false);
    assert_eq!(checkpoints::steps(out.path()), [15, 12, 9]);
    for step in [15, 12] {
        fs::remove_file(out.path().join(checkpoints::name(step)).join("state.json")).unwrap();
    }
    recipe.saving = SaveRecipe { steps: 1, total_limit: 2 };
    let second = session(out.path(), &recipe, 8, true);
    assert!(matches!(second.result, Err(Error::Interrupted(_))));
    let found = checkpoints::newest(out.path(), &mut |_| ()).unwrap().state.step;
    assert!(found > 9 && found < 15, "{found}");
    let steps = checkpoints::steps(out.path());
    let own: Vec<u64> = steps.iter().copied().filter(|step| *step <= found).take(2).collect();
    assert_eq!(own, [found, found - 1]);
    for step in own {
        checkpoints::verify(&out.path().join(checkpoints::name(step))).unwrap();
    }
    assert!(steps.contains(&15), "what cannot be read stays: {steps:?}");
}

/// Otherwise a run that is made longer has forgotten which weights were the best.
#[test]
fn the_last_checkpoint_knows_all_that_was_found_out() {
    let mut patient = recipe();
    patient.evaluation.steps = None;
    for recipe in [patient, impatient()] {
        // Those after 15 steps, those after 3, and those after what an evaluation asks for.
        for steps in [1, 5, 15, 4, 100] {
            let out = tempfile::tempdir().unwrap();
            let saving = SaveRecipe { steps, total_limit: 1 };
            let recipe = Recipe { sample_steps: None, saving, ..recipe.clone() };
            let run = session(out.path(), &recipe, NEVER, false);
            let state = checkpoints::newest(out.path(), &mut |_| ()).unwrap().state;
            let Some(Event::End(end)) = run.events.last() else { panic!() };
            assert_eq!((state.step, state.sampled_step), (end.step, Some(end.step)), "{steps}");
            assert_eq!(state.evaluated_step, Some(end.step), "{steps}");
            assert_eq!(state.best.map(|best| (best.eval_loss, best.step)), end.best);
            assert_eq!(numbers(&state.history), numbers(&run.events), "{steps}");
            let saved = saves(&run.events);
            assert!(saved.is_sorted_by(|a, b| a < b), "each is told of once: {saved:?}");
            let last = run.events.iter().rev().find_map(|event| match event {
                Event::Save(save) => Some(save),
                _ => None,
            });
            let is_best = state.best.is_some_and(|best| best.step == end.step);
            assert_eq!(last.map(|save| (save.step, save.is_best)), Some((end.step, is_best)));
            let longer = Recipe { length: Length::Steps(end.step + 1), ..recipe };
            let longer = session(out.path(), &longer, NEVER, true);
            let saved = saves(&longer.events);
            assert!(saved.is_sorted_by(|a, b| a < b), "not by a session later: {saved:?}");
        }
    }
}

/// A run whose adapter could not be put into its folder is not over.
#[test]
fn the_end_comes_after_the_adapter() {
    let out = tempfile::tempdir().unwrap();
    let obstacle = out.path().join(".adapter.partial");
    fs::write(&obstacle, "").unwrap();
    let first = session(out.path(), &recipe(), NEVER, false);
    assert!(matches!(first.result, Err(Error::Io { .. })));
    assert!(!first.events.iter().any(|event| matches!(event, Event::End(_))));
    fs::remove_file(obstacle).unwrap();
    let second = session(out.path(), &recipe(), NEVER, true);
    assert_eq!(second.result.unwrap(), EndReason::Finished);
    assert_eq!(second.toy.master, first.toy.master);
    assert!(out.path().join("adapter_model.safetensors").exists());
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

/// The same step may be saved again: a session may end between the renames of that.
#[test]
fn a_checkpoint_that_was_moved_away_comes_back() {
    let out = tempfile::tempdir().unwrap();
    session(out.path(), &recipe(), 40, false);
    let before = checkpoints::steps(out.path());
    let (name, other) = (checkpoints::name(before[0]), checkpoints::name(before[1]));
    let at = |name: &str| out.path().join(name);
    fs::rename(at(&name), at(&format!(".{name}.replaced"))).unwrap();
    fs::create_dir(at(&format!(".{name}.partial"))).unwrap();
    fs::create_dir(at(&format!(".{other}.replaced"))).unwrap();
    checkpoints::clear_leftovers(out.path());
    assert_eq!(checkpoints::steps(out.path()), before);
    checkpoints::verify(&at(&name)).unwrap();
    checkpoints::verify(&at(&other)).unwrap();
    let names = fs::read_dir(out.path()).unwrap().flatten().map(|entry| entry.file_name());
    assert!(!names.into_iter().any(|name| name.to_string_lossy().starts_with(".checkpoint")));
}

#[test]
fn the_newest_and_the_best_survive_thinning_out() {
    let out = tempfile::tempdir().unwrap();
    let mut recipe = recipe();
    // a rate that grows until it overshoots: the best evaluation is an early one
    recipe.learning_rate = 8.0;
    recipe.scheduler_type = SchedulerType::ConstantWithWarmup;
    recipe.warmup = Warmup::Steps(40);
    recipe.saving = SaveRecipe { steps: 1, total_limit: 2 };
    let run = session(out.path(), &recipe, NEVER, false);
    let Some(Event::End(end)) = run.events.last() else { panic!() };
    let (_, best) = end.best.unwrap();
    assert!(best < 12, "{best}");
    assert_eq!(checkpoints::steps(out.path()), [15, 14, best]);
    assert_eq!(end.best_checkpoint, Some(checkpoints::name(best)));
}

#[test]
fn the_run_stops_when_patience_is_out_and_ends_with_the_best_weights() {
    let out = tempfile::tempdir().unwrap();
    let mut recipe = impatient();
    recipe.evaluation.load_best_at_end = true;
    let run = session(out.path(), &recipe, NEVER, false);
    assert_eq!(run.result.unwrap(), EndReason::EarlyStopping);
    let Some(Event::End(end)) = run.events.last() else { panic!() };
    let (_, best) = end.best.unwrap();
    assert_eq!(end.step, best + 4, "two evaluations later");
    let name = "adapter_model.safetensors";
    let in_best = fs::read(out.path().join(checkpoints::name(best)).join(name)).unwrap();
    assert_eq!(fs::read(out.path().join(name)).unwrap(), in_best);
    let in_last = fs::read(out.path().join(checkpoints::name(end.step)).join(name)).unwrap();
    assert_ne!(in_best, in_last);
}

#[test]
fn best_weights_that_were_damaged_since_leave_the_last_ones() {
    let out = tempfile::tempdir().unwrap();
    let mut recipe = impatient();
    recipe.evaluation.load_best_at_end = true;
    session(out.path(), &recipe, NEVER, false);
    let state = checkpoints::newest(out.path(), &mut |_| ()).unwrap().state;
    let [best, last] = [state.best.unwrap().step, state.step].map(checkpoints::name);
    assert_ne!(best, last);
    let at = |name: &str| out.path().join(name);
    fs::remove_file(at(&best).join("adapter_model.safetensors")).unwrap();
    fs::remove_file(at("adapter_model.safetensors")).unwrap();
    let again = session(out.path(), &recipe, NEVER, true);
    assert_eq!(again.result.unwrap(), EndReason::EarlyStopping);
    let last = fs::read(at(&last).join("adapter_model.safetensors")).unwrap();
    assert_eq!(fs::read(at("adapter_model.safetensors")).unwrap(), last);
}

#[test]
fn a_run_that_made_all_its_steps_did_not_stop_early() {
    let out = tempfile::tempdir().unwrap();
    let mut recipe = impatient();
    let stopped = session(out.path(), &recipe, NEVER, false);
    let Some(Event::End(end)) = stopped.events.last() else { panic!() };
    assert_eq!(end.reason, EndReason::EarlyStopping);
    let out = tempfile::tempdir().unwrap();
    recipe.length = Length::Steps(end.step);
    let run = session(out.path(), &recipe, NEVER, false);
    assert_eq!(run.result.unwrap(), EndReason::Finished);
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

#[test]
fn a_refused_write_leaves_the_last_checkpoint() {
    let out = tempfile::tempdir().unwrap();
    session(out.path(), &recipe(), 40, false);
    let before = checkpoints::newest(out.path(), &mut |_| ()).unwrap().state;
    let mut state = before.clone();
    state.step += 1;
    let mut toy = Toy::new();
    toy.full_disk = true;
    let error = checkpoints::save(&mut toy, &state, out.path()).unwrap_err();
    let survivor = checkpoints::name(before.step);
    assert!(error.to_string().contains(&format!("{survivor} is intact")), "{error}");
    assert_eq!(checkpoints::newest(out.path(), &mut |_| ()).unwrap().state, before);
    let hidden = fs::read_dir(out.path()).unwrap().flatten();
    assert!(hidden.filter(|e| e.file_name().to_string_lossy().starts_with('.')).count() == 0);
}

fn resume_with(change: impl Fn(&mut Found, &mut Identity)) -> Error {
    let out = tempfile::tempdir().unwrap();
    session(out.path(), &recipe(), 40, false);
    let (mut toy, mut feed) = (Toy::new(), feed());
    let mut identity = Identity {
        settings: settings(&[("seed", "1")]),
        data_sha256: feed.fingerprint(),
        ..Identity::default()
    };
    let mut found = checkpoints::newest(out.path(), &mut |_| ()).unwrap();
    change(&mut found, &mut identity);
    let start = begin(&mut toy, &recipe(), &mut feed, identity, AdapterOrigin::Fresh, Some(found));
    start.map(|_| ()).unwrap_err()
}

#[test]
fn resuming_another_run_is_refused_by_name() {
    let error = resume_with(|_, now| now.settings = settings(&[("seed", "2")]));
    assert!(error.to_string().contains("seed was 1, now 2"), "{error}");
    let error = resume_with(|_, now| now.data_sha256 = "other".into());
    assert!(error.to_string().contains("training data"), "{error}");
    let error = resume_with(|_, now| now.eval_data_sha256 = Some("other".into()));
    assert!(error.to_string().contains("evaluation data"), "{error}");
    for (factor, bf16) in [(1.001, false), (1.01, true)] {
        let error = resume_with(|found, now| {
            found.state.identity.base_loss *= factor;
            now.bf16 = bf16;
        });
        assert!(error.to_string().contains("base model"), "{error}");
    }
}

#[test]
fn a_machine_that_rounds_differently_may_continue_but_is_told() {
    let out = tempfile::tempdir().unwrap();
    session(out.path(), &recipe(), 40, false);
    let start = |factor: f64, bf16: bool| {
        let (mut toy, mut feed) = (Toy::new(), feed());
        let identity = Identity {
            settings: settings(&[("seed", "1")]),
            data_sha256: feed.fingerprint(),
            ..Identity::default()
        };
        let mut found = checkpoints::newest(out.path(), &mut |_| ()).unwrap();
        found.state.identity.base_loss *= factor;
        found.state.identity.bf16 = bf16;
        let origin = AdapterOrigin::Fresh;
        begin(&mut toy, &recipe(), &mut feed, identity, origin, Some(found)).unwrap()
    };
    assert!(!start(1.0, false).rounding_differs);
    assert!(start(1.0 + 1e-6, false).rounding_differs);
    assert!(start(1.001, true).rounding_differs, "from a GPU to the CPU");
}

#[test]
fn a_session_that_adds_up_in_another_order_is_told() {
    let differs = |was: Option<usize>, now: usize| {
        let out = tempfile::tempdir().unwrap();
        session(out.path(), &recipe(), 40, false);
        let (mut toy, mut feed) = (Toy::new(), feed());
        toy.room.0 = now;
        let identity = Identity {
            settings: settings(&[("seed", "1")]),
            data_sha256: feed.fingerprint(),
            ..Identity::default()
        };
        let mut found = checkpoints::newest(out.path(), &mut |_| ()).unwrap();
        let order = |tokens| Settings::of_pass(tokens, 64).sum_order();
        found.state.identity.sum_order = was.map(order);
        let origin = AdapterOrigin::Fresh;
        let start = begin(&mut toy, &recipe(), &mut feed, identity, origin, Some(found)).unwrap();
        assert_eq!(start.state.identity.sum_order, Some(order(now)));
        start.rounding_differs
    };
    assert!(differs(Some(64), 32));
    assert!(!differs(Some(32), 32));
    // Written by a version that did not keep it.
    assert!(!differs(None, 32));
}
