//! Device memory with bounds: allocations that free themselves, regions of a plan, and views.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::Cuda;
use super::driver::{Address, Argument, Driver};
use crate::error::Result;
use crate::kernels::{Columns, PlannedMemory};
use crate::plan::{Region, RegionType};

/// Blocks of the first stage of a sum: a constant, so that sums are the same in every run.
pub const PARTIALS: usize = 256;

/// Memory that is given back when its last user is gone.
pub struct Allocation<D: Driver> {
    driver: Arc<D>,
    address: Address,
    bytes: usize,
}

impl<D: Driver> Allocation<D> {
    /// Of any content.
    ///
    /// # Errors
    /// `Budget` when there is not enough.
    pub fn new(driver: &Arc<D>, bytes: usize) -> Result<Arc<Self>> {
        let address = driver.allocate(bytes.max(1))?;
        Ok(Arc::new(Allocation { driver: driver.clone(), address, bytes }))
    }

    /// First byte.
    pub fn address(&self) -> Address {
        self.address
    }

    /// Length.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl<D: Driver> Drop for Allocation<D> {
    fn drop(&mut self) {
        self.driver.free(self.address);
    }
}

/// A planned region, or a part of one.
pub struct Buffer<D: Driver> {
    pub(super) address: Address,
    pub(super) elements: usize,
    pub(super) dtype: RegionType,
    memory: Arc<Allocation<D>>,
}

impl<D: Driver> Clone for Buffer<D> {
    fn clone(&self) -> Self {
        Buffer { memory: self.memory.clone(), ..*self }
    }
}

impl<D: Driver> Buffer<D> {
    /// Bytes of an element.
    pub fn size(&self) -> usize {
        if self.dtype == RegionType::F32 { 4 } else { 2 }
    }

    /// Elements `range` as a buffer of their own over the same memory.
    pub(super) fn part(&self, range: Range<usize>) -> Self {
        let address = self.at(range.clone());
        Buffer { address, elements: range.len(), dtype: self.dtype, memory: self.memory.clone() }
    }

    /// Address of `range`, which must lie inside.
    ///
    /// # Panics
    /// When it does not: a bug of the caller, caught here and not by the card.
    pub(super) fn at(&self, range: Range<usize>) -> Address {
        let inside = range.start <= range.end && range.end <= self.elements;
        assert!(inside, "{range:?} is outside a buffer of {} elements", self.elements);
        self.address + (range.start * self.size()) as u64
    }

    /// Address of `rows` rows of a band of columns.
    pub(super) fn band(&self, band: Columns, rows: usize) -> Address {
        let last = rows.saturating_sub(1) * band.stride + band.offset + band.width;
        self.at(band.offset..last.max(band.offset))
    }

    /// The first `elements` as an argument.
    pub(super) fn argument(&self, elements: usize) -> Argument {
        Argument::Pointer(self.at(0..elements))
    }
}

/// The regions of a plan in one allocation.
pub struct Memory<D: Driver> {
    allocation: Arc<Allocation<D>>,
    free: HashMap<String, Buffer<D>>,
}

impl<D: Driver> Memory<D> {
    pub(super) fn new(allocation: Arc<Allocation<D>>, regions: &[Region]) -> Self {
        let (mut free, mut offset) = (HashMap::new(), 0);
        for region in regions {
            let buffer = Buffer {
                address: allocation.address() + offset,
                elements: region.elements,
                dtype: region.dtype,
                memory: allocation.clone(),
            };
            free.insert(region.name.clone(), buffer);
            offset += region.bytes() as u64;
        }
        Memory { allocation, free }
    }

    /// The optimizer's buffers begin at zero; all others hold whatever was there.
    pub(super) fn zero_optimizer(&self, driver: &Arc<D>) -> Result<()> {
        let optimizer = self.free.iter().filter(|(name, _)| name.starts_with("adapter."));
        for (_, buffer) in optimizer {
            driver.zero(buffer.address, buffer.elements * buffer.size())?;
        }
        Ok(())
    }

    pub(super) fn region(&mut self, name: &str) -> Buffer<D> {
        self.free.remove(name).expect("region is planned, and taken once")
    }
}

impl<D: Driver> PlannedMemory<Cuda<D>> for Memory<D> {
    fn take(&mut self, name: &str) -> Buffer<D> {
        self.region(name)
    }

    fn take_half(&mut self, name: &str) -> Buffer<D> {
        let buffer = self.region(name);
        assert_eq!(buffer.dtype, RegionType::Bf16, "{name} has another element type");
        buffer
    }

    fn bytes(&self) -> usize {
        self.allocation.bytes()
    }

    fn untaken(&self) -> Vec<&str> {
        self.free.keys().map(String::as_str).collect()
    }
}
