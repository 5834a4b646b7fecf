//! What a run saves, what of that is believed later, and what is removed.

use std::fs;

use super::{NEVER, impatient, numbers, recipe, saves, session};
use crate::error::Error;
use crate::train::checkpoints;
use crate::train::events::Event;
use crate::train::recipe::{Length, Recipe, SaveRecipe};
use crate::train::schedule::{SchedulerType, Warmup};
use crate::train::toy::Toy;

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

/// A step may be saved again, and a session may end between the renames of that.
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
