//! Memory that runs short in the middle of a pass, and a driver that has less than was planned.

use nibble::adapter::LoraPlus;
use nibble::error::Error;
use nibble::plan::{AdapterRegion, Policy};
use nibble::train::adamw::AdamW;
use nibble::train::backend::{TrainingKernels, Update};
use nibble::train::step::rate_groups;

use super::golden::{Case, with_dropout};
use super::{gpu, model, nf4, settings};

#[test]
fn a_pass_that_finds_no_memory_is_repeated_in_parts_with_the_same_sums() {
    let Some(gpu) = gpu() else { return };
    let case = Case::open("llama_s0");
    let (batch, shape) = case.tensors("ref.safetensors").batch("input_ids", "labels");
    assert!(batch.cu_seqlens.len() > 2, "documents can be parted");
    let scale = 1.0 / batch.num_targets() as f32;
    let mut plan = settings(&case, Some("adapter_init"), &[Policy::Keep], true);
    (plan.tokens, plan.longest_document, plan.lora_dropout) = (batch.tokens(), shape[1], true);
    let fresh = || {
        let model = model(&gpu, &case, Some(nf4(true)), Some("adapter_init"), plan.clone());
        model.with_randomness(with_dropout(0.3, 5))
    };
    let whole = || {
        let mut model = fresh();
        let loss = model.forward_backward(&batch, scale, 0).unwrap().sum;
        (loss, model.parameters().all_values(AdapterRegion::Gradients).unwrap().into_owned())
    };
    let (loss, gradients) = whole();
    for launches in [0, 7, 60] {
        let mut model = fresh();
        let moments = vec![0.25; gradients.len()];
        model.parameters_mut().replace(AdapterRegion::SecondMoment, &moments);
        let master = model.parameters().all_values(AdapterRegion::Master).unwrap().into_owned();
        gpu.driver().fail_after(launches);
        let error = model.forward_backward(&batch, scale, 0).unwrap_err();
        assert!(matches!(error, Error::Budget(_)), "{launches}: {error}");
        let before = model.arena_bytes();
        let mut model = model.with_smaller_plan().unwrap();
        assert!(model.arena_bytes() < before);
        assert_eq!(*model.parameters().all_values(AdapterRegion::Master).unwrap(), *master);
        assert_eq!(*model.parameters().all_values(AdapterRegion::SecondMoment).unwrap(), *moments);
        let parts = batch.split(model.settings().tokens);
        assert!(parts.len() > 1);
        model.parameters_mut().zero_gradients();
        let sum: f64 =
            parts.iter().map(|part| model.forward_backward(part, scale, 0).unwrap().sum).sum();
        assert!((sum / loss - 1.0).abs() < 1e-3, "{sum} {loss}");
        let got = model.parameters().all_values(AdapterRegion::Gradients).unwrap();
        let error = super::error_in_norm(&got, &gradients);
        assert!(error < 1e-2, "{launches}: gradients are off by {error:e}");
    }
}

/// A document is not cut: its blocks recompute instead, which changes no bit.
#[test]
fn a_single_document_is_recomputed_where_memory_is_short() {
    let Some(gpu) = gpu() else { return };
    let case = Case::open("llama_s0");
    let (batch, _) = case.tensors("ref.safetensors").batch("input_ids", "labels");
    let scale = 1.0 / batch.num_targets() as f32;
    let policies = [Policy::Attention, Policy::Keep];
    let mut plan = settings(&case, Some("adapter_init"), &policies, true);
    (plan.tokens, plan.longest_document) = (batch.tokens(), batch.tokens());
    let mut model = model(&gpu, &case, Some(nf4(true)), Some("adapter_init"), plan);
    let loss = model.forward_backward(&batch, scale, 0).unwrap().sum;
    let gradients = model.parameters().all_values(AdapterRegion::Gradients).unwrap().into_owned();
    let mut smaller = 0;
    while model.can_be_smaller() {
        model = model.with_smaller_plan().unwrap();
        smaller += 1;
        let settings = model.settings().clone();
        model.parameters_mut().zero_gradients();
        let again = model.forward_backward(&batch, scale, 0).unwrap().sum;
        let got = model.parameters().all_values(AdapterRegion::Gradients).unwrap();
        if settings.dequantize_ahead {
            assert_eq!((again.to_bits(), &*got), (loss.to_bits(), &*gradients), "{settings:?}");
        }
        assert!((again / loss - 1.0).abs() < 1e-3, "{settings:?}: {again} {loss}");
        let error = super::error_in_norm(&got, &gradients);
        assert!(error < 1e-2, "{settings:?}: gradients are off by {error:e}");
    }
    assert!(smaller >= 4, "recomputed, then attention, too, in smaller pieces, offloaded");
    assert_eq!(model.settings().count(Policy::Offload), case.spec().num_layers);
}

/// The weights are in between then: this is no failure of the next pass, which would be made again.
#[test]
fn an_update_that_finds_no_memory_says_so_itself() {
    let Some(gpu) = gpu() else { return };
    let case = Case::open("llama_s0");
    let (batch, shape) = case.tensors("ref.safetensors").batch("input_ids", "labels");
    let mut plan = settings(&case, Some("adapter_init"), &[Policy::Keep], true);
    (plan.tokens, plan.longest_document) = (batch.tokens(), shape[1]);
    let mut model = model(&gpu, &case, None, Some("adapter_init"), plan);
    model.forward_backward(&batch, 1.0, 0).unwrap();
    let groups = rate_groups(model.parameters().tensors(), LoraPlus::default());
    let optimizer = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };
    let update = Update {
        optimizer: &optimizer,
        groups: &groups,
        step: 1,
        learning_rate: 1e-3,
        gradient_scale: 1.0,
    };
    gpu.driver().fail_after(0);
    let error = gpu.update(model.parameters_mut(), &update).unwrap_err();
    assert!(matches!(error, Error::Budget(_)), "{error}");
}

#[test]
fn a_plan_that_the_driver_refuses_becomes_a_smaller_one() {
    let Some(gpu) = gpu() else { return };
    let case = Case::open("qwen2_s0");
    let mut plan = settings(&case, Some("adapter_init"), &[Policy::Keep], true);
    (plan.tokens, plan.longest_document) = (256, 24);
    let large = model(&gpu, &case, None, Some("adapter_init"), plan.clone());
    plan.tokens = 65;
    let planned = model(&gpu, &case, None, Some("adapter_init"), plan).arena_bytes();
    gpu.driver().limit(planned);
    let small = large.with_smaller_plan().unwrap();
    assert_eq!(small.settings().tokens, 64, "256 and 128 do not fit");
    gpu.driver().limit(0);
    let error = small.with_smaller_plan().err().unwrap();
    assert!(matches!(error, Error::Budget(_)), "{error}");
}
