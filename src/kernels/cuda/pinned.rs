//! Pinned memory of the host, which copies need not wait for and kernels read at the same address.

use std::ops::Range;
use std::ptr;
use std::sync::Arc;

use super::driver::Driver;
use crate::error::Result;
use crate::ledger::pinned;

/// A piece of it, counted, and given back when it is dropped.
pub(super) struct PinnedMemory<D: Driver> {
    driver: Arc<D>,
    /// Null once it was abandoned.
    start: *mut u8,
    bytes: usize,
}

// SAFETY: the pointer is to memory of the driver, which any thread may use.
#[allow(unsafe_code)]
unsafe impl<D: Driver> Send for PinnedMemory<D> {}
// SAFETY: shared access gives out nothing but its address and length.
#[allow(unsafe_code)]
unsafe impl<D: Driver> Sync for PinnedMemory<D> {}

impl<D: Driver> PinnedMemory<D> {
    /// Memory of any content.
    ///
    /// # Errors
    /// `Budget` when there is not enough.
    pub fn new(driver: &Arc<D>, bytes: usize) -> Result<Self> {
        let start = driver.allocate_staging(bytes)?;
        pinned::add(bytes as u64);
        Ok(PinnedMemory { driver: driver.clone(), start, bytes })
    }

    /// The memory's first byte.
    pub fn start(&self) -> *mut u8 {
        self.start
    }

    /// The memory's length.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Some of it, to write.
    ///
    /// # Safety
    /// No copy that reads or writes these bytes may be on its way.
    ///
    /// # Panics
    /// When the range does not lie inside.
    #[allow(unsafe_code)]
    pub unsafe fn slice_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        assert!(range.start <= range.end && range.end <= self.bytes, "inside of pinned memory");
        // SAFETY: in bounds as asserted; `&mut self` is exclusive, and no copy touches these bytes.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// Leaves it to the driver, where a copy that nobody could wait for may still be on its way.
    pub fn abandon(mut self) {
        self.start = ptr::null_mut();
    }
}

impl<D: Driver> Drop for PinnedMemory<D> {
    fn drop(&mut self) {
        if !self.start.is_null() {
            self.driver.free_staging(self.start, self.bytes);
            pinned::remove(self.bytes as u64);
        }
    }
}
