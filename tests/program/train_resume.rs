//! Stopped and killed runs of the real binary end with the bytes of an uninterrupted one.
#![cfg(unix)]

use std::fs;
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::training::{Workplace, error_of, fail, signal, stderr, succeed};
use nibble::train::checkpoints::SUMS_FILE;
use nibble::train::digest;

/// 30 steps over ragged windows, several epochs, evaluation, dropout and a bf16 working copy.
const FLAGS: [&str; 16] = [
    "--max-steps",
    "30",
    "--gradient-accumulation-steps",
    "3",
    "--save-steps",
    "2",
    "--eval-data",
    "eval.jsonl",
    "--eval-steps",
    "5",
    "--lora-dropout",
    "0.1",
    "--learning-rate",
    "5e-3",
    "--weight-decay",
    "0.01",
];

const RESULTS: [&str; 4] = [
    "adapter_model.safetensors",
    "adapter_config.json",
    "checkpoint-30/adapter_model.safetensors",
    "checkpoint-30/optimizer.safetensors",
];

fn assert_same_results(place: &Workplace, a: &str, b: &str) {
    for file in RESULTS {
        let (left, right) =
            (place.read(&format!("{a}/{file}")), place.read(&format!("{b}/{file}")));
        assert!(left == right, "{file} differs between {a} and {b}");
    }
    let losses = |out: &str| {
        let state = place.json(&format!("{out}/checkpoint-30/state.json"));
        let history = state["history"].as_array().unwrap().clone();
        let pick = |event: serde_json::Value| {
            let fields = match event["event"].as_str().unwrap() {
                "step" => ["step", "loss", "mean_token_accuracy", "grad_norm"],
                "eval" => ["step", "eval_loss", "eval_mean_token_accuracy", "is_best"],
                _ => return None,
            };
            let values = fields.map(|field| event[field].clone());
            assert!(values.iter().all(|value| !value.is_null()), "{event}");
            Some(values)
        };
        history.into_iter().filter_map(pick).collect::<Vec<_>>()
    };
    assert_eq!(losses(a), losses(b));
    assert_eq!(losses(a).len(), 30 + 6);
}

/// As under `nohup`, and then by what it starts, too.
fn hangups_are_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    u64::from_str_radix(mask.trim(), 16).unwrap() & 1 == 1
}

/// Waits until a file that `wanted` likes appears in `out`; false if the run ended before.
fn wait_for(
    place: &Workplace,
    out: &str,
    child: &mut Child,
    wanted: impl Fn(&str) -> bool,
) -> bool {
    let limit = Instant::now() + Duration::from_secs(60);
    loop {
        if place.list(out).iter().any(|name| wanted(name)) {
            return true;
        }
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        assert!(Instant::now() < limit, "nothing happened in {out}");
        sleep(Duration::from_micros(200));
    }
}

#[test]
fn a_run_stopped_by_a_signal_continues_bit_for_bit() {
    let place = Workplace::new();
    succeed(place.train("whole", &FLAGS));
    let names = ["INT", "TERM", "HUP"];
    for name in &names[..if hangups_are_ignored() { 2 } else { 3 }] {
        let mut child = place.train(name, &FLAGS).spawn().unwrap();
        assert!(wait_for(&place, name, &mut child, |file| file == "checkpoint-6"));
        signal(&child, name);
        let output = child.wait_with_output().unwrap();
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(130), "{text}");
        let error = error_of(&text);
        assert!(error.starts_with("error: interrupted after step "), "{error}");
        assert!(
            error.ends_with(&format!("hint: continue with `nibble train --out {name} --resume`"))
        );
        succeed(place.nibble(&["train", "--out", name, "--resume", "--threads", "1"]));
        assert_same_results(&place, "whole", name);
    }
}

/// Ctrl-C also ends the `tee` that reads what a run says.
#[test]
fn a_run_outlives_its_reader_and_still_saves() {
    let place = Workplace::new();
    succeed(place.train("whole", &FLAGS));
    let (reader, writer) = std::io::pipe().unwrap();
    let mut command = place.train("deaf", &FLAGS);
    let mut child = command.stdout(writer.try_clone().unwrap()).stderr(writer).spawn().unwrap();
    drop((reader, command));
    assert!(wait_for(&place, "deaf", &mut child, |file| file == "checkpoint-6"));
    signal(&child, "INT");
    assert_eq!(child.wait().unwrap().code(), Some(130));
    succeed(place.nibble(&["train", "--out", "deaf", "--resume"]));
    assert_same_results(&place, "whole", "deaf");
    let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
    let mut command = place.train("full", &FLAGS);
    assert!(command.stderr(full()).status().unwrap().success());
    assert_same_results(&place, "whole", "full");
}

#[test]
fn a_run_with_8_bit_moments_continues_bit_for_bit() {
    let place = Workplace::new();
    let flags = [&FLAGS[..], &["--optim", "adamw_8bit", "--lora-r", "64"]].concat();
    succeed(place.train("whole", &flags));
    let bytes = place.read("whole/checkpoint-30/optimizer.safetensors");
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let packed = file.iter().filter(|(_, tensor)| tensor.dtype() == safetensors::Dtype::U8);
    assert_eq!(packed.count(), 2 * 2 * 12, "all but B of k and v");
    let mut child = place.train("stopped", &flags).spawn().unwrap();
    assert!(wait_for(&place, "stopped", &mut child, |file| file == "checkpoint-6"));
    signal(&child, "INT");
    child.wait().unwrap();
    let (_, refused) =
        fail(place.nibble(&["train", "--out", "stopped", "--resume", "--optim", "adamw_torch"]));
    assert!(refused.contains("optim was adamw_8bit, now adamw_torch"), "{refused}");
    succeed(place.nibble(&["train", "--out", "stopped", "--resume", "--threads", "1"]));
    assert_same_results(&place, "whole", "stopped");
}

#[test]
fn a_run_killed_between_and_during_saves_continues_bit_for_bit() {
    let place = Workplace::new();
    succeed(place.train("whole", &FLAGS));
    let mut command = place.train("killed", &FLAGS);
    let (mut kills, mut during) = (0, 0);
    loop {
        let mut child = command.spawn().unwrap();
        let done = place.list("killed");
        let news = |name: &str| !done.contains(&name.to_string());
        // Every other time in the middle of writing a checkpoint, else right after one.
        let reached = wait_for(&place, "killed", &mut child, |name| match kills % 2 {
            0 => name.starts_with(".checkpoint-") && name.ends_with(".partial"),
            _ => name.starts_with("checkpoint-") && news(name),
        });
        if !reached {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", stderr(&output));
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        during += usize::from(place.list("killed").iter().any(|name| name.ends_with(".partial")));
        command = place.nibble(&["train", "--out", "killed", "--resume"]);
        if place.list("killed").iter().all(|name| !name.starts_with("checkpoint-")) {
            command = place.train("killed", &[&FLAGS[..], &["--resume"]].concat());
        }
    }
    assert!(kills >= 10, "{kills} kills");
    assert!(during >= 3, "{during} of {kills} kills hit a save");
    assert_same_results(&place, "whole", "killed");
    let left = place.list("killed");
    assert!(!left.iter().any(|name| name.ends_with(".partial")), "{left:?}");
}

#[test]
fn a_full_disk_costs_no_checkpoint() {
    let place = Workplace::new();
    succeed(place.train("whole", &FLAGS));
    let mut child = place.train("full", &FLAGS).spawn().unwrap();
    assert!(wait_for(&place, "full", &mut child, |file| file == "checkpoint-4"));
    signal(&child, "INT");
    child.wait().unwrap();
    let before: Vec<String> = place.list("full");
    // No file may grow beyond 20 KiB; the write then fails as it does on a full disk.
    let script = "ulimit -f 20; trap '' XFSZ; exec \"$0\" train --out full --resume";
    let mut limited = Command::new("bash");
    limited.current_dir(place.path("")).args(["-c", script, env!("CARGO_BIN_EXE_nibble")]);
    let (code, text) = fail(limited);
    let newest = place.list("full").into_iter().filter(|name| name.starts_with("checkpoint-"));
    let newest = newest.max_by_key(|name| name["checkpoint-".len()..].parse::<u64>().unwrap());
    let error = error_of(&text);
    assert_eq!(code, 1, "{text}");
    assert!(error.starts_with("error: cannot write "), "{error}");
    let hint =
        format!("hint: {} is intact: make room and continue with `--resume`", newest.unwrap());
    assert!(error.ends_with(&hint), "{error}");
    assert_eq!(place.list("full"), before, "nothing lost, nothing half-written");
    succeed(place.nibble(&["train", "--out", "full", "--resume"]));
    assert_same_results(&place, "whole", "full");
}

#[test]
fn a_damaged_checkpoint_is_reported_and_the_one_before_it_used() {
    let place = Workplace::new();
    succeed(place.train("whole", &FLAGS));
    let mut child = place.train("damaged", &FLAGS).spawn().unwrap();
    assert!(wait_for(&place, "damaged", &mut child, |file| file == "checkpoint-8"));
    signal(&child, "TERM");
    child.wait().unwrap();
    let checkpoints = place.list("damaged").into_iter().filter(|n| n.starts_with("checkpoint-"));
    let steps = checkpoints.map(|name| name["checkpoint-".len()..].parse::<u64>().unwrap());
    let newest = format!("checkpoint-{}", steps.max().unwrap());
    let path = place.path("damaged").join(&newest).join("optimizer.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let output = succeed(place.nibble(&["train", "--out", "damaged", "--resume"]));
    let warning =
        format!("warning: skipping {newest}: optimizer.safetensors is damaged: SHA-256 differs");
    assert!(stderr(&output).contains(&warning), "{}", stderr(&output));
    assert_same_results(&place, "whole", "damaged");
}

/// Another content of a checkpoint's file, and its sum.
fn rewrite(place: &Workplace, file: &str, content: &serde_json::Value) {
    let path = place.path(file);
    let was = digest::file(&path).unwrap();
    fs::write(&path, content.to_string()).unwrap();
    let sums = path.with_file_name(SUMS_FILE);
    let text = fs::read_to_string(&sums).unwrap();
    fs::write(&sums, text.replace(&was, &digest::file(&path).unwrap())).unwrap();
}

/// In which order a plan adds up depends on the memory that is free, so a run remembers it.
#[test]
fn a_run_goes_on_in_the_order_in_which_it_began() {
    let place = Workplace::new();
    let run = |more: &[&str]| {
        let mut command = place.nibble(&["train", "--model", "model", "--data", "train.jsonl"]);
        command.args(["--out", "run", "--max-length", "512", "--save-steps", "2"]).args(more);
        stderr(&succeed(command))
    };
    let at = |step: u32| format!("run/checkpoint-{step}/state.json");
    let rows = |state: &serde_json::Value| state["identity"]["sum_order"]["logit_rows"].clone();
    run(&["--max-steps", "2"]);
    let mut state = place.json(&at(2));
    let whole = rows(&state).as_u64().unwrap();
    for (in_pieces, is_possible) in [(whole / 4, true), (whole / 4 + 1, false)] {
        state["identity"]["sum_order"]["logit_rows"] = in_pieces.into();
        rewrite(&place, &at(2), &state);
        let text = run(&["--max-steps", "4", "--resume"]);
        assert_eq!(text.contains("but not bit for bit"), !is_possible, "{text}");
        let now = if is_possible { in_pieces } else { whole };
        assert_eq!(rows(&place.json(&at(4))), now);
        fs::remove_dir_all(place.path("run/checkpoint-4")).unwrap();
    }
}

/// The evaluation loss of a rate as high rises at once.
#[test]
fn a_run_that_stopped_early_goes_on_with_more_patience() {
    let place = Workplace::new();
    let run = |more: &[&str]| {
        let flags = ["--eval-data", "eval.jsonl", "--eval-steps", "1", "--learning-rate", "3"];
        let flags = [&flags[..], &["--max-steps", "12", "--max-grad-norm", "0"]].concat();
        succeed(place.train("run", &[&flags, more].concat()))
    };
    let text = |output: &std::process::Output| String::from_utf8(output.stdout.clone()).unwrap();
    let first = text(&run(&["--early-stopping-patience", "1"]));
    assert!(first.contains("stopped early"), "{first}");
    let again = text(&run(&["--early-stopping-patience", "1", "--resume"]));
    assert!(
        again.contains("stopped early at step") && again.contains("nothing is left"),
        "{again}"
    );
    let second = text(&run(&["--early-stopping-patience", "100", "--resume"]));
    assert!(second.contains("run: 12 steps"), "{second}");
}

/// Whoever deletes checkpoints to save space does not want the adapter to be trained anew.
#[test]
fn a_finished_run_without_checkpoints_is_not_begun_again() {
    let place = Workplace::new();
    succeed(place.train("run", &["--max-steps", "2"]));
    let adapter = place.read("run/adapter_model.safetensors");
    let log = place.read("run/metrics.jsonl");
    fs::remove_dir_all(place.path("run/checkpoint-2")).unwrap();
    let (code, text) = fail(place.train("run", &["--max-steps", "4", "--resume"]));
    assert_eq!(code, 1);
    assert!(
        text.contains("run has a finished adapter, and no checkpoint to resume from"),
        "{text}"
    );
    assert!(text.contains("hint: train it further with `--init-adapter run`"), "{text}");
    assert_eq!(place.read("run/adapter_model.safetensors"), adapter);
    assert_eq!(place.read("run/metrics.jsonl"), log);
}

/// The folder of the adapter that a run began with may change or go; its checkpoints have all of it.
#[test]
fn a_run_goes_on_with_the_adapter_that_it_began_with() {
    let place = Workplace::new();
    succeed(place.train("first", &["--max-steps", "2", "--lora-r", "4", "--lora-alpha", "8"]));
    succeed(place.train("other", &["--max-steps", "2", "--lora-r", "4", "--lora-alpha", "64"]));
    let flags = |steps: &'static str| {
        let flags = ["--init-adapter", "first", "--lr-scheduler-type", "constant"];
        [&flags[..], &["--max-steps", steps]].concat()
    };
    succeed(place.train("whole", &flags("6")));
    succeed(place.train("run", &flags("3")));
    fs::remove_dir_all(place.path("first")).unwrap();
    fs::rename(place.path("other"), place.path("first")).unwrap();
    let resume = ["train", "--resume", "--max-steps", "6", "--out"];
    succeed(place.nibble(&[&resume[..], &["run"]].concat()));
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        let files = ["whole", "run"].map(|out| place.read(&format!("{out}/{file}")));
        assert!(files[0] == files[1], "{file}");
    }
    fs::remove_dir_all(place.path("first")).unwrap();
    let resume = ["train", "--resume", "--max-steps", "7", "--out", "run"];
    succeed(place.nibble(&resume));
}

/// `cp run/* copy` leaves hidden files behind.
#[test]
fn a_copy_of_a_run_goes_on() {
    let place = Workplace::new();
    succeed(place.train("run", &["--max-steps", "2"]));
    let copy = Command::new("sh")
        .current_dir(place.path(""))
        .args(["-c", "mkdir copy && cp -r run/* copy"])
        .status();
    assert!(copy.unwrap().success());
    succeed(place.nibble(&["train", "--out", "copy", "--resume", "--max-steps", "3"]));
    assert!(place.list("copy").contains(&"checkpoint-3".to_string()));
}

#[test]
fn a_run_that_is_behind_its_new_end_is_said_to_have_no_step_left() {
    let place = Workplace::new();
    succeed(place.train("run", &["--max-steps", "3"]));
    fs::remove_file(place.path("run/adapter_model.safetensors")).unwrap();
    let resume = ["train", "--out", "run", "--resume", "--max-steps", "2"];
    let said = stderr(&succeed(place.nibble(&resume)));
    assert!(said.contains("2 steps instead of 3: none is left\n"), "{said}");
}

#[test]
fn epochs_that_are_asked_for_go_before_the_steps_of_the_run() {
    let place = Workplace::new();
    succeed(place.train("run", &["--max-steps", "1"]));
    let out =
        succeed(place.nibble(&["train", "--out", "run", "--resume", "--num-train-epochs", "2"]));
    assert!(!String::from_utf8_lossy(&out.stdout).contains("nothing is left"));
}

/// A file of settings that somebody edits between sessions: what would be other numbers is said to stay.
#[test]
fn settings_that_were_edited_are_not_dropped_silently() {
    let place = Workplace::new();
    succeed(place.train("run", &["--max-steps", "2", "--learning-rate", "1e-3"]));
    let resume = || stderr(&succeed(place.nibble(&["train", "--out", "run", "--resume"])));
    assert!(!resume().contains("settings.toml"));
    let file = place.path("run/settings.toml");
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains("learning_rate = 0.001\n"), "{text}");
    fs::write(&file, text.replace("learning_rate = 0.001\n", "learning_rate = 0.5\n")).unwrap();
    let said = resume();
    let warning = "warning: run/settings.toml was edited, and the run goes on without that: \
                   learning_rate was 1e-3, now 0.5\n";
    assert!(said.contains(warning), "{said}");
    // What changes no number may be edited.
    assert!(text.contains("max_steps = 2\n"), "{text}");
    fs::write(&file, text.replace("max_steps = 2\n", "max_steps = 4\n")).unwrap();
    let said = resume();
    assert!(said.contains("step 4/4") && !said.contains("was edited"), "{said}");
}
