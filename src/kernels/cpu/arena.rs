//! One anonymous mapping for all planned buffers, handed out region by region.
//!
//! The mapping is exactly as long as [`MemoryPlan::arena_bytes`] says; each piece of a region can be
//! taken once, so no two [`Buffer`]s overlap.
#![allow(unsafe_code)]

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use bytemuck::Pod;
use half::bf16;
use memmap2::{MmapOptions, MmapRaw};

use super::Cpu;
use crate::error::{Error, Result};
use crate::kernels::{PlannedMemory, Residency, Untaken};
use crate::plan::{MemoryPlan, Region, RegionId};
use crate::system::pages;

/// The memory of a plan.
pub struct Arena {
    map: Arc<MmapRaw>,
    free: Untaken,
}

impl Arena {
    /// Maps the plan's bytes, zeroed; pages become resident when they are first written.
    ///
    /// # Errors
    /// `Budget` when the system refuses the mapping.
    pub fn new(plan: &MemoryPlan) -> Result<Self> {
        let bytes = plan.arena_bytes();
        let map = MmapOptions::new().len(bytes.max(1)).map_anon().map_err(|e| {
            Error::budget(format_args!("cannot reserve {bytes} bytes of memory: {e}"))
                .hint("lower `--max-length` or `--per-device-train-batch-size`")
        })?;
        Ok(Arena { map: Arc::new(map.into()), free: Untaken::new(&plan.regions) })
    }

    /// Tells how much of the arena is in memory, as long as it lives.
    fn account(&self, plan: &MemoryPlan) -> PageAccount {
        let lengths = plan.regions.iter().map(Region::bytes).collect();
        PageAccount { map: self.map.clone(), lengths }
    }

    /// Hands out the region `id`, or its next piece.
    ///
    /// # Panics
    /// When the plan has no such region, it has another element type, or all of it was taken: the
    /// plan and its user disagree, which is a bug, never bad input.
    pub fn take<T: Pod>(&mut self, id: RegionId) -> Buffer<T> {
        let (offset, region) = self.free.take(id);
        assert_eq!(region.dtype.bytes(), size_of::<T>(), "{id} has another element type");
        let bytes = region.elements.checked_mul(size_of::<T>());
        let end = bytes.and_then(|bytes| offset.checked_add(bytes));
        assert!(end.is_some_and(|end| end <= self.map.len()), "{id} is inside the arena");
        // SAFETY: inside the mapping, as asserted.
        let start = unsafe { self.map.as_mut_ptr().add(offset) }.cast::<T>();
        Buffer { start, elements: region.elements, _map: self.map.clone() }
    }
}

impl PlannedMemory<Cpu> for Arena {
    fn take(&mut self, id: RegionId) -> Buffer<f32> {
        Arena::take(self, id)
    }

    fn take_bf16(&mut self, id: RegionId) -> Buffer<bf16> {
        Arena::take(self, id)
    }

    fn bytes(&self) -> usize {
        self.map.len()
    }

    fn untaken(&self) -> Vec<RegionId> {
        self.free.left().map(|(_, region)| region.id).collect()
    }

    fn residency(&self, plan: &MemoryPlan) -> Residency {
        let account = self.account(plan);
        Box::new(move || account.region_bytes())
    }
}

/// The system's account of an arena.
struct PageAccount {
    map: Arc<MmapRaw>,
    lengths: Vec<usize>,
}

impl PageAccount {
    /// Bytes of each region that are in memory now; a page that two regions share counts to both
    /// in parts. All of them where the system does not tell.
    fn region_bytes(&self) -> Vec<u64> {
        let page_bytes = pages::page_bytes();
        let seen = pages::in_memory(self.map.as_ptr(), self.map.len()).unwrap_or_default();
        let mut offset = 0;
        let bytes = self.lengths.iter().map(|&length| {
            let (begin, end) = (offset, offset + length);
            offset = end;
            let inside = |page: usize| {
                let (first, last) = (page * page_bytes, (page + 1) * page_bytes);
                (last.min(end) - first.max(begin)) as u64
            };
            let touched = begin / page_bytes..end.div_ceil(page_bytes);
            touched.filter(|&page| seen.get(page) != Some(&false)).map(inside).sum()
        });
        bytes.collect()
    }
}

/// A region of the arena, exclusively owned: behaves like `Box<[T]>`.
pub struct Buffer<T> {
    start: *mut T,
    elements: usize,
    _map: Arc<MmapRaw>,
}

// SAFETY: a buffer is the only owner of its elements, and the mapping outlives it.
unsafe impl<T: Pod + Send> Send for Buffer<T> {}
// SAFETY: shared access only reads.
unsafe impl<T: Pod + Sync> Sync for Buffer<T> {}

impl<T: Pod> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the mapping begins on a page and pieces on a multiple of 256 bytes in it, so start is
        // aligned; it is in bounds, as `take` says, zero-initialised, and T is Pod.
        unsafe { std::slice::from_raw_parts(self.start, self.elements) }
    }
}

impl<T: Pod> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above; regions are disjoint and `&mut self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.elements) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::RegionType;

    const A: RegionId = RegionId::Cache(0);
    const B: RegionId = RegionId::Cache(1);
    const C: RegionId = RegionId::Cache(2);

    #[test]
    fn regions_are_disjoint_zeroed_and_as_long_as_planned() {
        let plan = MemoryPlan {
            regions: vec![
                Region::new(A, RegionType::F32, 5),
                Region::new(B, RegionType::Bf16, 33),
                Region::new(C, RegionType::F32, 16),
            ],
            offloaded: Vec::new(),
        };
        let mut arena = Arena::new(&plan).unwrap();
        assert_eq!(arena.bytes(), 3 * 256);
        let (mut a, mut b, c) =
            (arena.take::<f32>(A), arena.take::<half::bf16>(B), arena.take::<f32>(C));
        a.fill(1.0);
        b.fill(half::bf16::NEG_INFINITY);
        assert!(c.iter().all(|&x| x == 0.0) && a.iter().all(|&x| x == 1.0));
        assert_eq!((a.len(), b.len(), c.len()), (5, 33, 16));
        assert!(arena.untaken().is_empty());
    }

    #[test]
    fn pieces_follow_each_other_and_are_taken_in_turn() {
        let of_three = Region { count: 3, ..Region::new(A, RegionType::F32, 65) };
        let regions = vec![of_three, Region::new(B, RegionType::F32, 1)];
        let plan = MemoryPlan { regions, offloaded: Vec::new() };
        let mut arena = Arena::new(&plan).unwrap();
        assert_eq!((arena.bytes(), plan.arena_bytes()), (3 * 512 + 256, 3 * 512 + 256));
        let mut pieces: Vec<Buffer<f32>> = (0..3).map(|_| arena.take(A)).collect();
        assert_eq!(arena.untaken(), [B]);
        let starts: Vec<usize> = pieces.iter().map(|piece| piece.start as usize).collect();
        assert!(starts.windows(2).all(|pair| pair[1] - pair[0] == 512), "{starts:?}");
        pieces.iter_mut().for_each(|piece| piece.fill(1.0));
        assert!(pieces.iter().all(|piece| piece.len() == 65) && arena.take::<f32>(B)[0] == 0.0);
        let again = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            arena.take::<f32>(A);
        }));
        assert!(again.is_err(), "all three were taken");
    }

    #[test]
    fn more_than_can_be_counted_is_refused() {
        let plan = |elements: usize, count: usize| MemoryPlan {
            regions: vec![
                Region::new(B, RegionType::F32, 64),
                Region { count, ..Region::new(A, RegionType::F32, elements) },
            ],
            offloaded: Vec::new(),
        };
        for plan in [plan(1 << 62, 1), plan(usize::MAX, 1), plan(1 << 40, 1 << 30)] {
            assert_eq!(plan.arena_bytes(), usize::MAX);
            assert!(matches!(Arena::new(&plan), Err(Error::Budget(_))));
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn untouched_pages_are_not_in_memory() {
        let plan = MemoryPlan {
            regions: vec![
                Region::new(A, RegionType::F32, 1 << 20),
                Region::new(B, RegionType::F32, 1 << 20),
            ],
            offloaded: Vec::new(),
        };
        let mut arena = Arena::new(&plan).unwrap();
        let residency = arena.account(&plan);
        assert_eq!(residency.region_bytes(), [0, 0]);
        let (a, mut b) = (arena.take::<f32>(A), arena.take::<f32>(B));
        b[..1 << 19].fill(1.0);
        assert_eq!(residency.region_bytes(), [0, 2 << 20]);
        drop(a);
    }
}
