//! Every LoRA gradient of blocks of Llama-3.1-8B's shape beside the CPU's in f32, for
//! `scripts/gpu_check.sh`; in little on the emulator.

use nibble::model::Model;
use nibble::plan::{AdapterRegion, Policy, Settings};
use serde_json::json;

use crate::device::Device;
use crate::shaped::{self, Shape};
use crate::{error_in_norm, gpu};

/// What bf16 may cost; a wrong kernel is off by about 1. The goal is `scripts/gpu/goals.py`'s.
const SANE: f64 = 6e-2;

#[test]
fn of_blocks_of_an_8b_model_match_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let shape = if Device::is_a_card() { Shape::of_8b(2, 8192) } else { Shape::small(2) };
    // The longer random documents are, the more alike are the outputs of their attention, and the more of
    // them is lost in bf16, whoever computes it.
    let ends = &[41, 70];
    let spec = shape.spec();
    let (adapter, batch) = (shaped::adapter(&spec), shaped::batch(&spec, ends));
    let scale = 1.0 / batch.num_targets() as f32;
    let plan = shaped::settings(&spec, &adapter, &batch, Policy::Checkpoint);

    let weights = shaped::weights(&spec).upload(&gpu).unwrap();
    let mut device = Model::with_kernels(gpu, spec.clone(), weights, plan.clone()).unwrap();
    device.parameters_mut().load(&adapter);
    device.parameters_mut().zero_gradients();
    let exact = Settings { bf16_working: false, ..plan };
    let mut host = Model::new(spec.clone(), shaped::weights(&spec), exact).unwrap();
    host.parameters_mut().load(&adapter);
    host.parameters_mut().zero_gradients();
    let losses = [
        device.forward_backward(&batch, scale, 0).unwrap().sum,
        host.forward_backward(&batch, scale, 0).unwrap().sum,
    ];
    let loss_error = (losses[0] / losses[1] - 1.0).abs();

    let (got, expected) = (
        device.parameters().all_values(AdapterRegion::Gradients).unwrap(),
        host.parameters().gradients(),
    );
    let tensors = host.parameters().tensors().iter();
    let error = |range: &std::ops::Range<usize>| {
        error_in_norm(&got[range.clone()], &expected[range.clone()])
    };
    let mut errors: Vec<_> = tensors.map(|t| (error(&t.range), t.name.clone())).collect();
    errors.sort_by(|a, b| b.0.abs().total_cmp(&a.0.abs())); // NaN first
    let mean = errors.iter().map(|(error, _)| error).sum::<f64>() / errors.len() as f64;
    let (largest, worst) = &errors[0];
    let result = json!({ "largest": largest, "worst": worst, "mean": mean, "loss": loss_error,
        "tensors": errors.len(), "tokens": batch.tokens() });
    println!("GRADIENTS {result}");
    assert_eq!(errors.len(), 2 * 7 * spec.num_layers);
    assert!(*largest < SANE, "{worst} is off by {largest:e}");
    assert!(loss_error < 5e-3, "{losses:?}");
}
