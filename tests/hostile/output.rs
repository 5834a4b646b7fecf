//! Flags, settings and output folders.

use std::fs;

use crate::scene::{assert_not_trained, assert_refused};
use crate::training::Workplace;

#[test]
fn an_output_folder_with_files_in_it() {
    let place = Workplace::new();
    fs::create_dir(place.path("out")).unwrap();
    fs::write(place.path("out/thesis.txt"), "years of work").unwrap();
    assert_not_trained(&place, 2, &[], &["out is not empty", "--out"]);
    let says = ["--resume: out is not the folder of a run: no settings.toml", "--out"];
    assert_not_trained(&place, 2, &["--resume"], &says);
    let command = place.nibble(&["quantize", "--model", "model", "--out", "out"]);
    assert_refused(&place, command, 2, &["out", "not empty", "--overwrite"]);
}

#[test]
fn an_output_folder_that_is_the_input() {
    let place = Workplace::new();
    for out in ["model", "./model/../model"] {
        let command = place.nibble(&["quantize", "--model", "model", "--out", out, "--overwrite"]);
        assert_refused(&place, command, 2, &["model"]);
    }
}

#[test]
fn an_output_path_that_is_a_file() {
    let place = Workplace::new();
    let command = place.nibble(&["quantize", "--model", "model", "--out", "eval.jsonl"]);
    assert_refused(&place, command, 2, &["eval.jsonl"]);
    let command = place.nibble(&[
        "train",
        "--model",
        "model",
        "--data",
        "train.jsonl",
        "--out",
        "eval.jsonl",
    ]);
    assert_refused(&place, command, 2, &["eval.jsonl"]);
}

#[cfg(unix)]
#[test]
fn a_disk_that_is_full_while_quantizing() {
    let place = Workplace::new();
    // No file may grow beyond 20 KiB; the write then fails as it does on a full disk.
    let script = "ulimit -f 20; trap '' XFSZ; exec \"$0\" quantize --model model --out out";
    let mut command = std::process::Command::new("bash");
    command.current_dir(place.path("")).args(["-c", script, env!("CARGO_BIN_EXE_nibble")]);
    assert_refused(&place, command, 1, &["cannot write ", "File too large"]);
}

#[test]
fn unknown_values_of_flags() {
    let place = Workplace::new();
    for (arguments, says) in [
        (&["quantize", "--quant-type", "int3"][..], "nf4"),
        (&["quantize", "--block-size", "lots"], "invalid"),
        (&["quantize", "--max-shard-size", "5 parsecs"], "invalid"),
        (&["train", "--quantization", "int8"], "nf4, fp4, none"),
        (&["train", "--learning-rate", "nan"], "expected a number"),
        (&["eval", "--max-length", "none"], "invalid"),
        (&["generate", "--temperature", "hot"], "hot"),
        (&["merge", "--dtype", "f8"], "f8"),
        (&["memory", "--budget", "much"], "much"),
    ] {
        let wrong = format!("'{}' for '{}", arguments[2], arguments[1]);
        assert_refused(&place, place.nibble(arguments), 2, &[&wrong, says]);
    }
}

#[test]
fn values_that_only_look_right() {
    let place = Workplace::new();
    for size in ["0", "48", "8192"] {
        let command =
            place.nibble(&["quantize", "--model", "model", "--out", "out", "--block-size", size]);
        assert_refused(&place, command, 2, &["--block-size", size, "power of two from 32 to 4096"]);
    }
    let command = place.nibble(&["quantize", "--model", "model", "--out", "out", "--skip", "((("]);
    assert_refused(&place, command, 2, &["--skip"]);
    assert_not_trained(&place, 2, &["--target-modules", "q_prj"], &["q_prj", "q_proj"]);
    assert_not_trained(
        &place,
        2,
        &["--lora-r", "100000000"],
        &["rank of `r` is 100000000, expected 1 to 65536"],
    );
    for (flag, value) in [("--max-length", "0"), ("--max-length", "1"), ("--threads", "0")] {
        assert_not_trained(&place, 2, &[flag, value], &[flag]);
    }
}

#[test]
fn config_files_with_mistakes() {
    let place = Workplace::new();
    for (text, says) in [
        ("learning_rat = 1e-4\n", &["run.toml:1", "learning_rat", "learning-rate"][..]),
        ("max_steps = 'many'\n", &["many", "max-steps"]),
        ("max_steps = \n", &["run.toml:1"]),
        ("seed = 1\nseed = 2\n", &["run.toml:2", "duplicate key"]),
        ("[lora]\nr = 4\n", &["run.toml", "lora"]),
        ("\u{0}", &["run.toml:1"]),
    ] {
        fs::write(place.path("run.toml"), text).unwrap();
        assert_not_trained(&place, 2, &["--config", "run.toml"], says);
    }
    assert_not_trained(&place, 1, &["--config", "absent.toml"], &["absent.toml"]);
}

#[test]
fn a_state_that_is_damaged() {
    let place = Workplace::new();
    crate::training::succeed(place.train("out", &["--max-steps", "2"]));
    for file in ["state.json", "optimizer.safetensors", "adapter_model.safetensors"] {
        let path = place.path("out/checkpoint-2").join(file);
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        let command = place.nibble(&[
            "train",
            "--model",
            "model",
            "--data",
            "train.jsonl",
            "--out",
            "out",
            "--resume",
            "--max-length",
            "32",
            "--max-steps",
            "2",
        ]);
        assert_refused(&place, command, 1, &["no checkpoint in out can be resumed from", file]);
        fs::write(&path, bytes).unwrap();
    }
}
