//! Settings of other programs, as `nibble train --config` answers them: all at once, and each by what to do.

use std::fs;
use std::path::Path;

use crate::training::{Workplace, error_of, fail, succeed};

/// What is said of the example `name`: each row that asks for something, with its answer.
fn answers(name: &str) -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/settings");
    let place = Workplace::new();
    fs::copy(folder.join(name), place.path("run.toml")).unwrap();
    let (code, text) = fail(place.nibble(&["train", "--config", "run.toml"]));
    assert_eq!(code, 2, "{text}");
    let mut lines = error_of(&text).lines();
    let rows =
        lines.by_ref().filter_map(|line| line.split_once("unknown key `")?.1.split_once("`; "));
    let rows: Vec<_> = rows.map(|(key, answer)| (key.to_string(), answer.to_string())).collect();
    let count =
        format!("error: run.toml: {} settings cannot be used", text.matches("\n  line ").count());
    assert!(text.contains(&count), "{text}");
    for word in ["did you mean", "; see `nibble train --help`", "no sections"] {
        assert!(!text.contains(word), "{text}");
    }
    rows
}

fn assert_answers(answers: &[(String, String)], expected: &[(&str, &str)]) {
    let keys: Vec<&str> = answers.iter().map(|(key, _)| &**key).collect();
    let of_expected: Vec<&str> = expected.iter().map(|(key, _)| *key).collect();
    assert_eq!(keys, of_expected);
    for ((key, answer), (_, begins)) in answers.iter().zip(expected) {
        assert!(answer.starts_with(begins), "{key}: {answer}");
    }
}

#[test]
fn llama_factory() {
    let expected = [
        ("model_name_or_path", "here it is `model`"),
        ("quantization_bit", "here it is `quantization`: \"nf4\", the default, for 4"),
        ("quantization_method", "here it is `quantization`: "),
        ("double_quantization", "here it is `double-quant`"),
        ("trust_remote_code", "leave it out: "),
        ("lora_rank", "here it is `lora-r`"),
        ("lora_target", "here it is `target-modules`: \"all-linear\", the default, for all"),
        ("dataset", "here it is `data`: the paths of files"),
        ("template", "here it is `chat-template`: the model's by itself"),
        ("cutoff_len", "here it is `max-length`"),
        ("max_samples", "not supported: give a file with fewer records"),
        ("output_dir", "here it is `out`"),
        ("overwrite_output_dir", "leave it out: "),
        ("val_size", "here it is `validation-split`: a fraction"),
        ("per_device_eval_batch_size", "leave it out: "),
    ];
    assert_answers(&answers("llama_factory.toml"), &expected);
}

#[test]
fn axolotl() {
    let expected = [
        ("base_model", "here it is `model`"),
        ("load_in_4bit", "here it is `quantization`: \"nf4\", the default, for true"),
        ("val_set_size", "here it is `validation-split`: a fraction"),
        ("output_dir", "here it is `out`"),
        ("sequence_len", "here it is `max-length`"),
        ("sample_packing", "here it is `packing`"),
        ("eval_sample_packing", "here it is `packing`: "),
        ("lora_target_modules", "here it is `target-modules`"),
        ("micro_batch_size", "here it is `per-device-train-batch-size`"),
        ("num_epochs", "here it is `num-train-epochs`"),
        ("optimizer", "here it is `optim`: invalid value 'adamw_bnb_8bit'"),
        ("lr_scheduler", "here it is `lr-scheduler-type`"),
        ("train_on_inputs", "here it is `train-on`: \"all\" for true, \"assistant\""),
        ("gradient_checkpointing", "here it is `activations`: \"checkpoint\" for true"),
        ("flash_attention", "here it is `attn-implementation`: \"flash\" or \"exact\""),
        ("loss_watchdog_threshold", "not supported"),
        ("loss_watchdog_patience", "not supported"),
        ("evals_per_epoch", "use `--eval-strategy epoch`"),
        ("saves_per_epoch", "use `--save-strategy epoch`"),
        ("special_tokens", "leave it out: "),
        ("datasets", "here it is `data`: the paths of files"),
    ];
    assert_answers(&answers("axolotl.toml"), &expected);
}

/// Not the same as leaving it out, which is 4 bits here.
#[test]
fn no_quantization_is_asked_for() {
    let place = Workplace::new();
    fs::write(place.path("run.toml"), "quantization_bit = \"none\"\n").unwrap();
    let (code, text) = fail(place.train("run", &["--config", "run.toml"]));
    assert!(code == 2 && text.contains("\"none\" for none"), "{text}");
}

/// LLaMA-Factory's example once every answer was followed: nothing else is asked for.
#[test]
fn a_file_whose_answers_were_followed_is_trained() {
    let place = Workplace::new();
    let text = r#"
        model = "model"
        quantization = "nf4"
        double_quant = true
        stage = "sft"
        do_train = true
        finetuning_type = "lora"
        lora_r = 8.0
        target_modules = "all-linear"
        data = "train.jsonl"
        max_length = 32
        overwrite_cache = true
        preprocessing_num_workers = 16
        dataloader_num_workers = 4
        out = "run"
        plot_loss = true
        save_only_model = false
        report_to = "none"
        num_train_epochs = 3.0
        warmup_ratio = 0.1
        ddp_timeout = 180000000
        resume_from_checkpoint = ""
        max_steps = 1.0
    "#;
    fs::write(place.path("run.toml"), text).unwrap();
    succeed(place.nibble(&["train", "--config", "run.toml"]));
    assert_eq!(place.json("run/adapter_config.json")["r"], 8);
}
