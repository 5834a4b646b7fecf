//! `nibble export`: what llama.cpp gets of a model, its tokenizer and an adapter.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::Path;

use crate::golden::{CASES, Case};
use crate::training::{Workplace, change_model, fail, succeed};
use candle_core::Device;
use candle_core::quantized::gguf_file::{self, Content, Value as Metadata};
use nibble::checkpoint::atomic::AtomicFile;
use nibble::checkpoint::{Checkpoint, Export, FileType};
use nibble::data::ChatTokenizer;
use nibble::model::families::spec_from_config;
use nibble::model::spec::{Family, ModelSpec, Projections, TensorRole, TensorSpec};
use serde_json::{Value, json};

fn added_token(id: usize, text: &str, special: bool) -> Value {
    json!({
        "id": id, "content": text, "special": special, "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false
    })
}

/// A tokenizer of 128 byte-level tokens, of which a few are merged.
fn write_tokenizer(folder: &Path) {
    let mut vocab: serde_json::Map<String, Value> =
        ('!'..='~').enumerate().map(|(id, byte)| (byte.to_string(), id.into())).collect();
    let merges = ["l l", "h e", "he ll", "hell o", "Ġ w"];
    for token in ["Ġ", "Ċ", "ll", "he", "hell", "hello", "Ġw"] {
        vocab.insert(token.into(), vocab.len().into());
    }
    let special = added_token(vocab.len(), "<|end|>", true);
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true
    });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special],
        "normalizer": null, "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges}
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({"eos_token": "<|end|>", "chat_template": "{{ messages[0].content }}"});
    fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
}

/// A golden model with that tokenizer, as `base` of a workplace.
fn place(case: &Case) -> Workplace {
    let place = Workplace::new();
    let folder = place.path("base");
    fs::create_dir(&folder).unwrap();
    fs::copy(case.path.join("model.safetensors"), folder.join("model.safetensors")).unwrap();
    let mut config = case.json("config.json");
    // As llama.cpp takes them for granted.
    if case.name.starts_with("gemma") {
        config["query_pre_attn_scalar"] = config["head_dim"].clone();
    }
    if case.name.starts_with("gemma3") {
        config["layer_types"] = vec!["sliding_attention"; 3].into();
    }
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    write_tokenizer(&folder);
    place
}

fn export(place: &Workplace, flags: &[&str]) -> (Content, File) {
    let base = ["export", "--model", "base", "--out", "out.gguf", "--overwrite"];
    succeed(place.nibble(&[&base[..], flags].concat()));
    let mut file = File::open(place.path("out.gguf")).unwrap();
    (Content::read(&mut file).unwrap(), file)
}

#[test]
fn every_family_reads_back_as_it_was() {
    for name in CASES.into_iter().filter(|name| *name != "granite4_s0") {
        let case = Case::open(name);
        let place = place(&case);
        export(&place, &["--outtype", "f32"]);
        let source = Checkpoint::open(&place.path("base")).unwrap();
        let written = Checkpoint::open(&place.path("out.gguf")).unwrap();
        let (expected, got) =
            [&source, &written].map(|c| spec_from_config(c.config()).unwrap()).into();
        assert_eq!(got.inventory(), expected.inventory(), "{name}");
        // The file's special tokens are the tokenizer's.
        let (bos_token_id, eos_token_ids) = (got.bos_token_id, got.eos_token_ids.clone());
        let mut same = ModelSpec { bos_token_id, eos_token_ids, ..expected.clone() };
        if same.family == Family::Mistral {
            // Which is a Llama there.
            (same.family, same.windows) = (Family::Llama, vec![None; same.num_layers]);
        }
        assert_eq!(got, same, "{name}");
        for tensor in expected.inventory() {
            let [was, is] = [&source, &written].map(|checkpoint| {
                let elements = checkpoint.elements(&tensor.name).unwrap();
                (elements.shape().to_vec(), elements.to_f32())
            });
            // The file holds w + 1 in f32.
            let rounds = expected.norm_plus_one && tensor.role == TensorRole::Norm;
            let rounding = if rounds { f32::EPSILON / 2.0 } else { 0.0 };
            let close = |(was, is): (&f32, &f32)| (was - is).abs() <= rounding;
            let same = was.0 == is.0 && was.1.iter().zip(&is.1).all(close);
            assert!(same, "{name}: {}", tensor.name);
        }
        let text = "hello world\n<|end|>";
        let [was, is] = ["base", "out.gguf"].map(|path| {
            let tokenizer = ChatTokenizer::open(&place.path(path)).unwrap();
            let eos = tokenizer.eos().cloned();
            (tokenizer.encode(text).unwrap(), eos, tokenizer.chat_template().map(String::from))
        });
        assert_eq!(was, is, "{name}");
        assert!(was.0.len() < text.len() && was.2.is_some());
    }
}

/// llama.cpp has gate and up of every Granite apart.
#[test]
fn a_granite_4_reads_back_as_a_granite() {
    let case = Case::open("granite4_s0");
    let place = place(&case);
    export(&place, &["--outtype", "f32"]);
    let [source, written] =
        ["base", "out.gguf"].map(|path| Checkpoint::open(&place.path(path)).unwrap());
    let [expected, got] = [&source, &written].map(|c| spec_from_config(c.config()).unwrap());
    assert_eq!((got.family, got.projections), (Family::Granite, Projections::Separate));
    let factors = |spec: &ModelSpec| {
        [spec.embedding_scale, spec.residual_scale, spec.attention_scale, spec.logit_divisor]
    };
    assert_eq!(factors(&got), factors(&expected));
    let values = |checkpoint: &Checkpoint, name: &str| checkpoint.elements(name).unwrap().to_f32();
    for tensor in expected.inventory() {
        let was = values(&source, &tensor.name);
        let (layer, part) = tensor.name.split_once(".shared_mlp.").unwrap_or((&tensor.name, ""));
        let is: Vec<f32> = match part {
            "input_linear.weight" => ["gate_proj", "up_proj"]
                .iter()
                .flat_map(|part| values(&written, &format!("{layer}.mlp.{part}.weight")))
                .collect(),
            "output_linear.weight" => values(&written, &format!("{layer}.mlp.down_proj.weight")),
            _ => values(&written, &tensor.name),
        };
        assert!(was == is, "{}", tensor.name);
    }
}

/// A tokenizer that names no end of answers has the model's.
#[test]
fn the_end_of_answers_is_in_the_file_whoever_names_it() {
    let place = place(&Case::open("llama_s0"));
    let eos = |content: &Content| content.metadata["tokenizer.ggml.eos_token_id"].to_u32().unwrap();
    let named = eos(&export(&place, &[]).0);
    fs::remove_file(place.path("base/tokenizer_config.json")).unwrap();
    let mut config = place.json("base/config.json");
    config["eos_token_id"] = json!([7, 9]);
    fs::write(place.path("base/config.json"), config.to_string()).unwrap();
    assert_eq!((eos(&export(&place, &[]).0), named), (7, 101));
}

#[test]
fn what_llama_cpp_computes_otherwise_is_refused() {
    let llama3 = json!({
        "rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32
    });
    let mut yarn = Case::open("ministral3_s0").json("config.json")["rope_parameters"].take();
    yarn["truncate"] = false.into();
    let turns = json!({
        "rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0, "beta_fast": 16,
        "original_max_position_embeddings": 32
    });
    let another = |key: &str, name: &str| format!("llama.cpp has another {key} for every {name}");
    let cases = [
        ("gemma2_s0", None, another("query_pre_attn_scalar", "gemma2")),
        ("gemma3_s0", None, another("layer_types", "gemma3")),
        (
            "smollm3_s0",
            Some(("no_rope_layers", json!([1, 0, 1, 1]))),
            another("no_rope_layers", "smollm3"),
        ),
        ("smollm3_s0", Some(("mlp_bias", true.into())), another("mlp_bias", "smollm3")),
        ("qwen3_s0", Some(("attention_bias", true.into())), another("attention_bias", "qwen3")),
        ("gemma_s0", Some(("attention_bias", true.into())), another("attention_bias", "gemma")),
        (
            "ministral3_s0",
            Some(("rope_parameters", yarn)),
            "llama.cpp truncates the bounds of every yarn".into(),
        ),
        (
            "llama_s0",
            Some(("rope_parameters", turns)),
            "llama.cpp has beta_fast 32 and beta_slow 1 for every yarn of a llama".into(),
        ),
        (
            "qwen3_s0",
            Some(("rope_parameters", llama3)),
            "rope scaling `llama3` for llama alone".into(),
        ),
    ];
    for (name, change, says) in cases {
        let case = Case::open(name);
        let place = place(&case);
        let mut config = case.json("config.json");
        if let Some((key, value)) = change {
            config[key] = value;
        }
        fs::write(place.path("base/config.json"), config.to_string()).unwrap();
        let (code, error) = fail(place.nibble(&["export", "--model", "base", "--out", "out.gguf"]));
        assert!(code == 1 && error.contains(&says), "{name}: {code}: {error}");
    }
}

#[test]
fn an_olmo_that_llama_cpp_computes_otherwise_is_refused() {
    let mut yarn = Case::open("olmo3_s0").json("config.json")["rope_parameters"].take();
    let [local_too, mut another_base, mut another_factor] = [(); 3].map(|()| yarn.clone());
    let local_too = json!({
        "full_attention": local_too["full_attention"], "sliding_attention": local_too["full_attention"],
    });
    another_base["sliding_attention"]["rope_theta"] = 1e4.into();
    another_factor["full_attention"]["attention_factor"] = 1.0.into();
    let full = ["full_attention"; 3];
    for (name, key, value, says) in [
        ("olmo2_s0", "attention_bias", true.into(), "attention_bias for every olmo2"),
        ("olmo2_s0", "head_dim", 32.into(), "head_dim for every olmo2"),
        (
            "olmo3_s0",
            "layer_types",
            json!([&full[..], &["sliding_attention"]].concat()),
            "layer_types",
        ),
        ("olmo3_s0", "rope_parameters", local_too, "rope_parameters"),
        ("olmo3_s0", "rope_parameters", another_base, "rope_parameters"),
        ("olmo3_s0", "rope_parameters", another_factor, "attention_factor"),
        ("seed_oss_s0", "attention_out_bias", true.into(), "attention_bias for every seed_oss"),
    ] {
        let case = Case::open(name);
        let place = place(&case);
        let mut config = case.json("config.json");
        config[key] = value;
        fs::write(place.path("base/config.json"), config.to_string()).unwrap();
        let (code, error) = fail(place.nibble(&["export", "--model", "base", "--out", "out.gguf"]));
        let says = format!("llama.cpp has another {says}");
        assert!(code == 1 && error.contains(&says), "{name} {key}: {code}: {error}");
    }
    // Layers with a window have the base of the others, whatever it is.
    for kind in ["full_attention", "sliding_attention"] {
        yarn[kind]["rope_theta"] = 1e4.into();
    }
    let case = Case::open("olmo3_s0");
    let place = place(&case);
    let mut config = case.json("config.json");
    config["rope_parameters"] = yarn;
    fs::write(place.path("base/config.json"), config.to_string()).unwrap();
    export(&place, &["--outtype", "f32"]);
    let [expected, got] = ["base", "out.gguf"].map(|path| {
        spec_from_config(Checkpoint::open(&place.path(path)).unwrap().config()).unwrap()
    });
    assert_eq!((got.rotary, got.local_rotary), (expected.rotary, expected.local_rotary));
}

/// What llama.cpp takes where a file of a Granite is silent, or has zeros.
#[test]
fn factors_of_a_granite_may_be_absent() {
    let place = place(&Case::open("granite_s0"));
    export(&place, &["--outtype", "f32"]);
    let bytes = place.read("out.gguf");
    let spec = |bytes: &[u8]| {
        fs::write(place.path("changed.gguf"), bytes).unwrap();
        let checkpoint = Checkpoint::open(&place.path("changed.gguf")).unwrap();
        spec_from_config(checkpoint.config()).unwrap()
    };
    let at = |key: &str| {
        let found = bytes.windows(key.len()).position(|window| window == key.as_bytes());
        found.unwrap_or_else(|| panic!("{key} is in the file"))
    };
    for (key, factor, usual) in [
        ("granite.embedding_scale", 3.0, 1.0),
        ("granite.residual_scale", 0.22, 1.0),
        ("granite.attention.scale", 0.1, 0.25),
        ("granite.logit_scale", 4.0, 1.0),
    ] {
        let of = |spec: ModelSpec| match key {
            "granite.embedding_scale" => spec.embedding_scale,
            "granite.residual_scale" => spec.residual_scale,
            "granite.attention.scale" => spec.attention_scale,
            _ => spec.logit_divisor,
        };
        assert_eq!(of(spec(&bytes)), factor, "{key}");
        // Behind the key and the four bytes of its type; and under a name that nobody asks for.
        let mut zero = bytes.clone();
        zero[at(key) + key.len() + 4..][..4].fill(0);
        assert_eq!(of(spec(&zero)), usual, "{key}");
        if key != "granite.logit_scale" {
            let mut absent = bytes.clone();
            absent[at(key) + key.len() - 1] = b'_';
            assert_eq!(of(spec(&absent)), usual, "{key}");
        }
    }
}

/// Where its class finds nothing of rope, a Ministral 3 takes YaRN: its file must not be silent.
#[test]
fn a_ministral_keeps_its_rope_and_its_scale() {
    let rope = |more: Value| {
        let mut rope = json!({"rope_theta": 1e4});
        rope.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        rope
    };
    for rope in [
        rope(json!({"rope_type": "default"})),
        rope(json!({
            "rope_type": "default", "llama_4_scaling_beta": 0.2,
            "original_max_position_embeddings": 9,
        })),
        rope(json!({
            "rope_type": "linear", "factor": 2.0, "llama_4_scaling_beta": 0.2,
            "original_max_position_embeddings": 9,
        })),
        rope(json!({
            "rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 9,
            "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 4.0,
        })),
    ] {
        let case = Case::open("ministral3_s0");
        let place = place(&case);
        let mut config = case.json("config.json");
        config["rope_parameters"] = rope.clone();
        fs::write(place.path("base/config.json"), config.to_string()).unwrap();
        export(&place, &["--outtype", "f32"]);
        let [expected, got] = ["base", "out.gguf"].map(|path| {
            let checkpoint = Checkpoint::open(&place.path(path)).unwrap();
            spec_from_config(checkpoint.config()).unwrap()
        });
        assert_eq!(got.query_scaling, expected.query_scaling, "{rope}");
        let frequencies =
            |spec: &ModelSpec| spec.rotary.as_ref().unwrap().inverse_frequencies(16, 0);
        let ((got, by), (expected, other)) = (frequencies(&got), frequencies(&expected));
        assert!(got == expected && (by - other).abs() < 1e-6, "{rope}: {by} {other}");
    }
}

#[test]
fn a_folder_is_no_name_of_a_file() {
    let place = place(&Case::open("llama_s0"));
    let (code, text) = fail(place.nibble(&["export", "--model", "base", "--out", "base"]));
    assert!(code == 2 && text.contains("base is a folder, expected the name of a file"), "{text}");
    assert!(text.contains("hint: such as `--out base/model.gguf`"), "{text}");
}

#[test]
fn what_is_read_is_not_replaced() {
    let place = place(&Case::open("llama_s0"));
    let before = place.read("base/model.safetensors");
    let ask = |model: &str, out: &str| {
        let (code, text) =
            fail(place.nibble(&["export", "--model", model, "--out", out, "--overwrite"]));
        let says = format!("{out} would be replaced while it is read");
        assert!(code == 2 && text.contains(&says), "{code}: {text}");
    };
    ask("base", "base/model.safetensors");
    // As the hub's cache has it.
    #[cfg(unix)]
    {
        fs::create_dir(place.path("blobs")).unwrap();
        fs::rename(place.path("base/model.safetensors"), place.path("blobs/weights")).unwrap();
        let link = place.path("base/model.safetensors");
        std::os::unix::fs::symlink("../blobs/weights", link).unwrap();
        ask("base", "base/model.safetensors");
    }
    assert!(place.read("base/model.safetensors") == before);
    export(&place, &[]);
    ask("out.gguf", "out.gguf");
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("/dev/null", place.path("null")).unwrap();
        let device = ["export", "--model", "base", "--out", "null", "--overwrite"];
        let (_, text) = fail(place.nibble(&device));
        assert!(text.contains("null is no file that could be replaced"), "{text}");
        fs::remove_file(place.path("null")).unwrap();
    }
    for _ in 0..2 {
        let inside = ["export", "--model", "base", "--out", "base/m.gguf", "--overwrite"];
        succeed(place.nibble(&inside));
    }
}

/// The golden configs say `max_position_embeddings` 128.
#[test]
fn windows_that_llama_cpp_does_not_heed_are_told() {
    for (name, window) in [("mistral_s0", "8"), ("phi3_s0", "10")] {
        let place = place(&Case::open(name));
        let output = succeed(place.nibble(&["export", "--model", "base", "--out", "out.gguf"]));
        let text = String::from_utf8(output.stderr).unwrap();
        let says = format!("texts longer than {window} tokens will differ");
        assert!(text.contains(&says), "{text}");
    }
}

/// LongRoPE's divisors are tensors, as llama.cpp's converter writes them.
#[test]
fn long_rope_is_written_for_llama_cpp() {
    let place = place(&Case::open("phi3_s0"));
    let (content, mut file) = export(&place, &[]);
    let mut factors = |kind: &str| {
        let name = format!("rope_factors_{kind}.weight");
        let tensor = content.tensor(&mut file, &name, &Device::Cpu).unwrap();
        tensor.dequantize(&Device::Cpu).unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(factors("short"), [1.0, 1.1, 1.2, 1.4, 1.7, 2.1]);
    assert_eq!(factors("long"), [1.0, 1.5, 2.5, 4.0, 6.0, 9.0]);
    let field = |key: &str| &content.metadata[&format!("phi3.{key}")];
    assert_eq!(field("rope.dimension_count").to_u32().unwrap(), 12);
    assert_eq!(field("rope.scaling.original_context_length").to_u32().unwrap(), 48);
    assert_eq!(field("attention.sliding_window").to_u32().unwrap(), 10);
    let factor = (1.0 + (128.0_f64 / 48.0).ln() / 48.0_f64.ln()).sqrt() as f32;
    assert_eq!(field("rope.scaling.attn_factor").to_f32().unwrap(), factor);
}

#[test]
fn matrices_have_the_type_that_is_asked_for_and_vectors_are_f32() {
    let case = Case::open("llama_s0");
    let place = place(&case);
    let source = Checkpoint::open(&place.path("base")).unwrap();
    let name = "model.layers.1.mlp.up_proj.weight";
    let expected = source.elements(name).unwrap().to_f32();
    let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    // Rows of 64 are too short for blocks of 256.
    let kinds = [
        ("f16", "F16", 1, 2e-3),
        ("bf16", "BF16", 32, 1e-2),
        ("q8_0", "Q8_0", 7, 0.004),
        ("q6_k", "Q8_0", 18, 0.004),
        ("q5_k_m", "Q5_1", 17, 0.04),
        ("Q4_K_M", "Q5_0", 15, 0.07),
    ];
    for (flag, kind, file_type, tolerance) in kinds {
        let (content, _) = export(&place, &["--outtype", flag]);
        let dtype = |name: &str| format!("{:?}", content.tensor_infos[name].ggml_dtype);
        assert_eq!(
            (dtype("blk.1.ffn_up.weight"), dtype("token_embd.weight")),
            (kind.into(), kind.into())
        );
        assert_eq!(dtype("blk.0.attn_norm.weight"), "F32");
        assert_eq!(content.metadata["general.file_type"].to_u32().unwrap(), file_type);
        let got = Checkpoint::open(&place.path("out.gguf")).unwrap().elements(name).unwrap();
        let off =
            got.to_f32().iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(off > 0.0 && off <= tolerance * largest, "{flag}: {off} of {largest}");
    }
}

/// GPT-2's down projection has rows of 256.
#[test]
fn blocks_of_256_are_written_where_rows_allow() {
    let place = place(&Case::open("gpt2_s0"));
    let source = Checkpoint::open(&place.path("base")).unwrap();
    for (flag, kinds, tolerance) in [
        ("q4_k_m", ["Q4K", "Q6K"], 0.12),
        ("q5_k_m", ["Q5K", "Q6K"], 0.06),
        ("q6_k", ["Q6K"; 2], 0.03),
    ] {
        let (content, _) = export(&place, &["--outtype", flag]);
        let written = Checkpoint::open(&place.path("out.gguf")).unwrap();
        for (layer, kind) in kinds.into_iter().enumerate() {
            let dtype = content.tensor_infos[&format!("blk.{layer}.ffn_down.weight")].ggml_dtype;
            assert_eq!(format!("{dtype:?}"), kind, "{flag}");
            let name = format!("transformer.h.{layer}.mlp.c_proj.weight");
            let expected = source.elements(&name).unwrap().to_f32();
            let got = written.elements(&name).unwrap().to_f32();
            let square = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>();
            let error = square(&mut got.iter().zip(&expected).map(|(a, b)| a - b));
            let error = (error / square(&mut expected.iter().copied())).sqrt();
            assert!(error > 0.0 && error < tolerance, "{flag}, layer {layer}: {error}");
        }
    }
}

/// Rows of q and k that llama.cpp has interleaved: row `half · d/2 + j` of a head at `2j + half`.
fn interleaved(rows: &[Vec<f32>], head_dim: usize) -> Vec<Vec<f32>> {
    let heads = rows.chunks(head_dim);
    heads
        .flat_map(|head| (0..head_dim).map(|at| head[at % 2 * (head_dim / 2) + at / 2].clone()))
        .collect()
}

#[test]
fn rows_of_heads_are_interleaved_where_llama_cpp_expects_it() {
    let families =
        [("llama_s0", true), ("ministral3_s0", true), ("smollm3_s0", true), ("granite_s0", true)];
    let as_they_are = ["qwen3_s0", "olmo2_s0", "glm4_s0", "seed_oss_s0"].map(|name| (name, false));
    for (name, turned) in families.into_iter().chain(as_they_are) {
        let case = Case::open(name);
        let place = place(&case);
        let (content, mut file) = export(&place, &["--outtype", "f32"]);
        let source = Checkpoint::open(&place.path("base")).unwrap();
        for (stored, module) in [("attn_q", "q_proj"), ("attn_k", "k_proj")] {
            let weight = format!("model.layers.0.self_attn.{module}.weight");
            let elements = source.elements(&weight).unwrap();
            let columns = elements.shape()[1];
            let rows: Vec<Vec<f32>> =
                elements.to_f32().chunks(columns).map(<[f32]>::to_vec).collect();
            let stored = format!("blk.0.{stored}.weight");
            let got = content.tensor(&mut file, &stored, &Device::Cpu).unwrap();
            let got = got.dequantize(&Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
            let expected = if turned { interleaved(&rows, case.spec().head_dim) } else { rows };
            assert!(got == expected, "{name} {stored}");
        }
    }
}

/// Golden models have none.
#[test]
fn biases_come_back() {
    let case = Case::open("llama_s0");
    let place = place(&case);
    let mut config = case.json("config.json");
    (config["attention_bias"], config["mlp_bias"]) = (true.into(), true.into());
    fs::write(place.path("base/config.json"), config.to_string()).unwrap();
    let spec = spec_from_config(&config).unwrap();
    let bytes = place.read("base/model.safetensors");
    let weights = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let biases: Vec<_> =
        spec.inventory().into_iter().filter(|it| it.role == TensorRole::Bias).collect();
    let numbered = |(index, bias): (usize, &TensorSpec)| -> Vec<f32> {
        (0..bias.shape[0]).map(|row| (index * 1000 + row) as f32).collect()
    };
    let values: Vec<Vec<f32>> = biases.iter().enumerate().map(numbered).collect();
    let views = biases.iter().zip(&values).map(|(bias, values)| {
        let (dtype, bytes) = (safetensors::Dtype::F32, bytemuck::cast_slice(values));
        let view = safetensors::tensor::TensorView::new(dtype, bias.shape.clone(), bytes);
        (bias.name.clone(), view.unwrap())
    });
    let all: Vec<_> = weights.tensors().into_iter().chain(views).collect();
    let file = place.path("base/model.safetensors");
    safetensors::serialize_to_file(all, None, &file).unwrap();
    export(&place, &["--outtype", "f32"]);
    let written = Checkpoint::open(&place.path("out.gguf")).unwrap();
    assert_eq!(biases.len(), 7 * spec.num_layers);
    for (bias, values) in biases.iter().zip(&values) {
        assert!(written.elements(&bias.name).unwrap().to_f32() == *values, "{}", bias.name);
    }
}

#[test]
fn an_adapter_is_written_for_llama_cpp() {
    ["llama_s0", "smollm3_s0"].into_iter().for_each(check_adapter);
}

/// One that is switched off by its alpha has a finite scale there, and adds nothing.
#[test]
fn an_adapter_with_an_alpha_of_zero_is_no_nan() {
    let case = Case::open("llama_s0");
    let place = place(&case);
    let folder = place.path("adapter");
    fs::create_dir(&folder).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(case.path.join("adapter_init").join(file), folder.join(file)).unwrap();
    }
    let mut config: Value = place.json("adapter/adapter_config.json");
    (config["lora_alpha"], config["alpha_pattern"]) = (0.into(), json!({}));
    fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    let (content, mut file) = export(&place, &["--adapter", "adapter", "--outtype", "f32"]);
    let alpha = &content.metadata["adapter.lora.alpha"];
    assert!(matches!(alpha, Metadata::F32(alpha) if *alpha > 0.0), "{alpha:?}");
    for name in content.tensor_infos.keys().filter(|name| name.ends_with("lora_b")) {
        let tensor = content.tensor(&mut file, name, &Device::Cpu).unwrap();
        let values = tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap();
        assert!(values.to_vec1::<f32>().unwrap().iter().all(|b| *b == 0.0), "{name}");
    }
}

fn check_adapter(name: &'static str) {
    let case = Case::open(name);
    let place = place(&case);
    let folder = case.path.join("adapter_init");
    let folder = folder.to_str().unwrap();
    let (content, mut file) = export(&place, &["--adapter", folder, "--outtype", "f32"]);
    let text = |key: &str| content.metadata[key].to_string().unwrap().clone();
    assert_eq!((text("general.type"), text("adapter.type")), ("adapter".into(), "lora".into()));
    assert_eq!(text("general.architecture"), name.split('_').next().unwrap());
    let config: Value =
        serde_json::from_slice(&fs::read(Path::new(folder).join("adapter_config.json")).unwrap())
            .unwrap();
    let alpha = config["lora_alpha"].as_f64().unwrap() as f32;
    assert!(matches!(content.metadata["adapter.lora.alpha"], Metadata::F32(x) if x == alpha));
    let bytes = fs::read(Path::new(folder).join("adapter_model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let head_dim = case.spec().head_dim;
    let parts: HashMap<&str, &str> = [
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ]
    .into();
    assert_eq!(content.tensor_infos.len(), tensors.len());
    for (name, tensor) in tensors.tensors() {
        let path = name.strip_prefix("base_model.model.model.layers.").unwrap();
        let (layer, rest) = path.split_once('.').unwrap();
        let (module, matrix) = rest.split_once(".lora_").unwrap();
        let stored =
            format!("blk.{layer}.{}.weight.lora_{}", parts[module], matrix[..1].to_lowercase());
        let got = content.tensor(&mut file, &stored, &Device::Cpu).unwrap();
        let got = got.dequantize(&Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
        let columns = tensor.shape()[1];
        let values: Vec<f32> = bytemuck::pod_collect_to_vec(tensor.data());
        let rows: Vec<Vec<f32>> = values.chunks(columns).map(<[f32]>::to_vec).collect();
        let turned = matrix.starts_with('B') && ["attn_q", "attn_k"].contains(&parts[module]);
        assert!(got == if turned { interleaved(&rows, head_dim) } else { rows }, "{name}");
    }
}

/// Gate and up, which are one module here, get the same A, and each its rows of B.
#[test]
fn an_adapter_of_a_fused_mlp_is_one_of_gate_and_one_of_up() {
    let case = Case::open("granite4_s0");
    let place = place(&case);
    let folder = case.path.join("adapter_init");
    let flags = ["--adapter", folder.to_str().unwrap(), "--outtype", "f32"];
    let (content, mut file) = export(&place, &flags);
    let mut stored = |name: &str| {
        let name = format!("blk.1.{name}");
        let tensor = content.tensor(&mut file, &name, &Device::Cpu).unwrap();
        tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let bytes = fs::read(folder.join("adapter_model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let trained = |letter: char| -> Vec<f32> {
        let name =
            format!("base_model.model.model.layers.1.shared_mlp.input_linear.lora_{letter}.weight");
        bytemuck::pod_collect_to_vec(tensors.tensor(&name).unwrap().data())
    };
    for part in ["ffn_gate", "ffn_up"] {
        assert!(stored(&format!("{part}.weight.lora_a")) == trained('A'), "{part}");
    }
    let rows = ["ffn_gate", "ffn_up"].map(|part| stored(&format!("{part}.weight.lora_b")));
    assert!(rows.concat() == trained('B') && rows[0].len() == rows[1].len());
}

#[test]
fn what_cannot_be_written_is_refused_before_anything_is() {
    let case = Case::open("llama_s0");
    let place = place(&case);
    let refused = |place: &Workplace, flags: &[&str]| {
        let (code, error) = fail(place.nibble(&[&["export", "--out", "new.gguf"], flags].concat()));
        assert!(!place.path("new.gguf").exists() && error.contains("hint: "), "{error}");
        (code, error)
    };
    let adapter = case.path.join("adapter_init");
    for outtype in ["q8_0", "q4_k_m"] {
        let adapter = adapter.to_str().unwrap();
        let flags = ["--model", "base", "--adapter", adapter, "--outtype", outtype];
        assert_eq!(refused(&place, &flags).0, 2);
    }
    // The word-level tokenizer of the workplace's own model.
    let (_, error) = refused(&place, &["--model", "model"]);
    assert!(error.contains("no name for this tokenizer"), "{error}");
    fs::write(place.path("there.gguf"), "mine").unwrap();
    let (code, error) = fail(place.nibble(&["export", "--model", "base", "--out", "there.gguf"]));
    assert!(code == 2 && error.contains("is there already"), "{error}");
    assert_eq!(place.read("there.gguf"), b"mine");
}

#[test]
fn a_model_that_holds_nan_is_not_written() {
    let case = Case::open("llama_s0");
    let place = place(&case);
    let tensor = "model.layers.1.mlp.down_proj.weight";
    change_model(&place.path("base"), |name, values| {
        values[7] = if name == tensor { f32::INFINITY } else { values[7] };
    });
    for outtype in ["f32", "bf16", "f16"] {
        let flags = ["export", "--model", "base", "--out", "new.gguf", "--outtype", outtype];
        let (code, error) = fail(place.nibble(&flags));
        let words =
            format!("tensor {tensor}: a value is inf\nhint: the checkpoint holds NaN or Inf");
        assert!(code == 1 && error.contains(&words), "{error}");
        assert!(!place.path("new.gguf").exists());
    }
}

/// Tokens of a vocabulary in the manner of SentencePiece.
fn sentence_pieces() -> Vec<String> {
    let mut tokens = vec!["<unk>".to_string(), "<s>".into(), "</s>".into()];
    tokens.extend((0..40).map(|byte| format!("<0x{byte:02X}>")));
    tokens
        .extend(["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello"].map(String::from));
    tokens
}

/// The tokenizer of Llama 2; of `special` tokens the text, and whether they take the spaces behind them.
fn sentence_piece(special: &[(&str, bool)]) -> Value {
    let mut tokens = sentence_pieces();
    let new = special.iter().map(|(text, _)| text.to_string());
    let new: Vec<String> = new.filter(|text| !tokens.contains(text)).collect();
    tokens.extend(new);
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect();
    let added = special.iter().map(|(text, takes_spaces)| {
        json!({
            "id": vocab[*text], "content": text, "special": true, "single_word": false,
            "lstrip": false, "rstrip": takes_spaces, "normalized": false
        })
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added.collect::<Vec<Value>>(),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        ]},
        "pre_tokenizer": null,
        "post_processor": null, "decoder": null,
        "model": {
            "type": "BPE", "vocab": vocab,
            "merges": ["h e", "l l", "he ll", "hell o", "▁ hello"], "byte_fallback": true,
            "fuse_unk": true, "unk_token": "<unk>"
        }
    })
}

/// Makes it the tokenizer of `base`.
fn give(place: &Workplace, tokenizer: &Value) {
    fs::write(place.path("base/tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true});
    fs::write(place.path("base/tokenizer_config.json"), config.to_string()).unwrap();
}

/// Asserts that both tokenizers make the same of the texts.
fn assert_same_tokens(place: &Workplace, texts: &[&str]) {
    let [folder, file] =
        ["base", "out.gguf"].map(|path| ChatTokenizer::open(&place.path(path)).unwrap());
    for text in texts {
        assert_eq!(file.encode(text).unwrap(), folder.encode(text).unwrap(), "{text:?}");
    }
}

/// What SentencePiece calls scores is the order of the merges.
#[test]
fn a_tokenizer_with_byte_fallback_becomes_sentence_piece() {
    let place = place(&Case::open("llama_s0"));
    let tokens = sentence_pieces();
    give(&place, &sentence_piece(&[("<unk>", false), ("<s>", false), ("</s>", false)]));
    let (content, _) = export(&place, &[]);
    let field = |key: &str| content.metadata[&format!("tokenizer.ggml.{key}")].clone();
    assert_eq!(field("model").to_string().unwrap(), "llama");
    assert!(
        field("add_bos_token").to_bool().unwrap() && field("add_space_prefix").to_bool().unwrap()
    );
    let list = |key: &str| field(key).to_vec().unwrap().clone();
    let scores: Vec<f32> = list("scores").iter().map(|x| x.to_f32().unwrap()).collect();
    let kinds: Vec<i32> = list("token_type").iter().map(|x| x.to_i32().unwrap()).collect();
    let at = |token: &str| tokens.iter().position(|other| other == token).unwrap();
    for (rank, token) in ["he", "ll", "hell", "hello", "▁hello"].into_iter().enumerate() {
        assert_eq!((scores[at(token)], kinds[at(token)]), (-(rank as f32), 1), "{token}");
    }
    assert_eq!([0, 1, 2, 3, 127].map(|id| kinds[id]), [2, 3, 3, 6, 5]);
    assert_eq!((scores.len(), list("tokens").len()), (128, 128));
    // Read back from the file, it has the same tokens.
    assert_same_tokens(&place, &["hello", "hello hello", "  hell ohe", "he\n!<s>lo", "ä</s>", ""]);
    let file = ChatTokenizer::open(&place.path("out.gguf")).unwrap();
    let ids = file.encode("hello hello").unwrap();
    assert_eq!(file.decode(&ids, false).unwrap(), "hello hello");
    assert!(ids.contains(&(at("▁hello") as u32)) && file.adds_bos());
}

/// Any factor and length of Llama 3's rope scaling, not only those of published models.
#[test]
fn rope_factors_are_read_back() {
    let place = place(&Case::open("llama_s0"));
    let mut config: Value = place.json("base/config.json");
    // Wavelengths of few dimensions are far apart: long ones that are stretched, and short ones.
    (config["rope_parameters"], config["rope_theta"]) = (Value::Null, 10_000.0.into());
    config["rope_scaling"] = json!({
        "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256
    });
    fs::write(place.path("base/config.json"), config.to_string()).unwrap();
    export(&place, &["--outtype", "f32"]);
    let read = Checkpoint::open(&place.path("out.gguf")).unwrap();
    assert_eq!(read.config()["rope_scaling"], config["rope_scaling"]);
}

/// Mistral Small 3's files have Ministral 3's architecture, and no scale of attention by position.
#[test]
fn a_mistral3_without_a_scale_is_a_mistral() {
    let case = Case::open("ministral3_s0");
    let place = place(&case);
    let (content, mut file) = export(&place, &["--outtype", "f32"]);
    let scaled = Checkpoint::open(&place.path("out.gguf")).unwrap();
    assert_eq!(scaled.config()["model_type"], "ministral3");
    let scale = "mistral3.attention.temperature_scale";
    assert!(content.metadata.contains_key(scale));
    let metadata = content.metadata.iter().map(|(key, value)| (key.as_str(), value));
    let metadata: Vec<(&str, &Metadata)> = metadata.filter(|(key, _)| *key != scale).collect();
    let tensors: Vec<_> = content
        .tensor_infos
        .keys()
        .map(|name| (name.as_str(), content.tensor(&mut file, name, &Device::Cpu).unwrap()))
        .collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let path = place.path("small.gguf");
    gguf_file::write(&mut File::create(&path).unwrap(), &metadata, &tensors).unwrap();
    let small = Checkpoint::open(&path).unwrap();
    assert_eq!(small.config()["architectures"], json!(["MistralForCausalLM"]));
    assert_eq!(small.config()["model_type"], "mistral");
    let spec = spec_from_config(small.config()).unwrap();
    assert!(spec.windows.iter().all(Option::is_none), "{:?}", spec.windows);
}

/// llama.cpp looks for users' own tokens in text as it is, and writes them so.
#[test]
fn tokens_of_users_have_spaces_as_text_has_them() {
    let place = place(&Case::open("llama_s0"));
    let own =
        [("<unk>", false), ("<s>", false), ("</s>", false), ("<|im_start|>", false), ("▁▁", false)];
    let mut tokenizer = sentence_piece(&own);
    for token in tokenizer["added_tokens"].as_array_mut().unwrap() {
        let text = token["content"].as_str().unwrap();
        token["special"] = (!["<|im_start|>", "▁▁"].contains(&text)).into();
    }
    give(&place, &tokenizer);
    let (content, _) = export(&place, &[]);
    let list = |content: &Content, key: &str| {
        content.metadata[&format!("tokenizer.ggml.{key}")].to_vec().unwrap().clone()
    };
    let tokens: Vec<String> =
        list(&content, "tokens").iter().map(|text| text.to_string().unwrap().clone()).collect();
    let at = |text: &str| tokens.iter().position(|token| token == text).unwrap();
    let kinds: Vec<i32> =
        list(&content, "token_type").iter().map(|x| x.to_i32().unwrap()).collect();
    assert_eq!([kinds[at("  ")], kinds[at("<|im_start|>")], kinds[at("<s>")]], [4, 4, 3]);
    let file = ChatTokenizer::open(&place.path("out.gguf")).unwrap();
    // As one token, whatever stands before it.
    let ids = file.encode("hello\n<|im_start|>hello  <|im_start|>").unwrap();
    let marker = at("<|im_start|>") as u32;
    assert_eq!(ids.iter().filter(|id| **id == marker).count(), 2, "{ids:?}");
    assert!(ids.contains(&(at("  ") as u32)));
    assert_eq!(file.decode(&ids, false).unwrap(), "hello\n<|im_start|> hello  <|im_start|>");
    // From this file to the next.
    succeed(place.nibble(&[
        "export",
        "--model",
        "out.gguf",
        "--out",
        "again.gguf",
        "--outtype",
        "f32",
    ]));
    let mut again = File::open(place.path("again.gguf")).unwrap();
    let again = Content::read(&mut again).unwrap();
    for key in ["tokens", "token_type"] {
        let text = |content: &Content| format!("{:?}", list(content, key));
        assert_eq!(text(&again), text(&content), "{key}");
    }
}

/// transformers 5 writes a Metaspace in the place of a normalizer.
#[test]
fn a_prefix_is_known_in_every_spelling() {
    for (scheme, prefix) in [("always", true), ("first", true), ("never", false)] {
        let place = place(&Case::open("llama_s0"));
        let mut tokenizer = sentence_piece(&[("<unk>", false), ("<s>", false), ("</s>", false)]);
        tokenizer["normalizer"] = Value::Null;
        tokenizer["pre_tokenizer"] = json!({
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false
        });
        give(&place, &tokenizer);
        let (content, _) = export(&place, &[]);
        let field = content.metadata["tokenizer.ggml.add_space_prefix"].to_bool().unwrap();
        assert_eq!(field, prefix, "{scheme}");
    }
}

/// Gemma 3 1B has a token for images that there is no row for.
#[test]
fn an_added_token_without_a_row_is_left_out() {
    let place = place(&Case::open("llama_s0"));
    let mut tokenizer = sentence_piece(&[("<unk>", false), ("<s>", false), ("</s>", false)]);
    tokenizer["added_tokens"].as_array_mut().unwrap().push(added_token(128, "<image>", true));
    // The library counts on from the vocabulary.
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    (vocabulary.len()..128).for_each(|id| drop(vocabulary.insert(format!("more{id}"), id.into())));
    give(&place, &tokenizer);
    let (content, _) = export(&place, &[]);
    let tokens = content.metadata["tokenizer.ggml.tokens"].to_vec().unwrap();
    assert_eq!((tokens.len(), tokens[127].to_string().unwrap().as_str()), (128, "more127"));
    let text = json!({"text": "hello"}).to_string();
    fs::write(place.path("text.jsonl"), text).unwrap();
    succeed(place.nibble(&["data", "--model", "base", "--data", "text.jsonl"]));
}

/// `<think>` is no special token: what decodes for people leaves it in.
#[test]
fn tokens_of_a_file_are_as_special_as_it_says() {
    let place = place(&Case::open("llama_s0"));
    let mut tokenizer: Value = place.json("base/tokenizer.json");
    let first = tokenizer["model"]["vocab"].as_object().unwrap().len() + 1;
    let added = tokenizer["added_tokens"].as_array_mut().unwrap();
    added.extend([added_token(first, "<think>", false), added_token(first + 1, "<|tool|>", true)]);
    fs::write(place.path("base/tokenizer.json"), tokenizer.to_string()).unwrap();
    let mut config: Value = place.json("base/tokenizer_config.json");
    config["chat_template"] =
        json!([{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]);
    fs::write(place.path("base/tokenizer_config.json"), config.to_string()).unwrap();
    let (content, _) = export(&place, &[]);
    let text =
        |key: &str| content.metadata[&format!("tokenizer.{key}")].to_string().unwrap().clone();
    assert_eq!((text("chat_template"), text("chat_template.tool_use")), ("d".into(), "t".into()));
    assert_eq!(content.metadata["tokenizer.chat_templates"].to_vec().unwrap().len(), 1);
    let file = ChatTokenizer::open(&place.path("out.gguf")).unwrap();
    let ids = file.encode("<think><|tool|>").unwrap();
    assert_eq!(ids, [first as u32, first as u32 + 1]);
    assert_eq!(file.decode(&ids, true).unwrap(), "<think>");
    let saved = tempfile::tempdir().unwrap();
    file.save(saved.path()).unwrap();
    let saved: Value =
        serde_json::from_slice(&fs::read(saved.path().join("tokenizer.json")).unwrap()).unwrap();
    let special = |text: &str| {
        let added = saved["added_tokens"].as_array().unwrap();
        added.iter().find(|token| token["content"] == text).map(|token| token["special"] == true)
    };
    assert_eq!((special("<think>"), special("<|tool|>")), (Some(false), Some(true)));
    assert_eq!(special("[PAD120]"), None, "rows without a token are none");
}

/// No field says that a token takes the spaces behind it: llama.cpp knows it of a Phi-3, by its name.
#[test]
fn special_tokens_of_a_phi3_take_the_spaces_behind_them() {
    let place = place(&Case::open("phi3_s0"));
    let tokens = |takes_spaces| {
        let [plain, role] = [false, takes_spaces];
        [
            ("<unk>", plain),
            ("<s>", plain),
            ("</s>", role),
            ("<|endoftext|>", plain),
            ("<|user|>", role),
        ]
    };
    let name = |place: &Workplace| {
        let (content, _) = export(place, &[]);
        content.metadata["general.name"].to_string().unwrap().clone()
    };
    give(&place, &sentence_piece(&tokens(true)));
    assert_eq!(name(&place), "Phi-3 base");
    let texts = ["<|user|>\n hello<|user|>  hell", "<s> hello</s> hello", "<|endoftext|> hello"];
    assert_same_tokens(&place, &texts);
    let length = |text: &str| {
        ChatTokenizer::open(&place.path("out.gguf")).unwrap().encode(text).unwrap().len()
    };
    assert_eq!(length("<|user|>\nhello"), length("<|user|>hello"));

    give(&place, &sentence_piece(&tokens(false)));
    assert_eq!(name(&place), "base");
    assert_same_tokens(&place, &texts);
    fs::rename(place.path("base"), place.path("my-Phi3")).unwrap();
    succeed(place.nibble(&["export", "--model", "my-Phi3", "--out", "other.gguf"]));
    let mut file = File::open(place.path("other.gguf")).unwrap();
    let content = Content::read(&mut file).unwrap();
    assert_eq!(content.metadata["general.name"].to_string().unwrap(), "Phi my-3");
}

/// Somebody writes a file of that name while the model is written.
#[test]
fn a_file_that_comes_while_a_model_is_written_is_left_alone() {
    let place = place(&Case::open("llama_s0"));
    let checkpoint = Checkpoint::open(&place.path("base")).unwrap();
    let spec = spec_from_config(checkpoint.config()).unwrap();
    let export = Export { checkpoint: &checkpoint, spec: &spec, file_type: FileType::F16 };
    let write = |overwrite| {
        let path = place.path("out.gguf");
        let file = AtomicFile::create(&path, overwrite).unwrap();
        export.write(file, &[], |_| {
            fs::write(&path, "mine").unwrap();
            Ok(())
        })
    };
    let error = write(false).unwrap_err().to_string();
    assert!(error.contains("out-2.gguf"), "{error}");
    assert_eq!(place.read("out.gguf"), b"mine");
    write(true).unwrap();
    assert_eq!(place.read("out.gguf"), place.read("out-2.gguf"));
}
