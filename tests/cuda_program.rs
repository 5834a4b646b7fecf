//! The whole program with `--device cuda`, where the driver's and cuBLAS' libraries are stand-ins:
//! `tests/emulator/driver.cpp`, which checks every call and runs what is queued as late as it may.
//! Apart from `program`, which needs no C++ compiler.
#![cfg(unix)]

#[path = "emulator/mod.rs"]
#[allow(dead_code)]
mod emulator;
mod training;

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use safetensors::SafeTensors;
use serde_json::Value;
use training::{Workplace, fail, stderr, succeed};

/// A folder with the libraries, whose kernels are the committed PTX; `None`, aloud, without g++.
fn libraries() -> Option<&'static PathBuf> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    let make = || {
        let library = emulator::ptx_library(emulator::PTX)?;
        let folder = library.with_extension("libraries");
        fs::create_dir_all(&folder).unwrap();
        for name in ["libcuda.so.1", "libcublas.so.12"] {
            // There since an earlier run, if not.
            let _ = symlink(&library, folder.join(name));
        }
        Some(folder)
    };
    FOLDER.get_or_init(make).as_ref()
}

/// The command on a GPU of 1 GiB.
fn on_gpu(mut command: Command) -> Option<Command> {
    let libraries = libraries()?;
    command.env("LD_LIBRARY_PATH", libraries).env("NIBBLE_CUDA_LIB_DIR", libraries);
    Some(command)
}

/// `nibble train --device cuda` into `out`.
fn train(place: &Workplace, out: &str, flags: &[&str]) -> Option<Command> {
    on_gpu(place.train(out, &[&["--device", "cuda"], flags].concat()))
}

fn stdout_json(command: Command) -> Value {
    serde_json::from_slice(&succeed(command).stdout).unwrap()
}

fn losses(place: &Workplace, checkpoint: &str) -> Vec<f64> {
    let state = place.json(&format!("{checkpoint}/state.json"));
    let events = state["history"].as_array().unwrap().iter();
    let steps = events.filter(|event| event["event"] == "step");
    steps.map(|event| event["loss"].as_f64().unwrap()).collect()
}

#[test]
fn a_card_is_taken_if_it_computes_what_the_cpu_does() {
    let place = Workplace::new();
    let Some(doctor) = on_gpu(place.nibble(&["doctor", "--json"])) else { return };
    let found = stdout_json(doctor);
    assert_eq!(found["cuda"]["usable"], true, "{found}");
    assert_eq!(found["cuda"]["driver"]["devices"][0]["name"], "Emulated GPU", "{found}");
    let plain =
        String::from_utf8(succeed(on_gpu(place.nibble(&["doctor"])).unwrap()).stdout).unwrap();
    assert!(plain.contains("training runs on it"), "{plain}");
    let said = stderr(&succeed(on_gpu(place.train("auto", &["--max-steps", "1"])).unwrap()));
    assert!(said.contains("cuda:0: Emulated GPU, "), "{said}");
    assert!(said.contains("computes as the CPU does"), "{said}");
    // Memory in the line of a step is the GPU's, cuBLAS' workspace included.
    assert!(said.contains("tokens/s  33."), "{said}");

    let broken = |command: Command| {
        let mut command = on_gpu(command).unwrap();
        command.env("NIBBLE_EMULATED_FAULT", "1");
        command
    };
    let found = stdout_json(broken(place.nibble(&["doctor", "--json"])));
    assert_eq!(found["cuda"]["usable"], false, "{found}");
    let said = stderr(&succeed(broken(place.train("broken", &["--max-steps", "1"]))));
    assert!(
        said.contains("the CPU is used, not cuda:0: losses of a llama with heads of 64 and"),
        "{said}"
    );
    let (code, text) = fail(broken(place.train("none", &["--device", "cuda"])));
    assert_eq!(code, 1);
    assert!(
        text.contains("error: --device cuda: losses of a llama with heads of 64 and"),
        "{text}"
    );
    assert!(text.contains("hint: use `--device cpu`"), "{text}");

    // As the check on a GPU has it, which measures the rest.
    let mut measured = broken(place.train("measured", &["--device", "cuda", "--max-steps", "1"]));
    measured.env("NIBBLE_UNVERIFIED_GPU", "1");
    let said = stderr(&succeed(measured));
    assert!(
        said.contains("warning: results are wrong: losses of a llama with heads of 64 and"),
        "{said}"
    );
    assert!(said.contains("free, DOES NOT compute as the CPU does"), "{said}");
}

/// Drivers of CUDA 12.0 and 12.1 load all kernels of a library at once, unless they are asked not to.
#[test]
fn kernels_are_loaded_when_they_are_used() {
    let place = Workplace::new();
    let usable = |loading: Option<&str>| {
        let mut command = on_gpu(place.nibble(&["doctor", "--json"]))?;
        command.env("NIBBLE_EMULATED_EAGER", "1").env_remove("CUDA_MODULE_LOADING");
        command.envs(loading.map(|loading| ("CUDA_MODULE_LOADING", loading)));
        Some(stdout_json(command)["cuda"]["usable"].clone())
    };
    let Some(by_default) = usable(None) else { return };
    assert_eq!(by_default, true);
    assert_eq!(usable(Some("EAGER")).unwrap(), false, "a user's wish goes first");
}

/// As where a package has brought a newer cuBLAS than the system's driver runs.
#[test]
fn a_library_that_needs_a_newer_driver_is_told_of() {
    let place = Workplace::new();
    let Some(library) = emulator::ptx_library(emulator::PTX) else { return };
    for name in ["libcuda.so.1", "libcublas.so.13"] {
        symlink(&library, place.path(name)).unwrap();
    }
    let mut command = place.nibble(&["doctor", "--json"]);
    command.env("LD_LIBRARY_PATH", place.path("")).env("NIBBLE_CUDA_LIB_DIR", place.path(""));
    let obstacle = stdout_json(command)["cuda"]["obstacle"].clone();
    let obstacle = obstacle.as_str().unwrap();
    assert!(obstacle.contains("libcublas.so.13 needs a newer driver"), "{obstacle}");
    assert!(obstacle.contains("this one runs CUDA 12"), "{obstacle}");
}

/// Losses of a run on the CPU, and of the same on the GPU, resumed in the middle.
#[test]
fn a_run_follows_the_cpu_and_resumes_bit_for_bit() {
    let place = Workplace::new();
    let flags = ["--learning-rate", "1e-2", "--per-device-train-batch-size", "2"];
    let steps = |count: &'static str| [&flags[..], &["--max-steps", count]].concat();
    let Some(run) = train(&place, "gpu", &[&steps("6")[..], &["--save-steps", "3"]].concat())
    else {
        return;
    };
    let said = stderr(&succeed(run));
    assert!(said.contains("Emulated GPU"), "{said}");
    succeed(place.train("cpu", &steps("6")));
    let (gpu, cpu) = (losses(&place, "gpu/checkpoint-6"), losses(&place, "cpu/checkpoint-6"));
    assert_eq!(gpu.len(), 6);
    for (gpu_loss, cpu_loss) in gpu.iter().zip(&cpu) {
        assert!((gpu_loss / cpu_loss - 1.0).abs() < 2e-2, "{gpu:?}, on the CPU {cpu:?}");
    }
    // As if it had ended after the third step.
    fs::remove_dir_all(place.path("gpu/checkpoint-6")).unwrap();
    let adapter = place.read("gpu/adapter_model.safetensors");
    // What stays in memory may be another choice.
    let resume = ["train", "--out", "gpu", "--resume", "--dequantized-blocks", "0"];
    succeed(on_gpu(place.nibble(&resume)).unwrap());
    assert!(place.read("gpu/adapter_model.safetensors") == adapter, "resumed bit for bit");
    assert_eq!(losses(&place, "gpu/checkpoint-6"), gpu);
}

/// All moments in 8 bits, so that none are left in f32; answers in between.
#[test]
fn a_run_with_packed_moments_is_saved_and_resumed() {
    let place = Workplace::new();
    let flags = ["--optim", "adamw_8bit", "--lora-r", "64", "--target-modules", "q_proj,o_proj"];
    let more = ["--learning-rate", "1e-2", "--max-steps", "4", "--save-steps", "2"];
    let samples = ["--sample-prompt", "w5 w12", "--sample-steps", "2"];
    let flags = [&flags[..], &more, &samples].concat();
    let Some(run) = train(&place, "gpu", &flags) else { return };
    succeed(run);
    succeed(place.train("cpu", &[&["--device", "cpu"], &flags[..]].concat()));
    let (gpu, cpu) = (losses(&place, "gpu/checkpoint-4"), losses(&place, "cpu/checkpoint-4"));
    for (gpu_loss, cpu_loss) in gpu.iter().zip(&cpu) {
        assert!((gpu_loss / cpu_loss - 1.0).abs() < 2e-2, "{gpu:?}, on the CPU {cpu:?}");
    }
    fs::remove_dir_all(place.path("gpu/checkpoint-4")).unwrap();
    let adapter = place.read("gpu/adapter_model.safetensors");
    succeed(on_gpu(place.nibble(&["train", "--out", "gpu", "--resume"])).unwrap());
    assert!(place.read("gpu/adapter_model.safetensors") == adapter, "resumed bit for bit");
}

/// In the middle of the second of three steps the driver, or cuBLAS, has no memory: the step is made again in
/// smaller parts, and has the same loss, as has the one after it.
#[test]
fn a_step_that_finds_no_memory_is_made_again_in_parts() {
    let place = Workplace::new();
    let flags = ["--per-device-train-batch-size", "4", "--packing", "false"];
    let flags = [&flags[..], &["--gradient-accumulation-steps", "1"]].concat();
    let run = |out: &str, steps: &str, (name, value): (&str, &str)| {
        let rate = ["--learning-rate", "1e-2", "--lr-scheduler-type", "constant"];
        // The first thing to go, see below.
        let room = if out == "room" { "8" } else { "0" };
        let rate = [&rate[..], &["--dequantized-blocks", room]].concat();
        let flags = [&flags[..], &rate, &["--max-steps", steps]].concat();
        let mut command = train(&place, out, &flags)?;
        command.env(name, value);
        Some(stderr(&succeed(command)))
    };
    let calls = |out: &str, steps: &str| -> Option<Vec<(String, u64)>> {
        run(out, steps, ("NIBBLE_EMULATED_CALLS", "calls"))?;
        let text = String::from_utf8(place.read("calls")).unwrap();
        let call = |line: &str| {
            let (kind, count) = line.split_once(' ').unwrap();
            (kind.to_string(), count.parse().unwrap())
        };
        Some(text.lines().map(call).collect())
    };
    let Some(first) = calls("first", "1") else { return };
    let all = calls("plenty", "3").unwrap();
    let plenty = losses(&place, "plenty/checkpoint-3");
    for ((kind, first), (_, all)) in first.iter().zip(&all) {
        let half_a_step = (all - first) / 4;
        assert!(half_a_step > 10, "{kind}: {first} of {all}");
        let shortage = format!("{kind}:{}", first + half_a_step);
        let said = run(kind, "3", ("NIBBLE_EMULATED_SHORTAGE", &shortage)).unwrap();
        assert!(said.contains("step 1: ") && said.contains("continuing with"), "{kind}: {said}");
        let short = losses(&place, &format!("{kind}/checkpoint-3"));
        assert_eq!(short[0], plenty[0], "{kind}");
        for (short, plenty) in short.iter().zip(&plenty) {
            assert!((short / plenty - 1.0).abs() < 1e-3, "{kind}: {short}, with memory {plenty}");
        }
        let text = String::from_utf8(place.read(&format!("{kind}/metrics.jsonl"))).unwrap();
        let events = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let told: Vec<Value> = events.filter(|event| event["event"] == "out_of_memory").collect();
        assert!(told.len() == 1 && told[0]["step"] == 1, "{kind}: {told:?}");
        let tokens = |key: &str| told[0][key].as_u64().unwrap();
        assert!(tokens("to_tokens") < tokens("from_tokens"), "{kind}: {told:?}");
        let page = String::from_utf8(place.read(&format!("{kind}/report.html"))).unwrap();
        assert!(page.contains("After step 1, memory ran out"), "{kind}");
    }
    // Weights that stay dequantized are given up alone, and no bit changes.
    let (kind, first) = &first[0];
    let shortage = format!("{kind}:{}", first + 20);
    let said = run("room", "3", ("NIBBLE_EMULATED_SHORTAGE", &shortage)).unwrap();
    assert!(said.contains("weights of 2 of 2 blocks stay dequantized"), "{said}");
    assert!(said.contains("continuing with no weights that stay dequantized, at "), "{said}");
    assert_eq!(losses(&place, "room/checkpoint-3"), plenty);
}

/// Weights and moments of a wide adapter, each matrix more than 1 MiB, pass through the host's memory in
/// pieces, and come back. The driver ends a process that copies more at once.
#[test]
fn a_checkpoint_is_written_and_read_piece_by_piece() {
    let place = Workplace::new();
    let pieces = |mut command: Command| {
        command.env("NIBBLE_EMULATED_MOST_DOWNLOAD", (1 << 20).to_string());
        on_gpu(command)
    };
    let flags = ["--lora-r", "5000", "--target-modules", "q_proj", "--learning-rate", "1e-2"];
    let flags = [&flags[..], &["--max-steps", "2", "--save-steps", "1"]].concat();
    let run = place.train("gpu", &[&["--device", "cuda"], &flags[..]].concat());
    let Some(run) = pieces(run) else { return };
    succeed(run);
    let written = place.read("gpu/checkpoint-2/optimizer.safetensors");
    let file = SafeTensors::deserialize(&written).unwrap();
    assert!(file.tensors().iter().all(|(_, tensor)| tensor.data().len() > 1 << 20));
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    assert!(safetensors::serialize(file.tensors(), Some(metadata)).unwrap() == written);
    fs::remove_dir_all(place.path("gpu/checkpoint-2")).unwrap();
    let adapter = place.read("gpu/adapter_model.safetensors");
    succeed(pieces(place.nibble(&["train", "--out", "gpu", "--resume"])).unwrap());
    assert!(place.read("gpu/adapter_model.safetensors") == adapter, "resumed bit for bit");
    assert!(place.read("gpu/checkpoint-2/optimizer.safetensors") == written);
}

#[test]
fn no_policy_changes_a_bit() {
    let place = Workplace::new();
    succeed(place.nibble(&["quantize", "--model", "model", "--out", "packed"]));
    let mut adapters = Vec::new();
    for (out, flags, stay) in [
        ("keep", "--activations keep --dequantized-blocks 0", 0),
        ("keep-all", "--activations keep", 2),
        ("checkpoint", "--activations checkpoint --dequantized-blocks 0", 0),
        ("checkpoint-one", "--activations checkpoint --dequantized-blocks 1", 1),
        ("offload", "--activations offload --weights stream --dequantized-blocks 0", 0),
        ("both", "--activations offload-attention --weights stream --dequantized-blocks 2", 1),
    ] {
        let mut command = place.nibble(&["train", "--model", "packed", "--data", "train.jsonl"]);
        command.args(["--device", "cuda", "--out", out, "--max-length", "32", "--max-steps", "3"]);
        command.args(["--learning-rate", "1e-2"]).args(flags.split(' '));
        let Some(command) = on_gpu(command) else { return };
        let said = stderr(&succeed(command));
        let fact = format!("weights of {stay} of 2 blocks stay dequantized");
        assert_eq!((said.contains(&fact), said.contains(" stay ")), (stay > 0, stay > 0), "{said}");
        adapters.push(place.read(&format!("{out}/adapter_model.safetensors")));
    }
    assert!(adapters.iter().all(|adapter| *adapter == adapters[0]));
}

#[test]
fn a_trained_adapter_is_measured_and_asked() {
    let place = Workplace::new();
    let flags = ["--max-steps", "4", "--learning-rate", "1e-2", "--lora-dropout", "0.1"];
    let Some(run) = train(&place, "out", &flags) else { return };
    succeed(run);
    let eval = |device: &str| {
        let mut command = place.nibble(&["eval", "--model", "model", "--adapter", "out", "--json"]);
        command.args(["--data", "eval.jsonl", "--device", device]);
        stdout_json(on_gpu(command).unwrap())
    };
    let (gpu, cpu) = (eval("cuda"), eval("cpu"));
    for part in ["base", "adapter"] {
        let loss = |all: &Value| all[part]["loss"].as_f64().unwrap();
        let (gpu, cpu) = (loss(&gpu), loss(&cpu));
        assert!((gpu / cpu - 1.0).abs() < 1e-2, "{part}: {gpu}, on the CPU {cpu}");
    }
    let ask = || {
        let mut command = place.nibble(&["generate", "--model", "model", "--adapter", "out"]);
        command.args([
            "--device",
            "cuda",
            "--raw",
            "--prompt",
            "w5 w12 w19",
            "--max-new-tokens",
            "9",
        ]);
        succeed(on_gpu(command).unwrap()).stdout
    };
    let answer = ask();
    assert!(!answer.is_empty() && answer == ask());
}

#[test]
fn memory_is_what_was_planned() {
    let place = Workplace::new();
    succeed(place.nibble(&["quantize", "--model", "model", "--out", "packed"]));
    for flags in [
        ["--activations", "keep", "--embedding", "gpu"],
        ["--activations", "checkpoint", "--embedding", "host-input"],
        ["--activations", "checkpoint", "--embedding", "host"],
        ["--activations", "offload", "--weights", "stream"],
        ["--activations", "offload-attention", "--weights", "resident"],
    ] {
        let mut command = place.nibble(&["memory", "--model", "packed", "--max-length", "32"]);
        command.args(["--json", "--device", "cuda", "--measure", "2"]).args(flags);
        let Some(command) = on_gpu(command) else { return };
        let report = stdout_json(command);
        let (planned, measured) = (&report["total_bytes"], &report["measured"]["peak_bytes"]);
        assert!(planned.as_u64().unwrap() > 0, "{report}");
        assert!(planned == measured, "{flags:?}: {measured} of {planned} planned");
        let (planned, host) = (&report["pinned_bytes"], &report["measured"]["host"]);
        assert!(planned.as_u64().unwrap() > 0, "what is uploaded is staged");
        assert_eq!(planned, &host["pinned_bytes"], "{flags:?}");
        let [resident, mapped] = ["resident_bytes", "mapped_bytes"].map(|key| host[key].as_u64());
        assert!(0 < mapped.unwrap() && mapped < resident, "{host}");
    }
}

/// What the context takes is in use when the GPU is asked, and not taken once more from what is free.
#[test]
fn a_context_is_counted_once() {
    const CONTEXT: u64 = 600 << 20;
    let place = Workplace::new();
    let with_context = |mut command: Command, bytes: u64| {
        command.env("NIBBLE_EMULATED_CONTEXT_BYTES", bytes.to_string());
        on_gpu(command)
    };
    // Of weights that stay dequantized only a plan for this card has some.
    let sizes = ["--dequantized-blocks", "0", "--max-length", "32", "--json"];
    let sizes = [&["--model", "model", "--device", "cuda"], &sizes[..]].concat();
    let memory = |bytes: u64, flags: &[&str]| {
        let command = place.nibble(&[&["memory"], &sizes[..], flags].concat());
        with_context(command, bytes).map(stdout_json)
    };
    let context = |report: &Value| report["components"]["CUDA context"].as_u64().unwrap();
    let Some(plan) = memory(CONTEXT, &[]) else { return };
    assert_eq!(context(&plan), CONTEXT);
    assert_eq!(
        (&plan["here"]["fits"], &plan["here"]["free_bytes"]),
        (&true.into(), &(1 << 30).into())
    );
    let fit = memory(CONTEXT, &["--fit"]).unwrap();
    assert_eq!(
        (&fit["fits"], &fit["planned_bytes"]),
        (&true.into(), &plan["total_bytes"]),
        "{fit}"
    );
    let run = place.train("out", &["--device", "cuda", "--max-steps", "1"]);
    succeed(with_context(run, CONTEXT).unwrap());
    let text = String::from_utf8(place.read("out/metrics.jsonl")).unwrap();
    let start: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    // Open for work, the backend has a page or two of its own.
    let open = |bytes: u64| (CONTEXT..CONTEXT + 8192).contains(&bytes);
    let row = &start["memory_plan"][0];
    assert!(row[0] == "CUDA context" && open(row[1].as_u64().unwrap()), "{start}");

    // Modules and cuBLAS come to the bare context of the question; other cards have a context of their own.
    assert_eq!(context(&memory(1 << 20, &[]).unwrap()), 460 << 20);
    let elsewhere = memory(CONTEXT, &["--budget", "600MiB"]).unwrap();
    assert_eq!((context(&elsewhere), &elsewhere["here"]["fits"]), (460 << 20, &true.into()));
    let full = memory(1000 << 20, &["--budget", "600MiB"]).unwrap();
    assert_eq!(full["here"]["fits"], false, "{full}");
    let measured = memory(CONTEXT, &["--measure", "1"]).unwrap();
    assert!(open(context(&measured)), "{measured}");
    assert_eq!(measured["total_bytes"], measured["measured"]["peak_bytes"]);
}

/// The host's memory beside the GPU, in what `train` says at its end and in its report.
#[test]
fn a_run_tells_what_it_pinned() {
    let place = Workplace::new();
    let flags = ["--max-steps", "2", "--activations", "offload"];
    let Some(run) = train(&place, "out", &flags) else { return };
    let said = String::from_utf8(succeed(run).stdout).unwrap();
    let line = said.lines().find(|line| line.contains(" of pinned memory, planned ")).unwrap();
    let (_, sizes) = line.split_once(", and ").unwrap();
    let (pinned, planned) = sizes.split_once(" of pinned memory, planned ").unwrap();
    assert_eq!(pinned, planned, "{said}");
    let page = String::from_utf8(place.read("out/report.html")).unwrap();
    assert!(page.contains("pinned memory") && page.contains("on the host"));
}

/// The answer's cache would take more than the card has: told before a weight is read.
#[test]
fn a_plan_that_the_card_has_no_room_for_is_refused() {
    let place = Workplace::new();
    let flags = ["--sample-prompt", "w5 w6", "--sample-max-new-tokens", "100000000"];
    let Some(run) = train(&place, "out", &flags) else { return };
    let (code, text) = fail(run);
    assert_eq!(code, 1);
    assert!(
        text.contains("with what is in use, the GPU has 1.0 GiB: ") && text.contains("hint: "),
        "{text}"
    );
    let command = place.nibble(&["memory", "--model", "model", "--device", "cuda"]);
    let said = String::from_utf8(succeed(on_gpu(command).unwrap()).stdout).unwrap();
    assert!(said.contains("\nfits the "), "{said}");
}

#[test]
fn a_card_that_is_too_small_is_refused_with_what_would_fit() {
    let place = Workplace::new();
    let Some(mut run) = train(&place, "out", &["--max-steps", "1"]) else { return };
    run.env("NIBBLE_EMULATED_BYTES", "4000000");
    let (_, text) = fail(run);
    assert!(text.contains("error: "), "{text}");
    assert!(text.contains("hint: "), "{text}");
    assert!(!place.path("out").join("adapter_model.safetensors").exists());
}
