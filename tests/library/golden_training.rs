//! Twenty optimizer steps against transformers, PEFT and torch's AdamW.
//!
//! Losses, gradient norms and the final adapter are in `tests/data/models/CASE`, made by
//! `gen_models.py`: f32, weight decay 0.01, clip 1.0, learning rate with four steps of warm-up.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

use crate::golden::{CASES, Case, relative_error};
use nibble::Result;
use nibble::adapter::LoraPlus;
use nibble::data::{Batch, Document};
use nibble::kernels::TokenLosses;
use nibble::kernels::cpu::Cpu;
use nibble::model::parameters::ParameterTensor;
use nibble::model::{Model, Variant};
use nibble::plan::{AdapterRegion, MomentLayout, Policy};
use nibble::train::adamw::AdamW;
use nibble::train::backend::{TrainingKernels, Update};
use nibble::train::clip;
use nibble::train::step;
use nibble::train::trainee::{AdapterBuffers, Shrinkable, Trainee};
use nibble_quant::product::Precision;
use nibble_quant::{BlockFormat, QuantType};
use serde_json::Value;

/// A model without files.
struct Bare(Model);

impl AdapterBuffers for Bare {
    fn tensors(&self) -> &[ParameterTensor] {
        self.0.parameters().tensors()
    }
    fn moments(&self) -> &MomentLayout {
        self.0.parameters().moments()
    }
    fn values(&self, region: AdapterRegion, words: Range<usize>) -> Result<Cow<'_, [f32]>> {
        self.0.parameters().values(region, words)
    }
    fn set_values(&mut self, region: AdapterRegion, first: usize, values: &[f32]) {
        self.0.parameters_mut().set_values(region, first, values);
    }
    fn refresh_working(&mut self) {
        self.0.parameters_mut().refresh_working();
    }
}

impl Shrinkable for Bare {}

impl Trainee for Bare {
    fn forward_backward(
        &mut self,
        batch: &Batch,
        scale: f32,
        micro_batch: u64,
    ) -> Result<TokenLosses> {
        self.0.forward_backward(batch, scale, micro_batch)
    }
    fn evaluate(&mut self, batch: &Batch, variant: Variant) -> Result<TokenLosses> {
        self.0.evaluate(batch, variant)
    }
    fn zero_gradients(&mut self) {
        self.0.parameters_mut().zero_gradients();
    }
    fn gradient_norm(&mut self) -> Result<f64> {
        Cpu::default().gradient_norm(self.0.parameters_mut())
    }
    fn update(&mut self, update: &Update) -> Result<()> {
        Cpu::default().update(self.0.parameters_mut(), update)
    }
    fn write_adapter(&self, _folder: &Path) -> Result<()> {
        Ok(())
    }
    fn sample(&mut self, _prompt: &str) -> Result<String> {
        Ok(String::new())
    }
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

/// Losses and gradient norms of the golden run, and the model after it.
fn train(case: &Case, quantization: Option<BlockFormat>) -> (Vec<f64>, Vec<f64>, Bare) {
    train_on(Cpu::default(), case, quantization)
}

fn train_on(
    cpu: Cpu,
    case: &Case,
    quantization: Option<BlockFormat>,
) -> (Vec<f64>, Vec<f64>, Bare) {
    let (recipe, data) = (&case.info["train"], case.tensors("ref.safetensors"));
    let number = |name: &str| recipe[name].as_f64().unwrap();
    let betas = numbers(&recipe["betas"]);
    let optimizer = AdamW {
        beta1: betas[0],
        beta2: betas[1],
        epsilon: number("eps"),
        weight_decay: number("weight_decay"),
    };
    let (spec, init) = (case.spec(), Some("adapter_init"));
    let mut model = Bare(case.model_on(cpu, spec, quantization, init, &[Policy::Keep], None));
    let groups = step::rate_groups(model.tensors(), LoraPlus::default());
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    for (k, rate) in numbers(&recipe["lr"]).into_iter().enumerate() {
        let window = [data.train_batch(k)];
        let gradient = step::accumulate(&mut model, &window, k as u64, &|| false).unwrap().unwrap();
        let update = Update {
            optimizer: &optimizer,
            groups: &groups,
            step: k as u64 + 1,
            learning_rate: rate,
            gradient_scale: clip::gradient_scale(gradient.norm, number("max_grad_norm")),
        };
        model.update(&update).unwrap();
        losses.push(gradient.loss);
        norms.push(gradient.norm);
    }
    (losses, norms, model)
}

fn assert_all_close(case: &Case, what: &str, got: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    for (k, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (got - expected).abs() / expected.abs();
        let name = case.name;
        assert!(error <= tolerance, "{name}: {what} of step {k} is {got}, expected {expected}");
    }
}

#[test]
fn twenty_steps_match_peft_and_torch() {
    for name in CASES {
        let case = Case::open(name);
        let (losses, norms, model) = train(&case, None);
        let expected = &case.info["lora"];
        assert_all_close(&case, "loss", &losses, &numbers(&expected["train_losses"]), 2e-5);
        assert_all_close(&case, "norm", &norms, &numbers(&expected["grad_norms"]), 2e-4);
        assert!(losses[19] < 0.98 * losses[0], "{name} learns: {losses:?}");
        let adapter = case.tensors("adapter_final/adapter_model.safetensors");
        let tensors = model.tensors().to_vec();
        for tensor in tensors {
            let got = model.values(AdapterRegion::Master, tensor.range.clone()).unwrap();
            let error = relative_error(&got, &adapter.f32(&tensor.name));
            assert!(error < 2e-3, "{name}: {} is off by {error:e}", tensor.name);
        }
    }
}

/// These models are steep and their learning rates high: a step may stray further than the mean does.
#[test]
fn twenty_steps_in_bf16_products_stay_near() {
    for case in CASES.map(Case::open) {
        let cpu = Cpu { precision: Precision::Bf16 };
        let (losses, norms, _) = train_on(cpu, &case, None);
        let expected = &case.info["lora"];
        for (what, got, expected, tolerance) in [
            ("loss", losses, numbers(&expected["train_losses"]), 3e-2),
            ("norm", norms, numbers(&expected["grad_norms"]), 5e-2),
        ] {
            assert_all_close(&case, what, &got, &expected, tolerance);
            let errors = got.iter().zip(&expected).map(|(got, expected)| got / expected - 1.0);
            let mean = errors.map(f64::abs).sum::<f64>() / got.len() as f64;
            assert!(mean < tolerance / 5.0, "{}: {what} is off by {mean:e} in the mean", case.name);
        }
    }
}

#[test]
fn twenty_steps_match_on_a_4_bit_base() {
    let format =
        |double_quant| BlockFormat { quant_type: QuantType::Nf4, block_size: 64, double_quant };
    for name in CASES {
        let case = Case::open(name);
        let (losses, norms, _) = train(&case, Some(format(false)));
        let expected = &case.info["nf4"];
        assert_all_close(&case, "nf4 loss", &losses, &numbers(&expected["train_losses"]), 2e-5);
        assert_all_close(&case, "nf4 norm", &norms, &numbers(&expected["grad_norms"]), 2e-4);
        // Nested scales follow the CUDA rule, bitsandbytes' CPU backend made the golden ones.
        let (losses, _, _) = train(&case, Some(format(true)));
        let expected = numbers(&case.info["nf4dq"]["train_losses"]);
        assert_all_close(&case, "nf4dq loss", &losses, &expected, 5e-3);
    }
}

/// Eight documents of 6 to 8 tokens with different numbers of targets.
fn eight_documents(case: &Case) -> Vec<Document> {
    let data = case.tensors("ref.safetensors");
    let batches: Vec<Batch> = (0..4).map(|step| data.train_batch(step)).collect();
    let starts = batches.iter().flat_map(|batch| {
        let documents = batch.cu_seqlens.windows(2);
        documents.map(move |ends| (batch, ends[1] as usize - 8))
    });
    let document = |(index, (batch, start)): (usize, (&Batch, usize))| {
        let range = start..start + 8 - index % 3;
        Document {
            input_ids: batch.input_ids[range.clone()].to_vec(),
            labels: batch.labels[range].to_vec(),
            line: index,
        }
    };
    starts.enumerate().map(document).collect()
}

#[test]
fn eight_batches_of_one_equal_one_batch_of_eight() {
    let case = Case::open("llama_s0");
    let documents = eight_documents(&case);
    let each: Vec<Batch> = documents.iter().map(|d| Batch::from_documents([d])).collect();
    let targets: Vec<usize> = each.iter().map(|batch| batch.num_targets()).collect();
    assert!(targets.len() == 8 && targets.iter().any(|&count| count != targets[0]), "{targets:?}");
    let gradients = |window: &[Batch]| {
        let mut model = Bare(case.model(None, Some("adapter_init"), &[Policy::Keep]));
        let gradient = step::accumulate(&mut model, window, 0, &|| false).unwrap().unwrap();
        (gradient, model.0.parameters().all_values(AdapterRegion::Gradients).unwrap().to_vec())
    };
    let (one, together) = gradients(&[Batch::from_documents(&documents)]);
    let (eight, apart) = gradients(&each);
    assert!((one.loss - eight.loss).abs() < 1e-6 * one.loss, "{} {}", one.loss, eight.loss);
    assert_eq!(one.targets, eight.targets);
    let error = relative_error(&apart, &together);
    assert!(error < 1e-5, "{error:e}");
}
