//! Every block type that a GGUF file may hold, against llama.cpp's own reader.

use std::fs;

use super::tensors::{golden, of_file, of_folder};
use crate::gguf_file::{Field, GgufFile};
use crate::training::{Workplace, succeed};

/// Types by their number in a file.
const TYPES: [(&str, u32); 13] = [
    ("F32", 0),
    ("F16", 1),
    ("BF16", 30),
    ("Q8_0", 8),
    ("Q4_0", 2),
    ("Q4_1", 3),
    ("Q5_0", 6),
    ("Q5_1", 7),
    ("Q2_K", 10),
    ("Q3_K", 11),
    ("Q4_K", 12),
    ("Q5_K", 13),
    ("Q6_K", 14),
];
/// Columns of a row of the largest blocks, and rows of the values that were made.
const WIDTH: u64 = 256;
const ROWS: u64 = 16;

/// The tiny Llama, wider, with zeros for weights.
fn wide() -> GgufFile {
    let mut file = GgufFile::tiny_llama();
    for (key, value) in [
        ("embedding_length", WIDTH),
        ("attention.head_count", WIDTH / ROWS),
        ("attention.head_count_kv", 1),
    ] {
        file.set(&format!("llama.{key}"), Field::U32(value as u32));
    }
    for tensor in &mut file.tensors {
        for size in &mut tensor.shape {
            *size = if *size == 64 { WIDTH } else { *size };
        }
        if tensor.name.contains("attn_k.") || tensor.name.contains("attn_v.") {
            tensor.shape[1] = ROWS;
        }
        tensor.data = vec![0; 4 * tensor.shape.iter().product::<u64>() as usize];
    }
    file
}

/// `tests/data/gguf/types.safetensors` was made by `scripts/golden/gen_gguf_types.py`.
#[test]
fn every_block_type_has_the_values_that_llama_cpp_reads() {
    let place = Workplace::new();
    let expected = of_file(&golden("gguf/types.safetensors"));
    for (name, kind) in TYPES {
        let mut file = wide();
        let tensor = file.tensor("blk.1.attn_v.weight");
        (tensor.kind, tensor.data) = (kind, expected[&format!("{name}.blocks")].data.clone());
        fs::write(place.path("model.gguf"), file.bytes()).unwrap();
        let out = format!("out-{name}");
        let arguments = ["quantize", "--model", "model.gguf", "--out", &out, "--skip", "."];
        succeed(place.nibble(&[&arguments[..], &["--dtype", "float32", "--check"]].concat()));
        let tensors = of_folder(&place.path(&out));
        let got = tensors["model.layers.1.self_attn.v_proj.weight"].values();
        let values = expected[&format!("{name}.values")].values();
        assert_eq!(got.len(), values.len());
        for (index, (got, expected)) in got.iter().zip(&values).enumerate() {
            let error = (got - expected).abs();
            assert!(error <= 1e-6 * expected.abs(), "{name} [{index}]: {got} {expected}");
        }
    }
}
