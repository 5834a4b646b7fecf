//! What is watched on the way, and what is kept.

use super::runs::{Run, Runs};

/// Learning so slow that the evaluation loss falls by next to nothing.
const SLOW: &str = "eval-data=eval.jsonl max-steps=12 learning-rate=1e-7 self-checks=false";
/// Learning so fast that it falls, rises, falls and rises, by far more than rounding decides.
const WILD: &str = "eval-data=eval.jsonl max-steps=12 self-checks=false \
                    learning-rate=0.03 lr-scheduler-type=constant";
/// 13 steps: an epoch has five, the last of them short.
const EPOCHS: &str = "!max-steps packing=false gradient-accumulation-steps=5 num-train-epochs=2.5";

#[test]
fn logging_steps() {
    let runs = Runs::new();
    let [each, third] =
        ["1", "3"].map(|steps| runs.train(&format!("max-steps=7 logging-steps={steps}")));
    assert_eq!(third.numbers("step", "step"), [3.0, 6.0, 7.0], "and the last one");
    let losses = each.numbers("step", "loss");
    let means = [&losses[..3], &losses[3..6], &losses[6..]]
        .map(|part| part.iter().sum::<f64>() / part.len() as f64);
    for (got, mean) in third.numbers("step", "loss").into_iter().zip(means) {
        assert!((got - mean).abs() < 1e-12, "{got} {mean}");
    }
}

#[test]
fn eval_steps() {
    let runs = Runs::new();
    let run = runs.train("eval-data=eval.jsonl max-steps=7 eval-steps=3");
    assert_eq!(run.numbers("eval", "step"), [3.0, 6.0, 7.0]);
    let share = runs.train("eval-data=eval.jsonl max-steps=7 eval-steps=0.3 logging-steps=0.5");
    assert_eq!(share.numbers("eval", "step"), [3.0, 6.0, 7.0], "a share is rounded up");
    assert_eq!(share.numbers("step", "step"), [4.0, 7.0]);
}

#[test]
fn eval_strategy() {
    let runs = Runs::new();
    let data = &format!("eval-data=eval.jsonl {EPOCHS}");
    let each = runs.train(&format!("{data} eval-strategy=epoch eval-steps=1"));
    assert_eq!(each.numbers("eval", "step"), [5.0, 10.0, 13.0]);
    let end = runs.train(&format!("{data} eval-strategy=no eval-steps=1"));
    assert_eq!(end.numbers("eval", "step"), [13.0]);
    let some = runs.train(&format!("{data} eval-strategy=steps eval-steps=0.5"));
    assert_eq!(some.numbers("eval", "step").len(), 2);
    // An interval on the command line is not outdone by a file.
    let toml = "eval_strategy = \"epoch\"\nsave_strategy = \"no\"\n";
    std::fs::write(runs.place.path("when.toml"), toml).unwrap();
    let typed = runs.train(&format!("{data} config=when.toml eval-steps=4 save-steps=6"));
    assert_eq!(typed.numbers("eval", "step"), [4.0, 8.0, 12.0, 13.0]);
    assert!([6, 12].iter().any(|step| typed.checkpoints().contains(step)));
    let filed = runs.train(&format!("{data} config=when.toml"));
    assert_eq!(filed.numbers("eval", "step"), [5.0, 10.0, 13.0]);
    let error = runs.refused(&format!("{data} eval-strategy=steps"));
    assert!(error.contains("`--eval-strategy steps` needs `--eval-steps`\nhint: "), "{error}");
    let error = runs.refused(&format!("{data} eval-strategy=no early-stopping-patience=1"));
    assert!(error.contains("`--early-stopping-patience` excludes `--eval-strategy no`"), "{error}");
    let error = runs.refused("max-steps=1 eval-strategy=epoch");
    assert!(error.contains("`--eval-strategy` needs evaluation data"), "{error}");
}

#[test]
fn early_stopping_patience() {
    let runs = Runs::new();
    let run = runs.train(&format!("{WILD} eval-steps=1 early-stopping-patience=3"));
    let losses = run.numbers("eval", "eval_loss");
    let best = (0..losses.len()).min_by(|&a, &b| losses[a].total_cmp(&losses[b])).unwrap();
    assert_eq!(losses.len(), best + 1 + 3, "{losses:?}");
    assert!(losses.len() < 12, "{losses:?}");
    assert_eq!(run.end()["reason"], "early_stopping");
}

#[test]
fn early_stopping_threshold() {
    let runs = Runs::new();
    let run = |threshold: &str| {
        let flags = "eval-steps=1 early-stopping-patience=2 early-stopping-threshold";
        runs.train(&format!("{SLOW} {flags}={threshold}"))
    };
    let (any, much) = (run("0"), run("1"));
    let losses = any.numbers("eval", "eval_loss");
    assert!(losses.is_sorted_by(|a, b| a > b), "this run improves each time: {losses:?}");
    assert_eq!((losses.len(), any.end()["reason"].as_str()), (12, Some("finished")));
    // The first one counts; two that are better by less than 1 do not.
    assert_eq!(much.numbers("eval", "step"), [1.0, 2.0, 3.0]);
}

#[test]
fn load_best_model_at_end() {
    let runs = Runs::new();
    let run = |on: &str| runs.train(&format!("{WILD} eval-steps=1 load-best-model-at-end={on}"));
    let adapter = |run: &Run, folder: &str| {
        runs.place.read(&format!("{}/{folder}adapter_model.safetensors", run.out))
    };
    for on in ["true", "false"] {
        let run = run(on);
        let best = run.end()["best"][1].as_u64().unwrap();
        assert!(best < 12, "{:?}", run.numbers("eval", "eval_loss"));
        assert!(run.checkpoints().contains(&best), "the best checkpoint is kept");
        let step = if on == "true" { best } else { 12 };
        assert!(adapter(&run, "") == adapter(&run, &format!("checkpoint-{step}/")), "{on}");
    }
}

fn samples(run: &Run) -> Vec<(u64, String)> {
    let of = |event: &serde_json::Value| {
        (event["step"].as_u64().unwrap(), event["prompt"].as_str().unwrap().to_string())
    };
    run.events("sample").iter().map(of).collect()
}

#[test]
fn sample_prompt() {
    let runs = Runs::new();
    let run = runs.train("max-steps=2 sample-prompt=w5 sample-prompt=w9");
    let expected = [(0, "w5"), (0, "w9"), (2, "w5"), (2, "w9")];
    assert_eq!(samples(&run), expected.map(|(step, prompt)| (step, prompt.to_string())));
    assert!(run.events("sample").iter().all(|event| event["completion"] != ""));
}

#[test]
fn sample_steps() {
    let runs = Runs::new();
    let run = runs.train("max-steps=5 sample-prompt=w5 sample-steps=2");
    let steps: Vec<u64> = samples(&run).into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, [0, 2, 4, 5]);
}

#[test]
fn sample_max_new_tokens() {
    let runs = Runs::new();
    for (limit, words) in [("3", 3), ("5", 5)] {
        let run = runs.train(&format!("sample-prompt=w5 sample-max-new-tokens={limit}"));
        let answer = run.events("sample")[0]["completion"].as_str().unwrap().to_string();
        assert_eq!(answer.split_whitespace().count(), words, "{answer}");
    }
    let error = runs.refused("sample-max-new-tokens=3");
    assert!(error.contains("`--sample-max-new-tokens` needs a prompt"), "{error}");
}

/// At this rate A cannot move: each update is less than half a unit in its last place.
#[test]
fn self_checks() {
    let runs = Runs::new();
    let error = runs.refused("max-steps=3 learning-rate=1e-12 self-checks=true");
    assert!(error.starts_with("error: step 2: 14 of 14 matrices stood still: "), "{error}");
    assert!(error.contains("q_proj.lora_A") && error.contains("--self-checks false"), "{error}");
    runs.train("max-steps=3 learning-rate=1e-12 self-checks=false");
}

#[test]
fn save_steps() {
    let runs = Runs::new();
    let run = runs.train("max-steps=8 save-steps=3 save-total-limit=9");
    assert_eq!(run.checkpoints(), [3, 6, 8]);
    let share = runs.train("max-steps=8 save-steps=0.25 save-total-limit=9");
    assert_eq!(share.checkpoints(), [2, 4, 6, 8]);
    for wrong in ["0", "1.5", "-0.1", "none"] {
        let error = runs.refused(&format!("max-steps=8 save-steps={wrong}"));
        assert!(error.contains("a share of the run below 1"), "{error}");
    }
}

#[test]
fn save_strategy() {
    let runs = Runs::new();
    let checkpoints = |strategy: &str| {
        let flags = format!("{EPOCHS} save-total-limit=99 save-steps=6 save-strategy={strategy}");
        runs.train(&flags).checkpoints()
    };
    assert_eq!(checkpoints("epoch"), [5, 10, 13]);
    assert_eq!(checkpoints("no"), [13]);
    assert_eq!(checkpoints("steps"), [6, 12, 13]);
}

#[test]
fn save_total_limit() {
    let runs = Runs::new();
    let run =
        |limit: &str| runs.train(&format!("max-steps=8 save-steps=1 save-total-limit={limit}"));
    assert_eq!(run("1").checkpoints(), [8]);
    let three = run("3");
    assert_eq!(three.checkpoints(), [6, 7, 8]);
    let page = String::from_utf8(runs.place.read(&format!("{}/report.html", three.out))).unwrap();
    let shown: Vec<u64> =
        (1..=8).filter(|step| page.contains(&format!("checkpoint-{step}<"))).collect();
    assert_eq!(shown, [6, 7, 8]);
    let run = runs.train(&format!("{WILD} eval-steps=1 save-steps=1 save-total-limit=2"));
    let best = run.end()["best"][1].as_u64().unwrap();
    assert_eq!(run.checkpoints(), [best, 11, 12], "the best besides");
}

/// The longest document comes last: tried first, it takes its memory before the first step.
#[test]
#[cfg(target_os = "linux")]
fn longest_first_step() {
    let runs = Runs::new();
    let row = |length: usize| {
        let ids: Vec<usize> = (0..length).map(|index| 3 + (7 * index) % 120).collect();
        serde_json::json!({ "input_ids": ids }).to_string()
    };
    let rows = [8, 8, 2000].map(row).join("\n");
    std::fs::write(runs.place.path("rows.jsonl"), rows).unwrap();
    let growth_mib = |on: bool| {
        let flags = "data=rows.jsonl packing=false shuffle=false max-length=2048 max-steps=3";
        let run = runs.train(&format!("{flags} longest-first-step={on}"));
        let bytes = run.numbers("step", "rss_bytes");
        (bytes[2] - bytes[0]) / f64::from(1 << 20)
    };
    let (tried, untried) = (growth_mib(true), growth_mib(false));
    assert!(tried < 1.0 && untried > 5.0, "{tried} {untried}");
}
