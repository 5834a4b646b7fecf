//! What a backend hands out: the regions of a plan, and weights that take turns.

use super::Kernels;
use crate::model::streaming::WeightStream;
use crate::plan::MemoryPlan;

/// The memory of a plan, handed out region by region.
pub trait PlannedMemory<K: Kernels> {
    /// Hands out the region `name`.
    ///
    /// # Panics
    /// When the plan has no such region, or it was taken before: the plan and its user disagree,
    /// which is a bug, never bad input.
    fn take(&mut self, name: &str) -> K::Buffer;

    /// Hands out the bf16 region `name`.
    ///
    /// # Panics
    /// As [`take`](PlannedMemory::take).
    fn take_half(&mut self, name: &str) -> K::HalfBuffer;

    /// Bytes that were allocated.
    fn bytes(&self) -> usize;

    /// Names of the regions that nobody has taken.
    fn untaken(&self) -> Vec<&str>;

    /// Tells how much of each region is in memory: all of it, unless the backend knows better.
    fn residency(&self, plan: &MemoryPlan) -> Residency {
        let bytes: Vec<u64> = plan.regions.iter().map(|region| region.bytes() as u64).collect();
        Box::new(move || bytes.clone())
    }
}

/// The matrices of all blocks, and what brings them in turn to where they are used.
pub struct StreamedWeights<W> {
    /// In the order in which they came.
    pub blocks: Vec<Vec<W>>,
    /// To be told which block is used.
    pub stream: Box<dyn WeightStream>,
}

/// Bytes of each region of a plan that are in memory now.
pub type Residency = Box<dyn Fn() -> Vec<u64> + Send + Sync>;
