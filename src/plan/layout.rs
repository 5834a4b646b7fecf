//! Names and sizes of the arena's regions.
//!
//! Formulas per token and layer, in f32 (docs/memory.md has the rest): with D width, W = q + 2·kv
//! columns of q, k, v, Q = H·head_dim, F feed-forward width, ΣR the ranks of the layer's adapters,
//! a kept layer holds `4·(W + H + Q + D + (gated ? 2 : 1)·F + ΣR)` bytes per token, and `4·2·D` more
//! where it has post-norms. One that keeps the output of attention alone holds `4·(H + Q)`.

use super::ranks::Ranks;
use super::region::{Component, MemoryPlan, Region, RegionType};
use super::settings::{Half, HeadSizes, OFFLOAD_SLOTS, Policy, Settings};
use crate::adapter::LoraTarget;
use crate::model::spec::{MlpKind, ModelSpec};

/// Rows of query tokens that one attention tile holds (per head).
pub const ATTENTION_TILE_ROWS: usize = 32;
/// Tiles of a forward pass that share the packing of a block of keys.
pub const ATTENTION_TILES: usize = 4;
/// Keys of a block: the scores of a tile and the block itself stay in the second-level cache.
pub const ATTENTION_KEY_BLOCK: usize = 256;
/// Elements between rows of scores: as many lines as do not fall into the same sets of a cache.
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
                    let ranks = |half: Half| ranks.of(layer, half.roles());
                    push_kept(&mut plan, spec, settings, layer, ranks);
                }
                Policy::Attention | Policy::OffloadInput => {
                    let component = Component::KeptActivations;
                    for (name, width) in attended_rows(spec) {
                        plan.push(component, format!("layer.{layer}.{name}"), tokens * width);
                    }
                }
                Policy::Checkpoint | Policy::Offload | Policy::OffloadAttention => {}
            }
        }
    } else {
        plan.push(Component::BlockInputs, "layer.even.input", tokens * d);
        plan.push(Component::BlockInputs, "layer.odd.input", tokens * d);
    }
    if !settings.training() || settings.recomputes() {
        push_shared(&mut plan, spec, settings, &ranks);
    }
    if settings.cache_tokens > 0 {
        for layer in 0..spec.num_layers {
            let elements = settings.cache_tokens * 2 * spec.kv_width();
            plan.push(Component::KvCache, format!("cache.{layer}"), elements);
        }
    }
    push_workspace(&mut plan, spec, settings);
    push_head(&mut plan, spec, settings);
    plan
}

fn push_adapter(plan: &mut MemoryPlan, settings: &Settings) {
    let size = |t: &LoraTarget| t.r * (t.in_features + t.out_features);
    let parameters: usize = settings.targets.iter().map(size).sum();
    if settings.bf16_working {
        let (component, dtype) = (Component::AdapterWorking, RegionType::Bf16);
        plan.regions.push(Region::new(component, "adapter.working", dtype, parameters));
    }
    plan.push(Component::AdapterMaster, "adapter.master", parameters);
    if settings.training() {
        plan.push(Component::AdapterGradients, "adapter.gradients", parameters);
        push_moments(plan, settings);
    }
}

/// Codes are bytes in f32 words, a whole number of blocks.
fn push_moments(plan: &mut MemoryPlan, settings: &Settings) {
    let moments = settings.moments();
    let floats = moments.float_elements;
    plan.push(Component::OptimizerMoments, "adapter.first_moment", floats);
    plan.push(Component::OptimizerMoments, "adapter.second_moment", floats);
    if moments.blocks > 0 {
        for moment in ["first", "second"] {
            let component = Component::PackedMoments;
            plan.push(component, format!("adapter.{moment}_codes"), moments.code_words());
            plan.push(component, format!("adapter.{moment}_absmax"), moments.blocks);
        }
    }
}

/// Inputs of the blocks and the output of the last one, and the output of attention where it waits.
fn push_inputs(plan: &mut MemoryPlan, spec: &ModelSpec, settings: &Settings) {
    let (component, elements) = (Component::BlockInputs, settings.tokens * spec.hidden_size);
    let policy = |layer: usize| settings.policies.get(layer).copied();
    for layer in 0..=spec.num_layers {
        if !policy(layer).is_some_and(Policy::offloads) {
            plan.push(component, format!("layer.{layer}.input"), elements);
        }
    }
    let layers = settings.policies.iter().enumerate();
    let waits = layers.map(|(layer, policy)| waiting(spec, settings, layer, *policy));
    let (inputs, attended): (Vec<_>, Vec<_>) = waits.unzip();
    plan.offloaded.extend(inputs.into_iter().flatten());
    plan.offloaded.extend(attended.into_iter().flatten().flatten());
    for slot in 0..OFFLOAD_SLOTS.min(settings.offloaded().len()) {
        plan.push(component, format!("offload.slot.{slot}"), elements);
    }
    for slot in 0..OFFLOAD_SLOTS.min(settings.offloaded_attention().len()) {
        for (name, width) in attended_rows(spec) {
            let (component, name) =
                (Component::KeptActivations, format!("offload.slot.{slot}.{name}"));
            plan.push(component, name, settings.tokens * width);
        }
    }
}

/// Regions of a layer that wait outside of the arena: its input, and what attention makes.
pub fn waiting(
    spec: &ModelSpec,
    settings: &Settings,
    layer: usize,
    policy: Policy,
) -> (Option<Region>, Option<[Region; 2]>) {
    let region = |component, name: &str, width: usize| {
        // Those of all layers have room for the same adapters: they share the slots.
        let name = format!("offloaded.{layer}.{name}");
        Region::new(component, name, RegionType::F32, settings.tokens * width)
    };
    let input = || region(Component::BlockInputs, "input", spec.hidden_size);
    let made = |(name, width)| region(Component::KeptActivations, name, width);
    let attended = || attended_rows(spec).map(made);
    (policy.offloads().then(input), (policy == Policy::OffloadAttention).then(attended))
}

/// A layer that keeps its activations: buffers with a piece for every tile of its MLP.
fn push_kept(
    plan: &mut MemoryPlan,
    spec: &ModelSpec,
    settings: &Settings,
    layer: usize,
    ranks: impl Fn(Half) -> usize,
) {
    let (component, prefix) = (Component::KeptActivations, format!("layer.{layer}"));
    push_attention(plan, spec, (component, &prefix), settings.tokens, ranks(Half::Attention));
    for tiles in kept_tiles(settings, layer) {
        push_mlp(plan, spec, component, &tiles, ranks(Half::Mlp));
    }
}

/// All other layers, in turn: one tile's MLP.
fn push_shared(plan: &mut MemoryPlan, spec: &ModelSpec, settings: &Settings, ranks: &Ranks) {
    let widest = |half: Half| ranks.most(half.roles());
    let (component, prefix) = (Component::RecomputeWorkspace, "recompute".to_string());
    push_attention(plan, spec, (component, &prefix), settings.tokens, widest(Half::Attention));
    let tile = Tiles { prefix, count: 1, tokens: settings.mlp_tile() };
    push_mlp(plan, spec, component, &tile, widest(Half::Mlp));
    if !settings.shares_attention() {
        // Each layer has its own.
        let own = attended_rows(spec).map(|(name, _)| format!("recompute.{name}"));
        let regions = plan.regions.iter_mut().filter(|region| own.contains(&region.name));
        regions.for_each(|region| region.elements = 0);
    }
}

/// What attention makes, for a token: its statistics and its output.
fn attended_rows(spec: &ModelSpec) -> [(&'static str, usize); 2] {
    [("lse", spec.num_heads), ("attention", spec.q_width())]
}

/// Tiles of an MLP that are equally long.
pub struct Tiles {
    /// Of their regions' names.
    pub prefix: String,
    /// How many: the pieces of each region.
    pub count: usize,
    /// Tokens of each.
    pub tokens: usize,
}

/// Tiles of the longest pass of a layer that keeps its activations, in order; the last one may be
/// shorter than all others.
pub fn kept_tiles(settings: &Settings, layer: usize) -> impl Iterator<Item = Tiles> {
    let (tokens, step) = (settings.mlp_tile(), settings.mlp_tile().max(1));
    let (whole, rest) = ((settings.tokens / step).max(1), settings.tokens % step);
    let prefix = format!("layer.{layer}");
    let last = Tiles { prefix: format!("{prefix}.last_tile"), count: 1, tokens: rest };
    let whole = Tiles { prefix, count: whole, tokens };
    std::iter::once(whole).chain((rest > 0).then_some(last))
}

fn push_attention(
    plan: &mut MemoryPlan,
    spec: &ModelSpec,
    (component, prefix): (Component, &str),
    tokens: usize,
    ranks: usize,
) {
    let d = spec.hidden_size;
    let [statistics, output] = attended_rows(spec);
    let rows = [
        ("qkv", spec.q_width() + 2 * spec.kv_width()),
        statistics,
        output,
        ("attention_lora_x", ranks),
        ("middle", d),
    ];
    for (name, width) in rows {
        plan.push(component, format!("{prefix}.{name}"), tokens * width);
    }
    if spec.post_norms {
        plan.push(component, format!("{prefix}.attention_projected"), tokens * d);
    }
}

fn push_mlp(
    plan: &mut MemoryPlan,
    spec: &ModelSpec,
    component: Component,
    tiles: &Tiles,
    ranks: usize,
) {
    let Tiles { prefix, count, tokens } = tiles;
    let mut push = |name: &str, width: usize| {
        let (name, dtype) = (format!("{prefix}.{name}"), RegionType::F32);
        let region = Region::new(component, name, dtype, tokens * width);
        plan.regions.push(Region { count: *count, ..region });
    };
    let gate = if spec.mlp == MlpKind::Gated { spec.intermediate_size } else { 0 };
    push("gate", gate);
    push("up", spec.up_width());
    push("mlp_lora_x", ranks);
    if spec.post_norms {
        push("mlp_projected", spec.hidden_size);
    }
}

fn push_workspace(plan: &mut MemoryPlan, spec: &ModelSpec, settings: &Settings) {
    let (t, d, f) = (settings.tokens, spec.hidden_size, spec.intermediate_size);
    let qkv = spec.q_width() + 2 * spec.kv_width();
    let rank = settings.targets.iter().map(|target| target.r).max().unwrap_or(0);
    let widths = |target: &LoraTarget| target.in_features + target.out_features;
    let pair = settings.targets.iter().map(|target| target.r * widths(target)).max().unwrap_or(0);
    let (component, tile) = (Component::BlockWorkspace, settings.mlp_tile());
    plan.push(component, "work.norm", t * d);
    plan.push(component, "work.norm_stats", t * 2);
    if spec.qk_norm {
        plan.push(component, "work.normed_qkv", t * qkv);
    }
    plan.push(component, "work.mlp", tile * f);
    plan.push(component, "work.lora_pair", pair);
    if settings.tiled() {
        plan.push(component, "work.tile_middle", tile * d);
        if settings.training() {
            plan.push(component, "work.tile_gradient", tile * d);
        }
    }
    if settings.lora_dropout {
        let input = |target: &LoraTarget| match Half::of(target.role) {
            Half::Attention => t * target.in_features,
            Half::Mlp => tile * target.in_features,
        };
        let most = settings.targets.iter().map(input).max().unwrap_or(0);
        plan.push(component, "work.dropped", most);
    }
    if settings.training() {
        plan.push(component, "work.mlp_gradient", tile * f);
        plan.push(component, "work.gradient", t * d);
        plan.push(component, "work.norm_gradient", t * d.max(spec.q_width()));
        if spec.post_norms {
            plan.push(component, "work.projected_gradient", t * d);
        }
        plan.push(component, "work.qkv_gradient", t * qkv);
        plan.push(component, "work.lora_gradient", t * rank);
    }
    let per_thread = attention_elements_per_thread(spec, settings);
    let component = Component::AttentionWorkspace;
    plan.push(component, "work.attention", settings.threads * per_thread);
    for name in rotary_tables(spec).flatten() {
        plan.push(Component::RotaryTables, name, t * spec.rotary_dim / 2);
    }
    if spec.query_scaling.is_some() {
        plan.push(Component::RotaryTables, QUERY_SCALE, t);
    }
}

/// Region of what q is multiplied by.
pub const QUERY_SCALE: &str = "rotary.query_scale";

/// Regions of each rotary embedding: cos and sin.
pub fn rotary_tables(spec: &ModelSpec) -> impl Iterator<Item = [String; 2]> {
    let prefixes = spec.rotaries().zip(["rotary", "rotary.local"]);
    prefixes.map(|(_, prefix)| ["cos", "sin"].map(|name| format!("{prefix}.{name}")))
}

/// [`attention_elements`] of a model's run.
pub fn attention_elements_per_thread(spec: &ModelSpec, settings: &Settings) -> usize {
    let longest = settings.longest_document.max(settings.cache_tokens);
    let heads = spec.num_heads / spec.num_kv_heads;
    attention_elements((heads, spec.head_dim), longest, settings.training())
}

/// What a thread of attention works in, for `heads` query heads of width `d` that share a key head:
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
    let component = Component::LogitsChunk;
    plan.push(component, "head.logits", logits);
    plan.push(component, "head.input", rows * d);
    plan.push(component, "head.norm", rows * d);
    plan.push(component, "head.norm_stats", rows * 2);
    if settings.training() {
        plan.push(component, "head.gradient", rows * d);
        if settings.head_on_host {
            plan.push(component, "head.sum", rows * d);
        }
    }
}
