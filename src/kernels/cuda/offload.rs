//! What layers offload, in pinned host memory, copied on a stream of their own.

use std::sync::Arc;

use super::driver::Driver;
use super::memory::Buffer;
use super::pinned::PinnedMemory;
use crate::error::Result;
use crate::plan::settings::OFFLOAD_SLOTS;
use crate::plan::{MemoryPlan, Region};

/// Slots whose copies are awaited apart: of inputs, and of what attention makes.
pub(super) const OFFLOAD_COPIES: usize = 2 * OFFLOAD_SLOTS;

/// The pinned memory, and where each region begins in it.
pub struct OffloadStore<D: Driver> {
    driver: Arc<D>,
    host: Option<PinnedMemory<D>>,
    offsets: Vec<usize>,
}

impl<D: Driver> OffloadStore<D> {
    /// No memory where nothing is offloaded.
    pub fn new(driver: &Arc<D>, plan: &MemoryPlan) -> Result<Self> {
        let mut bytes = 0;
        let mut place = |region: &Region| {
            let start = bytes;
            bytes += region.bytes();
            start
        };
        let offsets: Vec<usize> = plan.offloaded.iter().map(&mut place).collect();
        let host = (bytes > 0).then(|| PinnedMemory::new(driver, bytes)).transpose()?;
        Ok(OffloadStore { driver: driver.clone(), host, offsets })
    }

    /// Region `index`, for `bytes`.
    fn at(&self, index: usize, bytes: usize) -> *mut u8 {
        let host = self.host.as_ref().expect("regions are planned");
        let end = self.offsets.get(index + 1).copied().unwrap_or(host.bytes());
        assert!(self.offsets[index] + bytes <= end, "what is offloaded is larger than planned");
        host.start().wrapping_add(self.offsets[index])
    }

    /// Queues the copy of a slot to region `index`, behind everything queued so far.
    pub fn offload(
        &self,
        (from, slot): (&Buffer<D>, usize),
        index: usize,
        elements: usize,
    ) -> Result<()> {
        let (address, elements) = from.whole_rows(0, elements);
        let bytes = elements * from.size();
        self.driver.copy_out(address, self.at(index, bytes), bytes, slot)
    }

    /// Queues the copy back.
    pub fn fetch(
        &self,
        index: usize,
        (to, slot): (&Buffer<D>, usize),
        elements: usize,
    ) -> Result<()> {
        let (address, elements) = to.whole_rows(0, elements);
        let bytes = elements * to.size();
        self.driver.copy_in(self.at(index, bytes), address, bytes, slot)
    }
}

impl<D: Driver> Drop for OffloadStore<D> {
    fn drop(&mut self) {
        let Some(host) = self.host.take() else { return };
        // Copies that nobody waited for end before their memory goes.
        for slot in 0..OFFLOAD_COPIES {
            if self.driver.await_copy(slot).is_err() {
                return host.abandon();
            }
        }
    }
}
