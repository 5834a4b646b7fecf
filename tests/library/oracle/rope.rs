//! Stretched rotary embeddings against transformers, on sequences longer than the trained length.
//!
//! `tests/data/rope` was made by `scripts/golden/gen_rope.py` (transformers 5.23, f32, eager
//! attention); tolerances are 10 times the difference between f32 and f64 there.

use std::fs;
use std::path::{Path, PathBuf};

use nibble::checkpoint::Checkpoint;
use nibble::data::{Batch, Document};
use nibble::model::families::spec_from_config;
use nibble::model::weights::Weights;
use nibble::model::{Model, Variant};
use nibble::plan::{Policy, Settings};
use safetensors::SafeTensors;
use serde_json::{Value, json};

const CASES: [&str; 8] =
    ["linear", "dynamic", "yarn", "yarn_settings", "yarn_attention", "longrope", "llama3", "phi3"];

const LAYERS: usize = 2;
const VOCAB: usize = 96;

struct Case {
    folder: PathBuf,
    reference: Vec<u8>,
    tolerance: f32,
}

impl Case {
    fn open(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/rope").join(name);
        let info = json_of(&folder.join("case.json"));
        let number = |value: &Value| value.as_f64().unwrap() as f32;
        let tolerance = 10.0 * number(&info["noise"]["logits_max_abs_f32_vs_f64"]);
        assert!(number(&info["logits_max_abs_without_scaling"]) > 100.0 * tolerance);
        Case { reference: fs::read(folder.join("ref.safetensors")).unwrap(), folder, tolerance }
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let file = SafeTensors::deserialize(&self.reference).unwrap();
        bytemuck::allocation::pod_collect_to_vec(file.tensor(name).unwrap().data())
    }

    fn rows(&self, ids: &str, labels: &str) -> Vec<Document> {
        let file = SafeTensors::deserialize(&self.reference).unwrap();
        let read = |name: &str| -> (Vec<i64>, usize) {
            let tensor = file.tensor(name).unwrap();
            let values = bytemuck::allocation::pod_collect_to_vec(tensor.data());
            (values, tensor.shape()[1])
        };
        let ((ids, length), (labels, _)) = (read(ids), read(labels));
        let document = |(ids, labels): (&[i64], &[i64])| Document {
            input_ids: ids.iter().map(|&id| id as u32).collect(),
            labels: labels.iter().map(|&label| label as i32).collect(),
            line: 0,
        };
        ids.chunks(length).zip(labels.chunks(length)).map(document).collect()
    }

    fn model(&self) -> Model {
        self.model_with(Settings {
            longest_document: 96,
            policies: vec![Policy::Keep; LAYERS],
            bf16_working: false,
            ..Settings::of_pass(256, 32)
        })
    }

    fn generating(&self, context_tokens: usize) -> Model {
        self.model_with(Settings {
            cache_tokens: context_tokens,
            bf16_working: false,
            ..Settings::of_pass(32, 1)
        })
    }

    fn model_with(&self, settings: Settings) -> Model {
        let checkpoint = Checkpoint::open(&self.folder).unwrap();
        let spec = spec_from_config(checkpoint.config()).unwrap();
        let weights = Weights::load(&checkpoint, &spec, None, None).unwrap();
        Model::new(spec, weights, settings).unwrap()
    }
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn assert_close(case: &str, got: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(got.len(), expected.len());
    let error = got.iter().zip(expected).fold(0.0_f32, |m, (g, e)| m.max((g - e).abs()));
    assert!(error <= tolerance, "{case}: off by {error:e}, allowed {tolerance:e}");
}

#[test]
fn logits_and_loss_beyond_the_trained_length() {
    for name in CASES {
        let case = Case::open(name);
        let (documents, mut model) = (case.rows("input_ids", "labels"), case.model());
        let batch = Batch::from_documents(&documents);
        let rows: Vec<u32> = (0..batch.tokens() as u32).collect();
        let logits = model.logits(&batch, &rows).unwrap();
        assert_close(name, &logits, &case.floats("logits"), case.tolerance);
        let loss =
            model.evaluate(&batch, Variant::Adapted).unwrap().sum / batch.num_targets() as f64;
        assert_close(name, &[loss as f32], &case.floats("loss"), case.tolerance);
    }
}

/// With dynamic scaling the frequencies depend on the length of the document, not of the batch.
#[test]
fn a_short_document_beside_long_ones() {
    for name in CASES {
        let case = Case::open(name);
        let mut documents = case.rows("input_ids", "labels");
        documents.insert(1, case.rows("short_ids", "short_ids").remove(0));
        let batch = Batch::from_documents(&documents);
        let rows: Vec<u32> = (batch.cu_seqlens[1]..batch.cu_seqlens[2]).collect();
        let logits = case.model().logits(&batch, &rows).unwrap();
        assert_close(name, &logits, &case.floats("short_logits"), case.tolerance);
    }
}

/// A prompt that is fed in pieces turns by its whole length, as transformers' prefill does.
#[test]
fn a_prompt_in_pieces_is_the_whole_document() {
    for name in CASES {
        let case = Case::open(name);
        let document = case.rows("input_ids", "labels").remove(0);
        let length = document.input_ids.len();
        let expected = &case.floats("logits")[..length * VOCAB];
        let mut model = case.generating(length);
        let mut fed = 0;
        for piece in document.input_ids.chunks(29) {
            let logits = model.decode_piece(piece, length).unwrap().to_vec();
            fed += piece.len();
            let expected = &expected[(fed - 1) * VOCAB..fed * VOCAB];
            assert_close(&format!("{name} after {fed}"), &logits, expected, case.tolerance);
        }
    }
}

/// transformers reads `rope_scaling` before `rope_parameters`, and a config's own trained length before
/// that of either.
#[test]
fn what_comes_first_where_a_config_says_it_twice() {
    let base = json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "vocab_size": 99,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
    });
    let read = |extra: Value| {
        let mut config = base.clone();
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        spec_from_config(&config).map(|spec| spec.rotary.unwrap())
    };
    let yarn = |original: Option<usize>, theta: Option<f64>| {
        let mut rope = json!({"rope_type": "yarn", "factor": 4.0});
        if let Some(original) = original {
            rope["original_max_position_embeddings"] = original.into();
        }
        if let Some(theta) = theta {
            rope["rope_theta"] = theta.into();
        }
        rope
    };
    let newer = json!({"rope_type": "default", "rope_theta": 5e5});
    let both = |scaling: Value| read(json!({"rope_parameters": newer, "rope_scaling": scaling}));
    let alone = |scaling: Value| read(json!({"rope_scaling": scaling})).unwrap();
    let with_base = yarn(Some(32), Some(5e5));
    assert_eq!(both(with_base.clone()).unwrap(), alone(with_base));
    assert_eq!(both(json!({})).unwrap(), read(json!({"rope_parameters": newer})).unwrap());
    let error = both(yarn(Some(32), None)).unwrap_err().to_string();
    assert!(error.contains("`rope_scaling` hides the rope_theta of `rope_parameters`"), "{error}");
    assert!(error.contains("add `\"rope_theta\": 500000.0` to `rope_scaling`"), "{error}");
    let own = |rope: Value| {
        read(json!({"rope_parameters": rope, "original_max_position_embeddings": 16})).unwrap()
    };
    assert_eq!(own(yarn(Some(32), None)), alone(yarn(Some(16), None)));
    assert_eq!(own(yarn(None, None)), alone(yarn(Some(16), None)));
    assert_eq!(alone(yarn(None, None)), alone(yarn(Some(64), None)));
}

#[test]
fn both_spellings_of_the_config_are_one_rotary() {
    for name in CASES {
        let v5 = json_of(&Case::open(name).folder.join("config.json"));
        let mut v4 = v5.clone();
        let mut rope = v4.as_object_mut().unwrap().shift_remove("rope_parameters").unwrap();
        v4["rope_theta"] = rope["rope_theta"].take();
        let rope = rope.as_object_mut().unwrap();
        rope.shift_remove("rope_theta");
        // The key before transformers 4.43.
        let kind = rope.shift_remove("rope_type").unwrap();
        rope.insert("type".into(), kind);
        v4["rope_scaling"] = json!(rope);
        let (v5, v4) = (spec_from_config(&v5).unwrap(), spec_from_config(&v4).unwrap());
        assert_eq!(v5.rotary, v4.rotary, "{name}");
    }
}
