//! Buffers of the arena.

use serde::ser::{Serialize, SerializeStruct, Serializer};

use super::component::Component;
use super::region_id::RegionId;

/// Element type of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RegionType {
    /// A float of 4 bytes.
    F32,
    /// A bfloat16 of 2 bytes.
    Bf16,
}

impl RegionType {
    /// Bytes of an element.
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
    /// Which region it is; no other has the same id.
    pub id: RegionId,
    /// Element type.
    pub dtype: RegionType,
    /// Number of elements, of each piece.
    pub elements: usize,
    /// Pieces that follow each other, each a buffer: the tiles of an MLP that is kept, the blocks whose
    /// weights stay dequantized.
    pub count: usize,
    /// How the matrix' rows lie where they do not follow each other; only on a GPU.
    pub pitch: Option<Pitch>,
}

/// A region in JSON has its name, and the report row that it counts to.
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

/// How rows lie that have room behind them.
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
    /// A region of one piece, whose rows follow each other.
    pub fn new(id: RegionId, dtype: RegionType, elements: usize) -> Self {
        Region { id, dtype, elements, count: 1, pitch: None }
    }

    /// Bytes that the region takes in the arena, padding included.
    pub fn bytes(&self) -> usize {
        self.count.saturating_mul(self.piece_bytes())
    }

    /// Bytes from one piece to the next.
    pub fn piece_bytes(&self) -> usize {
        let bytes = self.elements.saturating_mul(self.dtype.bytes());
        bytes.checked_next_multiple_of(REGION_ALIGNMENT_BYTES).unwrap_or(usize::MAX)
    }
}

/// The arena: its regions in order.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct MemoryPlan {
    /// All regions of the arena.
    pub regions: Vec<Region>,
    /// Regions outside of the arena: inputs of layers and what attention made, in pinned memory beside a GPU
    /// or in a file.
    pub offloaded: Vec<Region>,
}

impl MemoryPlan {
    /// Bytes of the arena; of more than can be counted, `usize::MAX`, which no system has.
    pub fn arena_bytes(&self) -> usize {
        self.regions.iter().map(Region::bytes).fold(0, usize::saturating_add)
    }

    /// Bytes of the regions outside of the arena.
    pub fn offloaded_bytes(&self) -> usize {
        self.offloaded.iter().map(Region::bytes).fold(0, usize::saturating_add)
    }

    /// Bytes for each component, largest first.
    pub fn by_component(&self) -> Vec<(Component, usize)> {
        let mut sums = std::collections::BTreeMap::new();
        for region in &self.regions {
            let sum = sums.entry(region.id.component()).or_insert(0usize);
            *sum = sum.saturating_add(region.bytes());
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
