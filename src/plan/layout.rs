//! Names and sizes of the arena's regions.
//!
//! Formulas per token and layer are PERFORMANCE-sheet arithmetic in f32: with D width, W = q + 2·kv
//! columns of q, k, v, Q = H·head_dim, F feed-forward width, ΣR the ranks of the layer's adapters,
//! a kept layer holds `4·(2 + D + W + H + Q + D + 2 + D + (gated ? 2 : 1)·F + ΣR)` bytes per token.

use crate::adapter::LoraTarget;
use crate::model::spec::ModelSpec;

/// Rows of query tokens that one attention tile holds (per head).
pub const ATTENTION_TILE_ROWS: usize = 32;

/// What happens to a layer's activations between forward and backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Kept: no recomputation.
    Keep,
    /// Only the block's input is kept; the rest is recomputed in the backward pass.
    Checkpoint,
}

/// What a region is for: the rows of the memory report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Component {
    /// bf16 LoRA matrices that the forward pass reads.
    AdapterWorking,
    /// f32 LoRA matrices that the optimizer updates.
    AdapterMaster,
    /// f32 gradients of the LoRA matrices.
    AdapterGradients,
    /// AdamW's first and second moments.
    OptimizerMoments,
    /// Inputs of all blocks.
    BlockInputs,
    /// Activations of the layers whose policy is keep.
    KeptActivations,
    /// Activations of the one layer that is being recomputed.
    RecomputeWorkspace,
    /// Gradients and temporaries of one block.
    BlockWorkspace,
    /// Score tiles of attention, for each thread.
    AttentionWorkspace,
    /// Logits of one chunk, their rows of hidden states and gradients.
    LogitsChunk,
    /// Tables of cos and sin.
    RotaryTables,
    /// Keys and values of generated text.
    KvCache,
    /// On a GPU, one frozen matrix in bf16.
    DequantizedWeight,
    /// On a GPU, cuBLAS' workspace.
    LibraryWorkspace,
    /// On a GPU, token ids and rows.
    Uploads,
}

impl Component {
    /// Label in tables.
    pub fn label(self) -> &'static str {
        match self {
            Component::AdapterWorking => "LoRA weights (bf16)",
            Component::AdapterMaster => "LoRA master (f32)",
            Component::AdapterGradients => "LoRA gradients (f32)",
            Component::OptimizerMoments => "AdamW moments (f32)",
            Component::BlockInputs => "block inputs",
            Component::KeptActivations => "kept activations",
            Component::RecomputeWorkspace => "recompute workspace",
            Component::BlockWorkspace => "block workspace",
            Component::AttentionWorkspace => "attention workspace",
            Component::LogitsChunk => "logits chunk",
            Component::RotaryTables => "rotary tables",
            Component::KvCache => "key/value cache",
            Component::DequantizedWeight => "dequantized matrix",
            Component::LibraryWorkspace => "cuBLAS workspace",
            Component::Uploads => "token ids and rows",
        }
    }
}

/// Element type of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RegionType {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    Bf16,
}

/// One named buffer.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Region {
    /// Unique name, such as `layer.3.qkv`.
    pub name: String,
    /// Report row that it counts to.
    pub component: Component,
    /// Element type.
    pub dtype: RegionType,
    /// Number of elements.
    pub elements: usize,
}

/// Regions start at multiples of this many bytes: a cache line, and an AVX-512 vector.
pub const REGION_ALIGNMENT_BYTES: usize = 64;

impl Region {
    /// Bytes in the arena, padding included.
    pub fn bytes(&self) -> usize {
        let size = if self.dtype == RegionType::F32 { 4 } else { 2 };
        (self.elements * size).next_multiple_of(REGION_ALIGNMENT_BYTES)
    }
}

/// What the sizes depend on, beside the model.
#[derive(Debug, Clone)]
pub struct Settings {
    /// T: tokens of the largest micro-batch.
    pub tokens: usize,
    /// Tokens of the longest document in it.
    pub longest_document: usize,
    /// Rows of logits that exist at a time.
    pub logit_rows: usize,
    /// Policy of every layer; empty for a model that never runs backward.
    pub policies: Vec<Policy>,
    /// Adapted linears.
    pub targets: Vec<LoraTarget>,
    /// Whether dropout needs a masked copy of a linear's input.
    pub lora_dropout: bool,
    /// Whether bf16 working copies exist beside the f32 master (`--adapter-dtype bf16`).
    pub bf16_working: bool,
    /// Worker threads.
    pub threads: usize,
    /// Tokens of context for generating text; 0 where nothing is generated.
    pub cache_tokens: usize,
}

impl Settings {
    /// Whether there is a backward pass.
    pub fn training(&self) -> bool {
        !self.policies.is_empty()
    }
}

/// The arena: its regions in order.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct MemoryPlan {
    /// All regions.
    pub regions: Vec<Region>,
}

impl MemoryPlan {
    /// Bytes of the arena.
    pub fn arena_bytes(&self) -> usize {
        self.regions.iter().map(Region::bytes).sum()
    }

    /// Bytes for each component, largest first.
    pub fn by_component(&self) -> Vec<(Component, usize)> {
        let mut sums = std::collections::BTreeMap::new();
        for region in &self.regions {
            *sums.entry(region.component).or_insert(0) += region.bytes();
        }
        let mut rows: Vec<_> = sums.into_iter().collect();
        rows.sort_by_key(|&(component, bytes)| (std::cmp::Reverse(bytes), component));
        rows
    }

    fn push(&mut self, component: Component, name: impl Into<String>, elements: usize) {
        self.push_typed(component, name, elements, RegionType::F32);
    }

    fn push_typed(
        &mut self,
        component: Component,
        name: impl Into<String>,
        elements: usize,
        dtype: RegionType,
    ) {
        self.regions.push(Region { name: name.into(), component, dtype, elements });
    }
}

/// The buffers of a run with `settings`.
pub fn layout(spec: &ModelSpec, settings: &Settings) -> MemoryPlan {
    let mut plan = MemoryPlan { regions: Vec::new() };
    push_adapter(&mut plan, settings);
    let (tokens, d) = (settings.tokens, spec.hidden_size);
    if settings.training() {
        for layer in 0..=spec.num_layers {
            plan.push(Component::BlockInputs, format!("layer.{layer}.input"), tokens * d);
        }
        for (layer, policy) in settings.policies.iter().enumerate() {
            if *policy == Policy::Keep {
                let prefix = format!("layer.{layer}");
                push_saved(&mut plan, spec, settings, Component::KeptActivations, &prefix, layer);
            }
        }
    } else {
        plan.push(Component::BlockInputs, "layer.even.input", tokens * d);
        plan.push(Component::BlockInputs, "layer.odd.input", tokens * d);
    }
    if !settings.training() || settings.policies.contains(&Policy::Checkpoint) {
        let widest = widest_layer(spec, settings);
        let component = Component::RecomputeWorkspace;
        push_saved(&mut plan, spec, settings, component, "recompute", widest);
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

/// Rows of logits that exist at a time: 128 MiB of f32, at least 64 rows, no more than `tokens`.
pub fn logit_rows(spec: &ModelSpec, tokens: usize) -> usize {
    const CHUNK_BYTES: usize = 128 << 20;
    const LEAST_ROWS: usize = 64;
    (CHUNK_BYTES / (spec.vocab_size * size_of::<f32>())).max(LEAST_ROWS).min(tokens)
}

/// Sum of the adapters' ranks in `layer`.
pub fn rank_sum(targets: &[LoraTarget], layer: usize) -> usize {
    targets.iter().filter(|target| target.layer == layer).map(|target| target.r).sum()
}

fn widest_layer(spec: &ModelSpec, settings: &Settings) -> usize {
    (0..spec.num_layers).max_by_key(|&layer| rank_sum(&settings.targets, layer)).unwrap_or(0)
}

fn push_adapter(plan: &mut MemoryPlan, settings: &Settings) {
    let size = |t: &LoraTarget| t.r * (t.in_features + t.out_features);
    let parameters: usize = settings.targets.iter().map(size).sum();
    if settings.bf16_working {
        let dtype = RegionType::Bf16;
        plan.push_typed(Component::AdapterWorking, "adapter.working", parameters, dtype);
    }
    plan.push(Component::AdapterMaster, "adapter.master", parameters);
    if settings.training() {
        plan.push(Component::AdapterGradients, "adapter.gradients", parameters);
        plan.push(Component::OptimizerMoments, "adapter.first_moment", parameters);
        plan.push(Component::OptimizerMoments, "adapter.second_moment", parameters);
    }
}

fn push_saved(
    plan: &mut MemoryPlan,
    spec: &ModelSpec,
    settings: &Settings,
    component: Component,
    prefix: &str,
    layer: usize,
) {
    let (t, d, f) = (settings.tokens, spec.hidden_size, spec.intermediate_size);
    let qkv = spec.q_width() + 2 * spec.kv_width();
    let rows = [
        ("norm1_stats", 2),
        ("norm1", d),
        ("qkv", qkv),
        ("lse", spec.num_heads),
        ("attention", spec.q_width()),
        ("middle", d),
        ("norm2_stats", 2),
        ("norm2", d),
        ("gate", if spec.gated_mlp { f } else { 0 }),
        ("up", f),
        ("lora_x", rank_sum(&settings.targets, layer)),
    ];
    for (name, width) in rows {
        plan.push(component, format!("{prefix}.{name}"), t * width);
    }
}

fn push_workspace(plan: &mut MemoryPlan, spec: &ModelSpec, settings: &Settings) {
    let (t, d, f) = (settings.tokens, spec.hidden_size, spec.intermediate_size);
    let qkv = spec.q_width() + 2 * spec.kv_width();
    let rank = settings.targets.iter().map(|target| target.r).max().unwrap_or(0);
    let widths = |target: &LoraTarget| target.in_features + target.out_features;
    let pair = settings.targets.iter().map(|target| target.r * widths(target)).max().unwrap_or(0);
    let component = Component::BlockWorkspace;
    plan.push(component, "work.mlp", t * f);
    plan.push(component, "work.lora_pair", pair);
    if settings.lora_dropout {
        let widest = settings.targets.iter().map(|target| target.in_features).max().unwrap_or(0);
        plan.push(component, "work.dropped", t * widest);
    }
    if settings.training() {
        plan.push(component, "work.mlp_gradient", t * f);
        plan.push(component, "work.gradient", t * d);
        plan.push(component, "work.norm_gradient", t * d.max(spec.q_width()));
        plan.push(component, "work.qkv_gradient", t * qkv);
        plan.push(component, "work.lora_gradient", t * rank);
    }
    let per_thread = attention_elements_per_thread(spec, settings);
    let component = Component::AttentionWorkspace;
    plan.push(component, "work.attention", settings.threads * per_thread);
    if spec.rotary.is_some() {
        plan.push(Component::RotaryTables, "rotary.cos", t * spec.head_dim / 2);
        plan.push(Component::RotaryTables, "rotary.sin", t * spec.head_dim / 2);
    }
}

/// Two score tiles (one without a backward pass) and the tiles of q, o and their gradients, for the
/// query heads that share a key head; in training also dk and dv of one document.
pub fn attention_elements_per_thread(spec: &ModelSpec, settings: &Settings) -> usize {
    let rows = spec.num_heads / spec.num_kv_heads * ATTENTION_TILE_ROWS;
    let length = settings.longest_document.max(settings.cache_tokens);
    if settings.training() {
        rows * (2 * length + 4 * spec.head_dim) + 2 * length * spec.head_dim
    } else {
        rows * (length + 2 * spec.head_dim)
    }
}

fn push_head(plan: &mut MemoryPlan, spec: &ModelSpec, settings: &Settings) {
    let (rows, d) = (settings.logit_rows, spec.hidden_size);
    let component = Component::LogitsChunk;
    plan.push(component, "head.logits", rows * spec.vocab_size);
    plan.push(component, "head.input", rows * d);
    plan.push(component, "head.norm", rows * d);
    plan.push(component, "head.norm_stats", rows * 2);
    if settings.training() {
        plan.push(component, "head.gradient", rows * d);
        plan.push(component, "head.input_gradient", rows * d);
    }
}
