//! Blocks whose weights take turns on the device.

use nibble::kernels::cuda::Cuda;
use nibble::kernels::cuda::driver::Driver;
use nibble::model::Variant;
use nibble::plan::{AdapterRegion, Policy};

use crate::device::Device;
use crate::emulated::Copies;
use crate::golden::Case;
use crate::offload::deep_model;
use crate::settings;

/// Forward, backward, an evaluation between, and the first block again; copies as early and as late
/// as they may be made.
#[test]
fn streamed_weights_give_the_bits_of_resident_ones() {
    use Policy::{Attention, Checkpoint, Keep, Offload};
    let case = Case::open("llama_s0");
    let (batch, _) = case.tensors("ref.safetensors").batch("input_ids", "labels");
    let run = |copies: Copies, policies: &[Policy], stream: bool| {
        let gpu = Cuda::new(Device::with(copies)?).unwrap();
        let (free, _) = gpu.driver().memory().unwrap();
        let mut settings = settings(&case, Some("adapter_init"), &[], true);
        settings.policies = policies.to_vec();
        let mut model = deep_model(&gpu, &case, settings, stream);
        let (left, _) = gpu.driver().memory().unwrap();
        let taken = free.saturating_sub(left + model.arena_bytes() as u64);
        let scale = 1.0 / batch.num_targets() as f32;
        let mut losses = Vec::new();
        for step in 0..2 {
            losses.push(model.forward_backward(&batch, scale, step).unwrap().sum.to_bits());
            losses.push(model.evaluate(&batch, Variant::Adapted).unwrap().sum.to_bits());
        }
        let gradients =
            model.parameters().all_values(AdapterRegion::Gradients).unwrap().into_owned();
        Some(((losses, gradients), taken))
    };
    let mixed = [Keep, Checkpoint, Offload, Offload, Checkpoint, Keep, Offload];
    let attended = [Attention, Attention, Keep];
    for policies in [&[Checkpoint; 6][..], &mixed, &[Keep; 1], &[Keep, Checkpoint], &attended] {
        let Some((expected, resident)) = run(Copies::AtOnce, policies, false) else { return };
        assert!(expected.1.iter().all(|x| x.is_finite()));
        for copies in [Copies::AtOnce, Copies::WhenAwaited] {
            let (got, streamed) = run(copies, policies, true).unwrap();
            assert!(got == expected, "{copies:?} {policies:?}");
            if !Device::is_a_card() && policies.len() > 2 {
                let blocks = (resident - streamed) as f64 / (policies.len() - 2) as f64;
                let block = block_bytes(&case) as f64;
                assert!((blocks / block - 1.0).abs() < 0.02, "{blocks} bytes instead of {block}");
            }
        }
    }
    if Device::skips_on_a_card("copies that are never made") {
        return;
    }
    let (expected, _) = run(Copies::AtOnce, &mixed, false).unwrap();
    let (without, _) = run(Copies::Never, &mixed, true).unwrap();
    assert!(without != expected, "the copies matter");
}

/// Of a block's matrices in bf16.
fn block_bytes(case: &Case) -> usize {
    let spec = case.spec();
    spec.linears(0).iter().map(|linear| 2 * linear.in_features * linear.out_features).sum()
}
