//! Sessions that continue a run.

use std::fs;
use std::path::Path;

use super::{NEVER, feed, identity, numbers, recipe, saves, session, settings};
use crate::error::Error;
use crate::plan::Settings;
use crate::train::checkpoints::{self, Found};
use crate::train::events::EndReason;
use crate::train::start::{AdapterOrigin, begin};
use crate::train::state::Identity;
use crate::train::toy::Toy;

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

fn resume_with(change: impl Fn(&mut Found, &mut Identity)) -> Error {
    let out = tempfile::tempdir().unwrap();
    session(out.path(), &recipe(), 40, false);
    let (mut toy, mut feed) = (Toy::new(), feed());
    let mut identity = identity(&feed);
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
    let error = resume_with(|found, now| {
        (found.state.identity.base_fingerprint, now.base_fingerprint) = (vec![0.5], vec![0.51]);
    });
    assert!(error.to_string().contains("the base model, by its weights, is not"), "{error}");
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
        let identity = identity(&feed);
        let mut found = checkpoints::newest(out.path(), &mut |_| ()).unwrap();
        found.state.identity.base_loss *= factor;
        found.state.identity.bf16 = bf16;
        // Of another version nothing is known.
        found.state.identity.base_fingerprint = vec![0.5];
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
        let identity = identity(&feed);
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
