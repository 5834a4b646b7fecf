//! Names and sizes of the arena's regions.
//!
//! Formulas per token and layer, in f32 (docs/memory.md has the rest): with D width, W = q + 2·kv
//! columns of q, k, v, Q = H·head_dim, F feed-forward width, ΣR the ranks of the layer's adapters,
//! a kept layer holds `4·(W + H + Q + D + (gated ? 2 : 1)·F + ΣR)` bytes per token, and `4·2·D` more
//! where it has post-norms. One that keeps the output of attention alone holds `4·(H + Q)`.

use super::ranks::Ranks;
use super::region::{MemoryPlan, Region, RegionType};
use super::region_id::{
    AdapterRegion, BlockRegion, HeadRegion, Owner, RegionId, RotaryKind, RotaryRegion, WorkRegion,
};
use super::settings::{HeadSizes, OFFLOAD_SLOTS, Policy, Settings};
use crate::adapter::LoraTarget;
use crate::model::spec::{BlockHalf, MlpKind, ModelSpec};

/// Rows of query tokens that one attention tile holds (per head).
pub const ATTENTION_TILE_ROWS: usize = 32;
/// Attention tiles of a forward pass that share the packing of a block of keys.
pub const ATTENTION_TILES: usize = 4;
/// Keys that attention takes at a time: the scores of a tile and the block itself stay in the second-level
/// cache.
pub const ATTENTION_KEY_BLOCK: usize = 256;
/// Elements from one row of attention's scores to the next: as many lines as do not fall into the same sets
/// of a cache.
pub const ATTENTION_SCORE_STRIDE: usize = ATTENTION_KEY_BLOCK + 16;
/// Floats in a cache line.
const CACHE_LINE: usize = 16;

/// The buffers of a run with `settings`.
pub fn layout(spec: &ModelSpec, settings: &Settings) -> MemoryPlan {
    let mut plan = MemoryPlan { regions: Vec::new(), offloaded: Vec::new() };
    let ranks = Ranks::new(&settings.targets, spec.num_layers);
    push_adapter(&mut plan, settings);
    let (tokens, d) = (settings.tokens, spec.hidden_size);
    if settings.training() {
        push_inputs(&mut plan, spec, settings);
        for (layer, policy) in settings.policies.iter().enumerate() {
            match policy {
                Policy::Keep => {
                    let ranks = |half: BlockHalf| ranks.of(layer, half.roles());
                    push_kept(&mut plan, spec, settings, layer, ranks);
                }
                Policy::Attention | Policy::AttentionOffloadInput => {
                    push_attention_output(&mut plan, spec, Owner::Layer(layer), tokens);
                }
                Policy::Checkpoint | Policy::Offload | Policy::OffloadAttention => {}
            }
        }
    } else {
        for owner in [Owner::Even, Owner::Odd] {
            plan.push(RegionId::Block(owner, BlockRegion::Input), tokens * d);
        }
    }
    if !settings.training() || settings.recomputes() {
        push_shared(&mut plan, spec, settings, &ranks);
    }
    if settings.cache_tokens > 0 {
        for layer in 0..spec.num_layers {
            let elements = settings.cache_tokens * 2 * spec.kv_width();
            plan.push(RegionId::Cache(layer), elements);
        }
    }
    push_workspace(&mut plan, spec, settings);
    push_head(&mut plan, spec, settings);
    plan
}

fn push_adapter(plan: &mut MemoryPlan, settings: &Settings) {
    let parameters: usize = settings.targets.iter().map(|target| target.shape.elements()).sum();
    if settings.bf16_working {
        let id = RegionId::Adapter(AdapterRegion::Working);
        plan.regions.push(Region::new(id, RegionType::Bf16, parameters));
    }
    plan.push(RegionId::Adapter(AdapterRegion::Master), parameters);
    if settings.training() {
        plan.push(RegionId::Adapter(AdapterRegion::Gradients), parameters);
        push_moments(plan, settings);
    }
}

/// The optimizer's moments; codes are bytes in f32 words, a whole number of blocks.
fn push_moments(plan: &mut MemoryPlan, settings: &Settings) {
    use AdapterRegion::*;
    let moments = settings.moments();
    let mut push = |region, elements| plan.push(RegionId::Adapter(region), elements);
    push(FirstMoment, moments.float_elements);
    push(SecondMoment, moments.float_elements);
    if moments.blocks > 0 {
        for (codes, absmax) in [(FirstCodes, FirstAbsmax), (SecondCodes, SecondAbsmax)] {
            push(codes, moments.code_words());
            push(absmax, moments.blocks);
        }
    }
}

/// Inputs of the blocks and the output of the last one, and the output of attention where it waits.
fn push_inputs(plan: &mut MemoryPlan, spec: &ModelSpec, settings: &Settings) {
    let elements = settings.tokens * spec.hidden_size;
    let policy = |layer: usize| settings.policies.get(layer).copied();
    for layer in 0..=spec.num_layers {
        if !policy(layer).is_some_and(Policy::offloads) {
            plan.push(RegionId::Block(Owner::Layer(layer), BlockRegion::Input), elements);
        }
    }
    let layers = settings.policies.iter().enumerate();
    let waits = layers.map(|(layer, policy)| waiting(spec, settings, layer, *policy));
    let (inputs, attended): (Vec<_>, Vec<_>) = waits.unzip();
    plan.offloaded.extend(inputs.into_iter().flatten());
    plan.offloaded.extend(attended.into_iter().flatten().flatten());
    for slot in 0..OFFLOAD_SLOTS.min(settings.offloaded().len()) {
        plan.push(RegionId::Block(Owner::Slot(slot), BlockRegion::Input), elements);
    }
    for slot in 0..OFFLOAD_SLOTS.min(settings.offloaded_attention().len()) {
        push_attention_output(plan, spec, Owner::Slot(slot), settings.tokens);
    }
}

/// Regions of a layer that wait outside of the arena: its input, and what attention makes.
pub fn waiting(
    spec: &ModelSpec,
    settings: &Settings,
    layer: usize,
    policy: Policy,
) -> (Option<Region>, Option<[Region; 2]>) {
    let region = |(region, width)| {
        // Those of all layers have room for the same adapters: they share the slots.
        let id = RegionId::Block(Owner::Offloaded(layer), region);
        Region::new(id, RegionType::F32, settings.tokens * width)
    };
    let input = || region((BlockRegion::Input, spec.hidden_size));
    let attended = || attended_rows(spec).map(region);
    (policy.offloads().then(input), (policy == Policy::OffloadAttention).then(attended))
}

/// A layer that keeps its activations: buffers with a piece for every tile of its MLP.
fn push_kept(
    plan: &mut MemoryPlan,
    spec: &ModelSpec,
    settings: &Settings,
    layer: usize,
    ranks: impl Fn(BlockHalf) -> usize,
) {
    push_attention(plan, spec, Owner::Layer(layer), settings.tokens, ranks(BlockHalf::Attention));
    push_attention_output(plan, spec, Owner::Layer(layer), settings.tokens);
    for tiles in kept_tiles(settings, layer) {
        push_mlp(plan, spec, &tiles, ranks(BlockHalf::Mlp));
    }
}

/// Buffers that all other layers share, in turn, with one tile of an MLP.
fn push_shared(plan: &mut MemoryPlan, spec: &ModelSpec, settings: &Settings, ranks: &Ranks) {
    let widest = |half: BlockHalf| ranks.most(half.roles());
    let owner = Owner::Recompute;
    push_attention(plan, spec, owner, settings.tokens, widest(BlockHalf::Attention));
    let tile = Tiles { owner, count: 1, tokens: settings.mlp_tile() };
    push_mlp(plan, spec, &tile, widest(BlockHalf::Mlp));
    if settings.needs_shared_attention_buffer() {
        push_attention_output(plan, spec, owner, settings.tokens);
    }
}

fn push_attention_output(plan: &mut MemoryPlan, spec: &ModelSpec, owner: Owner, tokens: usize) {
    for (region, width) in attended_rows(spec) {
        plan.push(RegionId::Block(owner, region), tokens * width);
    }
}

/// Regions of what attention makes, its statistics and its output, and their elements for a token.
fn attended_rows(spec: &ModelSpec) -> [(BlockRegion, usize); 2] {
    [(BlockRegion::Lse, spec.num_heads), (BlockRegion::Attention, spec.q_width())]
}

/// Tiles of an MLP that are equally long.
pub struct Tiles {
    /// Whose regions the tiles have.
    pub owner: Owner,
    /// How many tiles there are: the pieces of each region.
    pub count: usize,
    /// Tokens of each tile.
    pub tokens: usize,
}

/// Tiles of the longest pass of a layer that keeps its activations, in order; the last one may be
/// shorter than all others.
pub fn kept_tiles(settings: &Settings, layer: usize) -> impl Iterator<Item = Tiles> {
    let (tokens, step) = (settings.mlp_tile(), settings.mlp_tile().max(1));
    let (whole, rest) = ((settings.tokens / step).max(1), settings.tokens % step);
    let last = Tiles { owner: Owner::LastTile(layer), count: 1, tokens: rest };
    let whole = Tiles { owner: Owner::Layer(layer), count: whole, tokens };
    std::iter::once(whole).chain((rest > 0).then_some(last))
}

fn push_attention(
    plan: &mut MemoryPlan,
    spec: &ModelSpec,
    owner: Owner,
    tokens: usize,
    ranks: usize,
) {
    let d = spec.hidden_size;
    let rows = [
        (BlockRegion::Qkv, spec.q_width() + 2 * spec.kv_width()),
        (BlockRegion::AttentionLoraX, ranks),
        (BlockRegion::Middle, d),
    ];
    let projected = spec.post_norms.then_some((BlockRegion::AttentionProjected, d));
    for (region, width) in rows.into_iter().chain(projected) {
        plan.push(RegionId::Block(owner, region), tokens * width);
    }
}

fn push_mlp(plan: &mut MemoryPlan, spec: &ModelSpec, tiles: &Tiles, ranks: usize) {
    let Tiles { owner, count, tokens } = *tiles;
    let mut push = |region: BlockRegion, width: usize| {
        let id = RegionId::Block(owner, region);
        let region = Region::new(id, RegionType::F32, tokens * width);
        plan.regions.push(Region { count, ..region });
    };
    let gate = if spec.projections.mlp() == MlpKind::Gated { spec.intermediate_size } else { 0 };
    push(BlockRegion::Gate, gate);
    push(BlockRegion::Up, spec.up_width());
    push(BlockRegion::MlpLoraX, ranks);
    if spec.post_norms {
        push(BlockRegion::MlpProjected, spec.hidden_size);
    }
}

fn push_workspace(plan: &mut MemoryPlan, spec: &ModelSpec, settings: &Settings) {
    let (t, d, f) = (settings.tokens, spec.hidden_size, spec.intermediate_size);
    let qkv = spec.q_width() + 2 * spec.kv_width();
    let shapes = || settings.targets.iter().map(|target| target.shape);
    let rank = shapes().map(|shape| shape.rank).max().unwrap_or(0);
    let pair = shapes().map(|shape| shape.elements()).max().unwrap_or(0);
    let tile = settings.mlp_tile();
    let mut push = |region, elements| plan.push(RegionId::Work(region), elements);
    push(WorkRegion::Norm, t * d);
    push(WorkRegion::NormStats, t * 2);
    if spec.qk_norm.is_some() {
        push(WorkRegion::NormedQkv, t * qkv);
    }
    push(WorkRegion::Mlp, tile * f);
    push(WorkRegion::LoraPair, pair);
    if settings.tiled() {
        push(WorkRegion::TileMiddle, tile * d);
        if settings.training() {
            push(WorkRegion::TileGradient, tile * d);
        }
    }
    if settings.lora_dropout {
        let input = |target: &LoraTarget| match BlockHalf::of(target.role) {
            BlockHalf::Attention => t * target.shape.in_features,
            BlockHalf::Mlp => tile * target.shape.in_features,
        };
        let most = settings.targets.iter().map(input).max().unwrap_or(0);
        push(WorkRegion::Dropped, most);
    }
    if settings.training() {
        push(WorkRegion::MlpGradient, tile * f);
        push(WorkRegion::Gradient, t * d);
        push(WorkRegion::NormGradient, t * d.max(spec.q_width()));
        if spec.post_norms {
            push(WorkRegion::ProjectedGradient, t * d);
        }
        push(WorkRegion::QkvGradient, t * qkv);
        push(WorkRegion::LoraGradient, t * rank);
    }
    let per_thread = attention_elements_per_thread(spec, settings);
    plan.push(RegionId::Work(WorkRegion::Attention), settings.threads * per_thread);
    for id in rotary_tables(spec).flatten() {
        plan.push(id, t * spec.rotary_dim / 2);
    }
    if spec.query_scaling.is_some() {
        plan.push(RegionId::QueryScale, t);
    }
}

/// Regions of each rotary embedding: cos and sin.
pub fn rotary_tables(spec: &ModelSpec) -> impl Iterator<Item = [RegionId; 2]> {
    let rotaries = spec.rotaries().zip([RotaryKind::Global, RotaryKind::Local]);
    let tables = [RotaryRegion::Cos, RotaryRegion::Sin];
    rotaries.map(move |(_, which)| tables.map(|table| RegionId::Rotary(which, table)))
}

/// [`attention_elements`] of a model's run.
fn attention_elements_per_thread(spec: &ModelSpec, settings: &Settings) -> usize {
    let longest = settings.longest_document.max(settings.cache_tokens);
    let heads = spec.num_heads / spec.num_kv_heads;
    attention_elements((heads, spec.head_dim), longest, settings.training())
}

/// Elements that a thread of attention works in, for `heads` query heads of width `d` that share a key head:
/// tiles of q, o, their gradients and scores, and a block of keys and values as products take them.
pub fn attention_elements((heads, d): (usize, usize), longest: usize, training: bool) -> usize {
    let (rows, keys) = (heads * ATTENTION_TILE_ROWS.min(longest), longest.min(ATTENTION_KEY_BLOCK));
    let turned = d * keys.next_multiple_of(CACHE_LINE);
    let plain = d.next_multiple_of(CACHE_LINE) * keys;
    let forward = turned + plain + rows * ATTENTION_SCORE_STRIDE;
    let forward = forward + ATTENTION_TILES * rows * (2 * d + 2);
    let backward = 2 * turned + plain + 2 * keys * d + rows * (3 * d + 2 * ATTENTION_SCORE_STRIDE);
    let most = if training { forward.max(backward) } else { forward };
    most.next_multiple_of(CACHE_LINE)
}

fn push_head(plan: &mut MemoryPlan, spec: &ModelSpec, settings: &Settings) {
    let (HeadSizes { rows, logits, .. }, d) = (settings.head(spec.vocab_size), spec.hidden_size);
    let mut push = |region, elements| plan.push(RegionId::Head(region), elements);
    push(HeadRegion::Logits, logits);
    push(HeadRegion::Input, rows * d);
    push(HeadRegion::Norm, rows * d);
    push(HeadRegion::NormStats, rows * 2);
    if settings.training() {
        push(HeadRegion::Gradient, rows * d);
        if settings.head_on_host {
            push(HeadRegion::Sum, rows * d);
        }
    }
}
