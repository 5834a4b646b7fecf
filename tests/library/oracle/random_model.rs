//! Tiny models with every switch of their family drawn at random, as files and in memory.

use std::collections::HashMap;
use std::fs;

use nibble::adapter::{Adapter, LoraConfig};
use nibble::checkpoint::Checkpoint;
use nibble::data::Document;
use nibble::model::Model;
use nibble::model::families::spec_from_config;
use nibble::model::spec::{ModelSpec, TensorRole};
use nibble::model::weights::Weights;
use nibble::plan::{Policy, Settings};
use nibble::random::Stream;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

pub const VOCABULARY: usize = 41;

/// Draws by name, so that one more does not change the others.
pub struct Draws(pub u64);

impl Draws {
    pub fn below(&self, name: &str, bound: u64) -> u64 {
        Stream::new(self.0, name).below(0, bound)
    }

    pub fn flag(&self, name: &str) -> bool {
        self.below(name, 2) == 1
    }

    pub fn normal(&self, name: &str, count: usize, deviation: f32) -> Vec<f32> {
        let mut values = vec![0.0; count];
        Stream::new(self.0, name).fill_normal(0, deviation, &mut values);
        values
    }

    fn pick<T: Copy>(&self, name: &str, from: &[T]) -> T {
        from[self.below(name, from.len() as u64) as usize]
    }
}

/// A config of `family`; `scaling` is a `rope_type`.
pub fn config(family: &str, scaling: &str, draws: &Draws) -> Value {
    let kv_heads = draws.pick("kv heads", &[1, 2]);
    let heads = kv_heads * draws.pick("group", &[1, 2, 3]);
    let head_dim = draws.pick("head dim", &[4, 6, 16]);
    let layers = 1 + draws.below("layers", 3);
    if family == "gpt2" {
        return json!({
            "model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": heads * head_dim,
            "n_head": heads, "n_layer": layers, "n_positions": 64,
            "n_inner": draws.pick("inner", &[None, Some(20)]),
            "activation_function": draws.pick("activation", &["gelu_new", "gelu"]),
            "tie_word_embeddings": draws.flag("tied"),
        });
    }
    let mut config = json!({
        "model_type": family, "vocab_size": VOCABULARY,
        "hidden_size": draws.pick("width", &[24, 10, 32]), "head_dim": head_dim,
        "intermediate_size": draws.pick("inner", &[17, 40]), "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_act": "silu",
        "rms_norm_eps": draws.pick("epsilon", &[1e-5, 1e-6]), "max_position_embeddings": 8,
        "tie_word_embeddings": draws.flag("tied"),
        "rope_parameters": rope(scaling, head_dim),
    });
    if family.starts_with("gemma") {
        config["hidden_act"] = "gelu_pytorch_tanh".into();
    }
    match family {
        "llama" => {
            config["attention_bias"] = draws.flag("attention bias").into();
            config["mlp_bias"] = draws.flag("mlp bias").into();
        }
        "gemma" | "olmo2" => {}
        "seed_oss" => {
            for key in ["attention_bias", "attention_out_bias", "mlp_bias"] {
                config[key] = draws.flag(key).into();
            }
        }
        "glm4" => {
            let turned = 2 * (1 + draws.below("turned", head_dim / 2));
            config["rope_parameters"] = rope(scaling, turned);
            config["partial_rotary_factor"] = (turned as f64 / head_dim as f64).into();
            config["attention_bias"] = draws.flag("attention bias").into();
        }
        "granite" | "granitemoehybrid" => {
            config["attention_bias"] = draws.flag("attention bias").into();
            config["mlp_bias"] = draws.flag("mlp bias").into();
            for key in ["embedding_multiplier", "residual_multiplier", "logits_scaling"] {
                config[key] = draws.pick(key, &[0.25, 1.0, 3.0]).into();
            }
            config["attention_multiplier"] = draws.pick("scores", &[0.1, 0.6]).into();
            config["shared_intermediate_size"] = config["intermediate_size"].clone();
            config["num_local_experts"] = 0.into();
            config["layer_types"] = vec!["attention"; layers as usize].into();
            config["position_embedding_type"] = "rope".into();
        }
        "olmo3" => {
            config["sliding_window"] = draws.pick("window", &[2, 4, 9]).into();
            let kinds = ["sliding_attention", "full_attention", "sliding_attention"];
            config["layer_types"] = json!(kinds[..layers as usize]);
            let local = json!({"rope_type": "default", "rope_theta": 100.0});
            config["rope_parameters"] =
                json!({"full_attention": rope(scaling, head_dim), "sliding_attention": local});
        }
        "phi3" => {
            let turned = 2 * (1 + draws.below("turned", head_dim / 2));
            config["rope_parameters"] = rope(scaling, turned);
            config["partial_rotary_factor"] = (turned as f64 / head_dim as f64).into();
            config["original_max_position_embeddings"] = 8.into();
            config["max_position_embeddings"] = 32.into();
            config["sliding_window"] = draws.pick("window", &[None, Some(4), Some(9)]).into();
        }
        "gemma2" | "gemma3_text" => {
            config["sliding_window"] = draws.pick("window", &[2, 4, 9]).into();
            config["query_pre_attn_scalar"] = draws.pick("scalar", &[4.0, 11.0]).into();
            let [scores, logits] = ["score cap", "logit cap"].map(|name| draws.flag(name));
            let scores = scores && family == "gemma2";
            config["attn_logit_softcapping"] = scores.then_some(1.5).into();
            config["final_logit_softcapping"] = logits.then_some(2.5).into();
            if family == "gemma3_text" {
                let kinds = ["sliding_attention", "full_attention", "sliding_attention"];
                config["layer_types"] = json!(kinds[..layers as usize]);
                let local = json!({"rope_type": "default", "rope_theta": 30.0});
                config["rope_parameters"] =
                    json!({"full_attention": rope(scaling, head_dim), "sliding_attention": local});
            }
        }
        "smollm3" => {
            let turns = ["first", "second", "third"].map(|name| u8::from(draws.flag(name)));
            config["no_rope_layers"] = json!(turns);
            config["use_sliding_window"] = draws.flag("slides").into();
            config["sliding_window"] = 5.into();
        }
        "ministral3" => {
            config["rope_parameters"]["llama_4_scaling_beta"] =
                draws.pick("beta", &[0.1, 0.7]).into();
            config["sliding_window"] = draws.pick("window", &[None, Some(4)]).into();
        }
        "mistral" => {
            config["sliding_window"] = draws.pick("window", &[2, 4, 9]).into();
        }
        _ => {
            if family == "qwen3" {
                config["attention_bias"] = draws.flag("attention bias").into();
            }
            config["use_sliding_window"] = draws.flag("slides").into();
            config["sliding_window"] = 5.into();
            config["max_window_layers"] = 1.into();
        }
    }
    config
}

/// Every scaling is in force: the model is trained for 8 tokens, documents are longer. `turned` elements
/// of each head are rotated.
fn rope(scaling: &str, turned: u64) -> Value {
    let mut rope = json!({"rope_theta": 100.0, "rope_type": scaling});
    let more = match scaling {
        "default" => json!({}),
        "llama3" => json!({
            "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        }),
        "longrope" => {
            let factors =
                |step: f64| (0..turned / 2).map(|j| 1.0 + step * j as f64).collect::<Vec<f64>>();
            json!({
                "original_max_position_embeddings": 8, "factor": 4.0, "short_factor": factors(0.1),
                "long_factor": factors(0.7),
            })
        }
        "yarn" => json!({
            "factor": 3.0, "original_max_position_embeddings": 8, "beta_fast": 2.0,
            "beta_slow": 0.3,
        }),
        _ => json!({"factor": 3.0}),
    };
    rope.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    rope
}

/// The model's tensors by name, as the inventory shapes them.
pub fn weights(spec: &ModelSpec, draws: &Draws) -> HashMap<String, Vec<f32>> {
    let draw = |tensor: &nibble::model::spec::TensorSpec| {
        let count = tensor.shape.iter().product();
        let mut values = draws.normal(&tensor.name, count, 0.3);
        if tensor.role == TensorRole::Norm && tensor.name.ends_with("weight") {
            let mean = if spec.norm_plus_one { 0.0 } else { 1.0 };
            values.iter_mut().for_each(|value| *value += mean);
        }
        (tensor.name.clone(), values)
    };
    spec.inventory().iter().map(draw).collect()
}

/// Writes the model as a Hugging Face folder and opens that.
pub fn checkpoint(
    config: &Value,
    spec: &ModelSpec,
    weights: &HashMap<String, Vec<f32>>,
) -> (tempfile::TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let stored = spec.inventory().into_iter().map(|tensor| {
        let (mut shape, mut values) = (tensor.shape.clone(), weights[&tensor.name].clone());
        if tensor.transposed {
            values = transposed(&values, shape[0]);
            shape.reverse();
        }
        (tensor.name, shape, bytemuck::allocation::pod_collect_to_vec::<f32, u8>(&values))
    });
    let stored: Vec<_> = stored.collect();
    let views = stored.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(&spec_from_config(checkpoint.config()).unwrap(), spec);
    (folder, checkpoint)
}

fn transposed(values: &[f32], rows: usize) -> Vec<f32> {
    let columns = values.len() / rows;
    (0..values.len()).map(|i| values[i % rows * columns + i / rows]).collect()
}

/// LoRA on all linears, A and B both away from zero.
pub fn adapter(spec: &ModelSpec, draws: &Draws) -> Adapter {
    let (r, lora_alpha) = (1 + draws.below("rank", 4) as usize, 5.0);
    let config = LoraConfig { r, lora_alpha, ..LoraConfig::default() };
    let mut adapter = Adapter::init(config, spec, draws.0).unwrap();
    for (target, tensors) in adapter.targets.iter().zip(&mut adapter.tensors) {
        tensors.a = draws.normal(&target.key_a(), tensors.a.len(), 0.3);
        tensors.b = draws.normal(&target.key_b(), tensors.b.len(), 0.3);
    }
    adapter
}

/// Four documents in one stream, one of them a single token; about a third of the labels masked.
pub fn documents(draws: &Draws) -> Vec<Document> {
    let document = |number: usize, length: usize| {
        let stream = Stream::new(draws.0, "tokens").at(number as u64);
        let ids = |i: usize| stream.below(2 * i as u64, VOCABULARY as u64) as u32;
        let input_ids: Vec<u32> = (0..length).map(ids).collect();
        let masked = |i: usize| stream.below(2 * i as u64 + 1, 3) == 0;
        let label = |(i, &id): (usize, &u32)| if masked(i) { -100 } else { id as i32 };
        let labels = input_ids.iter().enumerate().map(label).collect();
        Document { input_ids, labels, line: number }
    };
    [19, 1, 5, 12]
        .into_iter()
        .enumerate()
        .map(|(number, length)| document(number, length))
        .collect()
}

/// Our model of the checkpoint, layers kept and checkpointed in turn.
pub fn model(checkpoint: &Checkpoint, spec: &ModelSpec, adapter: Option<&Adapter>) -> Model {
    let weights = Weights::load(checkpoint, spec, None, None).unwrap();
    let policies = [Policy::Keep, Policy::Checkpoint].into_iter().cycle();
    let settings = Settings {
        longest_document: 24,
        policies: policies.take(spec.num_layers).collect(),
        targets: adapter.map(|adapter| adapter.targets.clone()).unwrap_or_default(),
        bf16_working: false,
        ..Settings::of_pass(48, 7)
    };
    let mut model = Model::new(spec.clone(), weights, settings).unwrap();
    if let Some(adapter) = adapter {
        model.parameters_mut().load(adapter);
    }
    model
}
