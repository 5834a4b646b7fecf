//! Device memory with bounds: allocations that free themselves, regions of a plan, and views.

use std::ops::Range;
use std::sync::Arc;

use super::Cuda;
use super::driver::{Address, Argument, Driver};
use crate::error::Result;
use crate::kernels::{Columns, PlannedMemory, Untaken};
use crate::plan::{Pitch, Region, RegionId, RegionType};

/// Blocks of the first stage of a sum: a constant, so that sums are the same in every run.
pub const PARTIALS: usize = 256;

/// Memory that is given back when its last user is gone.
pub struct Allocation<D: Driver> {
    driver: Arc<D>,
    address: Address,
    bytes: usize,
}

impl<D: Driver> Allocation<D> {
    /// Memory of any content.
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
    /// Rows of such a buffer are addressed as rows only.
    pitch: Option<Pitch>,
    memory: Arc<Allocation<D>>,
}

/// The first rows of a matrix in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rows {
    /// First element.
    pub address: Address,
    /// Elements from one row to the next.
    pub stride: usize,
}

impl Rows {
    /// The matrix as an argument.
    pub fn argument(self) -> Argument {
        Argument::Pointer(self.address)
    }

    /// The columns from `first` on, of a matrix of bf16.
    pub fn column(self, first: usize) -> Rows {
        Rows { address: self.address + 2 * first as u64, ..self }
    }

    /// The rows from `first` on, of a matrix of bf16.
    pub fn row(self, first: usize) -> Rows {
        self.column(first * self.stride)
    }
}

impl<D: Driver> Clone for Buffer<D> {
    fn clone(&self) -> Self {
        Buffer { memory: self.memory.clone(), ..*self }
    }
}

impl<D: Driver> Buffer<D> {
    /// Bytes of an element.
    pub fn size(&self) -> usize {
        self.dtype.bytes()
    }

    /// Elements `range` as a buffer of their own over the same memory.
    pub(super) fn part(&self, range: Range<usize>) -> Self {
        let (address, elements) = (self.at(range.clone()), range.len());
        Buffer { address, elements, dtype: self.dtype, pitch: None, memory: self.memory.clone() }
    }

    /// Address of `range`, which must lie inside.
    ///
    /// # Panics
    /// When it does not, or rows do not follow each other: a bug of the caller, caught here and not
    /// by the card.
    pub(super) fn at(&self, range: Range<usize>) -> Address {
        assert!(self.pitch.is_none(), "rows of {:?} are addressed as one piece", self.pitch);
        self.inside(range)
    }

    fn inside(&self, range: Range<usize>) -> Address {
        let inside = range.start <= range.end && range.end <= self.elements;
        assert!(inside, "{range:?} is outside a buffer of {} elements", self.elements);
        self.address + (range.start * self.size()) as u64
    }

    /// The first `rows` rows of a matrix of `width` columns.
    pub(super) fn rows(&self, rows: usize, width: usize) -> Rows {
        self.band(Columns::all(width), rows)
    }

    /// The memory as another matrix, whatever its rows are planned to be.
    pub(super) fn as_matrix(&self, rows: usize, width: usize) -> Rows {
        Rows { address: self.inside(0..rows * width), stride: width }
    }

    /// `rows` rows of a band of columns.
    pub(super) fn band(&self, band: Columns, rows: usize) -> Rows {
        let stride = self.pitch.map_or(band.stride, |pitch| {
            assert_eq!(pitch.width, band.stride, "a matrix is as wide as was planned");
            pitch.stride
        });
        let end = if rows == 0 { 0 } else { (rows - 1) * stride + band.width };
        Rows { address: self.inside(band.offset..band.offset + end), stride }
    }

    /// Columns behind the first `rows` rows, where there are `columns` of them.
    pub(super) fn tail(&self, rows: usize, columns: usize) -> Option<Rows> {
        let Pitch { width, stride } = self.pitch?;
        let end = rows.saturating_sub(1) * stride + width + columns;
        let address = || self.inside(width..end);
        (width + columns <= stride).then(|| Rows { address: address(), stride })
    }

    /// Rows of the matrix, if its rows have room behind them, and their width.
    pub(super) fn pitched_rows(&self, elements: usize) -> Option<(usize, usize)> {
        self.pitch.map(|pitch| (elements / pitch.width, pitch.width))
    }

    /// Whole rows that begin with element `start` of the matrix: their address, and elements from
    /// the first to the end of the last, what lies behind them included.
    pub(super) fn whole_rows(&self, start: usize, elements: usize) -> (Address, usize) {
        let Some(Pitch { width, stride }) = self.pitch else {
            return (self.inside(start..start + elements), elements);
        };
        assert!(start.is_multiple_of(width) && elements.is_multiple_of(width), "rows are whole");
        let (start, elements) = (start / width * stride, elements / width * stride);
        (self.inside(start..start + elements), elements)
    }

    /// The first `elements` as an argument.
    pub(super) fn argument(&self, elements: usize) -> Argument {
        Argument::Pointer(self.at(0..elements))
    }
}

/// The regions of a plan in one allocation.
pub struct Memory<D: Driver> {
    allocation: Arc<Allocation<D>>,
    free: Untaken,
}

impl<D: Driver> Memory<D> {
    pub(super) fn new(allocation: Arc<Allocation<D>>, regions: &[Region]) -> Self {
        Memory { allocation, free: Untaken::new(regions) }
    }

    /// The optimizer's buffers begin at zero; all others hold whatever was there.
    pub(super) fn zero_optimizer(&self, driver: &Arc<D>) -> Result<()> {
        let optimizer =
            self.free.left().filter(|(_, region)| matches!(region.id, RegionId::Adapter(_)));
        for (start, region) in optimizer {
            driver.zero(self.allocation.address() + start as u64, region.bytes())?;
        }
        Ok(())
    }

    /// The memory of `regions`, some of a plan's that follow each other, in f32, for use while their
    /// owners do not use them; `None` where there are none.
    pub(super) fn as_f32(&self, regions: &[Region], range: Range<usize>) -> Option<Buffer<D>> {
        let bytes = |regions: &[Region]| -> usize { regions.iter().map(Region::bytes).sum() };
        let address = self.allocation.address() + bytes(&regions[..range.start]) as u64;
        let elements = bytes(&regions[range]) / 4;
        let (dtype, memory) = (RegionType::F32, self.allocation.clone());
        (elements > 0).then_some(Buffer { address, elements, dtype, pitch: None, memory })
    }

    pub(super) fn region(&mut self, id: RegionId) -> Buffer<D> {
        let (start, Region { elements, dtype, pitch, .. }) = self.free.take(id);
        let (address, memory) = (self.allocation.address() + start as u64, self.allocation.clone());
        Buffer { address, elements, dtype, pitch, memory }
    }
}

impl<D: Driver> PlannedMemory<Cuda<D>> for Memory<D> {
    fn take(&mut self, id: RegionId) -> Buffer<D> {
        self.region(id)
    }

    fn take_bf16(&mut self, id: RegionId) -> Buffer<D> {
        let buffer = self.region(id);
        assert_eq!(buffer.dtype, RegionType::Bf16, "{id} has another element type");
        buffer
    }

    fn bytes(&self) -> usize {
        self.allocation.bytes()
    }

    fn untaken(&self) -> Vec<RegionId> {
        self.free.left().map(|(_, region)| region.id).collect()
    }
}
