//! One test for each kind of bad folder.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use nibble_quant::FloatType;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::super::fixtures;
use super::tensors::TENSORS_FILE;
use super::{PeftAdapter, settings::CONFIG_FILE};
use crate::adapter::{Adapter, LoraConfig};
use crate::error::Error;
use crate::model::spec::ModelSpec;
use crate::random::Stream;

/// A saved adapter on q and v of a two-block Llama, to be damaged.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let config = LoraConfig {
            r: 2,
            target_modules: "q_proj,v_proj".parse().unwrap(),
            ..LoraConfig::default()
        };
        let mut adapter = Adapter::init(config, &fixtures::llama(2), 0).unwrap();
        adapter.base_model = Some("the/base".into());
        adapter.save(dir.path(), FloatType::F32).unwrap();
        Folder(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Sets a key of the settings.
    fn set(self, key: &str, value: Value) -> Self {
        let path = self.path().join(CONFIG_FILE);
        let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        config[key] = value;
        fs::write(&path, config.to_string()).unwrap();
        self
    }

    /// Writes the tensors anew, changed by `edit`.
    fn edit(self, edit: impl FnOnce(&mut HashMap<String, (Dtype, Vec<usize>, Vec<u8>)>)) -> Self {
        let path = self.path().join(TENSORS_FILE);
        let bytes = fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut tensors = file
            .iter()
            .map(|(n, v)| (n.to_string(), (v.dtype(), v.shape().to_vec(), v.data().to_vec())))
            .collect();
        edit(&mut tensors);
        let views = tensors
            .iter()
            .map(|(n, (d, s, data))| (n, TensorView::new(*d, s.clone(), data).unwrap()));
        fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        self
    }

    fn error(&self) -> Error {
        self.error_for(&fixtures::llama(2))
    }

    fn error_for(&self, spec: &ModelSpec) -> Error {
        PeftAdapter::open(self.path(), spec).expect_err("a bad folder")
    }
}

/// The message holds all `words`; the hint, if asked for, too.
fn assert_says(error: &Error, words: &[&str]) {
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "`{word}` is not in:\n{text}");
    }
}

const A0: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";

#[test]
fn a_missing_folder_is_named() {
    let dir = TempDir::new().unwrap();
    let error = PeftAdapter::open(&dir.path().join("none"), &fixtures::llama(2)).unwrap_err();
    assert_says(&error, &["none does not exist", "hint: an adapter is a folder"]);
    let error = PeftAdapter::open("owner/name".as_ref(), &fixtures::llama(2)).unwrap_err();
    assert_says(&error, &["owner/name does not exist", "`hf download owner/name --local-dir DIR`"]);
}

#[test]
fn settings_that_are_not_json() {
    let folder = Folder::new();
    fs::write(folder.path().join(CONFIG_FILE), "{\"r\": 8,").unwrap();
    assert_says(&folder.error(), &[CONFIG_FILE, "not JSON"]);
}

#[test]
fn settings_of_the_wrong_type_name_the_key() {
    for (key, value) in [
        ("r", json!("eight")),
        ("r", json!(-1)),
        ("r", json!(0)),
        ("lora_alpha", json!([1])),
        ("lora_dropout", json!(1.5)),
        ("target_modules", json!(3)),
        ("target_modules", json!([3])),
        ("target_modules", json!(null)),
        ("target_modules", json!([])),
        ("rank_pattern", json!(["q_proj"])),
        ("rank_pattern", json!({"q_proj": 1.5})),
        ("layers_to_transform", json!("all")),
        ("bias", json!("some")),
        ("use_dora", json!("yes")),
        ("trainable_token_indices", json!({"embed_tokens": "a"})),
        ("peft_type", json!(null)),
    ] {
        let error = Folder::new().set(key, value.clone()).error();
        assert!(matches!(error, Error::Input(_)), "{key} {value}: {error}");
        assert_says(&error, &[CONFIG_FILE, key]);
    }
}

#[test]
fn an_adapter_of_another_type() {
    let error = Folder::new().set("peft_type", json!("IA3")).error();
    assert_says(&error, &["`peft_type` is IA3, expected LORA", "hint:"]);
}

#[test]
fn features_that_change_the_function_are_refused() {
    for (key, value) in [
        ("target_parameters", json!(["mlp.experts"])),
        ("layer_replication", json!([[0, 2], [1, 2]])),
        ("use_what_is_not_invented_yet", json!(true)),
        ("use_qalora", json!(true)),
        ("alora_invocation_tokens", json!([1, 2])),
    ] {
        assert_says(&Folder::new().set(key, value).error(), &[key, "not implemented", "hint:"]);
    }
    let spec = fixtures::llama(2);
    for (key, value) in [("use_qalora", json!(false)), ("layer_replication", json!(null))] {
        assert!(PeftAdapter::open(Folder::new().set(key, value).path(), &spec).is_ok());
    }
}

#[test]
fn an_initialisation_that_changed_the_base() {
    for kind in ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga"] {
        let error = Folder::new().set("init_lora_weights", json!(kind)).error();
        assert_says(&error, &[kind, "path_initial_model_for_weight_conversion"]);
    }
}

#[test]
fn missing_tensors_file() {
    let folder = Folder::new();
    fs::remove_file(folder.path().join(TENSORS_FILE)).unwrap();
    assert_says(&folder.error(), &["cannot read", TENSORS_FILE]);
    fs::write(folder.path().join("adapter_model.bin"), "").unwrap();
    assert_says(&folder.error(), &["hint: adapter_model.bin is a pickle"]);
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let folder = Folder::new();
    let path = folder.path().join(TENSORS_FILE);
    let bytes = fs::read(&path).unwrap();
    for length in [0, 1, 7, 8, 9, 100, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&path, &bytes[..length]).unwrap();
        assert_says(&folder.error(), &[TENSORS_FILE, "damaged safetensors file", "cut"]);
    }
}

#[test]
fn a_header_that_lies_about_sizes() {
    let folder = Folder::new();
    let path = folder.path().join(TENSORS_FILE);
    let good = fs::read(&path).unwrap();
    for (from, to) in [("[2,64]", "[3,64]"), ("[2,64]", "[2,99]"), ("\"F32\"", "\"F64\"")] {
        let size = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
        let header = String::from_utf8(good[8..8 + size].to_vec()).unwrap();
        assert!(header.contains(from));
        let lie = header.replacen(from, to, 1);
        fs::write(&path, [&good[..8], lie.as_bytes(), &good[8 + size..]].concat()).unwrap();
        assert_says(&folder.error(), &["damaged safetensors file"]);
    }
    let mut huge = good.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(&path, huge).unwrap();
    assert_says(&folder.error(), &["damaged safetensors file"]);
}

#[test]
fn a_value_that_is_not_finite_names_its_place() {
    for bad in [f32::NAN, f32::INFINITY] {
        let folder = Folder::new().edit(|tensors| {
            tensors.get_mut(A0).unwrap().2[4 * 17..4 * 18].copy_from_slice(&bad.to_le_bytes());
        });
        assert_says(&folder.error(), &[A0, "element 17 is not a finite number"]);
    }
}

#[test]
fn a_tensor_of_whole_numbers() {
    let folder = Folder::new().edit(|tensors| tensors.get_mut(A0).unwrap().0 = Dtype::I32);
    assert_says(&folder.error(), &[A0, "expected F32, F16 or BF16, got I32"]);
}

#[test]
fn missing_and_unexpected_tensors_are_listed() {
    let folder = Folder::new().edit(|tensors| {
        let tensor = tensors.remove(A0).unwrap();
        tensors.insert(A0.replace("lora_A", "lora_C"), tensor);
    });
    let missing = format!("missing    {A0} [2, 64]");
    let unexpected = format!("unexpected {} [2, 64]", A0.replace("lora_A", "lora_C"));
    assert_says(&folder.error(), &["do not fit the settings", &missing, &unexpected]);
}

#[test]
fn an_adapter_for_a_wider_model() {
    let wide = ModelSpec { hidden_size: 96, ..fixtures::llama(2) };
    let error = Folder::new().error_for(&wide);
    let line = format!("shape      {A0} expected [2, 96], got [2, 64]");
    assert_says(&error, &["adapter for another model", &line, "hint:", "trained on `the/base`"]);
}

#[test]
fn an_adapter_for_another_family() {
    let error = Folder::new().error_for(&fixtures::gpt2());
    assert_says(&error, &["adapter for another model", "unexpected", "and 4 more", "the/base"]);
}

#[test]
fn an_adapter_for_a_deeper_model() {
    let error = Folder::new().error_for(&fixtures::llama(1));
    assert_says(&error, &["unexpected", "layers.1.self_attn.v_proj.lora_B.weight"]);
}

#[test]
fn an_adapter_for_a_shallower_model() {
    let error = Folder::new().error_for(&fixtures::llama(3));
    assert_says(&error, &["missing", "layers.2.self_attn.v_proj.lora_B.weight"]);
}

#[test]
fn a_rank_that_the_tensors_do_not_have() {
    let error = Folder::new().set("r", json!(3)).error();
    assert_says(&error, &[&format!("{A0} expected [3, 64], got [2, 64]")]);
}

#[test]
fn dora_without_its_magnitudes() {
    let error = Folder::new().set("use_dora", json!(true)).error();
    assert_says(&error, &["missing", "q_proj.lora_magnitude_vector [64]"]);
}

#[test]
fn a_token_beyond_the_vocabulary() {
    let error = Folder::new().set("trainable_token_indices", json!([3, 128])).error();
    assert_says(&error, &["token 128, the vocabulary has 128"]);
    let error = Folder::new().set("trainable_token_indices", json!({"wte": [3]})).error();
    assert_says(&error, &["no embedding `wte`"]);
}

#[test]
fn an_expression_in_the_file_that_does_not_compile() {
    let error = Folder::new().set("target_modules", json!("(q_proj")).error();
    assert_says(&error, &["`(q_proj` is not a regular expression"]);
}

/// Seeded damage to both files: an adapter or an error, never a panic.
#[test]
fn damaged_files_never_panic() {
    let folder = Folder::new();
    let spec = fixtures::llama(2);
    let random = Stream::new(17, "damage");
    for file in [TENSORS_FILE, CONFIG_FILE] {
        let path = folder.path().join(file);
        let good = fs::read(&path).unwrap();
        let header = good.len().min(2000) as u64;
        for trial in 0..300 {
            let mut bytes = good.clone();
            for change in 0..=random.at(trial).below(0, 4) {
                let place = random.at(trial).below(2 * change + 1, header) as usize;
                bytes[place] = random.at(trial).below(2 * change + 2, 256) as u8;
            }
            fs::write(&path, bytes).unwrap();
            let _ = PeftAdapter::open(folder.path(), &spec);
        }
        fs::write(&path, good).unwrap();
    }
    assert!(PeftAdapter::open(folder.path(), &spec).is_ok());
}
