//! Weights that are dequantized on a stream of their own while the product before theirs runs.

use std::path::Path;

use nibble::adapter::{Adapter, LoraConfig};
use nibble::checkpoint::Checkpoint;
use nibble::data::Batch;
use nibble::kernels::cuda::Cuda;
use nibble::model::families::spec_from_config;
use nibble::model::streaming::StreamedPages;
use nibble::model::weights::Weights;
use nibble::model::{Model, Variant};
use nibble::plan::{AdapterRegion, Policy, Settings};

use crate::device::Device;
use crate::emulated::Copies;
use crate::golden::Case;
use crate::{Gpu, settings};

/// A model of 4-bit blocks, without nested scales, whose offsets would tell weights apart: its
/// file's two blocks over and over, turned around each time, so that blocks that take the same
/// place are not the same.
fn packed_model(
    gpu: &Gpu,
    policies: &[Policy],
    rank: usize,
    stream: bool,
    change: impl Fn(&mut Settings),
) -> Model<Gpu> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/bnb4bit");
    let checkpoint = Checkpoint::open(&root.join("llama_s0.f32.plain")).unwrap();
    let mut spec = spec_from_config(checkpoint.config()).unwrap();
    let mut weights = Weights::load(&checkpoint, &spec, None, None).unwrap();
    let pages = StreamedPages::new(&checkpoint, &spec);
    while weights.blocks.len() < policies.len() {
        let more = Weights::load(&checkpoint, &spec, None, None).unwrap().blocks;
        weights.blocks.extend(more.into_iter().rev());
    }
    weights.blocks.truncate(policies.len());
    for (layer, block) in weights.blocks.iter_mut().enumerate() {
        for linear in &mut block.linears {
            let part = linear.module.splitn(4, '.').last().unwrap();
            linear.module = format!("model.layers.{layer}.{part}");
        }
    }
    spec.num_layers = policies.len();
    spec.windows.resize(policies.len(), spec.windows[0]);
    let weights = match stream {
        true => weights.upload_streamed(gpu, pages).unwrap(),
        false => weights.upload(gpu).unwrap(),
    };
    let lora = LoraConfig { r: rank, ..LoraConfig::default() };
    let mut settings = Settings {
        targets: lora.resolve(&spec).unwrap(),
        policies: policies.to_vec(),
        ..settings(&Case::open("llama_s0"), None, &[Policy::Keep], true)
    };
    change(&mut settings);
    let mut adapter = Adapter::init(lora, &spec, 3).unwrap();
    // B is zero at first: then nobody would see what A's gradient is made of.
    for tensors in &mut adapter.tensors {
        let values = tensors.b.iter_mut().enumerate();
        values.for_each(|(index, b)| *b = (index % 7) as f32 * 0.01 - 0.03);
    }
    let mut model = Model::with_kernels(gpu.clone(), spec, weights, settings).unwrap();
    model.parameters_mut().load(&adapter);
    model
}

/// Loss and gradients of a step from nothing. A pass allocates nothing and waits for its loss alone,
/// whatever is offloaded, streamed or dequantized ahead.
fn step(model: &mut Model<Gpu>, batch: &Batch) -> (u64, Vec<u32>) {
    model.parameters_mut().zero_gradients();
    let counts = |model: &Model<Gpu>| model.parameters().kernels().driver().counts();
    let before = counts(model);
    let loss = model.forward_backward(batch, 1.0, 0).unwrap().sum;
    let after = counts(model);
    assert_eq!((after.allocations, after.waits), (before.allocations, before.waits + 1));
    let gradients = model.parameters().all_values(AdapterRegion::Gradients).unwrap();
    (loss.to_bits(), gradients.iter().map(|x| x.to_bits()).collect())
}

/// The first step knows no order and dequantizes nothing ahead; the later ones have its bits, whether
/// the other stream is as early or as late as it may be.
#[test]
fn what_is_dequantized_ahead_has_the_bits_of_what_is_dequantized_in_turn() {
    use Policy::{Checkpoint, Keep, Offload};
    let (batch, _) = Case::open("llama_s0").tensors("ref.safetensors").batch("input_ids", "labels");
    let policies = [Checkpoint, Keep, Offload];
    for stream in [false, true] {
        for copies in [Copies::AtOnce, Copies::WhenAwaited] {
            let Some(device) = Device::with(copies) else { return };
            let gpu = Cuda::new(device).unwrap();
            let mut model = packed_model(&gpu, &policies, 4, stream, |_| {});
            let dequantized = || gpu.driver().dequantized();
            let first = step(&mut model, &batch);
            let [all, none] = dequantized();
            assert!(f64::from_bits(first.0).is_finite() && none == 0 && all >= 7 * 3 * 2);
            // Another order between, which ends where it is not expected to.
            model.evaluate(&batch, Variant::Adapted).unwrap();
            let before = dequantized();
            assert!(step(&mut model, &batch) == first, "{copies:?}, streamed: {stream}");
            let [in_turn, ahead] = [0, 1].map(|stream| dequantized()[stream] - before[stream]);
            assert_eq!(in_turn + ahead, all, "no guess was wrong");
            // The first ones of all, q, k and v, which one product takes; of streamed weights also
            // those that a pass to another block begins with: backward to the one that keeps, down.
            assert_eq!(in_turn, if stream { 4 * 3 + 1 } else { 3 });
        }
    }
    if Device::skips_on_a_card("weights that are never dequantized") {
        return;
    }
    let gpu = Cuda::new(Device::with(Copies::Never).unwrap()).unwrap();
    let mut model = packed_model(&gpu, &[Keep; 2], 4, false, |_| {});
    let first = step(&mut model, &batch);
    assert!(step(&mut model, &batch) != first, "what is dequantized ahead matters");
}

/// Launches that dequantize the weights of a block: one for each linear.
const OF_A_BLOCK: usize = 7;

/// Whatever a block keeps, and however its MLP is tiled: a step dequantizes at most twice what there is no room
/// for, of streamed weights of all blocks but one. It begins with the blocks that the step before has left.
#[test]
fn weights_that_stay_are_not_dequantized_again_and_have_the_same_bits() {
    use Policy::{Attention, Checkpoint, Keep, Offload};
    const LAYERS: usize = 4;
    let (batch, _) = Case::open("llama_s0").tensors("ref.safetensors").batch("input_ids", "labels");
    let mixed = [Offload, Checkpoint, Attention, Keep];
    // With a rank of 8 the MLP's adapters are computed together.
    let cases = [
        ([Keep; LAYERS], 4, None),
        ([Checkpoint; LAYERS], 4, None),
        ([Checkpoint; LAYERS], 8, None),
        (mixed, 4, Some(10)),
    ];
    for (policies, rank, tile) in cases {
        for stream in [false, true] {
            let run = |blocks, copies| {
                let gpu = Cuda::new(Device::with(copies)?).unwrap();
                let mut model = packed_model(&gpu, &policies, rank, stream, |settings| {
                    (settings.dequantized_blocks, settings.mlp_tile_length) = (blocks, tile);
                });
                let first = step(&mut model, &batch);
                // Once more, for the order to be known.
                step(&mut model, &batch);
                let before = gpu.driver().dequantized();
                assert!(step(&mut model, &batch) == first, "{blocks} blocks, streamed: {stream}");
                let [in_turn, ahead] =
                    [0, 1].map(|stream| gpu.driver().dequantized()[stream] - before[stream]);
                Some((first, in_turn + ahead))
            };
            let Some((expected, all)) = run(0, Copies::WhenAwaited) else { return };
            // Recomputed, a block needs its down projection for the gradients alone, and has up still there.
            assert!(policies[0] != Checkpoint || all <= LAYERS * (3 * OF_A_BLOCK - 2));
            let most = if stream { 1 } else { LAYERS };
            let copies = [Copies::AtOnce, Copies::WhenAwaited];
            for (blocks, copies) in (1..=most).flat_map(|n| copies.map(|copies| (n, copies))) {
                let (got, dequantized) = run(blocks, copies).unwrap();
                assert!(got == expected, "{policies:?}, {blocks} blocks, streamed: {stream}");
                // The buffers of any size may spare some more.
                let most = 2 * (LAYERS - blocks) * OF_A_BLOCK;
                assert!(
                    dequantized <= most && most < all,
                    "{policies:?}, {blocks} blocks: {dequantized} of {all}"
                );
            }
        }
    }
}
