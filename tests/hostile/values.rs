//! Weights that are not numbers.

use std::fs;

use crate::scene::{assert_not_trained, assert_refused, safetensors_bytes, safetensors_parts};
use crate::training::Workplace;

/// The model with `value` as element `index` of tensor `name`.
fn with_element(name: &str, index: usize, value: f32) -> Workplace {
    let place = Workplace::new();
    let path = place.path("model/model.safetensors");
    let (header, mut data) = safetensors_parts(&path);
    assert_eq!(header[name]["dtype"], "F32");
    let begin = header[name]["data_offsets"][0].as_u64().unwrap() as usize + 4 * index;
    data[begin..begin + 4].copy_from_slice(&value.to_le_bytes());
    fs::write(&path, safetensors_bytes(&header, &data)).unwrap();
    place
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
