//! Buffers of the arena, and the parts of a run that they count to.

use serde::ser::{Serialize, SerializeStruct, Serializer};

use super::region_id::RegionId;

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
    /// AdamW's first and second moments in f32.
    OptimizerMoments,
    /// The same in 8 bits, with their scales.
    PackedMoments,
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
    /// On a GPU, two frozen matrices in bf16: the one at work and the next.
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
            Component::PackedMoments => "AdamW moments (8-bit)",
            Component::BlockInputs => "block inputs",
            Component::KeptActivations => "kept activations",
            Component::RecomputeWorkspace => "recompute workspace",
            Component::BlockWorkspace => "block workspace",
            Component::AttentionWorkspace => "attention workspace",
            Component::LogitsChunk => "logits chunk",
            Component::RotaryTables => "rotary tables",
            Component::KvCache => "key/value cache",
            Component::DequantizedWeight => "dequantized matrices",
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

impl RegionType {
    /// Of an element.
    pub fn bytes(self) -> usize {
        match self {
            RegionType::F32 => 4,
            RegionType::Bf16 => 2,
        }
    }
}

/// One buffer, or several that are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Which one; no other has the same.
    pub id: RegionId,
    /// Element type.
    pub dtype: RegionType,
    /// Number of elements, of each piece.
    pub elements: usize,
    /// Pieces that follow each other, each a buffer: the tiles of an MLP that is kept.
    pub count: usize,
    /// How its rows lie where they do not follow each other; only on a GPU.
    pub pitch: Option<Pitch>,
}

/// With its name, and the report row that it counts to.
impl Serialize for Region {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_struct("Region", 6)?;
        out.serialize_field("name", &self.id.to_string())?;
        out.serialize_field("component", &self.id.component())?;
        out.serialize_field("dtype", &self.dtype)?;
        out.serialize_field("elements", &self.elements)?;
        if self.count != 1 {
            out.serialize_field("count", &self.count)?;
        }
        if let Some(pitch) = &self.pitch {
            out.serialize_field("pitch", pitch)?;
        }
        out.end()
    }
}

/// Rows with room behind them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Pitch {
    /// Columns of the matrix itself.
    pub width: usize,
    /// Elements from one row to the next.
    pub stride: usize,
}

/// Regions, and their pieces, start at multiples of this many bytes: what a driver aligns its own
/// allocations to, and so what no library chooses another kernel for.
pub const REGION_ALIGNMENT_BYTES: usize = 256;

impl Region {
    /// One piece, whose rows follow each other.
    pub fn new(id: RegionId, dtype: RegionType, elements: usize) -> Self {
        Region { id, dtype, elements, count: 1, pitch: None }
    }

    /// Bytes in the arena, padding included.
    pub fn bytes(&self) -> usize {
        self.count * self.piece_bytes()
    }

    /// Bytes from one piece to the next.
    pub fn piece_bytes(&self) -> usize {
        (self.elements * self.dtype.bytes()).next_multiple_of(REGION_ALIGNMENT_BYTES)
    }
}

/// The arena: its regions in order.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct MemoryPlan {
    /// All regions.
    pub regions: Vec<Region>,
    /// Outside of the arena: inputs of layers and what attention made, in pinned memory beside a GPU or
    /// in a file.
    pub offloaded: Vec<Region>,
}

impl MemoryPlan {
    /// Bytes of the arena.
    pub fn arena_bytes(&self) -> usize {
        self.regions.iter().map(Region::bytes).sum()
    }

    /// Bytes outside of it.
    pub fn offloaded_bytes(&self) -> usize {
        self.offloaded.iter().map(Region::bytes).sum()
    }

    /// Bytes for each component, largest first.
    pub fn by_component(&self) -> Vec<(Component, usize)> {
        let mut sums = std::collections::BTreeMap::new();
        for region in &self.regions {
            *sums.entry(region.id.component()).or_insert(0) += region.bytes();
        }
        let mut rows: Vec<_> = sums.into_iter().filter(|&(_, bytes)| bytes > 0).collect();
        rows.sort_by_key(|&(component, bytes)| (std::cmp::Reverse(bytes), component));
        rows
    }

    /// The region `id`, if it is planned.
    pub fn region(&self, id: RegionId) -> Option<&Region> {
        self.regions.iter().find(|region| region.id == id)
    }

    pub(super) fn push(&mut self, id: RegionId, elements: usize) {
        self.regions.push(Region::new(id, RegionType::F32, elements));
    }
}
