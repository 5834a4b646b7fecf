//! What other trainers call the settings that Nibble has: a hint for those who try their names.

use clap::{Arg, Command};

/// Their name and ours, with hyphens.
const SYNONYMS: [(&str, &str); 39] = [
    // transformers, TRL and PEFT, where ours is shorter
    ("bnb-4bit-quant-type", "quantization"),
    ("bnb-4bit-use-double-quant", "double-quant"),
    ("dataset-name", "data"),
    ("gradient-checkpointing", "activations"),
    ("load-in-4bit", "quantization"),
    ("max-seq-length", "max-length"),
    ("model-name-or-path", "model"),
    ("output-dir", "out"),
    ("r", "lora-r"),
    ("resume-from-checkpoint", "resume"),
    ("train-file", "data"),
    ("validation-file", "eval-data"),
    // axolotl, LLaMA-Factory, torchtune, mlx-lm, unsloth
    ("base-model", "model"),
    ("cutoff-len", "max-length"),
    ("datasets", "data"),
    ("grad-checkpoint", "activations"),
    ("iters", "max-steps"),
    ("lora-rank", "lora-r"),
    ("micro-batch-size", "per-device-train-batch-size"),
    ("num-epochs", "num-train-epochs"),
    ("num-output-chunks", "logits-chunk-length"),
    ("sample-packing", "packing"),
    ("sequence-len", "max-length"),
    ("tiled-mlp", "mlp-tile-length"),
    ("tiled-mlp-num-shards", "mlp-tile-length"),
    ("train-on-inputs", "train-on"),
    ("val-set-size", "validation-split"),
    // short forms
    ("alpha", "lora-alpha"),
    ("batch-size", "per-device-train-batch-size"),
    ("dropout", "lora-dropout"),
    ("epochs", "num-train-epochs"),
    ("eval-file", "eval-data"),
    ("grad-accum", "gradient-accumulation-steps"),
    ("lr", "learning-rate"),
    ("lr-scheduler", "lr-scheduler-type"),
    ("max-tokens", "max-new-tokens"),
    ("output", "out"),
    ("rank", "lora-r"),
    ("steps", "max-steps"),
];

/// The flag of `command` that other programs call `theirs` (kebab or snake case).
pub fn ours(command: &Command, theirs: &str) -> Option<&'static str> {
    let theirs = theirs.trim_start_matches('-').replace('_', "-").to_lowercase();
    let (_, ours) = SYNONYMS.into_iter().find(|(name, _)| *name == theirs)?;
    command.get_arguments().filter_map(Arg::get_long).any(|long| long == ours).then_some(ours)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn every_name_leads_to_a_flag_and_is_none_itself() {
        let cli = Cli::command();
        for (theirs, name) in SYNONYMS {
            let has = |command: &&Command| ours(command, theirs) == Some(name);
            assert!(cli.get_subcommands().any(|command| has(&command)), "{theirs}");
            let train = cli.find_subcommand("train").unwrap();
            assert!(train.get_arguments().all(|arg| arg.get_long() != Some(theirs)), "{theirs}");
        }
        let data = cli.find_subcommand("data").unwrap();
        assert_eq!(ours(data, "--lr"), None, "it has no such flag");
    }
}
