//! The arena's regions as the buffers of a model.

use super::offload::Offload;
use crate::kernels::{Kernels, PlannedMemory};
use crate::model::block::{
    AdapterWork, AttentionOutput, GradientBuffers, RotaryBuffers, Saved, SavedMlp, TileBuffers,
    Workspace,
};
use crate::model::spec::ModelSpec;
use crate::plan::layout::{kept_tiles, rotary_tables};
use crate::plan::{BlockRegion, HeadRegion, Owner, Policy, RegionId, Settings, WorkRegion};

/// The arena's regions.
pub(super) struct Buffers<K: Kernels> {
    /// Inputs of blocks and the output of the last; two that alternate without training.
    pub(super) inputs: Vec<K::Buffer>,
    /// Index in `inputs` of what each block reads, and of what the last one writes.
    pub(super) input_indices: Vec<usize>,
    /// What waits elsewhere.
    pub(super) offload: Offload<K>,
    /// Activations of the layers that keep them.
    pub(super) kept: Vec<Option<Saved<K::Buffer>>>,
    /// What attention made.
    pub(super) attended: Vec<AttentionOutput<K::Buffer>>,
    /// Index in `attended` of what each block has: its own, that of its slot, or that of all others.
    pub(super) attended_indices: Vec<usize>,
    /// Activations of all other layers, in turn.
    pub(super) shared: Option<Saved<K::Buffer>>,
    pub(super) work: Workspace<K::Buffer>,
    pub(super) head: HeadBuffers<K::Buffer>,
    /// Keys and values of each block, where text is generated.
    pub(super) caches: Vec<K::Buffer>,
}

pub(super) struct HeadBuffers<B> {
    pub(super) logits: B,
    pub(super) input: B,
    /// The head's input; in the backward pass its gradient.
    pub(super) norm: B,
    pub(super) stats: B,
    /// The gradient of the head's input while it is summed, where the head comes in tiles.
    pub(super) sum: Option<B>,
    /// The gradient of the final norm's input.
    pub(super) gradient: Option<B>,
}

impl<K: Kernels> Buffers<K> {
    pub(super) fn new(
        spec: &ModelSpec,
        settings: &Settings,
        store: K::Offload,
        arena: &mut K::Memory,
    ) -> Self {
        let training = settings.training();
        let widths = [spec.hidden_size, spec.num_heads, spec.q_width()];
        let offload = Offload::new(store, settings, widths);
        let (inputs, input_indices) = inputs::<K>(spec, settings, &offload, arena);
        let (attended, attended_indices) = attended::<K>(spec, settings, &offload, arena);
        let keeps = |layer: usize| settings.policies.get(layer) == Some(&Policy::Keep);
        let kept = (0..spec.num_layers)
            .map(|layer| keeps(layer).then(|| kept::<K>(spec, settings, arena, layer)))
            .collect();
        let cached = if settings.cache_tokens > 0 { spec.num_layers } else { 0 };
        let shared = !training || settings.recomputes();
        let caches = (0..cached).map(|layer| arena.take(RegionId::Cache(layer))).collect();
        Buffers {
            inputs,
            input_indices,
            offload,
            kept,
            attended,
            attended_indices,
            shared: shared.then(|| saved::<K>(spec, arena, Owner::Recompute, [Owner::Recompute])),
            work: workspace::<K>(spec, settings, arena),
            caches,
            head: head_buffers::<K>(settings, arena),
        }
    }
}

fn head_buffers<K: Kernels>(settings: &Settings, arena: &mut K::Memory) -> HeadBuffers<K::Buffer> {
    let training = settings.training();
    let mut take = |region| arena.take(RegionId::Head(region));
    HeadBuffers {
        logits: take(HeadRegion::Logits),
        input: take(HeadRegion::Input),
        norm: take(HeadRegion::Norm),
        stats: take(HeadRegion::NormStats),
        sum: (training && settings.head_on_host).then(|| take(HeadRegion::Sum)),
        gradient: training.then(|| take(HeadRegion::Gradient)),
    }
}

/// Buffers of the residual stream, and which one holds it before each block and after the last.
fn inputs<K: Kernels>(
    spec: &ModelSpec,
    settings: &Settings,
    offload: &Offload<K>,
    arena: &mut K::Memory,
) -> (Vec<K::Buffer>, Vec<usize>) {
    let mut take = |owner| arena.take(RegionId::Block(owner, BlockRegion::Input));
    if !settings.training() {
        let inputs = vec![take(Owner::Even), take(Owner::Odd)];
        return (inputs, (0..=spec.num_layers).map(|layer| layer % 2).collect());
    }
    let [slots, _] = offload.slots();
    let mut inputs: Vec<_> = (0..slots).map(|slot| take(Owner::Slot(slot))).collect();
    let mut index = |layer: usize| match offload.slot(layer) {
        Some(slot) => slot,
        None => {
            inputs.push(take(Owner::Layer(layer)));
            inputs.len() - 1
        }
    };
    let indices = (0..=spec.num_layers).map(&mut index).collect();
    (inputs, indices)
}

/// The activations of a layer that keeps them, tile after tile.
fn kept<K: Kernels>(
    spec: &ModelSpec,
    settings: &Settings,
    arena: &mut K::Memory,
    layer: usize,
) -> Saved<K::Buffer> {
    let tiles = kept_tiles(settings, layer);
    let owners = tiles.flat_map(|tiles| std::iter::repeat_n(tiles.owner, tiles.count));
    saved::<K>(spec, arena, Owner::Layer(layer), owners)
}

/// Buffers of what attention makes, and which of them each block has.
fn attended<K: Kernels>(
    spec: &ModelSpec,
    settings: &Settings,
    offload: &Offload<K>,
    arena: &mut K::Memory,
) -> (Vec<AttentionOutput<K::Buffer>>, Vec<usize>) {
    let mut take = |owner| AttentionOutput {
        lse: arena.take(RegionId::Block(owner, BlockRegion::Lse)),
        output: arena.take(RegionId::Block(owner, BlockRegion::Attention)),
    };
    let [_, slots] = offload.slots();
    let mut attended: Vec<_> = (0..slots).map(|slot| take(Owner::Slot(slot))).collect();
    let shared = slots;
    attended.extend(settings.needs_shared_attention_buffer().then(|| take(Owner::Recompute)));
    let mut index = |layer: usize| match settings.policies.get(layer) {
        Some(Policy::OffloadAttention) => offload.slot_of_attention(layer).expect("it waits"),
        Some(Policy::Keep | Policy::Attention | Policy::AttentionOffloadInput) => {
            attended.push(take(Owner::Layer(layer)));
            attended.len() - 1
        }
        Some(Policy::Checkpoint | Policy::Offload) | None => shared,
    };
    let indices = (0..spec.num_layers).map(&mut index).collect();
    (attended, indices)
}

/// Regions of `owner`; of the MLP one piece for each tile, of its own.
fn saved<K: Kernels>(
    spec: &ModelSpec,
    arena: &mut K::Memory,
    owner: Owner,
    tiles: impl IntoIterator<Item = Owner>,
) -> Saved<K::Buffer> {
    let mut take = |region| arena.take(RegionId::Block(owner, region));
    Saved {
        qkv: take(BlockRegion::Qkv),
        lora_x: take(BlockRegion::AttentionLoraX),
        projected: spec.post_norms.then(|| take(BlockRegion::AttentionProjected)),
        middle: take(BlockRegion::Middle),
        mlp: tiles.into_iter().map(|owner| saved_mlp::<K>(spec, arena, owner)).collect(),
    }
}

fn saved_mlp<K: Kernels>(
    spec: &ModelSpec,
    arena: &mut K::Memory,
    owner: Owner,
) -> SavedMlp<K::Buffer> {
    let mut take = |region| arena.take(RegionId::Block(owner, region));
    SavedMlp {
        gate: take(BlockRegion::Gate),
        up: take(BlockRegion::Up),
        lora_x: take(BlockRegion::MlpLoraX),
        projected: spec.post_norms.then(|| take(BlockRegion::MlpProjected)),
    }
}

fn workspace<K: Kernels>(
    spec: &ModelSpec,
    settings: &Settings,
    arena: &mut K::Memory,
) -> Workspace<K::Buffer> {
    let rotary = RotaryBuffers {
        tables: rotary_tables(spec).map(|ids| ids.map(|id| arena.take(id))).collect(),
        query_scale: spec.query_scaling.map(|_| arena.take(RegionId::QueryScale)),
    };
    let mut take = |region| arena.take(RegionId::Work(region));
    Workspace {
        norm: take(WorkRegion::Norm),
        norm_stats: take(WorkRegion::NormStats),
        mlp: take(WorkRegion::Mlp),
        adapter: AdapterWork {
            pair: take(WorkRegion::LoraPair),
            dropped: settings.lora_dropout.then(|| take(WorkRegion::Dropped)),
            inner_gradient: settings.training().then(|| take(WorkRegion::LoraGradient)),
        },
        normed_qkv: spec.qk_norm.map(|_| take(WorkRegion::NormedQkv)),
        attention: take(WorkRegion::Attention),
        rotary,
        tile: settings.tiled().then(|| TileBuffers {
            tokens: settings.mlp_tile(),
            middle: take(WorkRegion::TileMiddle),
            gradient: settings.training().then(|| take(WorkRegion::TileGradient)),
        }),
        gradients: settings.training().then(|| GradientBuffers {
            mlp: take(WorkRegion::MlpGradient),
            stream: take(WorkRegion::Gradient),
            norm: take(WorkRegion::NormGradient),
            projected: spec.post_norms.then(|| take(WorkRegion::ProjectedGradient)),
            qkv: take(WorkRegion::QkvGradient),
        }),
    }
}
