//! GGUF files that are damaged or lie.

use std::fs;

use nibble::checkpoint::Checkpoint;
use safetensors::SafeTensors;

use crate::gguf_file::{Field, GgufFile};
use crate::scene::assert_refused;
use crate::training::{Workplace, succeed};

/// Every command that reads the file refuses it.
fn assert_gguf_refused(bytes: &[u8], says: &[&str]) {
    let place = Workplace::new();
    fs::write(place.path("model.gguf"), bytes).unwrap();
    let says = [&["model.gguf"], says].concat();
    let base = ["--model", "model.gguf"];
    for more in [
        &["quantize", "--out", "out"][..],
        &["train", "--data", "train.jsonl", "--out", "out", "--max-length", "32"],
    ] {
        assert_refused(&place, place.nibble(&[more, &base[..]].concat()), 1, &says);
    }
}

fn with(edit: impl FnOnce(&mut GgufFile)) -> Vec<u8> {
    let mut file = GgufFile::tiny_llama();
    edit(&mut file);
    file.bytes()
}

#[test]
fn the_undamaged_file_is_the_model_that_it_was_made_from() {
    let place = Workplace::new();
    fs::write(place.path("model.gguf"), GgufFile::tiny_llama().bytes()).unwrap();
    let mut command = place.nibble(&["quantize", "--model", "model.gguf", "--out", "out"]);
    command.args(["--skip", ".", "--dtype", "float32", "--check"]);
    succeed(command);
    let (ours, theirs) =
        (place.read("out/model.safetensors"), place.read("model/model.safetensors"));
    let ours = SafeTensors::deserialize(&ours).unwrap();
    for (name, tensor) in SafeTensors::deserialize(&theirs).unwrap().tensors() {
        assert!(ours.tensor(&name).unwrap().data() == tensor.data(), "{name}");
    }
    let command = place.nibble(&[
        "generate",
        "--model",
        "out",
        "--raw",
        "--prompt",
        "w1",
        "--max-new-tokens",
        "2",
    ]);
    succeed(command);
}

/// The layers of a Gemma are listed in its config: not before their number is known to be one.
#[test]
fn a_gemma_of_more_layers_than_there_can_be() {
    let gemma = with(|file| {
        for (key, value) in &mut file.fields {
            *key = key.replace("llama.", "gemma2.");
            if key == "general.architecture" {
                *value = Field::Text("gemma2".into());
            }
        }
        file.set("gemma2.block_count", Field::U32(u32::MAX));
    });
    let place = Workplace::new();
    fs::write(place.path("model.gguf"), gemma).unwrap();
    let command = place.nibble(&["quantize", "--model", "model.gguf", "--out", "out"]);
    let says = "num_hidden_layers is 4294967295, expected at most 10000";
    assert_refused(&place, command, 1, &[says]);
}

#[test]
fn a_truncated_file() {
    let bytes = GgufFile::tiny_llama().bytes();
    for length in [bytes.len() - 1, bytes.len() / 2, 900, 60, 20, 6] {
        assert_gguf_refused(&bytes[..length], &["damaged", "truncated"]);
    }
    assert_gguf_refused(&bytes[..3], &["not a GGUF file"]);
    assert_gguf_refused(&[], &["not a GGUF file"]);
}

#[test]
fn an_alignment_that_is_none() {
    for value in [0, 1, 3, 33, u32::MAX] {
        let bytes = with(|file| file.set("general.alignment", Field::U32(value)));
        let says = ["general.alignment", &value.to_string(), "power of two"];
        assert_gguf_refused(&bytes, &says);
    }
    let bytes = with(|file| file.set("general.alignment", Field::Text("wide".into())));
    assert_gguf_refused(&bytes, &["general.alignment", "power of two"]);
}

#[test]
fn absurd_counts() {
    for count in [1 << 20, 1 << 40, u64::MAX] {
        assert_gguf_refused(&with(|file| file.num_tensors = Some(count)), &["damaged"]);
        assert_gguf_refused(&with(|file| file.num_fields = Some(count)), &["damaged"]);
        let mut array = 8u32.to_le_bytes().to_vec();
        array.extend(count.to_le_bytes());
        let bytes = with(|file| file.set("tokenizer.ggml.tokens", Field::Raw(9, array)));
        assert_gguf_refused(&bytes, &["damaged"]);
    }
}

#[test]
fn strings_longer_than_the_file() {
    for length in [1u64 << 20, 1 << 62, u64::MAX] {
        let mut text = length.to_le_bytes().to_vec();
        text.extend(b"llama");
        let bytes = with(|file| file.set("general.architecture", Field::Raw(8, text)));
        assert_gguf_refused(&bytes, &["damaged", "general.architecture", "bytes expected"]);
    }
}

#[test]
fn values_of_unknown_types_and_arrays_in_arrays() {
    let bytes = with(|file| file.set("general.name", Field::Raw(99, vec![0; 8])));
    assert_gguf_refused(&bytes, &["general.name", "unknown type 99"]);
    let mut nested = Vec::new();
    for _ in 0..1000 {
        nested.extend(9u32.to_le_bytes());
        nested.extend(1u64.to_le_bytes());
    }
    let bytes = with(|file| file.set("general.name", Field::Raw(9, nested)));
    assert_gguf_refused(&bytes, &["general.name", "damaged"]);
}

#[test]
fn tensors_outside_the_file() {
    for offset in [1 << 30, u64::MAX - 31, !63] {
        let bytes = with(|file| file.tensor("blk.0.attn_q.weight").offset = Some(offset));
        assert_gguf_refused(
            &bytes,
            &["blk.0.attn_q.weight", &offset.to_string(), "beyond the end"],
        );
    }
    let bytes = with(|file| file.tensor("blk.0.attn_q.weight").offset = Some(7));
    assert_gguf_refused(&bytes, &["blk.0.attn_q.weight", "offset 7 is not aligned"]);
}

#[test]
fn shapes_that_overflow_or_do_not_fill_blocks() {
    for shape in [vec![1 << 32, 1 << 32], vec![u64::MAX, 2], vec![0, 5], vec![1; 9]] {
        let bytes = with(|file| file.tensor("blk.0.ffn_up.weight").shape = shape);
        assert_gguf_refused(&bytes, &["blk.0.ffn_up.weight", "damaged"]);
    }
    // Q4_0 has blocks of 32.
    let bytes = with(|file| {
        let tensor = file.tensor("blk.0.ffn_up.weight");
        (tensor.kind, tensor.shape) = (2, vec![63, 160]);
    });
    assert_gguf_refused(&bytes, &["blk.0.ffn_up.weight", "Q4_0"]);
}

#[test]
fn shapes_that_the_metadata_do_not_imply() {
    let bytes = with(|file| file.tensor("blk.0.ffn_up.weight").shape = vec![160, 64]);
    let name = "model.layers.0.mlp.up_proj.weight";
    let place = Workplace::new();
    fs::write(place.path("model.gguf"), bytes).unwrap();
    let command = place.nibble(&["quantize", "--model", "model.gguf", "--out", "out"]);
    assert_refused(&place, command, 1, &[name, "[64, 160]", "[160, 64]"]);
}

/// Nothing but a reader asks for a tensor before the shapes are compared with the metadata.
#[test]
fn heads_of_a_tensor_without_dimensions() {
    let bytes = with(|file| file.tensor("blk.0.attn_q.weight").shape = Vec::new());
    let place = Workplace::new();
    fs::write(place.path("model.gguf"), bytes).unwrap();
    let checkpoint = Checkpoint::open(&place.path("model.gguf")).unwrap();
    let error = checkpoint.weight("model.layers.0.self_attn.q_proj.weight").unwrap_err();
    assert!(error.to_string().contains("attn_q.weight has shape [] for 4 heads"), "{error}");
}

#[test]
fn a_version_architecture_or_block_type_that_is_not_known() {
    assert_gguf_refused(&with(|file| file.version = 9), &["version 9", "1 to 3"]);
    assert_gguf_refused(&with(|file| file.version = 3 << 24), &["big-endian"]);
    let bytes = with(|file| file.set("general.architecture", Field::Text("mamba".into())));
    assert_gguf_refused(&bytes, &["mamba", "llama"]);
    let bytes = with(|file| file.tensor("output_norm.weight").kind = 77);
    assert_gguf_refused(&bytes, &["output_norm.weight", "block type 77", "Q8_0"]);
}

#[test]
fn metadata_that_are_missing_or_of_another_kind() {
    for key in ["llama.attention.head_count", "llama.context_length", "llama.block_count"] {
        let bytes = with(|file| file.fields.retain(|(name, _)| name != key));
        let short = key.trim_start_matches("llama.");
        assert_gguf_refused(&bytes, &[short, "missing or no number"]);
        let bytes = with(|file| file.set(key, Field::Text("three".into())));
        assert_gguf_refused(&bytes, &[short, "missing or no number"]);
    }
    let bytes = with(|file| file.set("llama.attention.head_count", Field::U32(0)));
    let place = Workplace::new();
    fs::write(place.path("model.gguf"), bytes).unwrap();
    let command = place.nibble(&["quantize", "--model", "model.gguf", "--out", "out"]);
    assert_refused(&place, command, 1, &["rope.dimension_count", "expected 64"]);
}

#[test]
fn a_tokenizer_that_is_missing_or_damaged() {
    let bytes = with(|file| file.fields.retain(|(name, _)| name != "tokenizer.ggml.tokens"));
    assert_gguf_refused(&bytes, &["tokenizer"]);
    let bytes = with(|file| file.set("tokenizer.ggml.tokens", Field::I32s(vec![1, 2])));
    assert_gguf_refused(&bytes, &["tokenizer"]);
    let bytes = with(|file| file.set("tokenizer.ggml.pre", Field::Text("klingon".into())));
    assert_gguf_refused(&bytes, &["pre-tokenizer `klingon`"]);
}

#[test]
fn a_path_that_is_not_there() {
    let place = Workplace::new();
    let command = place.nibble(&["quantize", "--model", "no.gguf", "--out", "out"]);
    assert_refused(&place, command, 1, &["no.gguf", "(os error 2)", "hint: is the path right?"]);
}
