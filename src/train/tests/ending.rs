//! How a run ends, and with which weights.

use std::fs;

use super::{NEVER, impatient, recipe, session};
use crate::error::Error;
use crate::train::checkpoints;
use crate::train::events::{EndReason, Event};
use crate::train::recipe::Length;

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
