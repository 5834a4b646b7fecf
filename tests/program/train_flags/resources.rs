//! Where a run reads, writes and computes, and what it may use.

use super::runs::{Run, Runs};
use crate::training::{fail, refused, succeed};

/// Loss of the base model on the first tokens: what model it is.
fn base_loss(run: &Run) -> f64 {
    run.start()["base_loss"].as_f64().unwrap()
}

fn planned(run: &Run, part: &str) -> u64 {
    let plan = run.start()["memory_plan"].as_array().unwrap().clone();
    let row = plan.iter().find(|row| row[0].as_str().unwrap().starts_with(part));
    row.map_or(0, |row| row[1].as_u64().unwrap())
}

#[test]
fn config() {
    let runs = Runs::new();
    std::fs::write(runs.place.path("run.toml"), "lora_r = 5\nseed = 9\n").unwrap();
    let run = runs.train("config=run.toml");
    assert_eq!(run.adapter_config()["r"], 5);
    assert_eq!(run.start()["settings"]["seed"], 9);
    assert_eq!(runs.train("config=run.toml lora-r=6").adapter_config()["r"], 6);
}

#[test]
fn model() {
    let runs = Runs::new();
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/models/llama_tied_s2");
    std::fs::create_dir(runs.place.path("other")).unwrap();
    for (from, file) in [
        (golden.into(), "config.json"),
        (golden.into(), "model.safetensors"),
        (runs.place.path("model"), "tokenizer.json"),
        (runs.place.path("model"), "tokenizer_config.json"),
    ] {
        let (from, to) = (from.join(file), runs.place.path("other").join(file));
        std::fs::copy(from, to).unwrap();
    }
    let (one, other) = (runs.train("model=model"), runs.train("model=other"));
    assert_ne!(base_loss(&one), base_loss(&other));
    assert_eq!(other.adapter_config()["base_model_name_or_path"], "other");
}

/// A dense base with `flags` trains as the folder that `nibble quantize` makes with `packed`.
fn assert_packed_as(flags: &str, packed: &[&str]) {
    let runs = Runs::new();
    let mut command = runs.place.nibble(&["quantize", "--model", "model", "--out", "packed"]);
    command.args(packed);
    succeed(command);
    let [dense, stored, default] = [
        format!("max-steps=3 {flags}"),
        "max-steps=3 model=packed".to_string(),
        "max-steps=3".to_string(),
    ]
    .map(|flags| runs.train(&flags));
    assert_eq!(dense.numbers("step", "loss"), stored.numbers("step", "loss"));
    assert_eq!(dense.optimizer("master"), stored.optimizer("master"));
    assert_ne!(dense.numbers("step", "loss"), default.numbers("step", "loss"));
    for part in ["4-bit codes", "scales of 4-bit blocks", "embeddings and head"] {
        assert_eq!(planned(&dense, part), planned(&stored, part), "{part}");
    }
}

#[test]
fn quantization() {
    assert_packed_as("quantization=fp4", &["--quant-type", "fp4"]);
    let runs = Runs::new();
    let [none, nf4] = ["none", "nf4"].map(|how| runs.train(&format!("quantization={how}")));
    assert_ne!(base_loss(&none), base_loss(&nf4));
    // 64·64·2 + 32·64·2 + 160·64·3 weights of two blocks, in f32 or at 4.127 bits
    let linears = [4096, 2048, 2048, 4096, 10240, 10240, 10240];
    let dense: u64 = linears.iter().map(|n| n * 4).sum();
    let packed: u64 = linears.iter().map(|n| n / 2 + n / 64 + 4 + 4).sum();
    assert_eq!(planned(&none, "linear layers, not quantized"), 2 * dense);
    assert_eq!(planned(&nf4, "4-bit codes") + planned(&nf4, "scales of 4-bit"), 2 * packed);
}

#[test]
fn block_size() {
    assert_packed_as("block-size=256", &["--block-size", "256"]);
}

/// Also one that a dense base has by itself; but for files, where settings of other runs have it. The run's
/// own settings have none: the base is as it is.
#[test]
fn a_packing_that_the_base_has_not_is_refused() {
    let runs = Runs::new();
    let packed = ["quantize", "--model", "model", "--out", "packed", "--quant-type", "fp4"];
    let format = ["--block-size", "128", "--double-quant", "false"];
    succeed(runs.place.nibble(&[&packed[..], &format].concat()));
    for asked in ["quantization=nf4", "block-size=64", "double-quant=true", "double-quant"] {
        let error = runs.refused(&format!("model=packed {asked}"));
        let is =
            "packed is 4-bit already: --quantization fp4 --block-size 128 --double-quant false";
        assert!(error.contains(is) && error.contains("hint: leave these flags out"), "{error}");
        let memory = ["memory", "--model", "packed", &format!("--{asked}")];
        let (code, error) = fail(runs.place.nibble(&memory));
        assert!(code == 2 && error.contains(is), "{error}");
    }
    runs.train("model=packed quantization=fp4 block-size=128");
    let usual = "quantization = 'nf4'\nblock_size = 64\ndouble_quant = true\n";
    std::fs::write(runs.place.path("run.toml"), usual).unwrap();
    let run = runs.train("model=packed config=run.toml max-steps=2");
    assert!(run.start()["settings"]["block_size"].is_null());
    succeed(runs.place.nibble(&["train", "--out", &run.out, "--resume", "--max-steps", "3"]));
    let settings = format!("{}/settings.toml", run.out);
    let text = String::from_utf8(runs.place.read(&settings)).unwrap();
    assert!(!text.contains("double_quant"), "{text}");
    succeed(runs.place.nibble(&["memory", "--config", &settings]));
}

#[test]
fn blocks_of_what_is_not_packed_are_refused() {
    let runs = Runs::new();
    let both = "quantization=none block-size=32";
    let says = "have no effect with `--quantization none`";
    assert!(runs.refused(both).contains(says));
    assert!(runs.refused("quantization=none block-size=64").contains(says));
    let memory = ["memory", "--model", "model", "--quantization", "none", "--block-size", "32"];
    assert!(fail(runs.place.nibble(&memory)).1.contains(says));
    // In a file, too; but what is usual asks for nothing there.
    let run = runs.train("quantization=none max-steps=2");
    let settings = format!("{}/settings.toml", run.out);
    succeed(runs.place.nibble(&["memory", "--config", &settings]));
    let text = String::from_utf8(runs.place.read(&settings)).unwrap();
    let asking = text.replace("block_size = 64", "block_size = 32");
    assert_ne!(asking, text);
    std::fs::write(runs.place.path(&settings), asking).unwrap();
    assert!(fail(runs.place.nibble(&["memory", "--config", &settings])).1.contains(says));
}

#[test]
fn double_quant() {
    assert_packed_as("double-quant=false", &["--double-quant", "false"]);
}

#[test]
fn out() {
    let runs = Runs::new();
    let folder = runs.train("").out;
    let mut files = runs.place.list(&folder);
    files.retain(|name| !name.starts_with('.'));
    let expected = [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoint-1",
        "metrics.jsonl",
        "report.html",
        "runs",
        "settings.toml",
        "trainer_state.json",
    ];
    assert_eq!(files, expected);
    // What a shell would expand, in a file and behind `=`.
    std::fs::write(runs.place.path("home.toml"), "out = '~/run'").unwrap();
    let mut by_file = runs.place.nibble(&["train", "--config", "home.toml"]);
    by_file.args(super::runs::arguments(""));
    let merge = ["merge", "--model=model", "--adapter", &folder, "--out=~/merged"];
    for (command, out) in [(by_file, "~/run"), (runs.place.nibble(&merge), "~/merged")] {
        let error = refused(2, command);
        let says =
            format!("there is no folder `~` for {out}\nhint: `~` is not expanded in quotes or");
        assert!(error.contains(&says), "{error}");
        assert!(!runs.place.path("~").exists());
    }
    #[cfg(unix)]
    for file in ["adapter_model.safetensors", "checkpoint-1/optimizer.safetensors"] {
        use std::os::unix::fs::PermissionsExt;
        let mode = |name: &str| {
            let path = runs.place.path(&folder).join(name);
            path.metadata().unwrap().permissions().mode()
        };
        assert_eq!(mode(file), mode("metrics.jsonl"), "{file}");
    }
}

/// `tests/program/train_resume.rs` kills and stops runs at all kinds of moments.
#[test]
fn resume() {
    let runs = Runs::new();
    let (whole, part) = (runs.train("max-steps=5"), runs.train("max-steps=2"));
    let resumed = runs.nibble_into(&part.out, &["--resume", "--max-steps", "5"]);
    assert_eq!(resumed.numbers("step", "loss"), whole.numbers("step", "loss"));
    assert_eq!(resumed.start()["resumed_from_step"], 2);
    assert_eq!(resumed.optimizer("master"), whole.optimizer("master"));
}

#[test]
#[cfg(target_os = "linux")]
fn threads() {
    let threads_of = |process: u32| {
        let tasks = std::fs::read_dir(format!("/proc/{process}/task")).ok()?;
        Some(tasks.count())
    };
    let runs = Runs::new();
    let most = |threads: usize| {
        let flags = format!("threads={threads} max-steps=100000 save-steps=100000");
        let out = runs.next_out();
        let mut command = runs.place.nibble(&["train", "--out", &out]);
        let mut child = command.args(super::runs::arguments(&flags)).spawn().unwrap();
        let metrics = runs.place.path(&out).join("metrics.jsonl");
        while !metrics.exists() {
            assert!(child.try_wait().unwrap().is_none());
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let found = threads_of(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        found.unwrap()
    };
    assert_eq!(most(4) - most(1), 3);
}

#[test]
fn activations() {
    let runs = Runs::new();
    let policies = ["keep", "attention", "checkpoint", "offload", "offload-attention"];
    let [keep, attention, checkpoint, offload, both] =
        policies.map(|policy| runs.train(&format!("activations={policy}")));
    assert!(keep.said.contains("2 of 2 blocks keep"), "{}", keep.said);
    assert!(checkpoint.said.contains("0 of 2 blocks keep"), "{}", checkpoint.said);
    assert!(planned(&checkpoint, "kept activations") == 0 && planned(&keep, "kept") > 0);
    assert_eq!(keep.optimizer("master"), checkpoint.optimizer("master"));
    let says = "0 of 2 blocks keep their activations, 2 the output of attention";
    assert!(attention.said.contains(says), "{}", attention.said);
    assert!((1..planned(&keep, "kept")).contains(&planned(&attention, "kept activations")));
    assert_eq!(attention.optimizer("master"), checkpoint.optimizer("master"));
    assert!(offload.said.contains("0 of 2 blocks keep"), "{}", offload.said);
    assert!(offload.said.contains("of inputs offloaded"), "{}", offload.said);
    // Two slots and the output of the last block, as many as two blocks have without.
    assert_eq!(planned(&offload, "block inputs"), planned(&checkpoint, "block inputs"));
    assert_eq!(offload.optimizer("master"), checkpoint.optimizer("master"));
    assert!(both.said.contains("of inputs and attention offloaded"), "{}", both.said);
    let page = String::from_utf8(runs.place.read(&format!("{}/report.html", both.out))).unwrap();
    assert!(page.contains("of inputs and attention offloaded"), "the report says it, too");
    assert_eq!(planned(&both, "block inputs"), planned(&checkpoint, "block inputs"));
    // As many slots as two blocks have buffers of their own.
    assert_eq!(planned(&both, "kept activations"), planned(&attention, "kept activations"));
    assert_eq!(both.optimizer("master"), checkpoint.optimizer("master"));
}

#[test]
fn mlp_tile_length() {
    let runs = Runs::new();
    let flags = "max-length=64 activations=checkpoint";
    let [whole, tiled] =
        ["", "mlp-tile-length=16"].map(|tile| runs.train(&format!("{flags} {tile}")));
    assert!(tiled.said.contains("MLP in tiles of 16 tokens"), "{}", tiled.said);
    assert!(!whole.said.contains("MLP"), "{}", whole.said);
    assert!(planned(&tiled, "block workspace") < planned(&whole, "block workspace"));
    assert!(planned(&tiled, "recompute") < planned(&whole, "recompute"));
    // The first loss is the same to the bit; gradients are summed tile by tile.
    assert_eq!(whole.numbers("step", "loss")[0], tiled.numbers("step", "loss")[0]);
}

#[test]
fn logits_chunk_length() {
    let runs = Runs::new();
    let flags = "max-length=64 train-on=all";
    let [whole, chunks] =
        ["", "logits-chunk-length=5"].map(|chunk| runs.train(&format!("{flags} {chunk}")));
    assert!(planned(&chunks, "logits chunk") < planned(&whole, "logits chunk") / 4);
    // Every row of logits is computed as before; losses are added chunk by chunk.
    assert_eq!(whole.optimizer("master"), chunks.optimizer("master"));
}

#[test]
fn weights() {
    let runs = Runs::new();
    succeed(runs.place.nibble(&["quantize", "--model", "model", "--out", "packed"]));
    let [resident, stream] =
        ["resident", "stream"].map(|mode| runs.train(&format!("model=packed weights={mode}")));
    assert!(stream.said.contains("weights streamed from their file"), "{}", stream.said);
    assert!(!resident.said.contains("streamed"), "{}", resident.said);
    assert_eq!(resident.optimizer("master"), stream.optimizer("master"));
}

#[test]
fn memory_budget() {
    let runs = Runs::new();
    let total = |run: &Run| planned_total(run);
    let flags = "max-length=4096 max-steps=1";
    let [keep, checkpoint] = ["keep", "checkpoint"]
        .map(|policy| total(&runs.train(&format!("{flags} activations={policy}"))));
    assert!(checkpoint < keep);
    // What the program itself takes differs by some pages from run to run.
    let budget = (keep + checkpoint) / 2;
    let tight = runs.train(&format!("{flags} memory-budget={budget}B"));
    assert!(total(&tight) <= budget, "{}", tight.said);
    let roomy = runs.train(&format!("{flags} memory-budget={}B", keep + (64 << 20)));
    assert!(roomy.said.contains("2 of 2 blocks keep"), "{}", roomy.said);
    let error = runs.refused(&format!("{flags} memory-budget={}B", checkpoint - (4 << 20)));
    assert!(error.starts_with("error: plan needs "), "{error}");
    // Too little to keep everything; which change is enough depends on those pages.
    let budget = checkpoint + (keep - checkpoint) / 4;
    let error = runs.refused(&format!("{flags} activations=keep memory-budget={budget}B"));
    assert!(error.contains("\nhint: `--") && error.contains("` would need "), "{error}");
}

fn planned_total(run: &Run) -> u64 {
    let plan = run.start()["memory_plan"].as_array().unwrap().clone();
    plan.iter().map(|row| row[1].as_u64().unwrap()).sum()
}

/// Runs on a GPU are in `tests/cuda_backend`.
#[test]
fn device() {
    let runs = Runs::new();
    let [auto, cpu] = ["auto", "cpu"].map(|device| runs.train(&format!("device={device}")));
    assert_eq!(auto.optimizer("master"), cpu.optimizer("master"));
    let error = runs.refused("device=cuda:97");
    assert!(error.contains("hint: "), "{error}");
}

/// Near the run in f32, not equal to it; without a value the flag is `true`.
#[test]
fn bf16() {
    let runs = Runs::new();
    let [default, off, on] = ["", "bf16=false", "bf16=true"].map(|flag| runs.train(flag));
    assert_eq!(default.optimizer("master"), off.optimizer("master"));
    assert_ne!(default.optimizer("master"), on.optimizer("master"));
    let loss = |run: &Run| run.events("step")[0]["loss"].as_f64().unwrap();
    let (exact, rounded) = (loss(&off), loss(&on));
    assert!((rounded / exact - 1.0).abs() < 2e-3, "{rounded} {exact}");
    assert!(on.said.contains(", products in bf16"), "{}", on.said);
    assert_eq!(runs.train("bf16").optimizer("master"), on.optimizer("master"));
}

/// On the CPU there is one path; those of a GPU are in `tests/cuda_backend/attention.rs`.
#[test]
fn attn_implementation() {
    let runs = Runs::new();
    let [auto, exact] =
        ["auto", "exact"].map(|path| runs.train(&format!("attn-implementation={path}")));
    assert_eq!(auto.optimizer("master"), exact.optimizer("master"));
    let error = runs.refused("attn-implementation=flash");
    assert!(error.contains("is a path of the CUDA backend"), "{error}");
}

/// Beside the CPU there is one place; those beside a GPU are in `tests/cuda_backend/embedding.rs`.
#[test]
fn embedding() {
    let runs = Runs::new();
    runs.train("embedding=auto");
    for place in ["gpu", "host-input", "host"] {
        let error = runs.refused(&format!("embedding={place}"));
        assert!(error.contains("`--embedding` is for a GPU"), "{error}");
    }
}

/// What it does beside a GPU is in `tests/cuda_backend/dequantized.rs`, and in `tests/cuda_program.rs`.
#[test]
fn dequantized_blocks() {
    let runs = Runs::new();
    runs.train("dequantized-blocks=0");
    let error = runs.refused("dequantized-blocks=2");
    assert!(error.contains("`--dequantized-blocks` is for a GPU"), "{error}");
}
