//! How it is learned. Moments after one step give the gradient back: they are `(1 − β₁) g` and
//! `(1 − β₂) g²`.

use std::fs;

use safetensors::{Dtype, SafeTensors};
use serde_json::json;

use super::runs::{Run, Runs, assert_scaled, norm, only};

#[test]
fn preset() {
    let runs = Runs::new();
    let flags = "!lr-scheduler-type !learning-rate max-steps=5 preset=qlora-paper";
    let run = runs.train(flags);
    let config = run.adapter_config();
    assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(64), &json!(16)));
    assert_eq!(config["lora_dropout"], 0.1);
    assert_eq!(run.numbers("step", "learning_rate"), [2e-4; 5], "constant, without warm-up");
    let other = runs.train(&format!("{flags} lora-r=8"));
    assert_eq!(other.adapter_config()["r"], 8, "a flag wins over the preset");
}

/// Eight documents of which every other one has a single trained token.
fn write_ragged(runs: &Runs) {
    let row = |index: usize| {
        let length = 6 + 3 * index;
        let ids: Vec<usize> = (0..length).map(|i| 3 + (7 * i + 11 * index) % 120).collect();
        let trained = if index.is_multiple_of(2) { 1 } else { length - 1 };
        let mut labels: Vec<i64> = ids.iter().map(|&id| id as i64).collect();
        labels[..length - trained].fill(-100);
        json!({"input_ids": ids, "labels": labels}).to_string()
    };
    let rows: Vec<String> = (0..8).map(row).collect();
    fs::write(runs.place.path("ragged.jsonl"), rows.join("\n")).unwrap();
}

/// Steps over all eight documents, as `batch` times `accumulation`.
fn eight<'a>(runs: &'a Runs, batch: usize, accumulation: usize, more: &str) -> Run<'a> {
    runs.train(&format!(
        "data=ragged.jsonl packing=false shuffle=false per-device-train-batch-size={batch} \
         gradient-accumulation-steps={accumulation} {more}"
    ))
}

#[test]
fn per_device_train_batch_size() {
    let runs = Runs::new();
    write_ragged(&runs);
    let [two, eight] = [2, 8].map(|rows| eight(&runs, rows, 1, "!max-steps num-train-epochs=1"));
    assert_eq!((two.numbers("step", "loss").len(), eight.numbers("step", "loss").len()), (4, 1));
    assert_eq!(two.numbers("step", "num_input_tokens_seen"), [15.0, 42.0, 81.0, 132.0]);
    assert_eq!(eight.numbers("step", "num_input_tokens_seen"), [132.0]);
}

/// Every trained token counts the same, however the window is cut: 8 × 1 = 4 × 2 = 1 × 8, and the
/// loss is the mean over tokens, not over batches.
#[test]
fn gradient_accumulation_steps() {
    let runs = Runs::new();
    write_ragged(&runs);
    let three = "max-steps=3 learning-rate=1e-3 adapter-dtype=f32";
    let whole = eight(&runs, 8, 1, three);
    for (batch, accumulation) in [(4, 2), (3, 3), (1, 8)] {
        let parts = eight(&runs, batch, accumulation, three);
        for name in ["loss", "grad_norm"] {
            let pairs = whole.numbers("step", name).into_iter().zip(parts.numbers("step", name));
            for (whole, parts) in pairs {
                assert!((parts / whole - 1.0).abs() < 2e-5, "{name}: {whole} {parts}");
            }
        }
        let [got, expected] = [&parts, &whole].map(|run| run.optimizer("exp_avg"));
        assert_scaled(&got, 1.0, &expected, 1e-4);
        assert_eq!(
            parts.numbers("step", "num_target_tokens_seen"),
            whole.numbers("step", "num_target_tokens_seen")
        );
    }
    // Each document alone, at a rate that changes nothing.
    let alone = eight(&runs, 1, 1, "max-steps=8 learning-rate=1e-12 self-checks=false");
    let losses = alone.numbers("step", "loss");
    let seen = alone.numbers("step", "num_target_tokens_seen");
    let before = std::iter::once(&0.0).chain(&seen);
    let targets: Vec<f64> = seen.iter().zip(before).map(|(now, before)| now - before).collect();
    let sum: f64 = losses.iter().zip(&targets).map(|(loss, targets)| loss * targets).sum();
    let (by_token, by_batch) = (sum / seen[7], losses.iter().sum::<f64>() / 8.0);
    let loss = whole.numbers("step", "loss")[0];
    assert!((loss - by_token).abs() < 1e-5, "{loss} {by_token}");
    assert!((loss - by_batch).abs() > 1e-2, "these documents would not show the difference");
}

#[test]
fn learning_rate() {
    let runs = Runs::new();
    let [slow, fast] = ["1e-3", "2e-3"].map(|rate| runs.train(&format!("learning-rate={rate}")));
    assert_eq!(fast.numbers("step", "learning_rate"), [2e-3]);
    let b = |run: &Run| only(run.optimizer("master"), "lora_B");
    assert_scaled(&b(&fast), 2.0, &b(&slow), 1e-6);
}

fn rates(runs: &Runs, flags: &str) -> Vec<f64> {
    runs.train(&format!("learning-rate=1 max-steps=8 {flags} self-checks=false"))
        .numbers("step", "learning_rate")
}

fn assert_rates(got: &[f64], expected: &[f64]) {
    assert_eq!(got.len(), expected.len());
    for (a, b) in got.iter().zip(expected) {
        assert!((a - b).abs() < 1e-12, "{got:?} {expected:?}");
    }
}

#[test]
fn lr_scheduler_type() {
    let runs = Runs::new();
    let cosine =
        |progress: f64, floor: f64| floor + (1.0 - floor) * 0.5 * (1.0 + (progress * PI).cos());
    use std::f64::consts::PI;
    let falling = |floor: f64| (0..6).map(|k| cosine(f64::from(k) / 6.0, floor)).collect();
    let linear = (0..6).map(|k| f64::from(6 - k) / 6.0).collect();
    for (name, after_warmup) in [
        ("constant_with_warmup", vec![1.0; 6]),
        ("linear", linear),
        ("cosine", falling(0.0)),
        ("cosine_with_min_lr", falling(0.1)),
    ] {
        let got = rates(&runs, &format!("lr-scheduler-type={name} warmup-steps=2"));
        assert_rates(&got, &[vec![0.0, 0.5], after_warmup].concat());
    }
    assert_rates(&rates(&runs, "lr-scheduler-type=constant"), &[1.0; 8]);
    let error = runs.refused("lr-scheduler-type=constant warmup-steps=2");
    assert!(error.contains("`--warmup-steps` has no effect"), "{error}");
    let error = runs.refused("lr-scheduler-type=constant warmup-ratio=0.5");
    assert!(error.contains("`--warmup-ratio` has no effect"), "{error}");
    for (name, hint) in [
        ("reduce_lr_on_plateau", "`--early-stopping-patience` follows the loss"),
        ("greedy", "`--early-stopping-patience` follows the loss"),
        ("wsd", "it is `warmup_stable_decay`"),
    ] {
        let error = runs.refused(&format!("lr-scheduler-type={name}"));
        let says =
            format!("invalid value '{name}' for '--lr-scheduler-type <TYPE>': not supported");
        assert!(error.contains(&says) && error.contains(hint), "{error}");
    }
}

/// What each schedule makes of them is compared with transformers beside `Schedule`.
#[test]
fn lr_scheduler_kwargs() {
    let runs = Runs::new();
    let told = |name: &str, kwargs: &str| {
        format!("lr-scheduler-type={name} warmup-steps=2 lr-scheduler-kwargs={kwargs}")
    };
    let got = rates(&runs, &told("polynomial", "{\"lr_end\":0.25,\"power\":2}"));
    let squares = (0..6).map(|k| 0.25 + 0.75 * (f64::from(6 - k) / 6.0).powi(2)).collect();
    assert_rates(&got, &[vec![0.0, 0.5], squares].concat());
    let stable = told("warmup_stable_decay", "{\"num_decay_steps\":4,\"decay_type\":\"linear\"}");
    let expected = [0.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25];
    assert_rates(&rates(&runs, &stable), &expected);
    let floor = told("cosine_warmup_with_min_lr", "{\"min_lr\":0.5}");
    assert_rates(&rates(&runs, &floor)[..2], &[0.5, 1.0]);
    assert_rates(&rates(&runs, &floor)[7..], &[0.5]);
    // A run of the right length by its data is made; another one is refused before it begins.
    let by_epochs = "!max-steps packing=false num-train-epochs=0.25";
    let decay =
        |steps: usize| told("warmup_stable_decay", &format!("{{\"num_decay_steps\":{steps}}}"));
    let six = runs.train(&format!("{by_epochs} {}", decay(4)));
    assert_eq!(six.numbers("step", "learning_rate").len(), 6);
    let long = "`warmup_stable_decay` has 2 steps of warmup and 5 of decay, the run has 6\n";
    let error = runs.refused(&format!("{by_epochs} {}", decay(5)));
    assert!(error.contains(long) && !error.contains("plan: "), "{error}");
    let error = runs.refused(&format!("max-steps=6 data=none.jsonl {}", decay(5)));
    assert!(error.contains(long), "before the data are read: {error}");
    let floors = "lr-scheduler-type=cosine_with_min_lr lr-scheduler-kwargs";
    for (flags, says) in [
        ("lr-scheduler-type=linear lr-scheduler-kwargs={\"power\":2}", "`linear` reads no `power`"),
        ("lr-scheduler-type=warmup_stable_decay", "needs `num_decay_steps`"),
        (
            &*format!("{floors}={{\"min_lr\":0}} min-lr-rate=0.2"),
            "`--min-lr-rate` excludes `min_lr` in `--lr-scheduler-kwargs`",
        ),
        (
            &*format!("{floors}={{\"min_lr\":0,\"min_lr_rate\":0}}"),
            "`min_lr_rate` in `--lr-scheduler-kwargs` excludes `min_lr` in",
        ),
        (
            &*format!("{floors}={{\"min_lr\":0.02}}"),
            "`min_lr` is 2e-2, expected less than `--learning-rate`, 1e-2",
        ),
        (
            "lr-scheduler-type=polynomial learning-rate=1e-8",
            "`lr_end` is 1e-7, expected less than `--learning-rate`, 1e-8",
        ),
        ("lr-scheduler-kwargs={\"num_cycles\":0}", "`num_cycles` is 0, expected a number above 0"),
    ] {
        let error = runs.refused(flags);
        assert!(error.contains(says), "{error}");
    }
}

/// The peak lasts longer, and the decay is at the end of the longer run.
#[test]
fn a_longer_run_decays_later() {
    let runs = Runs::new();
    let kwargs = "{\"num_decay_steps\":2,\"decay_type\":\"linear\"}";
    let flags = format!(
        "learning-rate=1 self-checks=false lr-scheduler-type=warmup_stable_decay warmup-steps=0 \
         lr-scheduler-kwargs={kwargs} max-steps"
    );
    let short = runs.train(&format!("{flags}=4"));
    assert_rates(&short.numbers("step", "learning_rate"), &[1.0, 1.0, 1.0, 0.5]);
    let spaced = kwargs.replace(':', " : ");
    let again = ["--resume", "--max-steps", "7", "--lr-scheduler-kwargs", &spaced];
    let longer = runs.nibble_into(&short.out, &again);
    let rates = longer.numbers("step", "learning_rate");
    assert_rates(&rates, &[1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 0.5]);
    let mut other = runs.place.nibble(&["train", "--out", &short.out, "--resume"]);
    other.args(["--max-steps", "9", "--lr-scheduler-kwargs", "{\"num_decay_steps\": 3}"]);
    let error = crate::training::fail(other).1;
    assert!(error.contains("lr_scheduler_kwargs was {\"num_decay_steps\" : 2,"), "{error}");
}

#[test]
fn min_lr_rate() {
    let runs = Runs::new();
    let error = runs.refused("lr-scheduler-type=cosine min-lr-rate=0.5");
    assert!(error.contains("`--min-lr-rate` has no effect"), "{error}");
    let flags = "lr-scheduler-type=cosine_with_min_lr warmup-steps=0 min-lr-rate";
    let [low, high] = ["0", "0.5"].map(|rate| rates(&runs, &format!("{flags}={rate}")));
    let expected: Vec<f64> = low.iter().map(|rate| 0.5 + 0.5 * rate).collect();
    assert_rates(&high, &expected);
}

#[test]
fn warmup_steps() {
    let runs = Runs::new();
    let got = rates(&runs, "lr-scheduler-type=constant_with_warmup warmup-steps=4");
    assert_rates(&got, &[0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]);
}

#[test]
fn warmup_ratio() {
    let runs = Runs::new();
    // 30 % of eight steps, rounded up, are three.
    let got = rates(&runs, "lr-scheduler-type=constant_with_warmup warmup-ratio=0.3");
    assert_rates(&got, &[0.0, 1.0 / 3.0, 2.0 / 3.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
}

#[test]
fn max_steps() {
    let runs = Runs::new();
    let run = runs.train("max-steps=5 num-train-epochs=99");
    assert_eq!(run.numbers("step", "step"), [1.0, 2.0, 3.0, 4.0, 5.0]);
}

#[test]
fn num_train_epochs() {
    let runs = Runs::new();
    // 24 documents, 5 in a step: an epoch has five steps, the last of them short.
    let flags = "!max-steps packing=false gradient-accumulation-steps=5 num-train-epochs";
    for (epochs, steps) in [("1", 5), ("2", 10), ("0.5", 3)] {
        let run = runs.train(&format!("{flags}={epochs}"));
        assert_eq!(run.end()["step"], steps, "{epochs}");
    }
    let [one, two] = ["1", "2"].map(|epochs| runs.train(&format!("{flags}={epochs}")));
    let seen = |run: &Run| *run.numbers("step", "num_input_tokens_seen").last().unwrap();
    assert_eq!(2.0 * seen(&one), seen(&two));
    assert_eq!(seen(&one), one.start()["data"][0]["tokens"].as_f64().unwrap());
}

#[test]
fn max_grad_norm() {
    let runs = Runs::new();
    let free = runs.train("max-grad-norm=0");
    let found = free.numbers("step", "grad_norm")[0];
    assert!((10.0 * norm(&free.optimizer("exp_avg")) / found - 1.0).abs() < 1e-5);
    for (limit, factor) in [(found / 4.0, 0.25), (found * 2.0, 1.0)] {
        let clipped = runs.train(&format!("max-grad-norm={limit}"));
        assert_eq!(clipped.numbers("step", "grad_norm")[0], found, "as it was before clipping");
        assert_scaled(&clipped.optimizer("exp_avg"), factor, &free.optimizer("exp_avg"), 1e-5);
    }
}

#[test]
fn weight_decay() {
    let runs = Runs::new();
    // A has no gradient in the first step: it only decays, by learning rate times decay.
    let [plain, decayed] =
        ["0", "2"].map(|decay| runs.train(&format!("weight-decay={decay} self-checks=false")));
    let a = |run: &Run| only(run.optimizer("master"), "lora_A");
    assert_scaled(&a(&decayed), 1.0 - 1e-2 * 2.0, &a(&plain), 1e-6);
}

/// Rank 64 makes matrices of 4096 and more elements, which have 8-bit moments.
#[test]
fn optim() {
    let runs = Runs::new();
    let flags = "lora-r=64 lora-alpha=64 max-steps=20 learning-rate=2e-3 optim";
    let [full, small] =
        ["adamw_torch", "adamw_8bit"].map(|name| runs.train(&format!("{flags}={name}")));
    let losses = [&full, &small].map(|run| run.numbers("step", "loss"));
    assert!(losses[0][19] < 0.8 * losses[0][0], "it learns: {:?}", losses[0]);
    assert_ne!(losses[0], losses[1]);
    for (step, (full, small)) in losses[0].iter().zip(&losses[1]).enumerate() {
        assert!((small / full - 1.0).abs() < 0.02, "step {step}: {small}, {full} in f32");
    }
    let layout = |run: &Run, prefix: &str, matrix: &str| {
        let newest = *run.checkpoints().last().unwrap();
        let path = format!("{}/checkpoint-{newest}/optimizer.safetensors", run.out);
        let bytes = runs.place.read(&path);
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let name = format!("{prefix}.base_model.model.model.layers.0.{matrix}.weight");
        file.tensor(&name).ok().map(|tensor| (tensor.dtype(), tensor.shape().to_vec()))
    };
    let (large, little) = ("self_attn.q_proj.lora_A", "self_attn.k_proj.lora_B");
    assert_eq!(layout(&full, "exp_avg_sq", large), Some((Dtype::F32, vec![64, 64])));
    for moment in ["exp_avg", "exp_avg_sq"] {
        assert_eq!(layout(&small, moment, large), Some((Dtype::U8, vec![64, 64])));
        let scales = layout(&small, &format!("{moment}.absmax"), large);
        assert_eq!(scales, Some((Dtype::F32, vec![16])));
        assert_eq!(layout(&small, moment, little), Some((Dtype::F32, vec![32, 64])));
        assert_eq!(layout(&small, &format!("{moment}.absmax"), little), None);
    }
    let refused = runs.refused("optim=paged_adamw_8bit");
    assert!(refused.contains("take adamw_8bit: all of a run's memory is planned"), "{refused}");
}

#[test]
fn adam_beta1() {
    let runs = Runs::new();
    let [less, more] = ["0.75", "0.5"].map(|beta| runs.train(&format!("adam-beta1={beta}")));
    assert_scaled(&more.optimizer("exp_avg"), 2.0, &less.optimizer("exp_avg"), 1e-6);
}

#[test]
fn adam_beta2() {
    let runs = Runs::new();
    let [less, more] = ["0.75", "0.5"].map(|beta| runs.train(&format!("adam-beta2={beta}")));
    assert_scaled(&more.optimizer("exp_avg_sq"), 2.0, &less.optimizer("exp_avg_sq"), 1e-6);
}

#[test]
fn adam_epsilon() {
    let runs = Runs::new();
    // Far above every gradient, it alone divides: the first step is rate · g / epsilon.
    let run = runs.train("adam-epsilon=1e6 learning-rate=1e3 self-checks=false");
    let b = only(run.optimizer("master"), "lora_B");
    assert_scaled(&b, -1e3 / 1e6 / 0.1, &only(run.optimizer("exp_avg"), "lora_B"), 1e-4);
}

#[test]
fn seed() {
    let runs = Runs::new();
    let a = |seed: &str| only(runs.train(seed).optimizer("master"), "lora_A");
    assert_eq!(a("seed=1"), a("seed=1"));
    assert_ne!(a("seed=1"), a("seed=2"));
    assert_eq!(a(""), a("seed=42"));
}

#[test]
fn neftune_noise_alpha() {
    let runs = Runs::new();
    let losses = |flags: &str| {
        let run = runs.train(&format!("eval-data=eval.jsonl max-steps=3 {flags}"));
        (run.numbers("step", "loss"), run.numbers("eval", "eval_loss"))
    };
    let (plain, noisy) = (losses(""), losses("neftune-noise-alpha=15"));
    assert_eq!(losses("neftune-noise-alpha=15"), noisy);
    let (first, other) = (plain.0[0], noisy.0[0]);
    assert!(first != other && (first / other - 1.0).abs() < 0.2, "{first} {other}");
    assert!(losses("neftune-noise-alpha=15 seed=3").0 != noisy.0);
    assert!(runs.refused("neftune-noise-alpha=0").contains("expected a number above 0"));
}
