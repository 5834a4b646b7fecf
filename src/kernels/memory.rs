//! Where a backend keeps what it computes with: the regions of a plan, frozen weights, which may take
//! turns, and what waits elsewhere.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use crate::error::Result;
use crate::kernels::TokenLosses;
use crate::kernels::cpu::FrozenMatrix;
use crate::model::spec::ModelSpec;
use crate::model::streaming::{StreamedPages, WeightStream};
use crate::plan::{MemoryPlan, OnHost, Region, RegionId, Settings, WeightParts};

/// The memory of a plan, handed out region by region.
pub trait PlannedMemory<K: Storage> {
    /// Hands out the region `id`, or its next piece.
    ///
    /// # Panics
    /// When the plan has no such region, or all of it was taken: the plan and its user disagree,
    /// which is a bug, never bad input.
    fn take(&mut self, id: RegionId) -> K::Buffer;

    /// Hands out the bf16 region `id`.
    ///
    /// # Panics
    /// As [`take`](PlannedMemory::take).
    fn take_bf16(&mut self, id: RegionId) -> K::Bf16Buffer;

    /// Bytes that were allocated.
    fn bytes(&self) -> usize;

    /// The regions that nobody has taken.
    fn untaken(&self) -> Vec<RegionId>;

    /// Tells how much of each region is in memory: all of it, unless the backend knows better.
    fn residency(&self, plan: &MemoryPlan) -> Residency {
        let bytes: Vec<u64> = plan.regions.iter().map(|region| region.bytes() as u64).collect();
        Box::new(move || bytes.clone())
    }
}

/// What is left of a plan's regions, and where it begins in their memory.
pub struct Untaken {
    regions: HashMap<RegionId, (usize, Region)>,
}

impl Untaken {
    /// All `regions`, one behind the other.
    pub fn new(regions: &[Region]) -> Self {
        let mut end = 0usize;
        let place = |region: &Region| {
            let start = end;
            end = end.saturating_add(region.bytes());
            (region.id, (start, *region))
        };
        Untaken { regions: regions.iter().map(place).collect() }
    }

    /// The next piece of region `id`: its first byte, and what it is.
    ///
    /// # Panics
    /// As [`PlannedMemory::take`].
    pub fn take(&mut self, id: RegionId) -> (usize, Region) {
        let left = self.regions.get_mut(&id).filter(|(_, left)| left.count > 0);
        let (start, left) = left.expect("region is planned, and taken once");
        let piece = (*start, Region { count: 1, ..*left });
        *start += left.piece_bytes();
        left.count -= 1;
        piece
    }

    /// What is left, in no order.
    pub fn left(&self) -> impl Iterator<Item = (usize, &Region)> {
        let regions = self.regions.values().filter(|(_, region)| region.count > 0);
        regions.map(|(start, region)| (*start, region))
    }
}

/// The matrices of all blocks, and what brings them in turn to where they are used.
pub struct StreamedWeights<W> {
    /// The blocks' matrices, in the order in which they came.
    pub blocks: Vec<Vec<W>>,
    /// To be told which block is used.
    pub stream: Box<dyn WeightStream>,
}

/// Bytes of each region of a plan that are in memory now.
pub type Residency = Box<dyn Fn() -> Vec<u64> + Send + Sync>;

/// Where a backend keeps what it computes with: planned buffers, frozen weights, and what waits
/// elsewhere.
pub trait Storage: Clone + Sync {
    /// A planned region of activations or gradients.
    type Buffer: Send;
    /// A planned region of bf16 copies of the trained weights.
    type Bf16Buffer: Send;
    /// All planned regions.
    type Memory: PlannedMemory<Self>;
    /// A running sum of losses in f64.
    type LossSum: Send;
    /// Where what layers offload waits between forward and backward.
    type Offload: Send;
    /// A frozen matrix `[out, in]`, dense or in 4-bit blocks.
    type Weight: Send + Sync;
    /// A frozen vector: norm weight or bias.
    type Vector: Send + Sync;

    /// The regions that this backend needs for a run with `settings`.
    fn plan(&self, spec: &ModelSpec, settings: &Settings) -> MemoryPlan;

    /// Allocates a plan in one piece, zeroed.
    ///
    /// # Errors
    /// `Budget` when the memory cannot be had.
    fn allocate(&self, plan: &MemoryPlan) -> Result<Self::Memory>;

    /// A pass over all blocks begins: what a backend learned of the order of weights in the last one is of use
    /// again.
    fn begin_pass(&self) {}

    /// Makes room for the plan's offloaded regions; `folder` is for a backend that offloads to a file.
    ///
    /// # Errors
    /// `Budget` or `Io` when there is none.
    fn offload_store(&self, plan: &MemoryPlan, folder: Option<&Path>) -> Result<Self::Offload>;

    /// Begins to copy the first `elements` of the slot's buffer, whole rows of a matrix, to the offloaded
    /// region `index`; `from` is the buffer and the slot's number.
    fn offload(
        &self,
        store: &mut Self::Offload,
        from: (&Self::Buffer, usize),
        index: usize,
        elements: usize,
    );

    /// Begins to copy the offloaded region `index` into the slot's buffer; `to` is the buffer and the
    /// slot's number.
    fn fetch(
        &self,
        store: &mut Self::Offload,
        index: usize,
        to: (&mut Self::Buffer, usize),
        elements: usize,
    );

    /// Orders everything that is queued after this call behind the last copy to or from `slot`. Call it
    /// before that slot's buffer is read or overwritten.
    fn settle(&self, store: &mut Self::Offload, slot: usize);

    /// Tells of copies that failed, where nobody else does.
    ///
    /// # Errors
    /// `Io`, the first one.
    fn offload_failure(&self, store: &mut Self::Offload) -> Result<()>;

    /// The backend with the embedding, or that and the head, kept in the host's memory, where that is
    /// another place.
    fn with_on_host(self, _what: OnHost) -> Self {
        self
    }

    /// Whether the head is in the host's memory, and that another place.
    fn head_is_on_host(&self) -> bool {
        false
    }

    /// Takes frozen matrices over: on a GPU in one piece of memory, as a driver rounds every piece up
    /// to 2 MiB.
    ///
    /// # Errors
    /// `Budget` when the memory cannot be had.
    fn upload_weights(&self, weights: Vec<FrozenMatrix>) -> Result<Vec<Self::Weight>>;

    /// Takes the embedding over, to where it was told to keep it; `is_head` where it makes logits, too.
    ///
    /// # Errors
    /// `Budget` when the memory cannot be had.
    fn upload_embedding(&self, table: FrozenMatrix, is_head: bool) -> Result<Self::Weight>;

    /// Takes a head over that is a matrix of its own, to where it was told to keep it.
    ///
    /// # Errors
    /// `Budget` when the memory cannot be had.
    fn upload_head(&self, head: FrozenMatrix) -> Result<Self::Weight>;

    /// What is in memory of a matrix, as of a block's linear.
    fn bytes_in_memory(&self, weight: &Self::Weight) -> WeightParts;

    /// Takes over the matrices of blocks, of which two are in its memory at a time; `pages` are
    /// those of the file that they lie in.
    ///
    /// # Errors
    /// `Budget` when the memory cannot be had.
    fn stream_weights(
        &self,
        blocks: Vec<Vec<FrozenMatrix>>,
        pages: StreamedPages,
    ) -> Result<StreamedWeights<Self::Weight>>;

    /// Takes a frozen vector over.
    ///
    /// # Errors
    /// `Budget` when the memory cannot be had.
    fn upload_vector(&self, vector: Vec<f32>) -> Result<Self::Vector>;

    /// The elements of `range` in f32; a copy where the program does not see the memory.
    ///
    /// # Errors
    /// What went wrong in the operations before.
    fn values<'a>(&self, buffer: &'a Self::Buffer, range: Range<usize>) -> Result<Cow<'a, [f32]>>;

    /// Overwrites elements from `offset` on.
    fn set_values(&self, values: &[f32], buffer: &mut Self::Buffer, offset: usize);

    /// Rounds `elements` f32 weights to their bf16 copies.
    fn round(&self, from: &Self::Buffer, to: &mut Self::Bf16Buffer, elements: usize);

    /// Lets `fill` write the first `elements` of each table.
    fn write_tables<const N: usize>(
        &self,
        tables: [&mut Self::Buffer; N],
        elements: usize,
        fill: impl FnOnce([&mut [f32]; N]),
    );

    /// Sums that begin at zero.
    fn loss_sum(&self, memory: &mut Self::Memory) -> Self::LossSum;

    /// Sets sums to zero.
    fn clear_loss(&self, sum: &mut Self::LossSum);

    /// The values of sums.
    ///
    /// # Errors
    /// What went wrong in the operations before.
    fn read_loss(&self, sum: &Self::LossSum) -> Result<TokenLosses>;
}
