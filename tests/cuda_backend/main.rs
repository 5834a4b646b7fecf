//! The CUDA backend on the golden models, with its kernels emulated on the CPU; on a card with
//! `NIBBLE_TEST_DEVICE=cuda`. Apart, since it is carried to a GPU.
//!
//! Logits, losses and gradients of `tests/data/models/CASE` (made by `gen_models.py`, f32) within
//! the tolerances of bf16; what must be exact (policies, plan, allocations, waits) exactly.

#[path = "../emulator/mod.rs"]
#[allow(dead_code)]
mod emulator;
#[path = "../golden/mod.rs"]
mod golden;

mod attention;
mod dequantized;
mod device;
mod embedding;
mod emulated;
mod extension;
mod gradients;
mod meter;
mod offload;
mod optimizer;
mod regions;
mod shaped;
mod shortage;
mod speed;
mod stream;

use device::Device;
use golden::{CASES, Case, with_dropout};
use nibble::adapter::{Adapter, LoraPlus};
use nibble::checkpoint::Checkpoint;
use nibble::data::Batch;
use nibble::kernels::cuda::Cuda;
use nibble::model::weights::Weights;
use nibble::model::{Model, Variant};
use nibble::plan::{AdapterRegion, Optim, Policy, Settings};
use nibble::train::adamw::AdamW;
use nibble::train::backend::{TrainingKernels, Update};
use nibble::train::clip;
use nibble::train::step;
use nibble_quant::{BlockFormat, QuantType};

type Gpu = Cuda<Device>;

/// The same settings as [`Case::model`]'s, but for what is asked.
fn settings(
    case: &Case,
    adapter: Option<&str>,
    policies: &[Policy],
    bf16_working: bool,
) -> Settings {
    Settings {
        longest_document: 32,
        policies: policies.iter().copied().cycle().take(case.spec().num_layers).collect(),
        targets: adapter.map(|adapter| case.targets(adapter)).unwrap_or_default(),
        bf16_working,
        cache_tokens: 40,
        ..Settings::of_pass(64, 10)
    }
}

fn model(
    gpu: &Gpu,
    case: &Case,
    quantization: Option<BlockFormat>,
    adapter: Option<&str>,
    settings: Settings,
) -> Model<Gpu> {
    let (spec, checkpoint) = (case.spec(), Checkpoint::open(&case.path).unwrap());
    let weights = Weights::load(&checkpoint, &spec, quantization.as_ref(), None).unwrap();
    let weights = weights.upload(gpu).unwrap();
    let mut model = Model::with_kernels(gpu.clone(), spec, weights, settings).unwrap();
    if let Some(adapter) = adapter {
        let adapter = Adapter::load(&case.path.join(adapter), model.spec()).unwrap();
        model.parameters_mut().load(&adapter);
    }
    model
}

/// `None`, aloud, without g++.
fn gpu() -> Option<Gpu> {
    Some(Cuda::new(Device::open()?).unwrap())
}

/// ‖got − expected‖ / ‖expected‖.
fn error_in_norm(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = square(&mut got.iter().zip(expected).map(|(g, e)| f64::from(g - e)));
    difference / square(&mut expected.iter().map(|&e| f64::from(e)))
}

fn nf4(double_quant: bool) -> BlockFormat {
    BlockFormat { quant_type: QuantType::Nf4, block_size: 64, double_quant }
}

#[test]
fn logits_and_loss_match_transformers() {
    let Some(gpu) = gpu() else { return };
    for name in CASES {
        let case = Case::open(name);
        let reference = case.tensors("ref.safetensors");
        let (batch, _) = reference.batch("input_ids", "labels");
        let mut model = model(&gpu, &case, None, None, settings(&case, None, &[], false));
        let rows: Vec<u32> = (0..batch.tokens() as u32).collect();
        let error = error_in_norm(&model.logits(&batch, &rows).unwrap(), &reference.f32("logits"));
        assert!(error < 2e-2, "{name}: logits are off by {error:e}");
        let loss =
            model.evaluate(&batch, Variant::Adapted).unwrap().sum / batch.num_targets() as f64;
        let expected = f64::from(reference.f32("loss")[0]);
        let error = (loss / expected - 1.0).abs();
        assert!(error < 5e-3, "{name}: loss {loss}, expected {expected}");
    }
}

#[test]
fn a_ragged_batch_equals_its_documents() {
    let Some(gpu) = gpu() else { return };
    for name in CASES {
        let case = Case::open(name);
        let reference = case.tensors("ref.safetensors");
        let batch = reference.padded_batch();
        let mut model = model(&gpu, &case, None, None, settings(&case, None, &[], false));
        let rows: Vec<u32> = (0..batch.tokens() as u32).collect();
        let logits = model.logits(&batch, &rows).unwrap();
        let expected = reference.unpadded_logits(model.spec().vocab_size);
        let error = error_in_norm(&logits, &expected);
        assert!(error < 2e-2, "{name}: logits are off by {error:e}");
    }
}

fn check_gradients(gpu: &Gpu, case: &Case, tag: &str, quantization: Option<BlockFormat>) {
    let torch = case.bf16_error_of_torch();
    // Measured on the dense base; a 4-bit one is another model of about the same steepness.
    let tolerance = if tag == "lora" { torch } else { torch.max(3e-2) };
    let (reference, lora) = (case.tensors("ref.safetensors"), case.tensors("lora.safetensors"));
    let (batch, _) = reference.batch("input_ids", "labels");
    for bf16_working in [false, true] {
        let adapter = Some("adapter_init");
        let settings = settings(case, adapter, &[Policy::Keep], bf16_working);
        let mut model = model(gpu, case, quantization, adapter, settings);
        let loss = model.forward_backward(&batch, 1.0 / batch.num_targets() as f32, 0).unwrap().sum;
        let expected = f64::from(lora.f32(&format!("{tag}.loss"))[0]);
        let error = (loss / batch.num_targets() as f64 / expected - 1.0).abs();
        assert!(error < 5e-3, "{} {tag}: loss is off by {error:e}", case.name);
        let gradients = model.parameters().all_values(AdapterRegion::Gradients).unwrap();
        assert!(!model.parameters().tensors().is_empty());
        for tensor in model.parameters().tensors() {
            let expected = lora.f32(&format!("{tag}.grad.{}", tensor.name));
            let error = error_in_norm(&gradients[tensor.range.clone()], &expected);
            if std::env::var_os("SHOW").is_some() {
                println!("{} {bf16_working} {} {error:.2e}", case.name, tensor.name);
                continue;
            }
            let name = &tensor.name;
            assert!(error < tolerance, "{} {tag}: {name} is off by {error:e}", case.name);
        }
    }
}

#[test]
fn every_lora_gradient_matches_autograd() {
    let Some(gpu) = gpu() else { return };
    for name in CASES {
        check_gradients(&gpu, &Case::open(name), "lora", None);
    }
}

#[test]
fn every_lora_gradient_matches_autograd_on_a_4_bit_base() {
    let Some(gpu) = gpu() else { return };
    for name in CASES {
        check_gradients(&gpu, &Case::open(name), "nf4", Some(nf4(false)));
    }
}

#[test]
fn policies_give_the_same_bits_and_the_working_copy_is_what_is_read() {
    let Some(gpu) = gpu() else { return };
    let case = Case::open("mistral_s0");
    let (batch, _) = case.tensors("ref.safetensors").batch("input_ids", "labels");
    let scale = 1.0 / batch.num_targets() as f32;
    let run = |policies: &[Policy], bf16_working, dropped: Option<f32>, tile| {
        let adapter = Some("adapter_init");
        let mut settings = settings(&case, adapter, policies, bf16_working);
        (settings.lora_dropout, settings.mlp_tile_length) = (dropped.is_some(), tile);
        let mut model = model(&gpu, &case, Some(nf4(true)), adapter, settings);
        if let Some(probability) = dropped {
            model = model.with_randomness(with_dropout(probability, 7));
        }
        let loss = model.forward_backward(&batch, scale, 3).unwrap().sum;
        (
            loss.to_bits(),
            model.parameters().all_values(AdapterRegion::Gradients).unwrap().into_owned(),
        )
    };
    let losses = [None, Some(0.3)].map(|dropped| {
        let kept = run(&[Policy::Keep], true, dropped, None);
        assert!(kept.1.iter().all(|x| x.is_finite()));
        for policies in [
            &[Policy::Checkpoint][..],
            &[Policy::Checkpoint, Policy::Keep],
            &[Policy::Attention],
            &[Policy::Attention, Policy::Checkpoint],
        ] {
            assert!(run(policies, true, dropped, None) == kept, "{policies:?} {dropped:?}");
        }
        // The adapter is small: its bf16 copy is the rounded master in either case.
        assert!(run(&[Policy::Keep], false, dropped, None) == kept, "{dropped:?}");
        kept.0
    });
    assert_ne!(losses[0], losses[1]);
    // In tiles, with dropout's masks of the whole: other sums, as cuBLAS has an order for each shape.
    let tiled = |policies: &[Policy], tile| run(policies, true, Some(0.3), Some(tile));
    for tile in [9, 16] {
        let whole = tiled(&[Policy::Keep], batch.tokens());
        let (loss, gradients) = tiled(&[Policy::Checkpoint], tile);
        assert!((f64::from_bits(loss) / f64::from_bits(whole.0) - 1.0).abs() < 1e-4);
        assert!(error_in_norm(&gradients, &whole.1) < 1e-2);
        assert!(tiled(&[Policy::Keep, Policy::Checkpoint], tile) == (loss, gradients));
    }
}

#[test]
fn dropout_masks_what_the_cpu_masks() {
    let Some(gpu) = gpu() else { return };
    let case = Case::open("llama_s0");
    let (batch, _) = case.tensors("ref.safetensors").batch("input_ids", "labels");
    let (scale, dropout, adapter) =
        (1.0 / batch.num_targets() as f32, with_dropout(0.4, 11), Some("adapter_init"));
    let mut settings = settings(&case, adapter, &[Policy::Keep], false);
    settings.lora_dropout = true;
    let mut device = model(&gpu, &case, None, adapter, settings.clone()).with_randomness(dropout);
    let checkpoint = Checkpoint::open(&case.path).unwrap();
    let weights = Weights::load(&checkpoint, &case.spec(), None, None).unwrap();
    let mut host = Model::new(case.spec(), weights, settings).unwrap().with_randomness(dropout);
    host.parameters_mut()
        .load(&Adapter::load(&case.path.join("adapter_init"), &case.spec()).unwrap());
    let losses = [
        device.forward_backward(&batch, scale, 5).unwrap().sum,
        host.forward_backward(&batch, scale, 5).unwrap().sum,
    ];
    assert!((losses[0] / losses[1] - 1.0).abs() < 5e-3, "{losses:?}");
    let gradients = device.parameters().all_values(AdapterRegion::Gradients).unwrap();
    for tensor in host.parameters().tensors() {
        let expected = &host.parameters().gradients()[tensor.range.clone()];
        let error = error_in_norm(&gradients[tensor.range.clone()], expected);
        assert!(error < 4e-2, "{} is off by {error:e}", tensor.name);
    }
}

#[test]
fn cached_decoding_gives_the_logits_of_the_full_pass() {
    let Some(gpu) = gpu() else { return };
    let formats = [None, Some(nf4(true))];
    for (name, format) in CASES.iter().flat_map(|name| formats.map(|format| (name, format))) {
        let case = Case::open(name);
        let (batch, shape) = case.tensors("ref.safetensors").batch("input_ids", "labels");
        let (adapter, plan) =
            (Some("adapter_init"), settings(&case, Some("adapter_init"), &[], true));
        let mut model = model(&gpu, &case, format, adapter, plan);
        let (vocab, length) = (model.spec().vocab_size, shape[1]);
        let full = model.logits(&batch, &(0..length as u32).collect::<Vec<_>>()).unwrap();
        let mut fed = 0;
        for count in [11, 3].into_iter().chain(std::iter::repeat_n(1, length - 14)) {
            let dequantized = gpu.driver().dequantized();
            let logits = model.decode(&batch.input_ids[fed..fed + count]).unwrap().into_owned();
            fed += count;
            assert!(
                count > 1 || gpu.driver().dequantized() == dequantized,
                "{name}: rows are decoded"
            );
            let error = error_in_norm(&logits, &full[(fed - 1) * vocab..fed * vocab]);
            // A row by itself is off by more than all of them together.
            assert!(error < 3e-2, "{name}: logits after {fed} are off by {error:e}");
        }
    }
}

#[test]
fn a_score_is_the_loss_and_what_greedy_decoding_would_choose() {
    let Some(gpu) = gpu() else { return };
    let case = Case::open("qwen2_s0");
    let (batch, _) = case.tensors("ref.safetensors").batch("input_ids", "labels");
    let adapter = Some("adapter_init");
    let plan = settings(&case, adapter, &[], false);
    let mut device = model(&gpu, &case, None, adapter, plan);
    let mut host = case.model(None, adapter, &[]);
    let (got, expected) = (
        device.score(&batch, Variant::Adapted).unwrap(),
        host.score(&batch, Variant::Adapted).unwrap(),
    );
    assert!((got.loss / expected.loss - 1.0).abs() < 5e-3);
    assert_eq!(got.likeliest, expected.likeliest);
    assert_eq!(
        got.loss.to_bits(),
        device.evaluate(&batch, Variant::Adapted).unwrap().sum.to_bits()
    );
    let base = device.score(&batch, Variant::Base).unwrap().loss;
    assert_eq!(base.to_bits(), device.evaluate(&batch, Variant::Base).unwrap().sum.to_bits());
    assert_ne!(base.to_bits(), got.loss.to_bits());
}

/// Losses of the golden training run; also checks what each step asks of the driver.
fn train(gpu: &Gpu, case: &Case, steps: usize) -> Vec<f64> {
    let (recipe, data) = (&case.info["train"], case.tensors("ref.safetensors"));
    let number = |name: &str| recipe[name].as_f64().unwrap();
    let rates: Vec<f64> =
        recipe["lr"].as_array().unwrap().iter().map(|rate| rate.as_f64().unwrap()).collect();
    let optimizer = AdamW {
        beta1: recipe["betas"][0].as_f64().unwrap(),
        beta2: recipe["betas"][1].as_f64().unwrap(),
        epsilon: number("eps"),
        weight_decay: number("weight_decay"),
    };
    let adapter = Some("adapter_init");
    let plan = settings(case, adapter, &[Policy::Checkpoint, Policy::Keep], true);
    let mut model = model(gpu, case, None, adapter, plan);
    let groups = step::rate_groups(model.parameters().tensors(), LoraPlus::default());
    let mut losses = Vec::new();
    for (k, learning_rate) in rates.into_iter().take(steps).enumerate() {
        let before = gpu.driver().counts();
        let batch: Batch = data.train_batch(k);
        model.parameters_mut().zero_gradients();
        let scale = 1.0 / batch.num_targets() as f32;
        losses.push(
            model.forward_backward(&batch, scale, 0).unwrap().sum / batch.num_targets() as f64,
        );
        let norm = gpu.gradient_norm(model.parameters_mut()).unwrap();
        let gradient_scale = clip::gradient_scale(norm, number("max_grad_norm"));
        let (groups, optimizer) = (&groups, &optimizer);
        let step = k as u64 + 1;
        let update = Update { optimizer, groups, step, learning_rate, gradient_scale };
        gpu.update(model.parameters_mut(), &update).unwrap();
        let after = gpu.driver().counts();
        assert_eq!(after.allocations, before.allocations, "{}: a step allocates", case.name);
        assert_eq!(after.waits - before.waits, 2, "{}: it waits for loss and norm", case.name);
    }
    losses
}

/// Losses fall to a third within these twenty steps, so single steps differ by more than the run.
#[test]
fn a_training_run_has_the_losses_of_torch_in_f32() {
    let Some(gpu) = gpu() else { return };
    for name in ["llama_s0", "llama_tied_s2", "gpt2_s0"] {
        let case = Case::open(name);
        let expected = case.info["lora"]["train_losses"].as_array().unwrap();
        let losses = train(&gpu, &case, expected.len());
        let errors = losses.iter().zip(expected).map(|(got, e)| got / e.as_f64().unwrap() - 1.0);
        let errors: Vec<f64> = errors.map(f64::abs).collect();
        let mean = errors.iter().sum::<f64>() / errors.len() as f64;
        let largest = errors.iter().fold(0.0, |m: f64, &e| m.max(e));
        assert!(mean < 5e-3 && largest < 2e-2, "{name}: losses are off by {errors:?}");
        assert!(losses[19] < 0.98 * losses[0], "{name} learns: {losses:?}");
    }
}

#[test]
fn the_plan_is_one_allocation_of_its_bytes() {
    let Some(gpu) = gpu() else { return };
    for (name, tile) in CASES.into_iter().flat_map(|name| [(name, None), (name, Some(10))]) {
        let case = Case::open(name);
        let mut plan =
            settings(&case, Some("adapter_init"), &[Policy::Keep, Policy::Checkpoint], true);
        plan.mlp_tile_length = tile;
        let (spec, checkpoint) = (case.spec(), Checkpoint::open(&case.path).unwrap());
        let weights = Weights::load(&checkpoint, &spec, None, None).unwrap().upload(&gpu).unwrap();
        let before = gpu.driver().counts();
        let model = Model::with_kernels(gpu.clone(), spec, weights, plan).unwrap();
        let after = gpu.driver().counts();
        let bytes = model.plan().arena_bytes();
        assert_eq!(model.arena_bytes(), bytes, "{name}");
        assert_eq!(after.allocated_bytes - before.allocated_bytes, bytes, "{name}");
        // The plan, and host memory for what is uploaded.
        assert_eq!(after.allocations - before.allocations, 2, "{name}");
    }
}
