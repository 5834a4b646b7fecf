//! The memory plan on a GPU: the CPU's regions with activations in bf16, and what the kernels need
//! beside them.

use std::ops::Range;

use crate::model::spec::{LinearRole, MlpKind, ModelSpec};
use crate::plan::{
    Component, MemoryPlan, Pitch, Policy, Ranks, Region, RegionType, Settings, layout, waiting,
};

use super::adapted_mlp;
use super::attention::{AttnImplementation, WorkLayout};
use super::frozen::{STRIDE_ELEMENTS, extended_elements, tail_columns};
use super::loss::TILE_STATISTICS;
use super::memory::PARTIALS;

/// cuBLAS' workspace: what NVIDIA recommends for Hopper, enough for every earlier card.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Token ids, positions, targets, rows of the head twice, boundaries of documents, and two words for
/// each tile of one: a tile a token where documents have no more.
const UPLOADS_PER_TOKEN: usize = 8;
/// Each upload begins on this many words.
pub(super) const UPLOAD_WORDS: usize = 4;

/// Pinned host memory through which a plan's uploads and tables go.
pub fn staged_bytes(plan: &MemoryPlan) -> usize {
    let staged = |region: &&Region| {
        region.component == Component::Uploads || region.component == Component::RotaryTables
    };
    let regions = plan.regions.iter().filter(staged);
    let bytes = regions.map(|region| 4 * region.elements.next_multiple_of(UPLOAD_WORDS));
    bytes.sum::<usize>() + 4 * UPLOAD_WORDS
}

/// Buffers for widened weights; the second one is for what is widened ahead.
pub(super) const DEQUANTIZED: [&str; 2] = ["cuda.dequantized", "cuda.dequantized.ahead"];

/// Room for the matrices of linears that read the same rows, and for their gradients.
pub(super) const STACKED_A: &str = "cuda.stacked_a";
pub(super) const STACKED_GRADIENT: &str = "cuda.stacked_gradient";

/// What the sums of an MLP with adapters take that is not among the buffers of the head.
pub(super) const MLP_SUMS: &str = "cuda.mlp_sums";

/// Regions that follow each other and are idle while blocks work: those of the head.
pub(super) fn idle_in_blocks(regions: &[Region]) -> Range<usize> {
    let idle = |region: &Region| region.name.starts_with("head.") || region.name == MLP_SUMS;
    let start = regions.iter().position(idle).unwrap_or(0);
    start..start + regions[start..].iter().take_while(|region| idle(region)).count()
}

/// Linears that read the same rows; the first ones write bands of one matrix, too.
const TOGETHER: [&[LinearRole]; 2] =
    [&[LinearRole::Q, LinearRole::K, LinearRole::V], &[LinearRole::Gate, LinearRole::Up]];

/// Regions of a run with `settings`.
pub fn cuda_layout(
    spec: &ModelSpec,
    settings: &Settings,
    attention: AttnImplementation,
) -> MemoryPlan {
    let mut plan = layout(spec, settings);
    let ranks = Ranks::new(&settings.targets, spec.num_layers);
    let stacked = stacked_elements(spec, settings, &ranks);
    let room = extends(settings).then_some(&ranks);
    plan.regions.iter_mut().chain(&mut plan.offloaded).for_each(|it| narrow(spec, room, it));
    for region in &mut plan.regions {
        match region.name.as_str() {
            "work.attention" => {
                region.elements = WorkLayout::new(spec, settings, attention).elements();
            }
            // The bf16 copies are operands as they are.
            "work.lora_pair" if settings.bf16_working => region.elements = 0,
            "work.lora_gradient" if extends(settings) => {
                let ranks = TOGETHER.map(|roles| ranks.most(roles));
                let side_by_side = settings.tokens * ranks.into_iter().max().unwrap_or(0);
                region.elements = region.elements.max(side_by_side);
            }
            _ => {}
        }
        if region.name == "head.logits" {
            align_rows(spec.vocab_size, region);
        }
    }
    let sums = mlp_sum_elements(spec, settings, &ranks).unwrap_or(0);
    let idle = idle_in_blocks(&plan.regions);
    let room = plan.regions[idle.clone()].iter().map(|region| region.bytes()).sum::<usize>() / 4;
    if sums > room {
        let sums = Region::new(Component::LogitsChunk, MLP_SUMS, RegionType::F32, sums - room);
        plan.regions.insert(idle.end, sums);
    }
    let mut push = |component, name: &str, dtype, elements| {
        plan.regions.push(Region::new(component, name, dtype, elements));
    };
    let wide = RegionType::F32;
    let elements = widened_elements(spec, settings, &ranks, stacked.is_some());
    for name in &DEQUANTIZED[..if settings.widen_ahead { 2 } else { 1 }] {
        push(Component::DequantizedWeight, name, RegionType::Bf16, elements);
    }
    if let Some(elements) = stacked {
        push(Component::BlockWorkspace, STACKED_A, RegionType::Bf16, elements);
        if settings.training() {
            push(Component::BlockWorkspace, STACKED_GRADIENT, wide, elements);
        }
    }
    // Two words for each f64; a loss for each row, and what its tiles add up to.
    let rows = settings.head(spec.vocab_size).rows;
    let loss = 2 * (PARTIALS + 1) + (1 + TILE_STATISTICS) * rows;
    push(Component::LogitsChunk, "cuda.loss", wide, loss);
    let chunks = settings.tokens.div_ceil(rows);
    let words = UPLOADS_PER_TOKEN * (settings.tokens + UPLOAD_WORDS * (chunks + 2));
    push(Component::Uploads, "cuda.uploads", wide, words);
    let component = Component::LibraryWorkspace;
    let workspace = Region::new(component, "cuda.workspace", wide, WORKSPACE_BYTES / 4);
    // Where the arena begins: on 256 bytes, as cuBLAS demands of it.
    plan.regions.insert(0, workspace);
    plan
}

/// Bytes that a layer of `policy` has in pinned memory between forward and backward.
pub fn waiting_bytes(spec: &ModelSpec, settings: &Settings, policy: Policy) -> usize {
    if !policy.offloads() {
        return 0;
    }
    let ranks = Ranks::new(&settings.targets, spec.num_layers);
    let room = extends(settings).then_some(&ranks);
    let (input, attended) = waiting(spec, settings, 0, policy);
    let regions = input.into_iter().chain(attended.into_iter().flatten());
    let narrowed = regions.map(|mut region| {
        narrow(spec, room, &mut region);
        region.bytes()
    });
    narrowed.sum()
}

/// A region of the CPU's as it is on a GPU: in bf16 but for sums, and with room behind its rows for
/// adapters of those `ranks`.
fn narrow(spec: &ModelSpec, ranks: Option<&Ranks>, region: &mut Region) {
    if !is_wide(&region.name) {
        region.dtype = RegionType::Bf16;
    }
    if let Some(ranks) = ranks {
        leave_room(spec, ranks, region);
    }
}

/// Whether products have the adapters' share in them: dropout is for A alone.
fn extends(settings: &Settings) -> bool {
    !settings.lora_dropout && !settings.targets.is_empty()
}

/// Elements of the A of linears that read the same rows; `None` where there is no use for them.
fn stacked_elements(spec: &ModelSpec, settings: &Settings, ranks: &Ranks) -> Option<usize> {
    let linears = spec.linears(0);
    let several = |roles: &&&[LinearRole]| {
        linears.iter().filter(|linear| roles.contains(&linear.role)).count() > 1
    };
    let groups = TOGETHER.iter().filter(several).filter(|_| extends(settings));
    groups.map(|roles| ranks.most(roles)).max().map(|ranks| ranks * spec.hidden_size)
}

/// f32 elements that the sums of the MLP's adapters take; `None` where no layer has them summed together.
fn mlp_sum_elements(spec: &ModelSpec, settings: &Settings, ranks: &Ranks) -> Option<usize> {
    use LinearRole::{Down, Gate, Up};
    let gated = spec.mlp == MlpKind::Gated;
    if !(gated && settings.training() && extends(settings) && settings.bf16_working) {
        return None;
    }
    let (rows, width) = (settings.mlp_tile(), spec.intermediate_size);
    let of = |layer| [Gate, Up, Down].map(|role| ranks.of(layer, &[role]));
    let layers = (0..spec.num_layers).map(of);
    layers.filter_map(|ranks| adapted_mlp::sum_elements(ranks, rows, width)).max()
}

/// Elements of the largest matrix in bf16, with its adapter where that lies beside it; of q, k and v
/// one below the other.
fn widened_elements(spec: &ModelSpec, settings: &Settings, ranks: &Ranks, together: bool) -> usize {
    // All layers have the same.
    let linears = spec.linears(0).into_iter();
    let plain = linears.map(|linear| linear.in_features * linear.out_features).max();
    let targets = settings.targets.iter().filter(|_| extends(settings));
    let extended = targets.map(|t| extended_elements([t.out_features, t.in_features], t.r)).max();
    let together = together.then(|| {
        let rows = spec.q_width() + 2 * spec.kv_width();
        extended_elements([rows, spec.hidden_size], ranks.most(TOGETHER[0]))
    });
    plain.max(extended).max(together).unwrap_or(0)
}

/// Gives an operand of products with adapters room behind its rows.
fn leave_room(spec: &ModelSpec, ranks: &Ranks, region: &mut Region) {
    let Some((width, products)) = operand_rows(spec, &region.name) else { return };
    let layer = region.name.strip_prefix("layer.").and_then(|rest| rest.split('.').next());
    let layer: Option<usize> = layer.and_then(|number| number.parse().ok());
    let of = |roles: &&[LinearRole]| match layer {
        Some(layer) => ranks.of(layer, roles),
        None => ranks.most(roles),
    };
    let rank = products.iter().map(of).max().unwrap_or(0);
    if rank > 0 {
        let stride = width + tail_columns(rank);
        region.elements = region.elements / width * stride;
        region.pitch = Some(Pitch { width, stride });
    }
}

/// Rows of an odd vocabulary's logits begin on 16 bytes, as tensor cores like them.
fn align_rows(width: usize, region: &mut Region) {
    let stride = width.next_multiple_of(STRIDE_ELEMENTS);
    if stride > width {
        region.elements = region.elements.div_ceil(width) * stride;
        region.pitch = Some(Pitch { width, stride });
    }
}

/// Width of the rows of a region that such products read, and the linears of each product: their
/// inputs forward, the gradients of their outputs backward.
fn operand_rows(spec: &ModelSpec, name: &str) -> Option<(usize, &'static [Product])> {
    use LinearRole::{Down, Gate, K, O, Q, Qkv, Up, V};
    const PROJECTIONS: Product = &[Q, K, V, Qkv];
    let (d, f) = (spec.hidden_size, spec.intermediate_size);
    let qkv = spec.q_width() + 2 * spec.kv_width();
    let fused = spec.mlp == MlpKind::FusedGated;
    match name {
        "work.norm" => Some((d, &[PROJECTIONS, &[Gate], &[Up]])),
        "work.mlp" if fused => Some((f, &[&[Down]])),
        "work.mlp" => Some((f, &[&[Down], &[Up]])),
        "work.mlp_gradient" if fused => None,
        "work.mlp_gradient" if spec.mlp == MlpKind::Gated => Some((f, &[&[Gate]])),
        "work.mlp_gradient" => Some((f, &[&[Up]])),
        _ if fused && name.ends_with(".up") => Some((spec.up_width(), &[&[Up]])),
        "work.qkv_gradient" => Some((qkv, &[PROJECTIONS])),
        "work.projected_gradient" => Some((d, &[&[O], &[Down]])),
        "work.gradient" | "work.tile_gradient" if !spec.post_norms => Some((d, &[&[O], &[Down]])),
        "work.attention" => None,
        _ => name.ends_with(".attention").then_some((spec.q_width(), &[&[O]])),
    }
}

/// Linears that one product computes.
type Product = &'static [LinearRole];

/// Statistics, tables, sums and the optimizer's state stay f32.
fn is_wide(name: &str) -> bool {
    let optimizer = name.starts_with("adapter.") && name != "adapter.working";
    let statistics = name.ends_with("stats") || name.ends_with(".lse");
    let work = ["work.attention", "head.sum"].contains(&name);
    optimizer || statistics || work || name.starts_with("rotary.")
}
