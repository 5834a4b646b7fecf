//! Every flag of `nibble train` does what its help says: one test for each, named after it, on a
//! run of the real binary. What a run computes is checked in its files, not in what it says of
//! itself.

mod adapter;
mod data;
mod evaluation;
mod optimization;
mod resources;
mod runs;

use clap::{Arg, CommandFactory};
use nibble::cli::Cli;
use runs::Runs;

/// The files that the tests of the flags are in.
const SOURCES: [&str; 5] = [
    include_str!("adapter.rs"),
    include_str!("data.rs"),
    include_str!("evaluation.rs"),
    include_str!("optimization.rs"),
    include_str!("resources.rs"),
];

#[test]
fn no_flag_is_without_a_test() {
    let command = Cli::command().find_subcommand("train").unwrap().clone();
    for flag in command.get_arguments().filter_map(Arg::get_long) {
        let test = format!("\nfn {}() {{", flag.replace('-', "_"));
        let found = SOURCES.iter().any(|source| source.contains(&test));
        assert!(found, "no test shows what --{flag} does");
    }
}

#[test]
fn a_file_with_all_settings_is_the_same_run() {
    let runs = Runs::new();
    let flags = "quantization=fp4 block-size=32 double-quant=false lora-r=4 lora-alpha=6 \
                 lora-dropout=0.125 target-modules=q_proj,down_proj,up_proj \
                 exclude-modules=up_proj layers-to-transform=0,1 layers-pattern=layers \
                 rank-pattern=q_proj=2 alpha-pattern=q_proj=3 use-rslora=true \
                 init-lora-weights=gaussian loraplus-lr-ratio=4 adapter-dtype=f32 \
                 validation-split=0.25 max-length=24 truncation=left bad-records=skip format=tokens train-on=all \
                 packing=false shuffle=false per-device-train-batch-size=3 \
                 gradient-accumulation-steps=2 learning-rate=5e-3 \
                 lr-scheduler-type=cosine_with_min_lr min-lr-rate=0.25 \
                 lr-scheduler-kwargs={\"num_cycles\":1.5} warmup-steps=2 max-steps=5 \
                 max-grad-norm=0.5 weight-decay=0.01 adam-beta1=0.8 adam-beta2=0.95 \
                 adam-epsilon=1e-6 optim=adamw_8bit seed=7 logging-steps=2 eval-steps=2 \
                 early-stopping-patience=9 early-stopping-threshold=0.001 \
                 load-best-model-at-end=true sample-prompt=w5 sample-steps=3 \
                 sample-max-new-tokens=4 self-checks=true longest-first-step=false save-steps=2 \
                 save-total-limit=1 activations=checkpoint mlp-tile-length=9 logits-chunk-length=7 \
                 memory-budget=4GiB";
    let by_flags = runs.train(flags);
    let line = |flag: String| {
        let (name, value) = flag["--".len()..].split_once('=').unwrap();
        format!("{} = {}\n", name.replace('-', "_"), toml_value(name, value))
    };
    let text: String = runs::arguments(flags).into_iter().map(line).collect();
    std::fs::write(runs.place.path("run.toml"), text).unwrap();
    let by_file = runs.nibble(&["--config", "run.toml"]);
    let settings = |run: &runs::Run| {
        let text = String::from_utf8(runs.place.read(&format!("{}/settings.toml", run.out)));
        let lines = text.unwrap();
        let of_all_runs = |line: &&str| !line.starts_with("out = ");
        lines.lines().filter(of_all_runs).map(String::from).collect::<Vec<_>>()
    };
    assert_eq!(settings(&by_flags), settings(&by_file));
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        let read = |run: &runs::Run| runs.place.read(&format!("{}/{file}", run.out));
        assert!(read(&by_flags) == read(&by_file), "{file}");
    }
}

/// A number, a truth value or a list as TOML has it; all else is text.
fn toml_value(name: &str, value: &str) -> String {
    match name {
        "rank-pattern" | "alpha-pattern" => {
            let (pattern, number) = value.split_once('=').unwrap();
            format!("{{ {pattern} = {number} }}")
        }
        "layers-to-transform" => format!("[{value}]"),
        "target-modules" => format!("['{}']", value.replace(',', "', '")),
        _ if value.parse::<f64>().is_ok() || value.parse::<bool>().is_ok() => value.to_string(),
        _ => format!("'{value}'"),
    }
}
