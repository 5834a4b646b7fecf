//! Block inputs, and what attention made, that leave the device and come back.

use nibble::adapter::Adapter;
use nibble::checkpoint::Checkpoint;
use nibble::data::Batch;
use nibble::kernels::Kernels;
use nibble::kernels::cuda::Cuda;
use nibble::model::streaming::StreamedPages;
use nibble::model::weights::Weights;
use nibble::model::{Model, Variant};
use nibble::plan::{AdapterRegion, Policy, Settings};

use crate::device::Device;
use crate::emulated::Copies;
use crate::golden::Case;
use crate::{Gpu, settings};

/// Blocks that are offloaded among others, and next to each other; copies as early and as late as
/// they may be made.
#[test]
fn what_is_offloaded_gives_the_bits_of_what_is_recomputed() {
    use Policy::{Attention, AttentionOffloadInput, Checkpoint, Keep, Offload, OffloadAttention};
    let case = Case::open("llama_s0");
    let (batch, _) = case.tensors("ref.safetensors").batch("input_ids", "labels");
    let run_of = |copies: Copies, policies: &[Policy], lora_dropout: bool| {
        let gpu = Cuda::new(Device::with(copies)?).unwrap();
        let adapter = Some("adapter_init");
        let mut settings = settings(&case, adapter, &[], true);
        // The golden model's blocks, over and over.
        settings.policies = policies.to_vec();
        settings.lora_dropout = lora_dropout;
        let mut model = deep_model(&gpu, &case, settings, false);
        let scale = 1.0 / batch.num_targets() as f32;
        let mut losses = Vec::new();
        for step in 0..2 {
            // An evaluation between leaves slots with copies that nobody read.
            losses.push(model.forward_backward(&batch, scale, step).unwrap().sum.to_bits());
            losses.push(model.evaluate(&batch, Variant::Adapted).unwrap().sum.to_bits());
        }
        assert_eq!(model.arena_bytes(), model.plan().arena_bytes());
        Some((
            losses,
            model.parameters().all_values(AdapterRegion::Gradients).unwrap().into_owned(),
        ))
    };
    let run = |copies, policies: &[Policy]| run_of(copies, policies, false);
    let Some(expected) = run(Copies::AtOnce, &[Checkpoint; 6]) else { return };
    assert!(expected.1.iter().all(|x| x.is_finite()));
    for policies in [
        [Offload; 6],
        [Offload, Checkpoint, Offload, Offload, Keep, Offload],
        [Checkpoint, Offload, Keep, Keep, Keep, Keep],
        [Offload, Attention, Offload, Attention, Checkpoint, Keep],
        [AttentionOffloadInput; 6],
        [
            Offload,
            Offload,
            AttentionOffloadInput,
            AttentionOffloadInput,
            Keep,
            AttentionOffloadInput,
        ],
        [OffloadAttention; 6],
        [OffloadAttention, Offload, OffloadAttention, Keep, OffloadAttention, OffloadAttention],
        [AttentionOffloadInput, OffloadAttention, Attention, OffloadAttention, Checkpoint, Offload],
        [Checkpoint, Keep, OffloadAttention, Keep, Keep, Keep],
        [Keep, Keep, Checkpoint, Offload, Offload, Keep],
    ] {
        for copies in [Copies::AtOnce, Copies::WhenAwaited] {
            assert!(run(copies, &policies).unwrap() == expected, "{copies:?} {policies:?}");
        }
    }
    // Planned for dropout, rows of attention's output have no room for adapters behind them.
    let expected_of_dropout = run_of(Copies::AtOnce, &[Checkpoint; 6], true);
    for copies in [Copies::AtOnce, Copies::WhenAwaited] {
        let policies =
            [OffloadAttention, OffloadAttention, Keep, OffloadAttention, Offload, Attention];
        assert!(run_of(copies, &policies, true) == expected_of_dropout, "{copies:?}");
    }
    if Device::skips_on_a_card("copies that are never made") {
        return;
    }
    let without = run(Copies::Never, &[Offload; 6]).unwrap();
    assert!(without.1 != expected.1, "the copies matter");
}

/// Where numbers stop being finite, whether the inputs of blocks are in memory or not.
#[test]
fn the_first_bad_input_is_found_among_offloaded_ones() {
    use Policy::{Checkpoint, Keep, Offload};
    let case = Case::open("llama_s0");
    let (batch, _) = case.tensors("ref.safetensors").batch("input_ids", "labels");
    fn search<K: Kernels>(
        model: &mut Model<K>,
        batch: &Batch,
        of_block: usize,
    ) -> [Option<usize>; 2] {
        model.forward_backward(batch, 1.0, 0).unwrap();
        let sound = model.first_bad_block_input().unwrap();
        let mut master = model.parameters().all_values(AdapterRegion::Master).unwrap().into_owned();
        let block = format!("layers.{of_block}.");
        let tensors = model.parameters().tensors().iter();
        let mut tensors = tensors.filter(|tensor| tensor.name.contains(&block));
        let first = tensors.next().unwrap().range.start;
        master[first] = f32::NAN;
        model.parameters_mut().replace(AdapterRegion::Master, &master);
        let _ = model.forward_backward(batch, 1.0, 1);
        [sound, model.first_bad_block_input().unwrap()]
    }
    for policies in
        [[Checkpoint; 6], [Offload; 6], [Keep, Offload, Offload, Keep, Offload, Offload]]
    {
        for of_block in [0, 1] {
            let expected = [None, Some(of_block + 1)];
            let Some(device) = Device::with(Copies::WhenAwaited) else { return };
            let gpu = Cuda::new(device).unwrap();
            let mut settings = settings(&case, Some("adapter_init"), &[], true);
            settings.policies = policies.to_vec();
            let mut model = deep_model(&gpu, &case, settings, false);
            assert_eq!(search(&mut model, &batch, of_block), expected, "{policies:?}");
            let mut model = case.model(None, Some("adapter_init"), &policies[..2]);
            assert_eq!(search(&mut model, &batch, of_block), expected, "{policies:?} on the CPU");
        }
    }
}

/// The golden model with its blocks repeated to as many as there are policies.
pub fn deep_model(gpu: &Gpu, case: &Case, mut settings: Settings, stream: bool) -> Model<Gpu> {
    let layers = settings.policies.len();
    let (mut spec, checkpoint) = (case.spec(), Checkpoint::open(&case.path).unwrap());
    let mut weights = Weights::load(&checkpoint, &spec, None, None).unwrap();
    let mut adapter = Adapter::load(&case.path.join("adapter_init"), &spec).unwrap();
    // Targets come layer after layer.
    adapter.targets.retain(|target| target.layer < layers);
    adapter.tensors.truncate(adapter.targets.len());
    while weights.blocks.len() < layers {
        // Turned around, so that blocks that take the same place are not the same.
        let more = Weights::load(&checkpoint, &spec, None, None).unwrap().blocks;
        weights.blocks.extend(more.into_iter().rev());
    }
    weights.blocks.truncate(layers);
    spec.num_layers = layers;
    spec.windows = spec.windows.iter().copied().cycle().take(layers).collect();
    // Adapters of the first blocks only.
    settings.targets = adapter.targets.clone();
    let weights = match stream {
        true => weights.upload_streamed(gpu, StreamedPages::new(&checkpoint, &spec)).unwrap(),
        false => weights.upload(gpu).unwrap(),
    };
    let mut model = Model::with_kernels(gpu.clone(), spec, weights, settings).unwrap();
    model.parameters_mut().load(&adapter);
    model
}
