//! Blocks that take turns in two places of the device's memory.
//!
//! Even blocks lie in one place, odd ones in the other, so neighbours are there together and every
//! weight has one address. Before block l is queued, the next one is written to pinned memory and
//! its copy queued on the second stream, behind the work of the block whose place it takes and
//! beside that of block l. The program runs ahead of the device by two blocks at most: a piece of
//! pinned memory is written again only when its last copy is done.

use std::sync::Arc;

use rayon::prelude::*;

use super::driver::Driver;
use super::memory::Allocation;
use super::offload::OFFLOAD_COPIES;
use super::pinned::PinnedMemory;
use super::weight::{self, Part};
use super::{Cuda, DeviceWeight};
use crate::error::Result;
use crate::kernels::cpu::FrozenMatrix;
use crate::kernels::{Direction, StreamedWeights};
use crate::model::streaming::{StreamedPages, WeightStream, next};
use crate::plan::weights::STREAMED_BLOCKS;

/// Slots of copies on the second stream: first those of what is offloaded.
pub(super) const COPY_SLOTS: usize = OFFLOAD_COPIES + STREAMED_BLOCKS;

/// A block as the file has it: parts, and where each begins in its place.
type BlockParts = Vec<(usize, Part)>;

/// A place that blocks take turns in, one of two.
struct Place<D: Driver> {
    pinned: PinnedMemory<D>,
    memory: Arc<Allocation<D>>,
    /// Which block's weights are there, or will be when its copy is done.
    block: Option<usize>,
}

/// The blocks' weights.
struct Stream<D: Driver> {
    cuda: Cuda<D>,
    pages: StreamedPages,
    blocks: Vec<BlockParts>,
    places: Vec<Place<D>>,
    bytes: usize,
}

/// Lays the blocks out.
///
/// # Errors
/// `Budget` when there is no room for two of them.
pub(super) fn stream<D: Driver>(
    cuda: &Cuda<D>,
    blocks: Vec<Vec<FrozenMatrix>>,
    pages: StreamedPages,
) -> Result<StreamedWeights<DeviceWeight<D>>> {
    let parts: Vec<BlockParts> = blocks.iter().map(|block| block_parts(block)).collect();
    let end = |block: &BlockParts| {
        block.last().map_or(0, |(start, part)| start + weight::padded_bytes(part))
    };
    let bytes = parts.iter().map(end).max().unwrap_or(0);
    let driver = &cuda.shared.driver;
    let mut stream = Stream { cuda: cuda.clone(), pages, blocks: parts, places: Vec::new(), bytes };
    for _ in 0..STREAMED_BLOCKS.min(blocks.len()) {
        let memory = Allocation::new(driver, bytes)?;
        let pinned = PinnedMemory::new(driver, bytes.max(1))?;
        stream.places.push(Place { pinned, memory, block: None });
    }
    let placed = blocks.iter().enumerate().map(|(layer, block)| {
        let memory = &stream.places[layer % STREAMED_BLOCKS].memory;
        let mut start = memory.address();
        let place = |matrix: &FrozenMatrix| {
            let bytes = weight::parts(matrix).iter().map(weight::padded_bytes).sum::<usize>();
            start += bytes as u64;
            let weight = weight::at(&cuda.shared.tables, matrix, start - bytes as u64, memory);
            weight.in_turns_at(memory.address())
        };
        block.iter().map(place).collect()
    });
    Ok(StreamedWeights { blocks: placed.collect(), stream: Box::new(stream) })
}

fn block_parts(block: &[FrozenMatrix]) -> BlockParts {
    let mut end = 0;
    let place = |part: Part| {
        end += weight::padded_bytes(&part);
        (end - weight::padded_bytes(&part), part)
    };
    block.iter().flat_map(weight::parts).map(place).collect()
}

impl<D: Driver> Stream<D> {
    /// Queues the copy of block `layer`, unless it is there or on its way.
    fn fetch(&mut self, layer: usize) -> Result<()> {
        let (index, driver) = (layer % STREAMED_BLOCKS, &self.cuda.shared.driver);
        let (place, slot) = (&mut self.places[index], OFFLOAD_COPIES + index);
        if place.block == Some(layer) {
            return Ok(());
        }
        place.block = None;
        self.cuda.forget_dequantized();
        driver.finish_copy(slot)?;
        write_block(&self.blocks[layer], &mut place.pinned, self.bytes);
        self.pages.release(layer);
        driver.copy_in(place.pinned.start(), place.memory.address(), self.bytes, slot)?;
        place.block = Some(layer);
        Ok(())
    }

    fn bring(&mut self, layer: usize, direction: Direction) -> Result<()> {
        self.fetch(layer)?;
        self.cuda.shared.driver.await_copy(OFFLOAD_COPIES + layer % STREAMED_BLOCKS)?;
        let blocks = self.blocks.len();
        let Some(behind) = next(layer, blocks, direction) else { return Ok(()) };
        self.fetch(behind)?;
        if let Some(then) = next(behind, blocks, direction) {
            self.pages.read_ahead(then);
        }
        Ok(())
    }
}

/// Writes a block to the first `bytes` of pinned memory, whose last copy is done, on all threads.
#[allow(unsafe_code)]
fn write_block<D: Driver>(block: &BlockParts, pinned: &mut PinnedMemory<D>, bytes: usize) {
    // SAFETY: its last copy is done, and the next one is queued behind this.
    let mut rest = unsafe { pinned.slice_mut(0..bytes) };
    let mut pieces = Vec::new();
    let mut begin = 0;
    for (start, part) in block {
        let (own, later) = rest.split_at_mut(start - begin + part.bytes());
        pieces.push((part, &mut own[start - begin..]));
        begin = start + part.bytes();
        rest = later;
    }
    pieces.into_par_iter().for_each(|(part, to)| part.write(to));
}

impl<D: Driver> WeightStream for Stream<D> {
    fn enter(&mut self, layer: usize, direction: Direction) {
        let result = self.bring(layer, direction);
        self.cuda.note(result);
    }

    fn leave(&mut self, _layer: usize, _direction: Direction) {
        // Its place is taken behind its work: see `fetch`.
    }

    fn leave_table(&mut self) {
        // On the device.
    }

    fn leave_head(&mut self) {
        // On the device.
    }

    fn bytes_in_memory(&self) -> Option<u64> {
        Some((self.places.len() * self.bytes) as u64)
    }
}

impl<D: Driver> Drop for Stream<D> {
    fn drop(&mut self) {
        let driver = &self.cuda.shared.driver;
        for (index, place) in self.places.drain(..).enumerate() {
            // A copy that cannot be waited for keeps its memory.
            if driver.finish_copy(OFFLOAD_COPIES + index).is_err() {
                place.pinned.abandon();
            }
        }
    }
}
