//! What layers offload, in pinned host memory, copied on a stream of their own.

use std::sync::Arc;

use super::driver::{Driver, pin, unpin};
use super::memory::Buffer;
use crate::error::Result;
use crate::plan::settings::OFFLOAD_SLOTS;
use crate::plan::{MemoryPlan, Region};

/// Slots whose copies are awaited apart: of inputs, and of what attention makes.
pub(super) const OFFLOAD_COPIES: usize = 2 * OFFLOAD_SLOTS;

/// The pinned memory, and where each region begins in it.
pub struct Pinned<D: Driver> {
    driver: Arc<D>,
    host: Option<*mut u8>,
    bytes: usize,
    offsets: Vec<usize>,
}

// SAFETY: the pointer is to memory of the driver, which any thread may use; only copies that the
// driver orders touch it.
#[allow(unsafe_code)]
unsafe impl<D: Driver> Send for Pinned<D> {}

impl<D: Driver> Pinned<D> {
    /// No memory where nothing is offloaded.
    pub fn new(driver: &Arc<D>, plan: &MemoryPlan) -> Result<Self> {
        let mut bytes = 0;
        let mut place = |region: &Region| {
            let start = bytes;
            bytes += region.bytes();
            start
        };
        let offsets: Vec<usize> = plan.offloaded.iter().map(&mut place).collect();
        let host = (bytes > 0).then(|| pin(driver.as_ref(), bytes)).transpose()?;
        Ok(Pinned { driver: driver.clone(), host, bytes, offsets })
    }

    /// Region `index`, for `bytes`.
    fn at(&self, index: usize, bytes: usize) -> *mut u8 {
        let end = self.offsets.get(index + 1).copied().unwrap_or(self.bytes);
        assert!(self.offsets[index] + bytes <= end, "what is offloaded is larger than planned");
        let host = self.host.expect("regions are planned");
        host.wrapping_add(self.offsets[index])
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

impl<D: Driver> Drop for Pinned<D> {
    fn drop(&mut self) {
        let Some(host) = self.host else { return };
        // Copies that nobody waited for end before their memory goes.
        for slot in 0..OFFLOAD_COPIES {
            if self.driver.await_copy(slot).is_err() {
                return;
            }
        }
        unpin(self.driver.as_ref(), host, self.bytes);
    }
}
