//! What crosses between the program and the device: vectors, values, words.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use half::bf16;

use super::Cuda;
use super::driver::{Argument, Driver};
use super::memory::{Allocation, Buffer};
use super::staging::Documents;
use crate::byte_size::ByteSize;
use crate::error::{Error, Result};
use crate::plan::RegionType;

/// A frozen f32 vector.
pub struct DeviceVector<D: Driver> {
    memory: Arc<Allocation<D>>,
    pub(super) elements: usize,
}

impl<D: Driver> DeviceVector<D> {
    pub(super) fn upload(driver: &Arc<D>, vector: &[f32]) -> Result<Self> {
        let memory = Allocation::new(driver, 4 * vector.len())?;
        driver.upload(bytemuck::cast_slice(vector), memory.address())?;
        Ok(DeviceVector { memory, elements: vector.len() })
    }

    pub(super) fn argument(&self) -> Argument {
        Argument::Pointer(self.memory.address())
    }
}

impl<D: Driver> Cuda<D> {
    /// Copies words to the device for the next operation.
    pub(super) fn stage(&self, words: &[u32]) -> Option<Argument> {
        self.through_staging(|staging| staging.upload(words)).map(Argument::Pointer)
    }

    /// Boundaries and tiles of documents on the device.
    pub(super) fn stage_documents(&self, boundaries: &[usize], past: usize) -> Option<Documents> {
        self.through_staging(|staging| staging.documents(boundaries, past))
    }
}

/// The elements of `range` in f32: whole rows, of a matrix whose rows have room behind them.
pub(super) fn values<D: Driver>(
    cuda: &Cuda<D>,
    buffer: &Buffer<D>,
    range: Range<usize>,
) -> Result<Cow<'static, [f32]>> {
    // What went wrong before is not to be found by whoever reads next.
    cuda.take_failure()?;
    let (from, stored) = buffer.whole_rows(range.start, range.len());
    Ok(Cow::Owned(if buffer.dtype == RegionType::F32 {
        assert_eq!(stored, range.len(), "rows of f32 have no room behind them");
        let mut values = zeroes(stored)?;
        cuda.download(from, bytemuck::cast_slice_mut(&mut values))?;
        values
    } else {
        let mut values: Vec<bf16> = zeroes(stored)?;
        cuda.download(from, bytemuck::cast_slice_mut(&mut values))?;
        let mut wide = zeroes(range.len())?;
        let (rows, width) = buffer.pitched_rows(range.len()).unwrap_or((1, stored));
        for row in 0..rows {
            let (to, from) = (&mut wide[row * width..][..width], &values[row * stored / rows..]);
            to.iter_mut().zip(from).for_each(|(wide, value)| *wide = value.to_f32());
        }
        wide
    }))
}

/// Memory of the host that may not be there: a checkpoint needs it in the middle of a run.
fn zeroes<T: bytemuck::Zeroable + Clone>(elements: usize) -> Result<Vec<T>> {
    let mut values = Vec::new();
    values.try_reserve_exact(elements).map_err(|_| {
        let bytes = ByteSize((elements * size_of::<T>()) as u64);
        Error::budget(format_args!("cannot allocate {bytes} of host memory"))
    })?;
    values.resize(elements, T::zeroed());
    Ok(values)
}

/// Overwrites elements from `offset` on.
pub(super) fn set_values<D: Driver>(
    cuda: &Cuda<D>,
    values: &[f32],
    buffer: &Buffer<D>,
    offset: usize,
) {
    let (to, driver) = (buffer.at(offset..offset + values.len()), cuda.driver());
    cuda.note(if buffer.dtype == RegionType::F32 {
        driver.upload(bytemuck::cast_slice(values), to)
    } else {
        let rounded: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
        driver.upload(bytemuck::cast_slice(&rounded), to)
    });
}

/// Lets `fill` write the first `elements` of each table.
pub(super) fn write_tables<D: Driver, const N: usize>(
    cuda: &Cuda<D>,
    tables: [&mut Buffer<D>; N],
    elements: usize,
    fill: impl FnOnce([&mut [f32]; N]),
) {
    let mut values = tables.each_ref().map(|_| vec![0.0; elements]);
    fill(values.each_mut().map(Vec::as_mut_slice));
    cuda.through_staging(|staging| {
        let mut tables = tables.iter().zip(&values);
        tables.try_for_each(|(to, values)| {
            staging.fill(to, elements, |to| to.copy_from_slice(values))
        })
    });
}
