//! What is trained, and how it starts.

use super::runs::{Runs, assert_scaled, only};

const ALL: [&str; 7] = [
    "mlp.down_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "self_attn.k_proj",
    "self_attn.o_proj",
    "self_attn.q_proj",
    "self_attn.v_proj",
];

#[test]
fn lora_r() {
    let runs = Runs::new();
    let run = runs.train("lora-r=3");
    let tensors = run.optimizer("master");
    assert_eq!(tensors.len(), 2 * 2 * ALL.len());
    for (name, tensor) in tensors {
        assert_eq!(tensor.shape[usize::from(name.ends_with("lora_B"))], 3, "{name}");
    }
    assert_eq!(run.adapter_config()["r"], 3);
}

#[test]
fn lora_alpha() {
    let runs = Runs::new();
    let [small, large] = ["8", "16"].map(|alpha| runs.train(&format!("lora-alpha={alpha}")));
    // dB = alpha / r · dyᵀ (x Aᵀ); the first moment is a tenth of it.
    assert_scaled(&large.optimizer("exp_avg"), 2.0, &small.optimizer("exp_avg"), 1e-6);
    assert_eq!(large.adapter_config()["lora_alpha"], 16);
}

#[test]
fn lora_dropout() {
    let runs = Runs::new();
    let [without, with] = ["0", "0.5"].map(|share| runs.train(&format!("lora-dropout={share}")));
    assert_eq!(with.numbers("step", "loss"), without.numbers("step", "loss"), "B is still zero");
    assert_ne!(with.optimizer("exp_avg"), without.optimizer("exp_avg"));
    assert_eq!(with.adapter_config()["lora_dropout"], 0.5);
}

#[test]
fn target_modules() {
    let runs = Runs::new();
    for (modules, expected) in [
        ("all-linear", &ALL[..]),
        ("q_proj,v_proj", &["self_attn.q_proj", "self_attn.v_proj"]),
        (r"model\.layers\.\d+\.mlp\.(up|down)_proj", &["mlp.down_proj", "mlp.up_proj"]),
    ] {
        let run = runs.train(&format!("target-modules={modules}"));
        assert_eq!(run.modules(), expected, "{modules}");
    }
    // PEFT would find blocks and norms in it, which it does not adapt.
    let run = runs.train(r"target-modules=.*layers\.1\.(self_attn.*|.*norm)");
    let names = ["q", "k", "v", "o"].map(|part| format!("model.layers.1.self_attn.{part}_proj"));
    assert_eq!(run.adapter_config()["target_modules"], serde_json::json!(names));
}

#[test]
fn exclude_modules() {
    let runs = Runs::new();
    assert_eq!(runs.train("exclude-modules=down_proj,gate_proj").modules(), ALL[2..]);
}

#[test]
fn layers_to_transform() {
    let runs = Runs::new();
    let tensors = runs.train("layers-to-transform=1").optimizer("master");
    assert_eq!(tensors.len(), 2 * ALL.len());
    assert!(tensors.keys().all(|name| name.starts_with("layers.1.")));
}

#[test]
fn layers_pattern() {
    let runs = Runs::new();
    let run = runs.train("layers-to-transform=1 layers-pattern=layers");
    assert_eq!(run.optimizer("master").len(), 2 * ALL.len());
    let error = runs.refused("layers-to-transform=1 layers-pattern=blocks");
    assert!(error.contains("blocks"), "{error}");
}

#[test]
fn rank_pattern() {
    let runs = Runs::new();
    for (name, tensor) in runs.train("rank-pattern=q_proj=2").optimizer("master") {
        let expected = if name.contains("q_proj") { 2 } else { 16 };
        assert_eq!(tensor.shape[usize::from(name.ends_with("lora_B"))], expected, "{name}");
    }
}

#[test]
fn alpha_pattern() {
    let runs = Runs::new();
    let plain = runs.train("").optimizer("exp_avg");
    let other = runs.train("alpha-pattern=q_proj=128").optimizer("exp_avg");
    for (module, factor) in [("q_proj", 4.0), ("v_proj", 1.0)] {
        let [plain, other] = [&plain, &other].map(|tensors| only(tensors.clone(), module));
        assert_scaled(&other, factor, &plain, 1e-6);
    }
}

#[test]
fn use_rslora() {
    let runs = Runs::new();
    // alpha / sqrt(16) instead of alpha / 16
    let [plain, rslora] = ["false", "true"].map(|on| runs.train(&format!("use-rslora={on}")));
    assert_scaled(&rslora.optimizer("exp_avg"), 4.0, &plain.optimizer("exp_avg"), 1e-6);
    assert_eq!(rslora.adapter_config()["use_rslora"], true);
}

#[test]
fn init_lora_weights() {
    let runs = Runs::new();
    // A has no gradient while B is zero, so that the first step leaves it as it was.
    let a = |init: &str| {
        let run = runs.train(&format!("init-lora-weights={init} target-modules=q_proj"));
        let tensors = only(run.optimizer("master"), "lora_A").into_values();
        tensors.flat_map(|tensor| tensor.values).collect::<Vec<f32>>()
    };
    let rms = |values: &[f32]| {
        (values.iter().map(|value| value * value).sum::<f32>() / values.len() as f32).sqrt()
    };
    let (uniform, gaussian) = (a("true"), a("gaussian"));
    // Kaiming with a = sqrt(5): uniform within 1 / sqrt(64); gaussian: standard deviation 1 / 16.
    let bound = 1.0 / 8.0;
    assert!(uniform.iter().all(|value| value.abs() <= bound));
    assert!((rms(&uniform) / (bound / 3f32.sqrt()) - 1.0).abs() < 0.05, "{}", rms(&uniform));
    assert!(gaussian.iter().any(|value| value.abs() > bound));
    assert!((rms(&gaussian) * 16.0 - 1.0).abs() < 0.05, "{}", rms(&gaussian));
}

#[test]
fn loraplus_lr_ratio() {
    let runs = Runs::new();
    let [plain, plus] = ["1", "8"].map(|ratio| {
        runs.train(&format!("loraplus-lr-ratio={ratio} learning-rate=1e-3")).optimizer("master")
    });
    assert_scaled(&only(plus, "lora_B"), 8.0, &only(plain, "lora_B"), 1e-6);
}

#[test]
fn embeddings_are_not_trained() {
    let runs = Runs::new();
    let error = runs.refused("target-modules=embed_tokens");
    assert!(error.contains("embed_tokens"), "{error}");
    let error = runs.refused("loraplus-lr-embedding=1e-6");
    assert!(error.contains("leave it out: adapters on embeddings"), "{error}");
}

#[test]
fn init_adapter() {
    let runs = Runs::new();
    let first = runs.train("lora-r=4 adapter-dtype=f32 eval-data=eval.jsonl max-steps=6");
    let flags = "adapter-dtype=f32 eval-data=eval.jsonl learning-rate=1e-9";
    let second = runs.train(&format!("{flags} init-adapter={}", first.out));
    let note = "the adapter was made with `--lora-dropout 0`, this run has 0.5";
    assert!(!second.said.contains("the adapter was made with"), "{}", second.said);
    let dropped = runs.train(&format!("{flags} init-adapter={} lora-dropout=0.5", first.out));
    assert!(dropped.said.contains(note), "{}", dropped.said);
    assert_eq!(second.adapter_config()["r"], 4);
    // What the adapter decides is no setting of the run.
    let toml = "lora_r = 16\nseed = 3\ntarget_modules = 'q_proj'\n";
    std::fs::write(runs.place.path("new.toml"), toml).unwrap();
    let unused = "note: new.toml has settings that `--init-adapter` brings along, unused here: `lora-r`, \
                  `target-modules`\n";
    let told = runs.train(&format!("{flags} config=new.toml init-adapter={}", first.out));
    assert!(told.said.contains(unused), "{}", told.said);
    assert_eq!(told.adapter_config()["r"], 4);
    assert!(!second.said.contains("unused here"), "{}", second.said);
    let settings = &second.start()["settings"];
    assert!(settings["lora_r"].is_null() && settings["target_modules"].is_null(), "{settings}");
    assert_eq!(settings["learning_rate"], 1e-9);
    let eval = |run: &super::runs::Run| run.numbers("eval", "eval_loss")[0];
    let fresh = eval(&runs.train(flags));
    assert!((eval(&first) - eval(&second)).abs() < 1e-5, "{} {}", eval(&first), eval(&second));
    assert!(eval(&first) < fresh - 0.1, "{} {fresh}", eval(&first));
}

#[test]
fn adapter_dtype() {
    let runs = Runs::new();
    let [bf16, f32] = ["bf16", "f32"].map(|dtype| runs.train(&format!("adapter-dtype={dtype}")));
    for (run, name, bytes_per_number) in [(&bf16, "BF16", 2), (&f32, "F32", 4)] {
        let file = runs.place.read(&format!("{}/adapter_model.safetensors", run.out));
        let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
        for (key, view) in tensors.iter() {
            assert_eq!(format!("{:?}", view.dtype()), name, "{key}");
            let numbers = view.shape().iter().product::<usize>();
            assert_eq!(view.data().len(), bytes_per_number * numbers);
        }
    }
    // The same f32 master to begin with; what the products see is rounded or not.
    let a = |run: &super::runs::Run| only(run.optimizer("master"), "lora_A");
    assert_eq!(a(&bf16), a(&f32));
    assert_ne!(bf16.optimizer("exp_avg"), f32.optimizer("exp_avg"));
}
