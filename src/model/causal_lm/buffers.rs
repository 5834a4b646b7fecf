//! The arena's regions as the buffers of a model.

use super::offload::Offload;
use crate::kernels::{Kernels, PlannedMemory};
use crate::model::block::{
    Attended, GradientBuffers, RotaryBuffers, Saved, SavedMlp, Tile, Workspace,
};
use crate::model::spec::ModelSpec;
use crate::plan::layout::{QUERY_SCALE, kept_tiles, rotary_tables};
use crate::plan::{Policy, Settings};

/// The arena's regions.
pub(super) struct Buffers<K: Kernels> {
    /// Inputs of blocks and the output of the last; two that alternate without training.
    pub(super) inputs: Vec<K::Buffer>,
    /// Which of them each block reads, and the last one writes.
    pub(super) places: Vec<usize>,
    /// What waits elsewhere.
    pub(super) offload: Offload<K>,
    /// Of the layers that keep their activations.
    pub(super) kept: Vec<Option<Saved<K::Buffer>>>,
    /// What attention made, of layers that keep that alone or let it wait.
    pub(super) attended: Vec<Attended<K::Buffer>>,
    /// Which of these is a layer's, if any.
    pub(super) attended_places: Vec<Option<usize>>,
    /// Of all other layers, in turn.
    pub(super) shared: Option<Saved<K::Buffer>>,
    pub(super) work: Workspace<K::Buffer>,
    pub(super) head: HeadBuffers<K::Buffer>,
    /// One for each block where text is generated.
    pub(super) caches: Vec<K::Buffer>,
}

pub(super) struct HeadBuffers<B> {
    pub(super) logits: B,
    pub(super) input: B,
    /// The head's input; in the backward pass its gradient.
    pub(super) norm: B,
    pub(super) stats: B,
    /// That gradient while it is summed, where the head comes in tiles.
    pub(super) sum: Option<B>,
    /// Of the input.
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
        let (inputs, places) = inputs::<K>(spec, settings, &offload, arena);
        let (attended, attended_places) = attended::<K>(spec, settings, &offload, arena);
        let keeps = |layer: usize| settings.policies.get(layer) == Some(&Policy::Keep);
        let kept = (0..spec.num_layers)
            .map(|layer| keeps(layer).then(|| kept::<K>(spec, settings, arena, layer)))
            .collect();
        let cached = if settings.cache_tokens > 0 { spec.num_layers } else { 0 };
        let shared = !training || settings.recomputes();
        Buffers {
            inputs,
            places,
            offload,
            kept,
            attended,
            attended_places,
            shared: shared.then(|| saved::<K>(spec, arena, "recompute", ["recompute".to_string()])),
            work: workspace::<K>(spec, settings, arena),
            caches: (0..cached).map(|layer| arena.take(&format!("cache.{layer}"))).collect(),
            head: HeadBuffers {
                logits: arena.take("head.logits"),
                input: arena.take("head.input"),
                norm: arena.take("head.norm"),
                stats: arena.take("head.norm_stats"),
                sum: (training && settings.head_on_host).then(|| arena.take("head.sum")),
                gradient: training.then(|| arena.take("head.gradient")),
            },
        }
    }
}

/// Buffers of the residual stream, and which one holds it before each block and after the last.
fn inputs<K: Kernels>(
    spec: &ModelSpec,
    settings: &Settings,
    offload: &Offload<K>,
    arena: &mut K::Memory,
) -> (Vec<K::Buffer>, Vec<usize>) {
    if !settings.training() {
        let inputs = vec![arena.take("layer.even.input"), arena.take("layer.odd.input")];
        return (inputs, (0..=spec.num_layers).map(|layer| layer % 2).collect());
    }
    let [slots, _] = offload.slots();
    let mut inputs: Vec<_> =
        (0..slots).map(|slot| arena.take(&format!("offload.slot.{slot}"))).collect();
    let mut place = |layer: usize| match offload.slot(layer) {
        Some(slot) => slot,
        None => {
            inputs.push(arena.take(&format!("layer.{layer}.input")));
            inputs.len() - 1
        }
    };
    let places = (0..=spec.num_layers).map(&mut place).collect();
    (inputs, places)
}

/// Of a layer that keeps its activations, tile after tile.
fn kept<K: Kernels>(
    spec: &ModelSpec,
    settings: &Settings,
    arena: &mut K::Memory,
    layer: usize,
) -> Saved<K::Buffer> {
    let tiles = kept_tiles(settings, layer);
    let prefixes = tiles.flat_map(|tiles| std::iter::repeat_n(tiles.prefix, tiles.count));
    saved::<K>(spec, arena, &format!("layer.{layer}"), prefixes)
}

/// Buffers of what attention makes where a layer makes nothing else to stay, and which is a layer's.
fn attended<K: Kernels>(
    spec: &ModelSpec,
    settings: &Settings,
    offload: &Offload<K>,
    arena: &mut K::Memory,
) -> (Vec<Attended<K::Buffer>>, Vec<Option<usize>>) {
    let mut take = |prefix: String| Attended {
        lse: arena.take(&format!("{prefix}.lse")),
        attention: arena.take(&format!("{prefix}.attention")),
    };
    let [_, slots] = offload.slots();
    let mut attended: Vec<_> =
        (0..slots).map(|slot| take(format!("offload.slot.{slot}"))).collect();
    let mut place = |layer: usize| match settings.policies.get(layer)? {
        Policy::OffloadAttention => offload.slot_of_attention(layer),
        policy => policy.spares_attention().then(|| {
            attended.push(take(format!("layer.{layer}")));
            attended.len() - 1
        }),
    };
    let places = (0..spec.num_layers).map(&mut place).collect();
    (attended, places)
}

/// Regions under `prefix`; of the MLP one piece for each tile, under its own.
fn saved<K: Kernels>(
    spec: &ModelSpec,
    arena: &mut K::Memory,
    prefix: &str,
    tiles: impl IntoIterator<Item = String>,
) -> Saved<K::Buffer> {
    let mut take = |name: &str| arena.take(&format!("{prefix}.{name}"));
    Saved {
        qkv: take("qkv"),
        lse: take("lse"),
        attention: take("attention"),
        lora_x: take("attention_lora_x"),
        projected: spec.post_norms.then(|| take("attention_projected")),
        middle: take("middle"),
        mlp: tiles.into_iter().map(|prefix| saved_mlp::<K>(spec, arena, &prefix)).collect(),
    }
}

fn saved_mlp<K: Kernels>(
    spec: &ModelSpec,
    arena: &mut K::Memory,
    prefix: &str,
) -> SavedMlp<K::Buffer> {
    let mut take = |name: &str| arena.take(&format!("{prefix}.{name}"));
    SavedMlp {
        gate: take("gate"),
        up: take("up"),
        lora_x: take("mlp_lora_x"),
        projected: spec.post_norms.then(|| take("mlp_projected")),
    }
}

fn workspace<K: Kernels>(
    spec: &ModelSpec,
    settings: &Settings,
    arena: &mut K::Memory,
) -> Workspace<K::Buffer> {
    Workspace {
        norm: arena.take("work.norm"),
        norm_stats: arena.take("work.norm_stats"),
        mlp: arena.take("work.mlp"),
        lora_pair: arena.take("work.lora_pair"),
        dropped: settings.lora_dropout.then(|| arena.take("work.dropped")),
        normed_qkv: spec.qk_norm.then(|| arena.take("work.normed_qkv")),
        attention: arena.take("work.attention"),
        rotary: RotaryBuffers {
            tables: rotary_tables(spec).map(|names| names.map(|name| arena.take(&name))).collect(),
            query_scale: spec.query_scaling.map(|_| arena.take(QUERY_SCALE)),
        },
        tile: settings.tiled().then(|| Tile {
            tokens: settings.mlp_tile(),
            middle: arena.take("work.tile_middle"),
            gradient: settings.training().then(|| arena.take("work.tile_gradient")),
        }),
        gradients: settings.training().then(|| GradientBuffers {
            mlp: arena.take("work.mlp_gradient"),
            stream: arena.take("work.gradient"),
            norm: arena.take("work.norm_gradient"),
            projected: spec.post_norms.then(|| arena.take("work.projected_gradient")),
            qkv: arena.take("work.qkv_gradient"),
            lora: arena.take("work.lora_gradient"),
        }),
    }
}
