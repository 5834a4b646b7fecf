//! What other programs call the settings that Nibble has, and what it does about those that it has
//! not: a hint for those who try their names.

use clap::Command;

/// Their name and ours, with hyphens. A name that means several things is there several times: the
/// first flag that a command has is meant.
const SYNONYMS: [(&str, &str); 96] = [
    // transformers, TRL and PEFT, where ours is shorter
    ("assistant-only-loss", "train-on"),
    ("bnb-4bit-quant-type", "quantization"),
    ("bnb-4bit-use-double-quant", "double-quant"),
    ("chat-template-path", "chat-template"),
    ("completion-only-loss", "train-on"),
    ("dataset-name", "data"),
    ("device-map", "device"),
    ("data-seed", "seed"),
    ("do-sample", "temperature"),
    ("eval-batch-size", "per-device-train-batch-size"),
    ("eval-strategy", "eval-steps"),
    ("evaluation-strategy", "eval-steps"),
    ("gradient-checkpointing", "activations"),
    ("gradient-checkpointing-kwargs", "activations"),
    ("load-in-4bit", "quantization"),
    ("logging-strategy", "logging-steps"),
    ("max-seq-len", "max-length"),
    ("max-seq-len", "context-length"),
    ("max-seq-length", "max-length"),
    ("max-seq-length", "context-length"),
    ("model-name-or-path", "model"),
    ("output-dir", "out"),
    ("padding-free", "packing"),
    ("peft-model-path", "adapter"),
    ("r", "lora-r"),
    ("random-state", "seed"),
    ("resume-from-checkpoint", "resume"),
    ("save-strategy", "save-steps"),
    ("test-size", "validation-split"),
    ("train-file", "data"),
    ("use-flash-attention-2", "attn-implementation"),
    ("use-gradient-checkpointing", "activations"),
    ("validation-file", "eval-data"),
    // axolotl, LLaMA-Factory, torchtune, mlx-lm, unsloth, llama.cpp
    ("adapter-name-or-path", "adapter"),
    ("adapter-name-or-path", "init-adapter"),
    ("adapter-path", "adapter"),
    ("adapter-path", "init-adapter"),
    ("base-model", "model"),
    ("c", "context-length"),
    ("ctx-size", "context-length"),
    ("cutoff-len", "max-length"),
    ("datasets", "data"),
    ("eval-split", "validation-split"),
    ("flash-attention", "attn-implementation"),
    ("flash-attn", "attn-implementation"),
    ("grad-checkpoint", "activations"),
    ("iters", "max-steps"),
    ("lora-rank", "lora-r"),
    ("lora-target", "target-modules"),
    ("lora-target-modules", "target-modules"),
    ("m", "model"),
    ("micro-batch-size", "per-device-train-batch-size"),
    ("n", "max-new-tokens"),
    ("n-predict", "max-new-tokens"),
    ("neftune-alpha", "neftune-noise-alpha"),
    ("noisy-embedding-alpha", "neftune-noise-alpha"),
    ("num-epochs", "num-train-epochs"),
    ("num-output-chunks", "logits-chunk-length"),
    ("outfile", "out"),
    ("p", "prompt"),
    ("predict", "max-new-tokens"),
    ("quantization-method", "outtype"),
    ("quantize", "outtype"),
    ("quantization-type", "outtype"),
    ("sample-packing", "packing"),
    ("sequence-len", "max-length"),
    ("system-prompt", "system"),
    ("tiled-mlp", "mlp-tile-length"),
    ("tiled-mlp-num-shards", "mlp-tile-length"),
    ("train-on-inputs", "train-on"),
    ("train-on-responses-only", "train-on"),
    ("val-set-size", "validation-split"),
    // short forms
    ("alpha", "lora-alpha"),
    ("batch-size", "per-device-train-batch-size"),
    ("budget", "memory-budget"),
    ("dropout", "lora-dropout"),
    ("epochs", "num-train-epochs"),
    ("eval-file", "eval-data"),
    ("grad-accum", "gradient-accumulation-steps"),
    ("gradient-accumulation", "gradient-accumulation-steps"),
    ("lora", "adapter"),
    ("lora", "init-adapter"),
    ("lr", "learning-rate"),
    ("lr-scheduler", "lr-scheduler-type"),
    ("max-tokens", "max-new-tokens"),
    ("num-threads", "threads"),
    ("optimizer", "optim"),
    ("output", "out"),
    ("rank", "lora-r"),
    ("scheduler", "lr-scheduler-type"),
    ("seq-len", "max-length"),
    ("steps", "max-steps"),
    ("target", "target-modules"),
    ("temp", "temperature"),
    ("tokens", "max-new-tokens"),
    ("warmup", "warmup-steps"),
];

const NUMBER_TYPE: &str = "leave it out: Nibble computes in bf16 on a GPU, in f32 on a CPU, or in bf16 \
                           with `--bf16`; there is no fp16";
const REPORTS: &str = "leave it out: every run writes TensorBoard events, metrics.jsonl and \
                       report.html into `--out`; other trackers are not supported";
const NOT_NEEDED: &str = "leave it out: Nibble always does this";
const ONE_DEVICE: &str = "not supported: Nibble trains on one device";
const NO_UPLOAD: &str = "not supported: upload the folder of `--out` as it is";
const NOT_TRAINED: &str = "not supported in training: only LoRA on linear layers is trained; \
                           adapters with more can be used and merged";

const BEST_BY_LOSS: &str =
    "leave it out: the best checkpoint is the one of the lowest evaluation loss";

/// Their names of what has no flag here, and why.
const WITHOUT_FLAG: [(&str, &str); 48] = [
    ("adapter", "leave it out: LoRA is what is trained; one to begin with is `--init-adapter`"),
    ("bias", "leave it out: biases are not trained"),
    ("bnb-4bit-compute-dtype", NUMBER_TYPE),
    ("dataloader-num-workers", "leave it out: all data is in memory before the first step"),
    ("dataset-num-proc", "leave it out: `--threads` is for all work"),
    (
        "dataset-text-field",
        "plain text is read from the field `text`: `--rename-columns FIELD=text`",
    ),
    ("ddp-find-unused-parameters", ONE_DEVICE),
    ("deepspeed", ONE_DEVICE),
    ("do-eval", NOT_NEEDED),
    ("do-train", NOT_NEEDED),
    ("dtype", NUMBER_TYPE),
    ("eos-token", "leave it out: turns end as the chat template ends them"),
    ("eval-accumulation-steps", "leave it out: losses are summed, logits are not kept"),
    ("evals-per-epoch", "`--eval-steps` has the steps between evaluations"),
    ("fp16", NUMBER_TYPE),
    ("fsdp", ONE_DEVICE),
    ("greater-is-better", BEST_BY_LOSS),
    ("group-by-length", "not supported: `--packing` fills sequences with documents of any length"),
    ("hub-model-id", NO_UPLOAD),
    ("label-smoothing-factor", "not supported"),
    ("limit", "not supported: give a file with fewer records, such as `head -n 100` makes"),
    ("load-in-8bit", "not supported: `--quantization` is nf4, fp4 or none"),
    ("loftq-config", "not supported: adapters begin at zero; leave `None` out"),
    ("logging-dir", REPORTS),
    ("lora-bias", NOT_TRAINED),
    ("lora-target-linear", "leave it out: `--target-modules` is all-linear by itself"),
    ("loraplus-lr-embedding", "leave it out: adapters on embeddings are not trained"),
    ("metric-for-best-model", BEST_BY_LOSS),
    ("modules-to-save", NOT_TRAINED),
    ("num-processes", ONE_DEVICE),
    (
        "overwrite-output-dir",
        "leave it out: a run starts in a new `--out`, or continues with `--resume`",
    ),
    ("per-device-eval-batch-size", "leave it out: it is `--per-device-train-batch-size`"),
    ("push-to-hub", NO_UPLOAD),
    ("remove-unused-columns", NOT_NEEDED),
    ("report-to", REPORTS),
    ("run-name", REPORTS),
    ("saves-per-epoch", "`--save-steps` has the steps between checkpoints"),
    ("save-only-model", "not supported: a checkpoint is what `--resume` goes on from"),
    ("task-type", NOT_NEEDED),
    ("tf32", NUMBER_TYPE),
    ("torch-dtype", NUMBER_TYPE),
    ("trust-remote-code", "leave it out: code of a model is never run"),
    ("use-dora", NOT_TRAINED),
    ("use-liger-kernel", NOT_NEEDED),
    ("use-lora", NOT_NEEDED),
    ("use-peft", NOT_NEEDED),
    ("use-qlora", NOT_NEEDED),
    ("wandb-project", REPORTS),
];

/// Those that are about training alone.
const OF_TRAINING: [&str; 3] = ["adapter", "bias", "dtype"];

/// What to do instead of setting `theirs` (kebab or snake case), as far as other programs' names
/// tell; flags of `command` are written behind `dashes`.
pub fn hint(command: &Command, theirs: &str, dashes: &str) -> Option<String> {
    let theirs = theirs.trim_start_matches('-').replace('_', "-").to_lowercase();
    // Of a command that does not train they may mean something else.
    let trains = command.get_arguments().any(|arg| arg.get_long() == Some("learning-rate"));
    let applies = |name: &str| trains || !OF_TRAINING.contains(&name);
    let without = || WITHOUT_FLAG.into_iter().find(|(name, _)| *name == theirs && applies(name));
    let here = ours(command, &theirs).map(|ours| format!("here it is `{dashes}{ours}`"));
    here.or_else(|| Some(without()?.1.to_string()))
}

/// The flag of `command` that other programs call `theirs`.
pub fn ours(command: &Command, theirs: &str) -> Option<&'static str> {
    let has = |name: &str| command.get_arguments().any(|arg| arg.get_long() == Some(name));
    let mut meant = SYNONYMS.into_iter().filter(|(name, _)| *name == theirs);
    meant.find(|(_, ours)| has(ours)).map(|(_, ours)| ours)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn every_name_leads_to_a_flag_and_is_none_itself() {
        let cli = Cli::command();
        let train = cli.find_subcommand("train").unwrap();
        for (theirs, name) in SYNONYMS {
            let has = |command: &&Command| ours(command, theirs) == Some(name);
            assert!(cli.get_subcommands().any(|command| has(&command)), "{theirs}");
        }
        for (theirs, _) in SYNONYMS.into_iter().chain(WITHOUT_FLAG) {
            assert!(train.get_arguments().all(|arg| arg.get_long() != Some(theirs)), "{theirs}");
        }
        for (theirs, _) in WITHOUT_FLAG {
            assert!(SYNONYMS.iter().all(|(name, _)| *name != theirs), "{theirs}");
        }
        let export = cli.find_subcommand("export").unwrap();
        assert_eq!(hint(export, "--dtype", "--"), None, "its nearest flag is `--outtype`");
        let data = cli.find_subcommand("data").unwrap();
        assert_eq!(hint(data, "--lr", "--"), None, "it has no such flag");
    }

    #[test]
    fn a_name_is_answered_by_what_the_command_has() {
        let cli = Cli::command();
        let answer = |name: &str, theirs| hint(cli.find_subcommand(name).unwrap(), theirs, "--");
        for (command, theirs, words) in [
            ("train", "--max-seq-length", "here it is `--max-length`"),
            ("generate", "--max_seq_len", "here it is `--context-length`"),
            ("chat", "--adapter-path", "here it is `--adapter`"),
            ("train", "adapter_path", "here it is `--init-adapter`"),
            ("train", "--label-smoothing-factor", "not supported"),
            ("train", "random_state", "here it is `--seed`"),
        ] {
            assert_eq!(answer(command, theirs).as_deref(), Some(words), "{command} {theirs}");
        }
        for theirs in ["--use-dora", "--modules-to-save", "--fp16", "--report-to"] {
            assert!(answer("train", theirs).is_some_and(|words| !words.contains("here it is")));
        }
    }
}
