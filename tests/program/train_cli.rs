//! `nibble train` as a user meets it: pinned losses, settings from files, and mistakes.

use std::fs;
use std::path::Path;

use crate::training::{Workplace, error_of, fail, stderr, succeed};
use serde_json::{Value, json};

/// Losses and gradient norms that a run logged.
fn losses(place: &Workplace, checkpoint: &str) -> Vec<(f64, f64)> {
    let state = place.json(&format!("{checkpoint}/state.json"));
    let events = state["history"].as_array().unwrap().iter();
    let number = |event: &Value, name: &str| event[name].as_f64().unwrap();
    let steps = events.filter(|event| event["event"] == "step");
    steps.map(|event| (number(event, "loss"), number(event, "grad_norm"))).collect()
}

#[test]
fn ten_losses_stay_what_they_are() {
    let place = Workplace::new();
    let flags =
        ["--max-steps", "10", "--learning-rate", "1e-2", "--per-device-train-batch-size", "2"];
    let flags = [&flags[..], &["--longest-first-step", "false"]].concat();
    succeed(place.train("out", &flags));
    let pinned =
        [5.60757, 5.55555, 4.85765, 4.10005, 3.25883, 3.34280, 2.66103, 2.45949, 2.16895, 2.37023];
    let got = losses(&place, "out/checkpoint-10");
    assert_eq!(got.len(), 10);
    for ((loss, _), pinned) in got.iter().zip(pinned) {
        assert!((loss - pinned).abs() < 1e-4, "{got:?}");
    }
}

#[test]
fn one_is_no_plural() {
    let place = Workplace::new();
    place.write_rows("train.jsonl", 1, 1);
    let output = succeed(place.train("out", &["--max-steps", "1"]));
    let said = stderr(&output);
    assert!(said.contains("train.jsonl: 1 record, 1 document, "), "{said}");
    assert!(said.contains("packed into 1 sequence of 32 tokens"), "{said}");
    let result = String::from_utf8_lossy(&output.stdout);
    assert!(result.starts_with("out: 1 step, mean loss "), "{result}");
}

#[test]
fn mistyped_roles_are_said_before_the_training() {
    let place = Workplace::new();
    let template = "{% for m in messages %}{{ m.content }} w2 {% endfor %}";
    let config = json!({"eos_token": "w2", "bos_token": "w1", "chat_template": template});
    fs::write(place.path("model/tokenizer_config.json"), config.to_string()).unwrap();
    let turn = |role: &str| json!({"role": role, "content": "w5 w6"});
    let messages = ["user", "assistant", "user", "Asistant"].map(turn);
    let record = json!({ "messages": messages }).to_string();
    fs::write(place.path("train.jsonl"), record).unwrap();
    let said = stderr(&succeed(place.train("out", &["--max-steps", "1"])));
    let note = "; messages with roles that few templates know: 1 of `Asistant` (from line 1)\n";
    assert!(said.contains(note), "{said}");
}

#[test]
fn lengths_that_the_model_was_not_trained_on_are_said_once() {
    let place = Workplace::new();
    let row =
        |length: u64| json!({"input_ids": (0..length).map(|i| 3 + i % 9).collect::<Vec<_>>()});
    fs::write(place.path("rows.jsonl"), [20, 130, 135].map(|n| row(n).to_string()).join("\n"))
        .unwrap();
    let said = |data: &str, max_length: &str| {
        let mut command = place.nibble(&["train", "--model", "model", "--data", data]);
        command.args(["--eval-data", "eval.jsonl", "--max-steps", "1"]);
        command.args(["--max-length", max_length, "--out", &format!("out-{max_length}")]);
        stderr(&succeed(command))
    };
    let known = "the model was trained on up to 128 tokens; ";
    let longer = said("rows.jsonl", "136");
    let note = "2 documents are longer: their later positions are new to the model\n";
    assert!(longer.contains(&format!("{known}{note}")), "{longer}");
    assert_eq!(longer.matches(known).count(), 1, "{longer}");
    assert!(said("train.jsonl", "129").contains(&format!("{known}no document is longer\n")));
    assert!(!said("train.jsonl", "128").contains(known));
}

#[test]
fn neither_memory_policy_nor_threads_change_a_bit() {
    let place = Workplace::new();
    let flags = ["--max-steps", "6", "--learning-rate", "1e-2", "--lora-dropout", "0.2"];
    // In the file's order, the largest batch is tried before the first step.
    let flags = [&flags[..], &["--shuffle", "false"]].concat();
    let mut adapters = Vec::new();
    for (out, extra) in [
        ("keep", ["--activations", "keep", "--threads", "1"]),
        ("checkpoint", ["--activations", "checkpoint", "--threads", "3"]),
        ("not-tried", ["--activations", "keep", "--longest-first-step", "false"]),
    ] {
        let mut command = place.nibble(&["train", "--model", "model", "--data", "train.jsonl"]);
        command.args(["--out", out, "--max-length", "32"]).args(&flags).args(extra);
        succeed(command);
        adapters.push(place.read(&format!("{out}/adapter_model.safetensors")));
    }
    assert!(adapters[0] == adapters[1] && adapters[0] == adapters[2]);
}

#[test]
fn streamed_weights_give_the_same_bits() {
    let place = Workplace::new();
    succeed(place.nibble(&["quantize", "--model", "model", "--out", "packed"]));
    let mut adapters = Vec::new();
    for (out, weights, activations) in [
        ("resident", "resident", "keep"),
        ("streamed", "stream", "keep"),
        ("recomputed", "stream", "checkpoint"),
    ] {
        let mut command = place.nibble(&["train", "--model", "packed", "--data", "train.jsonl"]);
        command.args(["--out", out, "--max-length", "32", "--max-steps", "3"]);
        command.args(["--weights", weights, "--activations", activations]);
        let said = stderr(&succeed(command));
        assert_eq!(said.contains("streamed from their file"), weights == "stream", "{said}");
        adapters.push(place.read(&format!("{out}/adapter_model.safetensors")));
    }
    assert!(adapters[0] == adapters[1] && adapters[0] == adapters[2]);
    let (code, text) = fail(place.train("dense", &["--weights", "stream"]));
    assert_eq!(code, 2);
    assert!(text.contains("hint: make one with `nibble quantize`"), "{text}");
}

#[test]
fn a_config_file_is_a_command_line() {
    let place = Workplace::new();
    let text = "model = 'model'\ndata = 'train.jsonl'\nmax_length = 32\nmax-steps = 3\n\
                lora_r = 4\nlearning-rate = 1e-3\n[rank_pattern]\nq_proj = 2\n";
    fs::write(place.path("run.toml"), text).unwrap();
    succeed(place.nibble(&["train", "--config", "run.toml", "--out", "out", "--max-steps", "2"]));
    let config = place.json("out/adapter_config.json");
    assert_eq!(
        (config["r"].as_u64(), config["rank_pattern"]["q_proj"].as_u64()),
        (Some(4), Some(2))
    );
    let state = place.json("out/checkpoint-2/state.json");
    assert_eq!(state["max_steps"], 2, "the command line wins");
    // What a run writes down is such a file: it repeats the run.
    succeed(place.nibble(&["train", "--config", "out/settings.toml", "--out", "again"]));
    let adapter = |out: &str| place.read(&format!("{out}/adapter_model.safetensors"));
    assert!(adapter("out") == adapter("again"));
    assert_eq!(state["identity"]["settings"]["learning_rate"][0], "1e-3");
}

/// It has all settings, those that exclude each other too.
#[test]
fn a_runs_own_file_repeats_it_whatever_was_set() {
    let place = Workplace::new();
    let flags = ["--max-steps", "2", "--warmup-steps", "1", "--sample-prompt", "0x10"];
    succeed(place.train("out", &flags));
    succeed(place.nibble(&["train", "--config", "out/settings.toml", "--out", "again"]));
    let read = |out: &str, file: &str| place.read(&format!("{out}/{file}"));
    assert!(read("out", "adapter_model.safetensors") == read("again", "adapter_model.safetensors"));
    let settings = |out: &str| {
        let text = String::from_utf8(read(out, "settings.toml")).unwrap();
        text.replace(&format!("out = \"{out}\"\n"), "")
    };
    assert_eq!(settings("out"), settings("again"));
}

#[test]
fn mistakes_are_found_before_anything_is_read_or_written() {
    let place = Workplace::new();
    fs::write(place.path("bad.toml"), "learning_rat = 1e-4\n").unwrap();
    for (flags, code, message) in [
        (
            &["--config", "bad.toml"][..],
            2,
            "error: bad.toml:1: unknown key `learning_rat`\nhint: did you mean `learning-rate`?",
        ),
        (
            &["--early-stopping-patience", "2"],
            2,
            "error: `--early-stopping-patience` needs evaluation data",
        ),
        (&["--memory-budget", "1MiB"], 1, "error: plan needs "),
        (&["--target-modules", "q_prj"], 2, "hint: did you mean `q_proj`"),
    ] {
        let (got, text) = fail(place.train("out", flags));
        assert_eq!(got, code, "{text}");
        assert!(error_of(&text).contains(message), "{text}");
        assert!(!place.path("out").exists(), "{flags:?} left {:?}", place.list("out"));
    }
    let short =
        ["train", "--model", "model", "--data", "train.jsonl", "--out", "o", "--max-length", "8"];
    let (code, text) = fail(place.nibble(&short));
    assert_eq!(code, 1);
    assert!(error_of(&text).contains("hint: raise `--max-length` to "), "{text}");
}

#[test]
fn unknown_values_list_the_known_ones() {
    let place = Workplace::new();
    for (flag, value, known) in [
        ("--lr-scheduler-type", "cosin", "cosine_with_min_lr"),
        ("--quantization", "int8", "nf4, fp4, none"),
        ("--activations", "drop", "auto, keep, attention, checkpoint"),
        ("--preset", "qlora", "qlora-paper"),
        ("--packing", "yes", "true, false"),
        ("--adapter-dtype", "f16", "bf16, f32"),
        ("--truncation", "cut", "error, drop, right, left, split"),
        ("--learning-rate", "fast", "expected a number above 0"),
        ("--learning-rate", "-1", "expected a number above 0"),
        ("--memory-budget", "lots", "23GiB"),
        ("--gradient-accumulation-steps", "0", "1 or more"),
        ("--max-steps", "0", "1 or more"),
    ] {
        let (code, text) = fail(place.train("out", &[flag, value]));
        assert_eq!(code, 2, "{text}");
        assert!(text.contains(&format!("'{value}' for '{flag}")) && text.contains(known), "{text}");
    }
    for (theirs, ours) in [
        ("--lr", "--learning-rate"),
        ("--epochs=3", "--num-train-epochs"),
        ("--lora_rank", "--lora-r"),
    ] {
        let (code, text) = fail(place.train("out", &[theirs]));
        assert_eq!(code, 2);
        assert!(text.contains(&format!("hint: here it is `{ours}`")), "{text}");
    }
    let (code, text) = fail(place.train("out", &["--learning-rte", "1"]));
    assert_eq!(code, 2);
    assert!(text.contains("--learning-rate"), "{text}");
}

#[test]
fn somebody_elses_files_are_left_alone() {
    let place = Workplace::new();
    fs::create_dir(place.path("out")).unwrap();
    fs::write(place.path("out/thesis.txt"), "years of work").unwrap();
    for (flags, error) in [
        (&["--max-steps", "1"][..], "error: out is not empty\nhint: choose another `--out`"),
        (
            &["--resume"],
            "error: --resume: out is not the folder of a run: no settings.toml beside checkpoints\n\
             hint: name the folder that was the `--out` of the run, with all of its files",
        ),
    ] {
        let (code, text) = fail(place.train("out", flags));
        assert_eq!((code, error_of(&text)), (2, error));
        assert_eq!(place.list("out"), ["thesis.txt"]);
    }
}

#[test]
fn a_finished_run_is_not_trained_over() {
    let place = Workplace::new();
    succeed(place.train("out", &["--max-steps", "2"]));
    let (code, text) = fail(place.train("out", &["--max-steps", "2"]));
    assert_eq!(code, 2);
    assert!(
        error_of(&text)
            .ends_with("hint: continue its run with `--resume`, or choose another `--out`"),
        "{text}"
    );
    let files = || place.list("out").into_iter().filter(|name| name.contains('.'));
    let before: Vec<_> = files().map(|name| place.read(&format!("out/{name}"))).collect();
    let output = succeed(place.nibble(&["train", "--out", "out", "--resume"]));
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(said, "out: finished at step 2; nothing is left to resume\n");
    let after: Vec<_> = files().map(|name| place.read(&format!("out/{name}"))).collect();
    assert!(before == after && before.len() > 6, "resuming it changes nothing");
}

#[test]
fn resuming_with_other_settings_is_refused_by_name() {
    let place = Workplace::new();
    succeed(place.train("out", &["--max-steps", "2"]));
    let (code, text) = fail(place.nibble(&[
        "train",
        "--out",
        "out",
        "--resume",
        "--learning-rate",
        "1e-3",
        "--seed",
        "1",
        "--save-steps",
        "7",
    ]));
    assert_eq!(code, 2);
    assert_eq!(
        error_of(&text),
        "error: `--resume` with other settings would not continue the same run: learning_rate was \
         2e-4, now 1e-3; seed was 42, now 1\n\
         hint: leave them out to continue, or start another run in another `--out`"
    );
    place.write_rows("train.jsonl", 24, 5);
    let (code, text) = fail(place.nibble(&["train", "--out", "out", "--resume"]));
    assert_eq!(code, 1);
    assert!(
        error_of(&text).contains("the training data is not what this run began with"),
        "{text}"
    );
}

#[test]
fn a_constant_rate_can_be_trained_on_for_longer() {
    let place = Workplace::new();
    let flags = ["--lr-scheduler-type", "constant", "--max-steps"];
    succeed(place.train("long", &[&flags[..], &["9"]].concat()));
    succeed(place.train("short", &[&flags[..], &["4"]].concat()));
    succeed(place.nibble(&["train", "--out", "short", "--resume", "--max-steps", "9"]));
    let adapter = |out: &str| place.read(&format!("{out}/adapter_model.safetensors"));
    assert!(adapter("long") == adapter("short"));
}

/// As transformers does: from there on with the rates of the longer run.
#[test]
fn a_finished_run_can_be_made_longer() {
    let place = Workplace::new();
    let flags = ["--lr-scheduler-type", "linear", "--warmup-ratio", "0.25", "--max-steps"];
    let train = |out: &str, steps: &str| {
        succeed(place.train(out, &[&flags[..], &[steps]].concat()));
    };
    train("whole", "8");
    train("run", "4");
    let rates = |out: &str| -> Vec<f64> {
        let log = String::from_utf8(place.read(&format!("{out}/metrics.jsonl"))).unwrap();
        let events = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let steps = events.filter(|event| event["event"] == "step");
        steps.map(|event| event["learning_rate"].as_f64().unwrap()).collect()
    };
    let short = rates("run");
    let again = ["train", "--out", "run", "--resume"];
    let nothing = stderr(&succeed(place.nibble(&again)));
    assert!(nothing.contains("to train on, give more `--num-train-epochs`"), "{nothing}");
    let longer = [&again[..], &["--max-steps", "8"]].concat();
    let said = stderr(&succeed(place.nibble(&longer)));
    let note = "8 steps instead of 4: the learning rate goes on at 1.33e-4, as in a run of that length, \
                not at 0.00e0";
    assert!(said.contains(note), "{said}");
    assert_eq!(rates("run"), [&short[..], &rates("whole")[4..]].concat());
    // Shorter than it is: nothing is left.
    let (code, text) = fail(place.nibble(&[&longer[..], &["--seed", "1"]].concat()));
    assert!(code == 2 && text.contains("seed was 42, now 1"), "{code}: {text}");
    let done = succeed(place.nibble(&[&again[..], &["--max-steps", "6"]].concat()));
    assert!(String::from_utf8(done.stdout).unwrap().contains("finished at step 8"));
}

#[test]
fn what_a_run_does_not_do_is_said() {
    let place = Workplace::new();
    let said = |out: &str, flags: &[&str]| stderr(&succeed(place.train(out, flags)));
    let short = said("short", &["--max-steps", "1", "--warmup-steps", "1"]);
    assert!(short.contains("warning: all of the run (1 step) is warmup"), "{short}");
    let few = said("few", &[]);
    let note = "note: so few steps change a model little; more of them come of a larger \
                `--num-train-epochs`, a smaller `--gradient-accumulation-steps` (here 4) or `--packing false`\n";
    assert!(few.contains(note), "{few}");
    let flags = ["--gradient-accumulation-steps", "1", "--packing", "false"];
    let few = said("alone", &[&flags[..], &["--num-train-epochs", "0.5"]].concat());
    assert!(few.contains("come of a larger `--num-train-epochs`\n"), "{few}");
    assert!(short.contains("computing on the CPU, 2 threads"), "{short}");
    let flags = ["--max-steps", "2", "--warmup-steps", "1"];
    let quiet = said("quiet", &flags);
    assert!(!quiet.contains("warning") && !quiet.contains("note: "), "{quiet}");
    let start = String::from_utf8(place.read("quiet/metrics.jsonl")).unwrap();
    assert!(start.contains(r#""device":"the CPU, 2 threads""#), "{start}");
    let config = String::from_utf8(place.read("model/config.json")).unwrap();
    let dropping = config.replace(r#""attention_dropout": 0.0"#, r#""attention_dropout": 0.1"#);
    assert_ne!(config, dropping);
    std::fs::write(place.path("model/config.json"), dropping).unwrap();
    let noted = said("noted", &flags);
    assert!(noted.contains("attention_dropout of 0.1 is not applied"), "{noted}");
}

#[test]
fn a_packed_base_is_not_packed_otherwise() {
    let place = Workplace::new();
    succeed(place.nibble(&["quantize", "--model", "model", "--out", "packed"]));
    let train = |out: &str, flags: &[&str]| {
        let mut command = place.nibble(&["train", "--model", "packed", "--data", "train.jsonl"]);
        command.args(["--out", out, "--max-length", "32"]).args(flags);
        command
    };
    for flags in [&["--quantization", "fp4"][..], &["--block-size", "32"]] {
        let (code, text) = fail(train("out", flags));
        let says =
            "packed is 4-bit already: --quantization nf4 --block-size 64 --double-quant true";
        assert!(code == 2 && error_of(&text).contains(says), "{text}");
    }
    succeed(train("out", &["--quantization", "nf4", "--block-size", "64", "--max-steps", "2"]));
    let settings = String::from_utf8(place.read("out/settings.toml")).unwrap();
    let of_packing = |line: &&str| line.starts_with("quantization") || line.contains("block_size");
    assert_eq!(settings.lines().find(of_packing), None, "the base is as it is: {settings}");
    succeed(train("out", &["--resume", "--max-steps", "3"]));
    for flags in [["--block-size", "128"], ["--double-quant", "false"]] {
        let (code, text) = fail(train("out", &[&["--quantization", "none"][..], &flags].concat()));
        assert!(code == 2 && error_of(&text).contains("have no effect with"), "{text}");
    }
}

#[test]
fn numbers_that_explode_name_step_and_lines() {
    let place = Workplace::new();
    let flags = ["--learning-rate", "1e30", "--max-grad-norm", "0", "--max-steps", "9"];
    let (code, text) = fail(place.train(
        "out",
        &[&flags[..], &["--lr-scheduler-type", "constant", "--save-steps", "1"]].concat(),
    ));
    assert_eq!(code, 1);
    let error = error_of(&text);
    assert!(
        error.starts_with("error: step ")
            && error.contains("not finite in batch 1 of 4 (train.jsonl:"),
        "{error}"
    );
    assert!(error.contains("try a lower `--learning-rate`"), "{error}");
    let last = place.list("out").into_iter().filter(|name| name.starts_with("checkpoint-")).max();
    let way = format!("`--init-adapter out/{}` goes on from the last checkpoint", last.unwrap());
    assert!(error.contains(&way), "{error}");
}

#[test]
fn a_folder_has_one_run_at_a_time() {
    let place = Workplace::new();
    let mut first =
        place.train("out", &["--max-steps", "5000", "--save-steps", "2"]).spawn().unwrap();
    while !place.list("out").contains(&"settings.toml".to_string()) {
        assert!(first.try_wait().unwrap().is_none());
    }
    let (code, text) = fail(place.nibble(&["train", "--out", "out", "--resume"]));
    first.kill().unwrap();
    first.wait().unwrap();
    assert_eq!(code, 2);
    assert!(error_of(&text).contains("another process is training into out"), "{text}");
}

/// A model of learned positions has no others: longer documents are found before a weight is read, in
/// evaluation data, too.
#[test]
fn documents_are_no_longer_than_the_positions_that_there_are() {
    let place = Workplace::new();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models/gpt2_s0");
    for file in ["config.json", "model.safetensors"] {
        fs::copy(golden.join(file), place.path("model").join(file)).unwrap();
    }
    let ids: Vec<u32> = (0..200).map(|i| 3 + i % 90).collect();
    fs::write(place.path("long.jsonl"), json!({ "input_ids": ids }).to_string()).unwrap();
    let long = ["--max-length", "256", "--eval-data", "long.jsonl"];
    let train = |more: &[&str]| {
        let mut command = place.nibble(&["train", "--model", "model", "--data", "train.jsonl"]);
        let out = if more.contains(&"--out") { &[][..] } else { &["--out", "run"] };
        command.args(["--max-steps", "1"]).args(out).args(long).args(more);
        command
    };
    let error = "long.jsonl:1: document is longer than 64 tokens (1 of 1 is, the longest has 200)";
    let hint = "hint: the model has 64 positions: choose `--truncation drop`";
    let (_, text) = fail(train(&[]));
    assert!(text.contains(error) && text.contains(hint), "{text}");
    assert!(!text.contains("step 1"), "{text}");
    let report = place.nibble(&["data", "--model", "model", "--data", "long.jsonl"]);
    let output = { report }.args(["--max-length", "256"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("records longer than 64 tokens") && !output.status.success(), "{said}");
    succeed(train(&["--truncation", "split"]));
    // Samples end where the positions do.
    let sample = ["--truncation", "split", "--sample-max-new-tokens", "100"];
    succeed(train(&[&sample[..], &["--out", "sampled", "--sample-prompt", "w5 w6"]].concat()));
    let prompt = "w5 ".repeat(64);
    let (code, text) =
        fail(train(&[&sample[..], &["--out", "new", "--sample-prompt", &prompt]].concat()));
    assert!(code == 2 && text.contains("--sample-prompt: 64 tokens, the model has"), "{text}");
    let mut fit = place.nibble(&["memory", "--model", "model", "--device", "cpu", "--json"]);
    fit.args(["--max-length", "256", "--fit", "--budget", "1GiB"]);
    let fit = succeed(fit);
    let note = "note: the model has positions for 64 tokens, `--max-length` is 256\n";
    assert_eq!(stderr(&fit), note);
    let fit: Value = serde_json::from_slice(&fit.stdout).unwrap();
    assert_eq!(fit["fit"]["ways"][0]["longest_document"], 64, "{fit}");
    let mut ask = place.nibble(&["generate", "--model", "model", "--raw", "--prompt"]);
    ask.arg("w5 ".repeat(80)).args(["--context-length", "500"]);
    let (_, text) = fail(ask);
    assert!(text.contains("hint: shorten the prompt: the model has no more positions"), "{text}");
}
