//! The logits of merged models.

use nibble::checkpoint::Checkpoint;

use nibble_quant::BlockFormat;

use super::tools::{Expected, Merge, data, model, model_merged, model_of};

/// f32 on both sides, sums in another order, one layer of rounding more for the merge: PEFT's own
/// merge differs from its unmerged logits by up to 1.5e-6 of the largest on these models.
const TOLERANCE: f32 = 5e-6;

/// The merged folder, and the adapter merged while loading, with a 4-bit base too.
fn check_merge(case: &str) {
    let merge = Merge::new(case);
    let (merged, _) = merge.run("out", &[]);
    let expected = Expected::open(case);
    let error = expected.error(model(&merged, None));
    assert!(error < TOLERANCE, "{case}: {error:e}");
    let base = Checkpoint::open(&merge.model).unwrap();
    let loaded = |format| expected.logits_of(model_merged(&base, format, &merge.adapter));
    assert_eq!(loaded(None), expected.logits_of(model(&merged, None)), "{case}");
    let (dequantized, _) = merge.run("dequantized", &["--onto", "dequantized"]);
    // The command widens all linears, the loader only those that the adapter changes.
    let logits = loaded(Some(&BlockFormat::default()));
    let error = expected.distance(&logits, &expected.logits_of(model(&dequantized, None)));
    assert!(error < TOLERANCE, "{case}: {error:e}");
}

macro_rules! merged_models_compute_what_peft_does {
    ($($test:ident: $case:literal;)*) => {
        mod merged_models_compute_what_peft_does {
            $(#[test]
            fn $test() {
                super::check_merge($case);
            })*
        }
    };
}

merged_models_compute_what_peft_does! {
    gpt2_dora: "gpt2_s0.dora";
    gpt2_plain: "gpt2_s0.plain";
    gpt2_rslora: "gpt2_s0.rslora";
    gpt2_saved_fc: "gpt2_s0.saved_fc";
    gpt2_tied_embeddings: "gpt2_s0.tied_embeddings";
    gpt2_token_rows: "gpt2_s0.wte";
    llama_dora: "llama_s0.dora";
    llama_dora_on_embedding_and_head: "llama_s0.dora_embed";
    llama_embed_tokens: "llama_s0.embed_tokens";
    llama_exclude: "llama_s0.exclude";
    llama_layers_to_transform: "llama_s0.layers_to_transform";
    llama_modules_to_save: "llama_s0.modules_to_save";
    llama_plain: "llama_s0.plain";
    llama_rank_pattern: "llama_s0.rank_pattern";
    llama_regex: "llama_s0.regex";
    llama_rslora: "llama_s0.rslora";
    llama_saved_mlp: "llama_s0.saved_mlp";
    llama_token_rows: "llama_s0.token_rows";
    qwen2_bias_all: "qwen2_s0.bias_all";
    qwen2_bias_lora_only: "qwen2_s0.bias_lora_only";
    qwen2_lora_bias: "qwen2_s0.lora_bias";
    qwen2_tied_both: "qwen2_s0.tied_both";
    qwen2_tied_embed_dora: "qwen2_s0.tied_embed_dora";
    qwen2_tied_head: "qwen2_s0.tied_head";
    qwen2_tied_saved_head: "qwen2_s0.tied_saved_head";
    qwen2_tied_token_rows: "qwen2_s0.tied_token_rows";
    qwen2_token_rows: "qwen2_s0.token_rows";
}

#[test]
fn plain_adapters_compute_what_peft_does_without_merging() {
    for case in [
        "gpt2_s0.plain",
        "gpt2_s0.rslora",
        "llama_s0.exclude",
        "llama_s0.layers_to_transform",
        "llama_s0.plain",
        "llama_s0.rank_pattern",
        "llama_s0.regex",
        "llama_s0.rslora",
    ] {
        let base = Checkpoint::open(&model_of(case)).unwrap();
        let error = Expected::open(case).error(model(&base, Some(&data("adapters").join(case))));
        assert!(error < TOLERANCE, "{case}: {error:e}");
    }
}
