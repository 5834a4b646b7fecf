//! Wrong input: a clear error, and nothing written.

use std::fs;

use super::tools::{Merge, copy, data, model_of, nibble, run, text};
use crate::training::{change_model, refused};

#[test]
fn original_weights_that_are_not_there() {
    let errors = Merge::new("llama_s0.plain").quantized().refused(2, &["--onto", "original"]);
    assert!(errors.contains("holds no original weights"), "{errors}");
    assert!(errors.contains("hint: add `--original DIR`"), "{errors}");
}

#[test]
fn an_original_beside_a_dense_model() {
    let merge = Merge::new("llama_s0.plain");
    let errors = merge.refused(2, &["--original", text(&merge.model)]);
    assert!(errors.contains("--original beside a dense --model"), "{errors}");
}

#[test]
fn an_original_that_is_4_bit() {
    let merge = Merge::new("llama_s0.plain").quantized();
    let errors = merge.refused(2, &["--original", text(&merge.model)]);
    assert!(errors.contains("expected its dense original"), "{errors}");
}

#[test]
fn an_original_of_another_model() {
    let merge = Merge::new("llama_s0.plain").quantized();
    let other = data("models/llama_tied_s2");
    let errors = merge.refused(1, &["--original", text(&other)]);
    assert!(errors.contains("llama_tied_s2 is another model"), "{errors}");
}

/// Of the same shapes: it shows in the first weight.
#[test]
fn an_original_with_other_weights() {
    let merge = Merge::new("llama_s0.plain").quantized();
    let other = merge.path("other");
    copy(&model_of("llama_s0.plain"), &other);
    change_model(&other, |_, values| values.iter_mut().for_each(|x| *x = -*x));
    for onto in [&[][..], &["--onto", "dequantized"]] {
        let errors = merge.refused(1, &[&["--original", text(&other)], onto].concat());
        assert!(errors.contains("--original is not what --model was quantized from"), "{errors}");
        assert!(errors.contains("differs by 200 %\nhint: "), "{errors}");
    }
}

#[test]
fn a_model_that_holds_nan() {
    for tensor in ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"] {
        let mut merge = Merge::new("llama_s0.layers_to_transform");
        let model = merge.path("model");
        copy(&merge.model, &model);
        change_model(&model, |name, values| {
            values[7] = if name == tensor { f32::NAN } else { values[7] };
        });
        merge.model = model;
        for dtype in ["float32", "bfloat16"] {
            let errors = merge.refused(1, &["--quantization", "none", "--dtype", dtype]);
            let place = format!("{}: tensor {tensor}: element [0, 7]", text(&merge.model));
            let words = format!("{place} is NaN\nhint: the checkpoint holds NaN");
            assert!(errors.contains(&words), "{errors}");
        }
    }
}

#[test]
fn a_packing_that_a_4_bit_model_has_not() {
    let merge = Merge::new("llama_s0.plain").quantized();
    for more in [["--quantization", "none"], ["--quantization", "fp4"], ["--block-size", "128"]] {
        let errors = merge.refused(2, &more);
        assert!(
            errors.contains("is 4-bit already: --quantization nf4 --block-size 64"),
            "{errors}"
        );
        assert!(errors.contains("hint: leave these flags out"), "{errors}");
    }
    // What is asked for is not passed over where it is the default of a dense model.
    let merge =
        Merge::new("llama_s0.plain").packed(&["--block-size", "128", "--double-quant", "false"]);
    for more in [["--double-quant", "true"], ["--block-size", "64"]] {
        let errors = merge.refused(2, &more);
        assert!(errors.contains("--block-size 128 --double-quant false"), "{errors}");
    }
}

#[test]
fn dequantized_weights_that_training_did_not_use() {
    let more = ["--quantization", "none", "--onto", "dequantized"];
    let errors = Merge::new("llama_s0.plain").refused(2, &more);
    assert!(errors.contains("used no 4-bit weights"), "{errors}");
}

#[test]
fn an_adapter_for_another_model() {
    let mut merge = Merge::new("llama_s0.plain");
    merge.model = model_of("gpt2_s0");
    let errors = merge.refused(1, &[]);
    assert!(errors.contains("adapter for another model"), "{errors}");
    assert!(errors.contains("hint: the adapter was trained on"), "{errors}");
}

#[test]
fn an_output_folder_with_files_in_it() {
    let merge = Merge::new("llama_s0.plain");
    let out = merge.path("out");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("precious"), "").unwrap();
    let errors = refused(2, nibble(&merge.arguments(&out, &[])));
    assert!(errors.contains("not empty") && errors.contains("--overwrite"), "{errors}");
    assert!(out.join("precious").exists());
    let errors = refused(2, nibble(&merge.arguments(&out, &["--overwrite"])));
    assert!(errors.contains("holds `precious`, which is no file of a model"), "{errors}");
    fs::rename(out.join("precious"), out.join("vocab.json")).unwrap();
    run(&merge.arguments(&out, &["--overwrite"]));
    assert!(!out.join("vocab.json").exists());
}

#[test]
fn weights_that_do_not_fit_float16_leave_nothing_behind() {
    let mut merge = Merge::new("llama_s0.plain");
    let adapter = merge.path("adapter");
    copy(&merge.adapter, &adapter);
    let settings = fs::read_to_string(adapter.join("adapter_config.json")).unwrap();
    let huge = settings.replace("\"lora_alpha\": 16", "\"lora_alpha\": 1e9");
    assert_ne!(settings, huge);
    fs::write(adapter.join("adapter_config.json"), huge).unwrap();
    merge.adapter = adapter;
    let errors = merge.refused(1, &["--dtype", "f16"]);
    assert!(errors.contains("does not fit float16"), "{errors}");
    assert!(errors.contains("hint: use `--dtype bfloat16`"), "{errors}");
    assert_eq!(fs::read_dir(merge.root.path()).unwrap().count(), 1, "a temporary folder is left");
}
