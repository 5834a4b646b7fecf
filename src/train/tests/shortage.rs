//! Memory that runs short in the middle of a run.

use std::path::Path;

use super::{NEVER, feed, numbers, recipe, session_of, session_on};
use crate::error::Error;
use crate::train::checkpoints;
use crate::train::events::{EndReason, Event};
use crate::train::feed::Feed;
use crate::train::start::{AdapterOrigin, begin};
use crate::train::state::Identity;
use crate::train::toy::Toy;
use crate::train::trainee::Shrinkable;

#[test]
fn memory_that_runs_short_shrinks_passes_and_leaves_the_numbers() {
    let mut recipe = recipe();
    recipe.per_device_train_batch_size = 4;
    let (plenty_out, short_out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let run = |out: &Path, there_are: usize| {
        let rows = (0..13).map(|index| vec![index]).collect();
        let feed = Feed::new(feed().documents().to_vec(), rows, 4, Some(11)).unwrap();
        let mut toy = Toy::new();
        toy.room.1 = there_are;
        session_on(feed, toy, out, &recipe, NEVER, false)
    };
    let plenty = run(plenty_out.path(), usize::MAX);
    let short = run(short_out.path(), 18);
    assert_eq!(short.result.unwrap(), EndReason::Finished);
    let told: Vec<_> = short
        .events
        .iter()
        .filter_map(|event| match event {
            Event::OutOfMemory(event) => Some((event.step, event.to_tokens, &*event.reason)),
            _ => None,
        })
        .collect();
    assert_eq!(told, [(0, 32, "no memory"), (0, 16, "no memory")], "and never again");
    for (a, b) in plenty.toy.master.iter().zip(&short.toy.master) {
        assert!((a - b).abs() < 1e-5 * a.abs().max(1.0), "{a} {b}");
    }
    let (a, b) = (numbers(&plenty.events), numbers(&short.events));
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(&b) {
        if let (Event::Step(a), Event::Step(b)) = (a, b) {
            assert!((a.loss / b.loss - 1.0).abs() < 1e-5, "{a:?} {b:?}");
            assert_eq!(a.num_input_tokens_seen, b.num_input_tokens_seen);
        }
    }
    // A session that goes on takes passes as short, or its sums would have other last bits.
    let state = checkpoints::newest(short_out.path(), &mut |_| ()).unwrap().state;
    assert_eq!(short.toy.room.0, 16);
    assert_eq!(state.identity.sum_order, short.toy.sum_order());
    assert_ne!(state.identity.sum_order, plenty.toy.sum_order());
}

/// The loss of the base model is the first pass of all.
#[test]
fn memory_may_run_short_before_the_first_step() {
    let start = |failures: usize| {
        let (mut toy, mut feed, recipe) = (Toy::new(), feed(), recipe());
        toy.failing_bases = failures;
        let (identity, origin) = (Identity::default(), AdapterOrigin::Fresh);
        let start = begin(&mut toy, &recipe, &mut feed, identity, origin, None)?;
        assert_eq!(start.state.identity.sum_order, toy.sum_order());
        Ok::<_, Error>((start.state.identity.base_loss, toy.room.0))
    };
    let (plenty, short) = (start(0).unwrap(), start(2).unwrap());
    assert_eq!((short.0, short.1), (plenty.0, 16));
    let error = start(usize::MAX).unwrap_err();
    assert!(matches!(error, Error::Budget(_)), "{error}");
}

#[test]
fn a_document_without_memory_ends_the_run() {
    let out = tempfile::tempdir().unwrap();
    let mut toy = Toy::new();
    toy.room.1 = 3;
    let run = session_of(toy, out.path(), &recipe(), NEVER, false);
    let error = run.result.unwrap_err();
    assert!(matches!(error, Error::Budget(_)), "{error}");
}

/// No checkpoint is lost to memory that is short while it is written, and no half of one is left.
#[test]
fn a_checkpoint_without_memory_is_written_once_there_is_room() {
    let (plenty_out, short_out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let run = |out: &Path, failures: usize| {
        let toy = Toy::new();
        toy.failing_writes.set(failures);
        session_of(toy, out, &recipe(), NEVER, false)
    };
    let (plenty, short) = (run(plenty_out.path(), 0), run(short_out.path(), 2));
    assert_eq!(short.result.unwrap(), EndReason::Finished);
    assert_eq!(numbers(&plenty.events), numbers(&short.events));
    let reasons: Vec<&str> = short.events.iter().filter_map(shortage).collect();
    assert_eq!(reasons, ["no memory to write"; 2]);
    for step in checkpoints::steps(plenty_out.path()) {
        let name = checkpoints::name(step);
        assert!(checkpoints::verify(&short_out.path().join(&name)).is_ok(), "{name}");
    }
    assert_eq!(std::fs::read_dir(plenty_out.path()).unwrap().count(), {
        std::fs::read_dir(short_out.path()).unwrap().count()
    });
}

/// Where passes cannot be smaller the run ends, and names the checkpoint before.
#[test]
fn a_checkpoint_without_memory_at_all_leaves_the_one_before() {
    let out = tempfile::tempdir().unwrap();
    let first = session_of(Toy::new(), out.path(), &recipe(), NEVER, false);
    let saved = first.events.iter().filter(|event| matches!(event, Event::Save(_))).count();
    assert!(saved > 1);
    let out = tempfile::tempdir().unwrap();
    let mut recipe = recipe();
    recipe.saving.total_limit = 9;
    let stop_after = first.questions / 2;
    session_of(Toy::new(), out.path(), &recipe, stop_after, false);
    let before = checkpoints::steps(out.path())[0];
    let toy = Toy::new();
    toy.failing_writes.set(usize::MAX);
    let error = session_of(toy, out.path(), &recipe, NEVER, true).result.unwrap_err();
    assert!(matches!(error, Error::Budget(_)), "{error}");
    let survivor = checkpoints::name(before);
    assert!(error.to_string().contains(&format!("{survivor} is intact")), "{error}");
    assert!(checkpoints::verify(&out.path().join(survivor)).is_ok());
}

fn shortage(event: &Event) -> Option<&str> {
    match event {
        Event::OutOfMemory(event) => Some(&event.reason),
        _ => None,
    }
}
