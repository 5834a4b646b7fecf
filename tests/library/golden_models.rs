//! Logits, losses and every LoRA gradient against transformers 5.23 and PEFT 0.21.
//!
//! `tests/data/models/CASE` was made by `gen_models.py` (torch 2.13, f32, eager attention); `noise`
//! in its `case.json` is the difference between f32 and f64 there, tolerances are 10 times that.

use crate::golden::{CASES, Case, relative_error};
use nibble::data::Batch;
use nibble::model::families::spec_from_config;
use nibble::model::{Model, Randomness, Variant};
use nibble::plan::Policy;
use nibble_quant::{BlockFormat, QuantType};

fn assert_within(case: &Case, what: &str, error: f64, tolerance: f64) {
    let name = case.name;
    assert!(error <= tolerance, "{name}: {what} is off by {error:e}, allowed {tolerance:e}");
}

fn largest_difference(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max)
}

#[test]
fn both_spellings_of_the_config_give_one_spec() {
    for name in CASES {
        let case = Case::open(name);
        let v5 = spec_from_config(&case.json("config.json")).unwrap();
        let v4 = spec_from_config(&case.json("config_v4.json")).unwrap();
        assert_eq!(v5, v4, "{name}");
    }
}

#[test]
fn logits_loss_and_hidden_states_match_transformers() {
    for name in CASES {
        let case = Case::open(name);
        let reference = case.tensors("ref.safetensors");
        let (batch, shape) = reference.batch("input_ids", "labels");
        let mut model = case.model(None, None, &[Policy::Keep]);
        let noise = case.noise("logits_max_abs_f32_vs_f64");
        let rows: Vec<u32> = (0..batch.tokens() as u32).collect();
        let logits = model.logits(&batch, &rows).unwrap();
        let error = largest_difference(&logits, &reference.f32("logits"));
        assert_within(&case, "logits", error, 10.0 * noise);
        let loss =
            model.evaluate(&batch, Variant::Adapted).unwrap().sum / batch.num_targets() as f64;
        assert_within(
            &case,
            "loss",
            (loss - f64::from(reference.f32("loss")[0])).abs(),
            10.0 * noise,
        );
        assert_eq!(batch.num_targets() as u64, case.info["n_label_tokens"].as_u64().unwrap());
        for layer in 0..model.spec().num_layers {
            let got = &model.block_input(layer)[..shape[0] * shape[1] * model.spec().hidden_size];
            // A Granite's stream is held divided by its residual multiplier.
            let scale = model.spec().residual_scale;
            let got: Vec<f32> = got.iter().map(|value| value * scale).collect();
            let expected = reference.f32(&format!("hidden.{layer}"));
            let error = largest_difference(&got, &expected);
            assert_within(&case, &format!("hidden state {layer}"), error, 10.0 * noise);
        }
    }
}

#[test]
fn a_padded_batch_equals_its_documents() {
    for name in CASES {
        let case = Case::open(name);
        let reference = case.tensors("ref.safetensors");
        let batch = reference.padded_batch();
        let mut model = case.model(None, None, &[Policy::Keep]);
        let rows: Vec<u32> = (0..batch.tokens() as u32).collect();
        let logits = model.logits(&batch, &rows).unwrap();
        let expected = reference.unpadded_logits(model.spec().vocab_size);
        let noise = case.noise("logits_max_abs_f32_vs_f64");
        assert_within(&case, "logits", largest_difference(&logits, &expected), 10.0 * noise);
        let loss =
            model.evaluate(&batch, Variant::Adapted).unwrap().sum / batch.num_targets() as f64;
        let error = (loss - f64::from(reference.f32("pad.loss")[0])).abs();
        assert_within(&case, "loss", error, 10.0 * noise);
    }
}

/// Every policy, and the MLP untiled, in tiles with a rest, and of one token.
fn check_all_gradients(case: &Case, tag: &str, quantization: Option<BlockFormat>) {
    for policy in POLICIES {
        for tile in [None, Some(10), Some(1)] {
            check_gradients(case, tag, quantization, policy, tile);
        }
    }
}

const POLICIES: [&[Policy]; 11] = [
    &[Policy::Keep],
    &[Policy::Checkpoint],
    &[Policy::Checkpoint, Policy::Keep],
    &[Policy::Attention],
    &[Policy::Attention, Policy::Checkpoint, Policy::Keep],
    &[Policy::Offload],
    &[Policy::AttentionOffloadInput],
    &[Policy::Offload, Policy::AttentionOffloadInput],
    &[Policy::OffloadAttention],
    &[Policy::OffloadAttention, Policy::Offload],
    &[Policy::Keep, Policy::Offload],
];

fn check_gradients(
    case: &Case,
    tag: &str,
    quantization: Option<BlockFormat>,
    policy: &[Policy],
    tile: Option<usize>,
) {
    let reference = case.tensors("ref.safetensors");
    let lora = case.tensors("lora.safetensors");
    let (batch, _) = reference.batch("input_ids", "labels");
    let mut model = case.tiled_model(quantization, Some("adapter_init"), policy, tile);
    let noise = case.noise("grad_max_rel_f32_vs_f64").max(1e-6);
    let loss = model.forward_backward(&batch, 1.0 / batch.num_targets() as f32, 0).unwrap().sum;
    let error =
        (loss / batch.num_targets() as f64 - f64::from(lora.f32(&format!("{tag}.loss"))[0])).abs();
    // Nested scales follow the CUDA rule, bitsandbytes' CPU backend made the golden ones.
    let exact = tag != "nf4dq";
    assert_within(case, "loss", error, if exact { 1e-5 } else { 1e-3 });
    assert!(!model.parameters().tensors().is_empty());
    for tensor in model.parameters().tensors() {
        let expected = lora.f32(&format!("{tag}.grad.{}", tensor.name));
        let got = &model.parameters().gradients()[tensor.range.clone()];
        let tolerance = if exact { 10.0 * noise } else { 2e-2 };
        assert_within(case, &tensor.name, relative_error(got, &expected), tolerance);
    }
}

#[test]
fn every_lora_gradient_matches_autograd() {
    for name in CASES {
        check_all_gradients(&Case::open(name), "lora", None);
    }
}

#[test]
fn every_lora_gradient_matches_autograd_on_a_4_bit_base() {
    let format =
        |double_quant| BlockFormat { quant_type: QuantType::Nf4, block_size: 64, double_quant };
    for name in CASES {
        let case = Case::open(name);
        check_all_gradients(&case, "nf4", Some(format(false)));
        check_all_gradients(&case, "nf4dq", Some(format(true)));
    }
}

#[test]
fn policies_and_micro_batches_give_the_same_gradients() {
    let case = Case::open("llama_s0");
    let reference = case.tensors("ref.safetensors");
    let (batch, _) = reference.batch("input_ids", "labels");
    let scale = 1.0 / batch.num_targets() as f32;
    let run = |policies: &[Policy]| {
        let mut model = case.model(Some(BlockFormat::default()), Some("adapter_init"), policies);
        let loss = model.forward_backward(&batch, scale, 0).unwrap().sum;
        (loss, model.parameters().gradients().to_vec())
    };
    let (loss, gradients) = run(&[Policy::Keep]);
    use Policy::{Attention, Checkpoint, Keep, Offload};
    for policies in [
        [Checkpoint; 2],
        [Keep, Checkpoint],
        [Attention; 2],
        [Offload, Attention],
        [Offload; 2],
        [Offload, Keep],
    ] {
        let other = run(&policies);
        assert_eq!(loss.to_bits(), other.0.to_bits(), "{policies:?}");
        assert!(gradients == other.1, "{policies:?}: gradients are bitwise equal");
    }
    let mut model = case.model(Some(BlockFormat::default()), Some("adapter_init"), &[Policy::Keep]);
    let mut sum = 0.0;
    for document in 0..2 {
        let single = split(&batch, document);
        sum += model.forward_backward(&single, scale, 0).unwrap().sum;
    }
    assert!((sum - loss).abs() < 1e-5 * loss);
    assert!(relative_error(model.parameters().gradients(), &gradients) < 1e-5);
}

/// Rows are independent: only the sums over tokens in the gradients are made tile by tile.
#[test]
fn a_tiled_mlp_gives_the_same_loss_and_gradients() {
    for name in CASES {
        let case = Case::open(name);
        let (batch, _) = case.tensors("ref.safetensors").batch("input_ids", "labels");
        let run = |policies: &[Policy], tile| {
            let format = Some(BlockFormat::default());
            let mut model = case.tiled_model(format, Some("adapter_init"), policies, tile);
            let scale = 1.0 / batch.num_targets() as f32;
            let loss = model.forward_backward(&batch, scale, 0).unwrap().sum;
            (loss, model.parameters().gradients().to_vec(), model.plan().arena_bytes())
        };
        let (loss, gradients, bytes) = run(&[Policy::Checkpoint], None);
        for tile in [7, 16] {
            let tiled = run(&[Policy::Checkpoint], Some(tile));
            assert_eq!(tiled.0.to_bits(), loss.to_bits(), "{name}: tiles of {tile}");
            let error = relative_error(&tiled.1, &gradients);
            assert!(error < 2e-6, "{name}: tiles of {tile}: {error:e}");
            assert!(tiled.2 < bytes);
            for policies in POLICIES {
                let other = run(policies, Some(tile));
                assert_eq!(other.0.to_bits(), loss.to_bits(), "{name} {policies:?}");
                assert!(other.1 == tiled.1, "{name} {policies:?}: bitwise equal");
            }
        }
    }
}

fn split(batch: &Batch, document: usize) -> Batch {
    let range = batch.cu_seqlens[document] as usize..batch.cu_seqlens[document + 1] as usize;
    let (input_ids, labels) =
        (batch.input_ids[range.clone()].to_vec(), batch.labels[range].to_vec());
    Batch::from_documents([&nibble::data::Document { input_ids, labels, line: 0 }])
}

#[test]
fn cached_decoding_gives_the_logits_of_the_full_pass() {
    for name in CASES {
        let case = Case::open(name);
        let (batch, shape) = case.tensors("ref.safetensors").batch("input_ids", "labels");
        let mut model = case.model(None, Some("adapter_init"), &[]);
        let vocab = model.spec().vocab_size;
        let rows: Vec<u32> = (0..shape[1] as u32).collect();
        let full = model.logits(&batch, &rows).unwrap();
        let ids = &batch.input_ids[..shape[1]];
        let mut fed = 0;
        // One long feed, a short one, then one by one.
        for count in [11, 3].into_iter().chain(std::iter::repeat_n(1, shape[1] - 14)) {
            let logits = model.decode(&ids[fed..fed + count]).unwrap().to_vec();
            fed += count;
            let expected = &full[(fed - 1) * vocab..fed * vocab];
            let error = largest_difference(&logits, expected);
            assert_within(&case, &format!("logits after {fed}"), error, 2e-5);
        }
        assert_eq!(model.cached_tokens(), shape[1]);
        let error = model.decode(&[1; 20]).unwrap_err().to_string();
        assert!(error.contains("do not fit a context of 40"), "{error}");
    }
}

/// LongRoPE beyond the trained length: the context decides about the first tokens, too.
#[test]
fn cached_decoding_of_a_long_context_has_the_factors_for_long_texts() {
    let case = Case::open("phi3_s0");
    let (batch, shape) = case.tensors("ref.safetensors").batch("input_ids", "labels");
    let rows: Vec<u32> = (0..shape[1] as u32).collect();
    let short = case.model(None, None, &[]).logits(&batch, &rows).unwrap();
    let mut config = case.json("config.json");
    config["original_max_position_embeddings"] = 16.into();
    let spec = spec_from_config(&config).unwrap();
    let mut model = case.model_of(spec, None, None, &[], None);
    let (full, vocab) = (model.logits(&batch, &rows).unwrap(), model.spec().vocab_size);
    assert!(largest_difference(&full, &short) > 0.1);
    for fed in 0..shape[1] {
        let logits = model.decode(&batch.input_ids[fed..fed + 1]).unwrap().to_vec();
        let error = largest_difference(&logits, &full[fed * vocab..(fed + 1) * vocab]);
        assert_within(&case, &format!("logits after {fed}"), error, 2e-5);
    }
}

/// NEFTune: at most α/√(L·D) on each element of a document of L tokens, and nothing in an evaluation;
/// behind Gemma's factor on its embeddings, where transformers has it.
#[test]
fn embeddings_have_noise_while_training() {
    // A Granite multiplies its embeddings behind the noise, and divides its stream.
    for (name, factor) in
        [("llama_s0", 1.0), ("gpt2_s0", 1.0), ("gemma_s0", 1.0), ("granite_s0", 3.0 / 0.22)]
    {
        let case = Case::open(name);
        let (batch, _) = case.tensors("ref.safetensors").batch("input_ids", "labels");
        let documents: Vec<Batch> = (0..2).map(|document| split(&batch, document)).collect();
        let (d, tokens) = (case.spec().hidden_size, batch.tokens());
        let alpha = 3.0;
        let random = Randomness { seed: 7, neftune: Some(alpha), ..Randomness::default() };
        let model = || case.model(None, Some("adapter_init"), &[Policy::Checkpoint]);
        let mut noisy = model().with_randomness(random);
        let mut quiet = model();
        let evaluated = quiet.evaluate(&batch, Variant::Adapted).unwrap().sum;
        assert_eq!(
            noisy.evaluate(&batch, Variant::Adapted).unwrap().sum.to_bits(),
            evaluated.to_bits()
        );
        quiet.forward_backward(&batch, 1.0, 0).unwrap();
        let loss = noisy.forward_backward(&batch, 1.0, 4).unwrap().sum;
        let noise = |model: &Model| -> Vec<f32> {
            let pairs = model.block_input(0)[..tokens * d].iter().zip(quiet.block_input(0));
            pairs.map(|(noisy, quiet)| noisy - quiet).collect()
        };
        let first = noise(&noisy);
        let length = documents[0].tokens();
        let most = factor * alpha / ((length * d) as f32).sqrt();
        let largest = first.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        assert!((0.95 * most..1.001 * most).contains(&largest), "{name}: {largest} of {most}");
        let mean = first.iter().sum::<f32>() / first.len() as f32;
        let square = first.iter().map(|x| x * x).sum::<f32>() / first.len() as f32;
        assert!(mean.abs() < 0.05 * most && (square / (most * most / 3.0) - 1.0).abs() < 0.1);
        // Other noise in another micro-batch, the same in the parts of one.
        noisy.forward_backward(&batch, 1.0, 5).unwrap();
        assert!(largest_difference(&noise(&noisy), &first) > f64::from(most));
        let mut sum = 0.0;
        for (number, document) in documents.into_iter().enumerate() {
            let part = Batch { first_token: number * length, ..document };
            sum += noisy.forward_backward(&part, 1.0, 4).unwrap().sum;
        }
        assert!((sum / loss - 1.0).abs() < 1e-5, "{name}: {sum} {loss}");
        assert!((loss / evaluated - 1.0).abs() > 1e-4, "{name}: {loss} {evaluated}");
    }
}

#[test]
fn without_its_adapter_a_model_is_its_base() {
    let case = Case::open("llama_s0");
    let (batch, _) = case.tensors("ref.safetensors").batch("input_ids", "labels");
    let base = case.model(None, None, &[]).evaluate(&batch, Variant::Adapted).unwrap().sum;
    let mut adapted = case.model(None, Some("adapter_init"), &[]);
    assert_eq!(adapted.evaluate(&batch, Variant::Base).unwrap().sum.to_bits(), base.to_bits());
    assert!((adapted.evaluate(&batch, Variant::Adapted).unwrap().sum - base).abs() > 0.1);
}

#[test]
fn a_score_is_the_loss_and_what_greedy_decoding_would_choose() {
    for name in CASES {
        let case = Case::open(name);
        let (batch, _) = case.tensors("ref.safetensors").batch("input_ids", "labels");
        let mut model = case.model(None, Some("adapter_init"), &[]);
        let (all, vocab) = (0..batch.tokens() as u32, model.spec().vocab_size);
        let logits = model.logits(&batch, &all.collect::<Vec<_>>()).unwrap();
        // Every other label is made the likeliest token.
        let mut batch = batch;
        let mut expected = Vec::new();
        for document in batch.cu_seqlens.clone().windows(2) {
            for token in document[0] as usize + 1..document[1] as usize {
                if batch.labels[token] < 0 {
                    continue;
                }
                let row = &logits[(token - 1) * vocab..token * vocab];
                let best = (0..vocab).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as i32;
                if token % 2 == 0 {
                    batch.labels[token] = best;
                }
                expected.push(batch.labels[token] == best);
            }
        }
        let score = model.score(&batch, Variant::Adapted).unwrap();
        assert_eq!(score.likeliest, expected, "{name}");
        assert!(expected.contains(&true) && expected.contains(&false), "{name}");
        let evaluated = model.evaluate(&batch, Variant::Adapted).unwrap();
        assert_eq!(score.loss.to_bits(), evaluated.sum.to_bits(), "{name}");
        let mut training = case.model(None, Some("adapter_init"), &[Policy::Keep]);
        let trained = training.forward_backward(&batch, 1.0, 0).unwrap();
        let hits = expected.iter().filter(|hit| **hit).count() as u64;
        assert_eq!([evaluated.hits, trained.hits], [hits; 2], "{name}");
        let base = model.score(&batch, Variant::Base).unwrap().loss;
        assert_eq!(
            base.to_bits(),
            model.evaluate(&batch, Variant::Base).unwrap().sum.to_bits(),
            "{name}"
        );
    }
}
