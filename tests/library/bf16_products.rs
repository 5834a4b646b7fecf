//! `--bf16` on the CPU: products of operands that are rounded to bf16, beside those in f32 of
//! transformers and PEFT.

use crate::golden::{CASES, Case};
use nibble::data::Batch;
use nibble::kernels::cpu::Cpu;
use nibble::model::Model;
use nibble::model::parameters::ParameterTensor;
use nibble::plan::Policy;
use nibble_quant::product::Precision;

const BF16: Cpu = Cpu { precision: Precision::Bf16 };

fn model(case: &Case, policies: &[Policy], tile: Option<usize>) -> Model {
    case.model_on(BF16, case.spec(), None, Some("adapter_init"), policies, tile)
}

fn batch(case: &Case) -> Batch {
    case.tensors("ref.safetensors").batch("input_ids", "labels").0
}

/// `‖got − expected‖ / ‖expected‖`.
fn error_in_norm(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let square = |value: f32| f64::from(value) * f64::from(value);
    let difference: f64 = got.iter().zip(expected).map(|(a, b)| square(a - b)).sum();
    (difference / expected.iter().map(|&value| square(value)).sum::<f64>()).sqrt()
}

/// The largest error of a case is that of one small tensor: it may be a quarter above torch's by
/// chance, the mean over the cases may not.
#[test]
fn gradients_are_nearer_to_f32_than_those_of_torch_in_bf16() {
    let mut ratios = Vec::new();
    for case in CASES.map(Case::open) {
        let (batch, golden) = (batch(&case), case.tensors("lora.safetensors"));
        let mut model = model(&case, &[Policy::Keep], None);
        let loss = model.forward_backward(&batch, 1.0 / batch.num_targets() as f32, 0).unwrap().sum;
        let expected = f64::from(golden.f32("lora.loss")[0]);
        let error = (loss / batch.num_targets() as f64 / expected - 1.0).abs();
        assert!(error < 2e-3, "{}: loss is off by {error:e}", case.name);
        let (parameters, torch) = (model.parameters(), case.bf16_error_of_torch());
        let of = |tensor: &ParameterTensor| {
            let expected = golden.f32(&format!("lora.grad.{}", tensor.name));
            error_in_norm(&parameters.gradients()[tensor.range.clone()], &expected)
        };
        let largest = parameters.tensors().iter().map(of).fold(0.0, f64::max);
        assert!(largest > 1e-3, "{}: products are rounded: {largest:e}", case.name);
        assert!(largest < 1.25 * torch, "{}: a gradient is off by {largest:e}", case.name);
        ratios.push(largest / torch);
    }
    let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
    assert!(mean < 0.8, "{mean} of torch's errors");
}

#[test]
fn policies_and_tiles_give_the_same_bits() {
    for case in CASES.map(Case::open) {
        let batch = batch(&case);
        let run = |policies: &[Policy], tile| {
            let mut model = model(&case, policies, tile);
            let loss =
                model.forward_backward(&batch, 1.0 / batch.num_targets() as f32, 0).unwrap().sum;
            (loss, model.parameters().gradients().to_vec())
        };
        let (loss, gradients) = run(&[Policy::Keep], None);
        for policies in [Policy::Checkpoint, Policy::Attention, Policy::Offload] {
            let other = run(&[policies], None);
            assert!(other == (loss, gradients.clone()), "{}: {policies:?}", case.name);
        }
        let tiled = run(&[Policy::Checkpoint], Some(7));
        assert_eq!(tiled.0, loss, "{}: tiles", case.name);
        let error = error_in_norm(&tiled.1, &gradients);
        assert!(error < 2e-6, "{}: only the order of sums differs: {error:e}", case.name);
    }
}
