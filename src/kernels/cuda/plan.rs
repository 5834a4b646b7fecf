//! The memory plan on a GPU: the CPU's regions with activations in bf16, and what the kernels need
//! beside them.

use std::ops::Range;

use crate::model::spec::{LinearRole, MlpKind, ModelSpec};
use crate::plan::{
    AdapterRegion, BlockRegion, Component, CudaRegion, HeadRegion, MemoryPlan, Pitch, Policy,
    Ranks, Region, RegionId, RegionType, Settings, WorkRegion, host_head_tile, layout, waiting,
};

use super::adapted_mlp;
use super::attention::{AttnImplementation, WorkLayout};
use super::frozen::{Extended, STRIDE_ELEMENTS, tail_columns};
use super::loss;

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
        matches!(region.id.component(), Component::Uploads | Component::RotaryTables)
    };
    let regions = plan.regions.iter().filter(staged);
    let words = regions.map(|region| region.elements.next_multiple_of(UPLOAD_WORDS));
    RegionType::F32.bytes() * (words.sum::<usize>() + UPLOAD_WORDS)
}

/// Buffers for dequantized weights of any size, and for tiles of a head on the host; the second one is for
/// what is brought ahead.
pub(super) const DEQUANTIZED: [CudaRegion; 2] =
    [CudaRegion::Dequantized, CudaRegion::DequantizedAhead];

/// Regions that follow each other and are idle while blocks work: those of the head.
pub(super) fn idle_in_blocks(regions: &[Region]) -> Range<usize> {
    let idle = |region: &Region| {
        matches!(region.id, RegionId::Head(_) | RegionId::Cuda(CudaRegion::MlpSums))
    };
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
    let room = extends(settings).then_some(&ranks);
    plan.regions.iter_mut().chain(&mut plan.offloaded).for_each(|it| narrow(spec, room, it));
    for region in &mut plan.regions {
        resize(spec, settings, attention, &ranks, region);
    }
    push_mlp_sums(&mut plan, spec, settings, &ranks);
    let stacked = stacked_elements(spec, settings, &ranks);
    let matrices = dequantized_matrices(spec, settings, &ranks, stacked.is_some());
    if let Some(elements) = buffer_elements(spec, settings, &matrices) {
        for region in &DEQUANTIZED[..if settings.dequantize_ahead { 2 } else { 1 }] {
            push(&mut plan, *region, RegionType::Bf16, elements);
        }
    }
    if let Some(elements) = stacked {
        push(&mut plan, CudaRegion::StackedA, RegionType::Bf16, elements);
        if settings.training() {
            push(&mut plan, CudaRegion::StackedGradient, RegionType::F32, elements);
        }
    }
    push_loss_and_uploads(&mut plan, spec, settings);
    push_dequantized_blocks(&mut plan, matrices, settings);
    let id = RegionId::Cuda(CudaRegion::Workspace);
    let elements = WORKSPACE_BYTES / RegionType::F32.bytes();
    // Where the arena begins: on 256 bytes, as cuBLAS demands of it.
    plan.regions.insert(0, Region::new(id, RegionType::F32, elements));
    plan
}

fn push(plan: &mut MemoryPlan, region: CudaRegion, dtype: RegionType, elements: usize) {
    plan.regions.push(Region::new(RegionId::Cuda(region), dtype, elements));
}

/// Gives a region of the CPU's the size that the GPU's kernels need of it.
fn resize(
    spec: &ModelSpec,
    settings: &Settings,
    attention: AttnImplementation,
    ranks: &Ranks,
    region: &mut Region,
) {
    match region.id {
        RegionId::Work(WorkRegion::Attention) => {
            region.elements = WorkLayout::new(spec, settings, attention).elements();
        }
        // The bf16 copies are operands as they are.
        RegionId::Work(WorkRegion::LoraPair) if settings.bf16_working => region.elements = 0,
        RegionId::Work(WorkRegion::LoraGradient) if extends(settings) => {
            let ranks = TOGETHER.map(|roles| ranks.most(roles));
            let side_by_side = settings.tokens * ranks.into_iter().max().unwrap_or(0);
            region.elements = region.elements.max(side_by_side);
        }
        RegionId::Head(HeadRegion::Logits) => align_rows(spec.vocab_size, region),
        _ => {}
    }
}

/// A region behind those of the head for what the sums of the MLP's adapters take beyond these.
fn push_mlp_sums(plan: &mut MemoryPlan, spec: &ModelSpec, settings: &Settings, ranks: &Ranks) {
    let sums = mlp_sum_elements(spec, settings, ranks).unwrap_or(0);
    let idle = idle_in_blocks(&plan.regions);
    let idle_bytes = plan.regions[idle.clone()].iter().map(Region::bytes).sum::<usize>();
    let room = idle_bytes / RegionType::F32.bytes();
    if sums > room {
        let id = RegionId::Cuda(CudaRegion::MlpSums);
        plan.regions.insert(idle.end, Region::new(id, RegionType::F32, sums - room));
    }
}

fn push_loss_and_uploads(plan: &mut MemoryPlan, spec: &ModelSpec, settings: &Settings) {
    let rows = settings.head(spec.vocab_size).rows;
    push(plan, CudaRegion::Loss, RegionType::F32, loss::elements(rows));
    let chunks = settings.tokens.div_ceil(rows);
    let words = UPLOADS_PER_TOKEN * (settings.tokens + UPLOAD_WORDS * (chunks + 2));
    push(plan, CudaRegion::Uploads, RegionType::F32, words);
}

/// Room in bf16 for the `matrices` of blocks whose weights stay dequantized, a piece for each block.
fn push_dequantized_blocks(
    plan: &mut MemoryPlan,
    matrices: Vec<(LinearRole, Extended)>,
    settings: &Settings,
) {
    if settings.dequantized_blocks == 0 {
        return;
    }
    plan.regions.extend(matrices.into_iter().map(|(role, shape)| Region {
        count: settings.dequantized_blocks,
        pitch: Some(Pitch { width: shape.columns, stride: shape.stride() }),
        ..Region::new(RegionId::DequantizedBlocks(role), RegionType::Bf16, shape.elements())
    }));
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
    if !is_wide(region.id) {
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
    let gated = spec.projections.mlp() == MlpKind::Gated;
    if !(gated && settings.training() && extends(settings) && settings.bf16_working) {
        return None;
    }
    let (rows, width) = (settings.mlp_tile(), spec.intermediate_size);
    let of = |layer| [Gate, Up, Down].map(|role| ranks.of(layer, &[role]));
    let layers = (0..spec.num_layers).map(of);
    layers.filter_map(|ranks| adapted_mlp::sum_elements(ranks, rows, width)).max()
}

/// The matrices in bf16 that products of a block read, with room for the adapter where that lies beside them;
/// q, k and v are one where products take linears `together`.
fn dequantized_matrices(
    spec: &ModelSpec,
    settings: &Settings,
    ranks: &Ranks,
    together: bool,
) -> Vec<(LinearRole, Extended)> {
    let rank = |roles: &[LinearRole]| if extends(settings) { ranks.most(roles) } else { 0 };
    // All layers have the same.
    let (mut linears, stacked) = (spec.linears(0), TOGETHER[0]);
    let mut matrices = Vec::new();
    if together && linears.iter().any(|linear| stacked.contains(&linear.role)) {
        linears.retain(|linear| !stacked.contains(&linear.role));
        let rows = spec.q_width() + 2 * spec.kv_width();
        let shape = Extended { rows, columns: spec.hidden_size, rank: rank(stacked) };
        matrices.push((LinearRole::Qkv, shape));
    }
    matrices.extend(linears.into_iter().map(|linear| {
        let (rows, columns) = (linear.out_features, linear.in_features);
        (linear.role, Extended { rows, columns, rank: rank(&[linear.role]) })
    }));
    matrices
}

/// Elements of a buffer for weights that are no operands where they lie: 4-bit ones, of which the largest has
/// room, and a head on the host, of which a tile has; `None` where all are.
fn buffer_elements(
    spec: &ModelSpec,
    settings: &Settings,
    matrices: &[(LinearRole, Extended)],
) -> Option<usize> {
    if settings.packed_base {
        return matrices.iter().map(|(_, shape)| shape.elements()).max();
    }
    settings.head_on_host.then(|| host_head_tile(spec.vocab_size) * spec.hidden_size)
}

/// Gives an operand of products with adapters room behind its rows: as much in every layer, or a product of
/// what a layer kept would have other strides, and perhaps other bits, than of what is recomputed.
fn leave_room(spec: &ModelSpec, ranks: &Ranks, region: &mut Region) {
    let Some((width, products)) = operand_rows(spec, region.id) else { return };
    let rank = products.iter().map(|roles| ranks.most(roles)).max().unwrap_or(0);
    if rank > 0 {
        let stride = width + tail_columns(rank);
        region.elements = region.elements / width * stride;
        region.pitch = Some(Pitch { width, stride });
    }
}

/// Rows of an odd vocabulary's logits begin on whole lines of the cache.
fn align_rows(width: usize, region: &mut Region) {
    let stride = width.next_multiple_of(STRIDE_ELEMENTS);
    if stride > width {
        region.elements = region.elements.div_ceil(width) * stride;
        region.pitch = Some(Pitch { width, stride });
    }
}

/// Width of the rows of a region that such products read, and the linears of each product: their
/// inputs forward, the gradients of their outputs backward.
fn operand_rows(spec: &ModelSpec, id: RegionId) -> Option<(usize, &'static [Roles])> {
    use LinearRole::{Down, Gate, K, O, Q, Qkv, Up, V};
    const PROJECTIONS: Roles = &[Q, K, V, Qkv];
    let (d, f) = (spec.hidden_size, spec.intermediate_size);
    let qkv = spec.q_width() + 2 * spec.kv_width();
    let fused = spec.projections.mlp() == MlpKind::FusedGated;
    let products: (usize, &[Roles]) = match id {
        RegionId::Block(_, BlockRegion::Attention) => (spec.q_width(), &[&[O]]),
        RegionId::Block(_, BlockRegion::Up) if fused => (spec.up_width(), &[&[Up]]),
        RegionId::Work(WorkRegion::Norm) => (d, &[PROJECTIONS, &[Gate], &[Up]]),
        RegionId::Work(WorkRegion::Mlp) if fused => (f, &[&[Down]]),
        RegionId::Work(WorkRegion::Mlp) => (f, &[&[Down], &[Up]]),
        RegionId::Work(WorkRegion::MlpGradient) => match spec.projections.mlp() {
            MlpKind::FusedGated => return None,
            MlpKind::Gated => (f, &[&[Gate]]),
            MlpKind::Plain => (f, &[&[Up]]),
        },
        RegionId::Work(WorkRegion::QkvGradient) => (qkv, &[PROJECTIONS]),
        RegionId::Work(WorkRegion::ProjectedGradient) => (d, &[&[O], &[Down]]),
        RegionId::Work(WorkRegion::Gradient | WorkRegion::TileGradient) if !spec.post_norms => {
            (d, &[&[O], &[Down]])
        }
        _ => return None,
    };
    Some(products)
}

/// Roles of the linears that one product computes.
type Roles = &'static [LinearRole];

/// Statistics, tables, sums and the optimizer's state stay f32.
fn is_wide(id: RegionId) -> bool {
    match id {
        RegionId::Adapter(region) => region != AdapterRegion::Working,
        RegionId::Block(_, region) => region == BlockRegion::Lse,
        RegionId::Work(region) => matches!(region, WorkRegion::NormStats | WorkRegion::Attention),
        RegionId::Head(region) => matches!(region, HeadRegion::NormStats | HeadRegion::Sum),
        RegionId::Rotary(..) | RegionId::QueryScale => true,
        RegionId::Cache(_) => false,
        RegionId::Cuda(_) | RegionId::DequantizedBlocks(_) => {
            unreachable!("they come after those of the CPU")
        }
    }
}
