//! The memory plan on a GPU: the CPU's regions with activations in bf16, and what the kernels need
//! beside them.

use crate::model::spec::ModelSpec;
use crate::plan::{Component, MemoryPlan, Region, RegionType, Settings, layout};

use super::attention::WorkLayout;
use super::memory::PARTIALS;

/// cuBLAS' workspace: what NVIDIA recommends for Hopper, enough for every earlier card.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Token ids, positions, targets, rows of the head twice, and boundaries of documents.
const UPLOADS_PER_TOKEN: usize = 6;
/// Each upload begins on this many words.
pub(super) const UPLOAD_WORDS: usize = 4;

/// Regions of a run with `settings`.
pub fn cuda_layout(spec: &ModelSpec, settings: &Settings) -> MemoryPlan {
    let mut plan = layout(spec, settings);
    for region in &mut plan.regions {
        if !is_wide(&region.name) {
            region.dtype = RegionType::Bf16;
        }
        match region.name.as_str() {
            "work.attention" => {
                region.elements = WorkLayout::new(spec, settings).elements();
            }
            // The bf16 copies are operands as they are.
            "work.lora_pair" if settings.bf16_working => region.elements = 0,
            _ => {}
        }
    }
    plan.offloaded.iter_mut().for_each(|region| region.dtype = RegionType::Bf16);
    let mut push = |component, name: &str, dtype, elements| {
        plan.regions.push(Region { name: name.to_string(), component, dtype, elements });
    };
    let linears = (0..spec.num_layers).flat_map(|layer| spec.linears(layer));
    let largest = linears.map(|linear| linear.in_features * linear.out_features).max();
    let wide = RegionType::F32;
    let elements = largest.unwrap_or(0);
    push(Component::DequantizedWeight, "cuda.dequantized", RegionType::Bf16, elements);
    push(Component::LibraryWorkspace, "cuda.workspace", wide, WORKSPACE_BYTES / 4);
    // Two words for each f64.
    let loss = 2 * (PARTIALS + 1) + settings.logit_rows;
    push(Component::LogitsChunk, "cuda.loss", wide, loss);
    let chunks = settings.tokens.div_ceil(settings.logit_rows.max(1));
    let words = UPLOADS_PER_TOKEN * (settings.tokens + UPLOAD_WORDS * (chunks + 2));
    push(Component::Uploads, "cuda.uploads", wide, words);
    plan
}

/// Statistics, tables, sums and the optimizer's state stay f32.
fn is_wide(name: &str) -> bool {
    let optimizer = name.starts_with("adapter.") && name != "adapter.working";
    let statistics = name.ends_with("stats") || name.ends_with(".lse");
    optimizer || statistics || name.starts_with("rotary.") || name == "work.attention"
}
