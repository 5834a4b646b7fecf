//! Small uploads without waiting: token ids, rows, tables.
//!
//! Values are written to pinned host memory and copied from there in stream order. Both sides are
//! used from the front again once somebody has waited for the stream.

use super::attention::heaviest_first;
use super::driver::{Address, Driver};
use super::memory::Buffer;
use super::pinned::PinnedMemory;
use super::plan::UPLOAD_WORDS;
use crate::error::Result;
use std::sync::Arc;

/// The documents of a pass on the device.
#[derive(Debug, Clone, Copy)]
pub struct Documents {
    /// Where the documents begin and end.
    pub boundaries: Address,
    /// Where the documents' keys begin and end, with those that were cached before.
    pub key_boundaries: Address,
    /// Document and tile of each block of the flash kernels.
    pub tiles: Address,
    /// How many tiles.
    pub count: usize,
}

/// Pinned host memory, and the region of the plan that words are copied to.
pub struct Staging<D: Driver> {
    driver: Arc<D>,
    host: PinnedMemory<D>,
    region: Buffer<D>,
    host_used: usize,
    words_used: usize,
    documents: Option<(Vec<usize>, usize, Documents)>,
}

impl<D: Driver> Staging<D> {
    /// Staging for `region`, and for what goes elsewhere, through `host_bytes` of the host.
    pub fn new(driver: &Arc<D>, region: Buffer<D>, host_bytes: usize) -> Result<Self> {
        let host = PinnedMemory::new(driver, host_bytes)?;
        let driver = driver.clone();
        Ok(Staging { driver, host, region, host_used: 0, words_used: 0, documents: None })
    }

    /// Everything was copied.
    pub fn reuse(&mut self) {
        (self.host_used, self.words_used, self.documents) = (0, 0, None);
    }

    /// Boundaries and tiles of documents, copied once for all layers of a pass; of one document `past`
    /// keys may have been cached before.
    pub fn documents(&mut self, boundaries: &[usize], past: usize) -> Result<Documents> {
        assert!(past == 0 || boundaries.len() == 2, "a cache is one document's");
        match &self.documents {
            Some((known, before, documents)) if known == boundaries && *before == past => {
                return Ok(*documents);
            }
            _ => {}
        }
        let tiles = heaviest_first(boundaries);
        // One upload: a second one might wait, and then overwrite the first.
        let mut words: Vec<u32> = boundaries.iter().map(|&token| token as u32).collect();
        let mut keys = 0;
        if past > 0 {
            keys = words.len();
            words.extend([0, (past + boundaries[1]) as u32]);
        }
        words.resize(words.len().next_multiple_of(2), 0);
        let first = words.len();
        words.extend(tiles.as_flattened());
        let address = self.upload(&words)?;
        let (tiles, count) = (address + 4 * first as u64, tiles.len());
        let key_boundaries = address + 4 * keys as u64;
        let documents = Documents { boundaries: address, key_boundaries, tiles, count };
        self.documents = Some((boundaries.to_vec(), past, documents));
        Ok(documents)
    }

    /// Waits if what was staged before leaves no room.
    fn make_room(&mut self, bytes: usize, words: usize) -> Result<()> {
        let full = self.host_used + bytes > self.host.bytes();
        if full || self.words_used + words > self.region.elements {
            self.driver.synchronize()?;
            self.reuse();
        }
        assert!(
            bytes <= self.host.bytes() && words <= self.region.elements,
            "planned for this much"
        );
        Ok(())
    }

    /// Copies words to the device; they are there for the operations that follow.
    pub fn upload(&mut self, words: &[u32]) -> Result<Address> {
        let padded = words.len().next_multiple_of(UPLOAD_WORDS);
        self.make_room(4 * padded, padded)?;
        let to = self.region.at(self.words_used..self.words_used + words.len());
        self.words_used += padded;
        self.stage(to, 4 * words.len(), |bytes| {
            bytes.copy_from_slice(bytemuck::cast_slice(words))
        })?;
        Ok(to)
    }

    /// Copies one word to some place.
    pub fn word(&mut self, word: u32, to: Address) -> Result<()> {
        self.make_room(4 * UPLOAD_WORDS, 0)?;
        self.stage(to, 4, |bytes| bytes.copy_from_slice(&word.to_le_bytes()))
    }

    /// Lets `fill` write f32 values that are copied to `to`.
    pub fn fill(
        &mut self,
        to: &Buffer<D>,
        elements: usize,
        fill: impl FnOnce(&mut [f32]),
    ) -> Result<()> {
        self.make_room(4 * elements, 0)?;
        let to = to.at(0..elements);
        self.stage(to, 4 * elements, |bytes| fill(bytemuck::cast_slice_mut(bytes)))
    }

    #[allow(unsafe_code)]
    fn stage(&mut self, to: Address, bytes: usize, write: impl FnOnce(&mut [u8])) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: nothing that is being copied lies here: the front is used again only after a wait.
        let staged = unsafe { self.host.slice_mut(self.host_used..self.host_used + bytes) };
        write(staged);
        let from = staged.as_ptr();
        self.host_used += bytes.next_multiple_of(4 * UPLOAD_WORDS);
        self.driver.upload_staged(from, to, bytes)
    }
}
