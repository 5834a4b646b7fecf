//! Model files whose header does not tell the truth.

use std::fs;

use serde_json::{Value, json};

use crate::scene::{
    assert_not_quantized, assert_not_trained, assert_refused, edit_header, safetensors_parts,
};
use crate::training::Workplace;

const FILE: &str = "model/model.safetensors";
const Q: &str = "model.layers.0.self_attn.q_proj.weight";
const K: &str = "model.layers.0.self_attn.k_proj.weight";

#[test]
fn a_truncated_file() {
    let place = Workplace::new();
    let bytes = place.read(FILE);
    // In the data, in the header, in the header's length, nothing at all.
    for length in [bytes.len() - 1, bytes.len() / 2, 100, 5, 0] {
        fs::write(place.path(FILE), &bytes[..length]).unwrap();
        let says = ["model.safetensors", "damaged", &format!("{length} bytes"), "download"];
        assert_not_quantized(&place, &says);
        assert_not_trained(&place, 1, &[], &says);
    }
}

#[test]
fn a_git_lfs_pointer() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
    for name in ["model.safetensors", "tokenizer.json"] {
        let place = Workplace::new();
        fs::write(place.path(&format!("model/{name}")), pointer).unwrap();
        let says = [name, "a Git LFS pointer, not the file itself", "git lfs pull"];
        assert_not_trained(&place, 1, &[], &says);
    }
}

#[test]
fn a_type_of_another_tool() {
    let place = Workplace::new();
    edit_header(&place.path(FILE), |header| header[Q]["dtype"] = json!("F8_E4M3"));
    edit_header(&place.path(FILE), |header| {
        let begin = header[Q]["data_offsets"][0].as_u64().unwrap();
        let end = header[Q]["data_offsets"][1].as_u64().unwrap();
        let rows = header[Q]["shape"][0].as_u64().unwrap();
        header[Q]["shape"] = json!([rows, (end - begin) / rows]);
    });
    let says = [Q, "has type F8_E4M3", "hint: FP8 is not supported"];
    assert_not_trained(&place, 1, &[], &says);
    // Of which there are more kinds than safetensors has names.
    edit_header(&place.path(FILE), |header| header[Q]["dtype"] = json!("F8_E4M3FN"));
    assert_not_trained(&place, 1, &[], &[Q, "has type F8_E4M3FN", "hint: FP8 is not supported"]);
}

#[test]
fn overlapping_tensors() {
    let place = Workplace::new();
    edit_header(&place.path(FILE), |header| {
        header[K]["data_offsets"] = header[Q]["data_offsets"].clone();
        header[K]["shape"] = header[Q]["shape"].clone();
    });
    let says = ["model.safetensors", "damaged", "self_attn", "begins at byte", "ends at"];
    assert_not_quantized(&place, &says);
}

#[test]
fn offsets_past_the_end() {
    let place = Workplace::new();
    let (_, data) = safetensors_parts(&place.path(FILE));
    edit_header(&place.path(FILE), |header| {
        let last = header
            .as_object_mut()
            .unwrap()
            .values_mut()
            .find(|tensor| tensor["data_offsets"][1].as_u64() == Some(data.len() as u64));
        let last = last.unwrap();
        let rows = last["shape"][0].as_u64().unwrap();
        let row_bytes = (data.len() as u64 - last["data_offsets"][0].as_u64().unwrap()) / rows;
        last["shape"][0] = json!(rows + 1);
        last["data_offsets"][1] = json!(data.len() as u64 + row_bytes);
    });
    assert_not_quantized(&place, &["model.safetensors", "damaged", "the header describes"]);
}

#[test]
fn offsets_that_overflow() {
    let place = Workplace::new();
    edit_header(&place.path(FILE), |header| {
        header[Q]["data_offsets"] = json!([u64::MAX - 3, u64::MAX]);
    });
    assert_not_quantized(&place, &["model.safetensors", "damaged", "q_proj", "needs 16384 bytes"]);
}

#[test]
fn a_header_longer_than_the_file() {
    let place = Workplace::new();
    let bytes = place.read(FILE);
    for length in [bytes.len() as u64, 99_999_999, 100_000_001, 1 << 62, u64::MAX] {
        let mut lying = bytes.clone();
        lying[..8].copy_from_slice(&length.to_le_bytes());
        fs::write(place.path(FILE), lying).unwrap();
        assert_not_quantized(&place, &["model.safetensors", "damaged", "header"]);
    }
}

#[test]
fn a_header_that_is_no_json() {
    let place = Workplace::new();
    let mut bytes = place.read(FILE);
    bytes[8..12].copy_from_slice(b"\xff\xfe{]");
    fs::write(place.path(FILE), bytes).unwrap();
    assert_not_quantized(&place, &["model.safetensors", "damaged", "header"]);
}

#[test]
fn a_type_of_another_size() {
    let place = Workplace::new();
    edit_header(&place.path(FILE), |header| header[Q]["dtype"] = json!("BF16"));
    assert_not_quantized(&place, &["model.safetensors", "damaged", "q_proj"]);
}

#[test]
fn a_type_that_is_no_float() {
    let place = Workplace::new();
    edit_header(&place.path(FILE), |header| header[Q]["dtype"] = json!("I32"));
    assert_not_quantized(&place, &["q_proj", "I32", "F32, F16, BF16"]);
    assert_not_trained(&place, 1, &[], &["q_proj", "I32", "F32, F16, BF16"]);
}

/// Before data, which may take minutes to read; a plan is not made of what could not be loaded either.
#[test]
fn weights_are_looked_at_first() {
    type Edit<'a> = (&'a str, &'a dyn Fn(&mut Value));
    let edits: [Edit; 3] = [
        ("has type I32", &|header| header[Q]["dtype"] = json!("I32")),
        ("config.json implies", &|header| {
            let [rows, columns] = [0, 1].map(|axis| header[Q]["shape"][axis].as_u64().unwrap());
            header[Q]["shape"] = json!([2 * rows, columns / 2]);
        }),
        ("is not in the checkpoint", &|header| {
            let tensor = header.as_object_mut().unwrap().remove(Q).unwrap();
            header["another"] = tensor;
        }),
    ];
    for (says, edit) in edits {
        let place = Workplace::new();
        edit_header(&place.path(FILE), edit);
        fs::write(place.path("train.jsonl"), "no record\n").unwrap();
        let data = ["--model", "model", "--data", "train.jsonl"];
        for command in [
            place.nibble(&["memory", "--model", "model"]),
            place.nibble(&[&["eval"], &data[..]].concat()),
            place.train("out", &[]),
        ] {
            assert_refused(&place, command, 1, &[Q, says, "hint: "]);
        }
    }
}

#[test]
fn a_shape_that_overflows() {
    let place = Workplace::new();
    edit_header(&place.path(FILE), |header| header[Q]["shape"] = json!([1u64 << 40, 1u64 << 40]));
    assert_not_quantized(&place, &["model.safetensors", "damaged"]);
}

#[test]
fn a_page_saved_in_place_of_the_file() {
    let place = Workplace::new();
    fs::write(place.path(FILE), "<!DOCTYPE html><html>404 not found</html>").unwrap();
    assert_not_quantized(&place, &["model.safetensors", "damaged"]);
}
