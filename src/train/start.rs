//! How a run begins: from nothing, or from a checkpoint of the same run.

use std::path::Path;

use super::checkpoints::Found;
use super::checks::{self, FirstSteps};
use super::events::{Event, StartEvent};
use super::feed::Feed;
use super::fingerprint;
use super::optimizer_file;
use super::recipe::Recipe;
use super::settings;
use super::state::{Identity, TrainState};
use super::trainee::Trainee;
use crate::error::{Error, Result};
use crate::model::shortage::until_it_fits;

/// Losses of one model on two machines differ by less than this share in f32; those of two models do not.
const SAME_MODEL: f64 = 1e-4;
/// [`SAME_MODEL`] where one of the two is computed in bf16: tiny models have up to 7e-4.
const SAME_MODEL_IN_BF16: f64 = 5e-3;

/// A run about to take its next step.
pub struct Start {
    /// Where the run stands.
    pub state: TrainState,
    /// What the run's first steps are checked for.
    pub checks: FirstSteps,
    /// Whether another machine computes it now, or in another order, with other rounding.
    pub rounding_differs: bool,
    /// How the run ends elsewhere than it was to, if it does.
    pub other_length: Option<OtherLength>,
}

/// How a resumed run goes on that is to be longer or shorter than before: from its next step on with the
/// learning rates of a run of that length, as transformers does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OtherLength {
    /// Steps of the run, before and now.
    pub max_steps: [u64; 2],
    /// Learning rate of its next step, before and now.
    pub rates: [f64; 2],
}

/// Whether the adapter was just made: its B is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterOrigin {
    /// Fresh.
    Fresh,
    /// Read from a folder.
    Loaded,
}

/// Checks the base model and, for a resumed run, takes weights, moments and counters from `found`.
/// `identity` lacks the base loss and the order of sums; this fills them in. Where memory runs short, the
/// model shrinks.
///
/// # Errors
/// `Numeric` when a fresh adapter changes the loss; `Usage` naming every setting that differs from
/// the run's and changes its numbers; `Input` when model or data are others.
pub fn begin<M: Trainee>(
    model: &mut M,
    recipe: &Recipe,
    feed: &mut Feed,
    mut identity: Identity,
    origin: AdapterOrigin,
    found: Option<Found>,
) -> Result<Start> {
    let fresh = origin == AdapterOrigin::Fresh;
    let probe = checks::probe(&feed.batch(0, 0));
    identity.base_loss = until_it_fits(
        model,
        |model| match fresh && recipe.self_checks {
            true => checks::base_loss_under_fresh_adapter(model, &probe),
            false => checks::base_loss(model, &probe),
        },
        |model, message| model.shrink_or(message).map(drop),
    )?;
    identity.sum_order = model.sum_order();
    let max_steps = recipe.max_steps(feed.num_batches());
    let Some(found) = found else {
        let checks = if fresh { FirstSteps::default() } else { FirstSteps::done() };
        let state = TrainState::new(identity, max_steps);
        return Ok(Start { state, checks, rounding_differs: false, other_length: None });
    };
    let saved = found.event();
    let Found { folder, mut state } = found;
    compare(&state.identity, &identity)?;
    let is_save = |event: &Event| matches!(event, Event::Save(save) if save.step == saved.step);
    if !state.history.iter().any(is_save) {
        state.history.push(Event::Save(saved));
    }
    let was = std::mem::replace(&mut state.identity, identity);
    let now = &state.identity;
    let added_otherwise = was.sum_order.is_some_and(|order| Some(order) != now.sum_order);
    let rounding_differs = added_otherwise || was.base_loss.to_bits() != now.base_loss.to_bits();
    let max_steps = [std::mem::replace(&mut state.max_steps, max_steps), max_steps];
    let rates = max_steps.map(|max_steps| recipe.schedule(max_steps).rate(state.step));
    let other_length = (max_steps[0] != max_steps[1]).then_some(OtherLength { max_steps, rates });
    optimizer_file::read(model, &folder)?;
    Ok(Start { state, checks: FirstSteps::done(), rounding_differs, other_length })
}

/// The first event of the run's logs; `introduction` says what is not known here.
pub fn start_event(
    introduction: StartEvent,
    state: &TrainState,
    recipe: &Recipe,
    feed: &Feed,
    model: &Path,
) -> StartEvent {
    let steps_per_epoch = recipe.steps_per_epoch(feed.num_batches());
    StartEvent {
        settings: settings::to_json(&state.identity.settings),
        model: model.display().to_string(),
        max_steps: state.max_steps,
        steps_per_epoch,
        num_train_epochs: state.max_steps as f64 / steps_per_epoch as f64,
        train_batch_size: recipe.per_device_train_batch_size,
        gradient_accumulation_steps: recipe.gradient_accumulation_steps,
        logging_steps: recipe.logging_steps,
        eval_steps: recipe.evaluation.steps,
        save_steps: Some(recipe.saving.steps),
        base_loss: Some(state.identity.base_loss),
        resumed_from_step: (state.step > 0).then_some(state.step),
        history: state.history.clone(),
        ..introduction
    }
}

/// Whether `now` continues the run that was `was`.
///
/// # Errors
/// `Usage` or `Input` naming what differs.
pub fn compare(was: &Identity, now: &Identity) -> Result<()> {
    let changes = settings::changes(&was.settings, &now.settings);
    if !changes.is_empty() {
        return Err(Error::usage(format_args!(
            "`--resume` with other settings would not continue the same run: {}",
            changes.join("; ")
        ))
        .hint("leave them out to continue, or start another run in another `--out`"));
    }
    let different = |what: &str| {
        Error::input(format_args!("the {what} is not what this run began with")).hint(
            "give the original; `--init-adapter` with this run's adapter trains it on others, in \
                 another `--out`",
        )
    };
    if was.data_sha256 != now.data_sha256 {
        return Err(different("training data"));
    }
    if was.eval_data_sha256 != now.eval_data_sha256 {
        return Err(different("evaluation data"));
    }
    if !fingerprint::may_be_same(&was.base_fingerprint, &now.base_fingerprint) {
        return Err(different("base model, by its weights,"));
    }
    let most = if was.bf16 || now.bf16 { SAME_MODEL_IN_BF16 } else { SAME_MODEL };
    if (was.base_loss - now.base_loss).abs() > most * was.base_loss.abs() {
        let (was, now) = (was.base_loss, now.base_loss);
        let what = format_args!("base model (loss {now:.4} on the first tokens, then {was:.4})");
        return Err(different(&what.to_string()));
    }
    Ok(())
}
