//! What every command does with its arguments and with its output.

use std::fs;
#[cfg(unix)]
use std::process::Command;

#[cfg(unix)]
use crate::training::stderr;
use crate::training::{Workplace, error_of, fail, succeed};

/// On a device on which every write fails as on a full disk.
#[test]
#[cfg(target_os = "linux")]
fn output_that_cannot_be_written_is_an_error() {
    let full = || fs::File::options().write(true).open("/dev/full").unwrap();
    let place = Workplace::new();
    fs::copy(place.path("model/config.json"), place.path("config.json")).unwrap();
    for arguments in [
        &["completions", "bash"][..],
        &["completions", "zsh"],
        &["--help"],
        &["train", "-h"],
        &["--version"],
        &["doctor"],
        &["memory", "--model", "config.json"],
        &["memory", "--model", "config.json", "--fit", "--json", "--budget", "1GiB"],
        &["data", "--model", "model", "--data", "train.jsonl", "--show", "1"],
        &["quantize", "--model", "model", "--out", "packed"],
        &["generate", "--model", "model", "--raw", "--prompt", "w5"],
    ] {
        let mut command = place.nibble(arguments);
        command.stdout(full());
        let (code, text) = fail(command);
        assert_eq!(code, 1, "{arguments:?}: {text}");
        let message = "error: cannot write to standard output: No space left on device";
        assert!(error_of(&text).starts_with(message), "{arguments:?}: {text}");
        assert!(!text.contains("panicked"), "{arguments:?}: {text}");
    }
    let mut command = place.nibble(&["completions", "bash"]);
    command.stdout(full()).stderr(full());
    assert_eq!(command.status().unwrap().code(), Some(1), "nothing can be told");
}

#[test]
#[cfg(unix)]
fn a_reader_that_is_gone_is_no_error() {
    use std::os::unix::process::ExitStatusExt;

    let place = Workplace::new();
    for arguments in [&["completions", "bash"][..], &["--help"], &["doctor"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = place.nibble(arguments);
        let output = command.stdout(writer).output().unwrap();
        assert_eq!(stderr(&output), "", "{arguments:?}");
        assert_eq!(output.status.signal(), Some(libc::SIGPIPE), "{arguments:?}");
    }
}

fn refused(place: &Workplace, arguments: &str) -> String {
    let arguments: Vec<&str> = arguments.split(' ').collect();
    let (code, text) = fail(place.nibble(&arguments));
    assert_eq!(code, 2, "{arguments:?}: {text}");
    error_of(&text).to_string()
}

#[test]
fn negative_numbers_reach_the_flag_that_refuses_them() {
    let place = Workplace::new();
    let whole = "expected a whole number, 0 or more";
    for (command, flag, value, expected) in [
        ("train", "--learning-rate", "-1e-4", "expected a number above 0"),
        ("train", "--memory-budget", "-1GiB", "`-1GiB` is not a size, expected a number with a"),
        ("train", "--seed", "-1", whole),
        ("train", "--layers-to-transform", "-1", whole),
        ("train", "--warmup_steps", "-1", whole),
        ("train", "--lora-alpha", "-16", "expected a number above 0"),
        ("generate", "--top-k", "-1", whole),
        ("generate", "--seed", "-1", whole),
        ("memory", "--measure", "-1", "expected a whole number, 1 or more"),
        ("memory", "--measure", "0", "expected a whole number, 1 or more"),
        ("data", "--show", "-1", whole),
        ("quantize", "--block-size", "-64", "expected a power of two"),
    ] {
        let error = refused(&place, &format!("{command} {flag} {value}"));
        let flag = flag.replace('_', "-");
        assert!(
            error.starts_with(&format!("error: invalid value '{value}' for '{flag}")),
            "{error}"
        );
        assert!(error.contains(&format!(": {expected}")), "{error}");
    }
}

#[test]
fn a_size_has_a_unit() {
    let place = Workplace::new();
    for (arguments, hint) in [
        ("memory --model m --budget 24", "`24GiB`"),
        ("memory --model m --memory_budget 7.5", "`7.5GiB`"),
        ("train --out o --memory-budget 24000000000", "`24000000000B`"),
        ("quantize --max-shard-size 5", "`5GiB`"),
    ] {
        let error = refused(&place, arguments);
        let message = format!(": expected a number with a unit\nhint: {hint}");
        assert!(error.ends_with(&message), "{error}");
    }
    for command in ["quantize", "merge"] {
        let error = refused(&place, &format!("{command} --max-shard-size 0B"));
        assert!(error.contains("expected more than nothing, such as 5GB"), "{error}");
    }
}

#[test]
fn names_from_scripts_of_other_trainers() {
    let place = Workplace::new();
    let flags = "--lora_r 4 --lora_alpha=8 --max_steps 1 --packing --use_rslora --sample_prompt \
                 --max_steps";
    succeed(place.train("out", &flags.split(' ').collect::<Vec<_>>()));
    let config = place.json("out/adapter_config.json");
    assert_eq!((&config["r"], &config["lora_alpha"]), (&4.into(), &8.into()));
    let settings = String::from_utf8(place.read("out/settings.toml")).unwrap();
    assert!(settings.contains("sample_prompt = \"--max_steps\"\n"), "{settings}");
    for (flag, hint) in [
        ("--max_seq_len", "here it is `--max-length`"),
        ("--gradient_checkpointing", "here it is `--activations`"),
        ("--assistant_only_loss", "here it is `--train-on`"),
        ("--use-dora", "not supported in training"),
        ("--modules-to-save", "not supported in training"),
        ("--label_smoothing_factor", "not supported"),
        ("--fp16", "leave it out: Nibble computes in bf16 on a GPU"),
        ("--report_to", "leave it out: every run writes TensorBoard events"),
        ("--use_liger_kernel", "leave it out: Nibble always does this"),
        ("--test_size", "here it is `--validation-split`"),
        ("--budget", "here it is `--memory-budget`"),
        ("--target_modules q_proj v_proj", "a list is one value with commas: `--target-modules q_"),
        ("run.toml", "settings are read by `--config run.toml`"),
        ("--learning-rte", "did you mean `--learning-rate`?"),
        ("--no-packing", "`--packing false`"),
        ("--no_shuffle", "`--shuffle false`"),
        ("--max_samples", "not supported: give a file with fewer records"),
        ("--logging_first_step", "leave it out: `--logging-steps 1`"),
        ("--use_unsloth", "leave it out: "),
        ("--use_galore", "not supported: `--optim` is "),
        ("--evaluation_strategy", "here it is `--eval-strategy`"),
        ("--mask_history", "here it is `--train-on`: \"completion\" for true"),
        ("--cosine_min_lr_ratio", "here it is `--min-lr-rate`: with `lr-scheduler-type`"),
        ("--excess_length_strategy", "here it is `--truncation`: \"drop\", \"right\" for truncate"),
        ("--wandb_log_model", "leave it out: every run writes TensorBoard events"),
        ("--lora_modules_to_save", "not supported in training"),
        ("--resize_vocab", "not supported: the vocabulary stays as it is"),
        ("--colour", "see `nibble train --help`"),
    ] {
        let error = refused(&place, &format!("train {flag} 1"));
        assert!(error.contains(&format!("\nhint: {hint}")), "{flag}: {error}");
    }
    fs::write(place.path("run.yaml"), "lora_r: 4\n").unwrap();
    let error = refused(&place, "train --config run.yaml");
    assert!(
        error.contains("settings are read from TOML, not YAML\nhint: write `name = "),
        "{error}"
    );
    fs::write(place.path("run.json"), "{}").unwrap();
    let error = refused(&place, "train --config run.json");
    assert!(
        error.contains("settings are read from TOML, not JSON\nhint: write `name = "),
        "{error}"
    );
    fs::write(place.path("run.toml"), "model = \"D:\\models\"\n").unwrap();
    let error = refused(&place, "train --config run.toml");
    assert!(
        error.ends_with("hint: a path of Windows stands in single quotes: `'C:\\models'`"),
        "{error}"
    );
    let (_, error) =
        fail(place.nibble(&["train", "--model", "~/x", "--data", "train.jsonl", "--out", "o"]));
    assert!(error.contains("error: ~/x does not exist\nhint: `~` is not expanded"), "{error}");
    fs::write(place.path("run.toml"), "use_dora = true\n").unwrap();
    let error = refused(&place, "train --config run.toml");
    let message = "error: run.toml:1: unknown key `use_dora`\nhint: not supported in training";
    assert!(error.starts_with(message), "{error}");
    fs::write(place.path("run.toml"), "resume_from_checkpoint = true\n").unwrap();
    let error = refused(&place, "train --config run.toml");
    assert!(error.contains("\nhint: on the command line it is `--resume`"), "{error}");
}

/// Otherwise another adapter than the one in the file would be trained.
#[test]
fn an_adapter_to_begin_with_is_not_dropped_silently() {
    let place = Workplace::new();
    fs::write(place.path("run.toml"), "init_adapter = \"first\"\n").unwrap();
    let error = refused(&place, "train --config run.toml --lora-r 8");
    let message = "error: `--lora-r` is for a new adapter, run.toml:1 has `init-adapter`";
    assert!(error.starts_with(message), "{error}");
}

#[cfg(unix)]
#[test]
fn flags_with_fixed_values_complete_them_and_numbers_complete_nothing() {
    let place = Workplace::new();
    let script = succeed(place.nibble(&["completions", "bash"])).stdout;
    fs::write(place.path("nibble.bash"), script).unwrap();
    let completed = |words: &str| {
        let count = words.split(' ').count();
        let ask = format!(
            "compopt() {{ :; }}; source nibble.bash; COMP_WORDS=({words} ''); COMP_CWORD={count}; \
             _nibble nibble '' \"${{COMP_WORDS[-2]}}\"; echo \"${{COMPREPLY[@]}}\""
        );
        let mut bash = Command::new("bash");
        bash.current_dir(place.path("")).args(["-c", &ask]);
        let output = bash.output().unwrap();
        assert_eq!(stderr(&output), "", "{words}");
        String::from_utf8(output.stdout).unwrap().trim().to_string()
    };
    for (words, values) in [
        ("nibble train --optim", "adamw_torch adamw_8bit"),
        ("nibble memory --optim", "adamw_torch adamw_8bit"),
        ("nibble generate --device", "auto cpu cuda"),
        ("nibble train --init-lora-weights", "true gaussian"),
        ("nibble train --target-modules", "all-linear"),
        ("nibble train --packing", "true false"),
        ("nibble train --seed", ""),
        ("nibble generate --prompt", ""),
    ] {
        assert_eq!(completed(words), values, "{words}");
    }
    for words in ["nibble chat --adapter", "nibble train --data"] {
        assert!(completed(words).contains("train.jsonl"), "{words}");
    }
}
