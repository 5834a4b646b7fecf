//! 4-bit folders that transformers + bitsandbytes saved.
//!
//! `tests/data/bnb4bit` was made by `scripts/golden/gen_bnb_ckpt.py`.

use std::fs;

use nibble_quant::{BlockFormat, Floats, PackedWeight, QuantType};
use serde_json::Value;

use super::tensors::{golden, of_file, of_folder};
use crate::training::{Workplace, fail, stderr, succeed};

/// Each with another type, storage or family.
const CASES: [&str; 4] =
    ["llama_s0.bf16.dq.storage_bf16", "llama_s0.f32.plain", "qwen2_s0.f16.dq", "gpt2_s0.f32.dq"];

/// A place with the case's folder, and a tokenizer in it.
fn with_folder(case: &str) -> Workplace {
    let place = Workplace::new();
    fs::create_dir(place.path("packed")).unwrap();
    for file in ["config.json", "model.safetensors"] {
        let from = golden(&format!("bnb4bit/{case}/{file}"));
        fs::copy(from, place.path("packed").join(file)).unwrap();
    }
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(place.path("model").join(file), place.path("packed").join(file)).unwrap();
    }
    place
}

fn quantize(place: &Workplace, out: &str, flags: &[&str]) -> String {
    let arguments = ["quantize", "--model", "packed", "--out", out, "--check"];
    stderr(&succeed(place.nibble(&[&arguments[..], flags].concat())))
}

#[test]
fn weights_are_those_that_bitsandbytes_dequantizes() {
    for case in CASES {
        let place = with_folder(case);
        quantize(&place, "dense", &["--skip", "."]);
        let got = of_folder(&place.path("dense"));
        let expected = of_file(&golden(&format!("bnb4bit/{case}/dequant_some.safetensors")));
        assert_eq!(expected.len(), 4);
        for (name, tensor) in expected {
            let (found, values) = (&got[&name], tensor.values());
            if !case.starts_with("gpt2") {
                assert!(
                    (&found.shape, found.values()) == (&tensor.shape, values),
                    "{case}: {name}"
                );
                continue;
            }
            // A dense GPT-2 has [in, out].
            let [rows, columns] = [tensor.shape[0], tensor.shape[1]];
            assert_eq!(found.shape, [columns, rows], "{case}: {name}");
            let turned = |index: usize| values[index % rows * columns + index / rows];
            let equal = (0..).zip(found.values()).all(|(index, value)| value == turned(index));
            assert!(equal, "{case}: {name}");
        }
    }
}

#[test]
fn logits_are_those_of_the_dequantized_model() {
    for case in CASES {
        let place = with_folder(case);
        let reference = of_file(&golden(&format!("bnb4bit/{case}/ref.safetensors")));
        let ids = &reference["input_ids"];
        let all: Vec<i64> = bytemuck::allocation::pod_collect_to_vec(&ids.data);
        let rows: Vec<String> = all
            .chunks(ids.shape[1])
            .map(|row| serde_json::json!({"input_ids": row}).to_string())
            .collect();
        fs::write(place.path("rows.jsonl"), rows.join("\n")).unwrap();
        let arguments = ["eval", "--model", "packed", "--data", "rows.jsonl"];
        let more = ["--save-logits", "logits.safetensors"];
        succeed(place.nibble(&[&arguments[..], &more].concat()));
        let got = of_file(&place.path("logits.safetensors"))["logits"].values();
        let expected = reference["logits_f32_from_dequant"].values();
        assert_eq!(got.len(), expected.len());
        let largest = expected.iter().fold(0f32, |most, logit| most.max(logit.abs()));
        let error = got.iter().zip(&expected).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        // The reference has the embeddings, head and norms from before they were rounded to halves.
        let tolerance = if case.contains("f32") { 5e-6 } else { 2e-2 };
        assert!(error < tolerance * largest, "{case}: {error:e} of {largest}");
    }
}

#[test]
fn packed_linears_are_copied_byte_for_byte() {
    for case in CASES {
        let place = with_folder(case);
        let flags = ["quantize", "--model", "packed", "--out", "out", "--quant-type", "fp4"];
        let (code, text) = fail(place.nibble(&flags));
        assert!(code == 2 && text.contains("packed is 4-bit already: --quant-type"), "{text}");
        assert!(text.contains("hint: `--force` requantizes it"), "{text}");
        quantize(&place, "out", &[]);
        let (source, got) = (of_folder(&place.path("packed")), of_folder(&place.path("out")));
        for (name, tensor) in &source {
            if name.contains("quant_state") {
                let read = |bytes: &[u8]| serde_json::from_slice::<serde_json::Value>(bytes);
                let (mine, theirs) = (read(&got[name].data), read(&tensor.data));
                assert_eq!(mine.unwrap(), theirs.unwrap(), "{case}: {name}");
            } else {
                assert!(got[name].data == tensor.data, "{case}: {name}");
            }
        }
        assert_eq!(got.len(), source.len(), "{case}");
    }
}

/// Dense ones among them, too: somebody left them so.
#[test]
fn linears_of_a_4_bit_folder_stay_as_they_are_stored() {
    let place = Workplace::new();
    let quantize = |model: &str, out: &str, flags: &[&str]| {
        let arguments = [&["quantize", "--model", model, "--out", out][..], flags].concat();
        stderr(&succeed(place.nibble(&arguments)))
    };
    quantize("model", "mixed", &["--skip", "layers.0"]);
    let said = quantize("mixed", "same", &[]);
    assert!(said.contains("note: linear layers stay as stored (nf4, block size 64"), "{said}");
    let (mixed, same) = (of_folder(&place.path("mixed")), of_folder(&place.path("same")));
    assert!(mixed.keys().eq(same.keys()));
    assert!(mixed.iter().all(|(name, tensor)| tensor.data == same[name].data));
    // What is asked for is not passed over where it is the default.
    quantize("model", "other", &["--quant-type", "fp4"]);
    quantize("other", "copied", &[]);
    let asked = ["quantize", "--model", "other", "--out", "nf4", "--quant-type", "nf4"];
    assert!(fail(place.nibble(&asked)).1.contains("other is 4-bit already: --quant-type fp4"));
    quantize("model", "third", &["--block-size", "128", "--double-quant", "false"]);
    for asked in [["--block-size", "64"], ["--double-quant", "true"]] {
        let base = ["quantize", "--model", "third", "--out", "again"];
        let (code, text) = fail(place.nibble(&[&base[..], &asked].concat()));
        assert!(code == 2 && text.contains("--block-size 128 --double-quant false"), "{text}");
    }
    quantize("third", "again", &["--block-size", "128"]);
    quantize("mixed", "whole", &["--force"]);
    let is_state = |name: &&String| name.contains("quant_state");
    let packed = |folder: &str| of_folder(&place.path(folder)).keys().filter(is_state).count();
    assert!(packed("whole") > packed("mixed"));
}

#[test]
fn force_packs_what_was_stored_anew() {
    let place = with_folder("llama_s0.f32.plain");
    quantize(&place, "out", &["--force", "--block-size", "128"]);
    let got = of_folder(&place.path("out"));
    let expected = of_file(&golden("bnb4bit/llama_s0.f32.plain/dequant_some.safetensors"));
    let format = BlockFormat { quant_type: QuantType::Nf4, block_size: 128, double_quant: true };
    for (name, tensor) in expected {
        let (values, shape) = (tensor.values(), [tensor.shape[0], tensor.shape[1]]);
        let weight = PackedWeight::quantize(Floats::F32(&values), shape, &format).unwrap();
        assert!(got[&name].data == weight.codes()[..], "{name}");
    }
    // Which rounds a second time.
    let again = ["quantize", "--model", "packed", "--out", "again", "--force", "--json"];
    let output = succeed(place.nibble(&[&again[..], &["--block-size", "128"]].concat()));
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    let error = &said["roles"]["q"]["relative_rms_error"];
    assert!(error.as_f64().unwrap() > 0.01, "{said}");
}
