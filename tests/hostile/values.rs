//! Weights that are not numbers.

use std::fs;

use crate::scene::{assert_not_trained, assert_refused, safetensors_bytes, safetensors_parts};
use crate::training::{Workplace, succeed};

/// The model with `value` as element `index` of tensor `name`.
fn with_element(name: &str, index: usize, value: f32) -> Workplace {
    let place = Workplace::new();
    set_element(&place, "model", name, index, value);
    place
}

fn set_element(place: &Workplace, model: &str, name: &str, index: usize, value: f32) {
    let path = place.path(model).join("model.safetensors");
    let (header, mut data) = safetensors_parts(&path);
    assert_eq!(header[name]["dtype"], "F32");
    let begin = header[name]["data_offsets"][0].as_u64().unwrap() as usize + 4 * index;
    data[begin..begin + 4].copy_from_slice(&value.to_le_bytes());
    fs::write(&path, safetensors_bytes(&header, &data)).unwrap();
}

#[test]
fn a_linear_with_a_number_that_is_none() {
    let name = "model.layers.1.mlp.up_proj.weight";
    for (value, index) in [(f32::NAN, 0), (f32::INFINITY, 1001), (f32::NEG_INFINITY, 77)] {
        let place = with_element(name, index, value);
        let says = [name, &format!("element [{}, {}]", index / 64, index % 64), "NaN or Inf"];
        let command = place.nibble(&["quantize", "--model", "model", "--out", "out"]);
        assert_refused(&place, command, 1, &says);
        assert_not_trained(&place, 1, &[], &says);
        assert_not_trained(&place, 1, &["--quantization", "none"], &says);
    }
}

#[test]
fn another_tensor_with_a_number_that_is_none() {
    for name in ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"] {
        let place = with_element(name, 5, f32::NAN);
        let place_of_it = if name.contains("norm") { "element 5 is" } else { "element [0, 5] is" };
        let says = [name, place_of_it, "NaN"];
        let command = place.nibble(&["quantize", "--model", "model", "--out", "out"]);
        assert_refused(&place, command, 1, &says);
        assert_not_trained(&place, 1, &[], &says);
    }
}

/// A damaged scale makes a whole block of weights that is none.
#[test]
fn a_scale_that_is_no_number() {
    let name = "model.layers.1.self_attn.k_proj.weight";
    for (flags, part) in [(&[][..], "nested_absmax"), (&["--double-quant", "false"], "absmax")] {
        for value in [f32::NAN, f32::INFINITY] {
            let place = Workplace::new();
            let quantize = ["quantize", "--model", "model", "--out", "packed"];
            succeed(place.nibble(&[&quantize[..], flags].concat()));
            succeed(place.train("run", &["--max-steps", "1"]));
            set_element(&place, "packed", &format!("{name}.{part}"), 0, value);
            let says = [name, &format!("{part}[0] is {value}"), "NaN or Inf"];
            let generate = ["generate", "--raw", "--prompt", "w5"];
            for command in [
                &["eval", "--data", "eval.jsonl"][..],
                &generate,
                &["train", "--data", "train.jsonl", "--max-length", "32", "--out", "out"],
                &[
                    "train",
                    "--data",
                    "train.jsonl",
                    "--max-length",
                    "32",
                    "--out",
                    "out",
                    "--weights",
                    "stream",
                ],
                &["quantize", "--out", "again"],
                &["merge", "--adapter", "run", "--out", "merged"],
            ] {
                let command = place.nibble(&[command, &["--model", "packed"]].concat());
                assert_refused(&place, command, 1, &says);
            }
        }
    }
}

/// Merging reads the base anew, also what no adapter changes.
#[test]
fn a_number_that_is_none_is_not_merged() {
    for (name, place_of_it) in [
        ("model.layers.1.mlp.up_proj.weight", "element [0, 7] is NaN"),
        ("model.layers.0.input_layernorm.weight", "element 7 is NaN"),
    ] {
        let place = Workplace::new();
        succeed(place.train("run", &["--max-steps", "1"]));
        set_element(&place, "model", name, 7, f32::NAN);
        let merge = ["merge", "--model", "model", "--adapter", "run", "--out", "merged"];
        assert_refused(&place, place.nibble(&merge), 1, &[name, place_of_it]);
    }
}
