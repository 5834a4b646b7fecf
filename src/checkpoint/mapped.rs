//! The memory-mapped file opener.
#![allow(unsafe_code)]

use std::fs::{File, Metadata};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use memmap2::Mmap;

use crate::error::{Error, Result};
use crate::system::pages::{self, page_bytes};

/// Maps a file read-only; the bytes stay valid as long as any slice of them lives.
///
/// # Errors
/// `Io` when the file cannot be opened or mapped.
pub fn map_file(path: &Path) -> Result<Bytes> {
    MappedFile::open(path).map(|file| file.bytes)
}

/// A file mapped read-only.
#[derive(Debug, Clone)]
pub(crate) struct MappedFile {
    /// The contents of the file; slices keep the mapping alive.
    pub(crate) bytes: Bytes,
    /// The mapping; none of an empty file.
    map: Option<Arc<Mmap>>,
    /// Whether the system tells which of its pages are in memory.
    page_cache_is_visible: bool,
}

struct Owner(Arc<Mmap>);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl MappedFile {
    /// Opens and maps a file: see [`map_file`].
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        let metadata = file.metadata().map_err(|e| Error::io("read the size of", path, e))?;
        let page_cache_is_visible = page_cache_is_visible(path, &metadata);
        if metadata.len() == 0 {
            return Ok(MappedFile { bytes: Bytes::new(), map: None, page_cache_is_visible });
        }
        // SAFETY: the mapping is read-only. A file that another process truncates while it is
        // mapped faults the process; model files are not edited in place, and a reader that copied
        // them would need their size in memory.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io("map", path, e))?;
        let map = Arc::new(map);
        let bytes = Bytes::from_owner(Owner(map.clone()));
        Ok(MappedFile { bytes, map: Some(map), page_cache_is_visible })
    }

    /// The pages of `part`, if it lies in this file.
    pub(super) fn pages(&self, part: &[u8]) -> Option<Pages> {
        let map = self.map.as_ref()?;
        let (inside, wanted) = (map.as_ptr_range(), part.as_ptr_range());
        let lies_inside = inside.start <= wanted.start && wanted.end <= inside.end;
        let offset = (wanted.start as usize).wrapping_sub(inside.start as usize);
        lies_inside.then(|| Pages { map: map.clone(), offset, length: part.len() })
    }

    /// What the system has of it in its cache, on request of any process; none where it cannot tell.
    pub(super) fn page_cache(&self) -> Option<PageCache> {
        let Some(map) = &self.map else { return Some(PageCache::default()) };
        let cached_bytes = self.page_cache_is_visible.then(|| cached_bytes(map))??;
        Some(PageCache { file_bytes: map.len() as u64, cached_bytes })
    }

    /// Gives the pages of `part` back to the system if it lies in this file: they no longer count
    /// as this process' memory, and are mapped again when they are read again.
    pub(crate) fn release(&self, part: &[u8]) {
        if let Some(pages) = self.pages(part) {
            pages.release();
        }
    }
}

/// Whether Linux tells which pages of a file are in memory: of one that one neither owns nor may write it
/// says that all are.
#[cfg(unix)]
fn page_cache_is_visible(path: &Path, metadata: &Metadata) -> bool {
    use rustix::fs::{Access, access};
    let owner = std::os::unix::fs::MetadataExt::uid(metadata);
    owner == rustix::process::geteuid().as_raw() || access(path, Access::WRITE_OK).is_ok()
}

#[cfg(not(unix))]
fn page_cache_is_visible(_path: &Path, _metadata: &Metadata) -> bool {
    false
}

/// How much of some files is in the system's page cache: memory that is nobody's, which the system
/// takes back when it is needed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct PageCache {
    /// Bytes of the files.
    pub file_bytes: u64,
    /// How many of these bytes are in memory.
    pub cached_bytes: u64,
}

/// Bytes of the pages that are in memory, asked for in pieces: there is a number for each page.
fn cached_bytes(map: &Mmap) -> Option<u64> {
    const PIECE_PAGES: usize = 1 << 16;
    let page_bytes = page_bytes();
    let in_memory = |piece: &[u8]| pages::in_memory(piece.as_ptr(), piece.len());
    let pieces = map.chunks(PIECE_PAGES * page_bytes).map(in_memory);
    let pages: usize = pieces
        .map(|pages| Some(pages?.into_iter().filter(|&seen| seen).count()))
        .sum::<Option<usize>>()?;
    Some((pages * page_bytes).min(map.len()) as u64)
}

/// A part of a mapped file, of which the system can be told when it is needed.
#[derive(Debug, Clone)]
pub struct Pages {
    map: Arc<Mmap>,
    offset: usize,
    length: usize,
}

impl Pages {
    /// Starts to read them from the disk, if they are not in the system's cache.
    pub fn read_ahead(&self) {
        hints::read_ahead(&self.map, self.offset, self.length);
    }

    /// Gives them back to the system: they no longer count as this process' memory, and are mapped
    /// again when they are read again.
    pub fn release(&self) {
        hints::release(&self.map, self.offset, self.length);
    }
}

/// Hints to the system: without the first reading is slower, without the second memory is fuller, nothing
/// else.
#[cfg(unix)]
mod hints {
    use memmap2::{Advice, Mmap, UncheckedAdvice};

    pub fn read_ahead(map: &Mmap, offset: usize, length: usize) {
        let _ = map.advise_range(Advice::WillNeed, offset, length);
    }

    pub fn release(map: &Mmap, offset: usize, length: usize) {
        // SAFETY: the mapping is read-only and backed by the file, so dropped pages come back with the
        // same contents.
        let _ = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, offset, length) };
    }
}

/// Hints to the system, as far as it takes any.
#[cfg(windows)]
mod hints {
    use memmap2::Mmap;
    use windows_sys::Win32::System::Memory::{
        PrefetchVirtualMemory, VirtualUnlock, WIN32_MEMORY_RANGE_ENTRY,
    };
    use windows_sys::Win32::System::Threading::GetCurrentProcess;

    pub fn read_ahead(map: &Mmap, offset: usize, length: usize) {
        let part = &map[offset..offset + length];
        let range = WIN32_MEMORY_RANGE_ENTRY {
            VirtualAddress: part.as_ptr().cast_mut().cast(),
            NumberOfBytes: part.len(),
        };
        // SAFETY: one range, of a mapping that lives; nothing is written.
        unsafe { PrefetchVirtualMemory(GetCurrentProcess(), 1, &range, 0) };
    }

    /// Pages that were never locked leave the working set where they are to be unlocked.
    pub fn release(map: &Mmap, offset: usize, length: usize) {
        let part = &map[offset..offset + length];
        // SAFETY: of a mapping that lives, whose pages come back with the same contents.
        unsafe { VirtualUnlock(part.as_ptr().cast(), part.len()) };
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// Resident bytes of the mapping that holds `start`; other tests map files at the same time.
    fn resident_bytes(start: *const u8) -> usize {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let address = |text: &str| usize::from_str_radix(text, 16).ok();
        let holds = |line: &str| {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let range = range.and_then(|(begin, end)| Some(address(begin)?..address(end)?));
            range.is_some_and(|range| range.contains(&(start as usize)))
        };
        let mut lines = maps.lines().skip_while(|line| !holds(line));
        let line = lines.find(|line| line.starts_with("Rss:")).unwrap();
        1024 * line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap()
    }

    #[test]
    fn released_pages_leave_memory_and_come_back() -> Result<()> {
        const SIZE: usize = 64 << 20;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        std::fs::write(&path, vec![7u8; SIZE]).unwrap();
        let file = MappedFile::open(&path)?;
        let sum = || file.bytes.iter().map(|&byte| usize::from(byte)).sum::<usize>();
        assert_eq!(sum(), 7 * SIZE);
        assert_eq!(resident_bytes(file.bytes.as_ptr()), SIZE);
        file.release(&file.bytes[1000..SIZE - 1000]);
        assert!(resident_bytes(file.bytes.as_ptr()) < SIZE / 16);
        file.release(b"not of this file");
        assert_eq!(sum(), 7 * SIZE);
        Ok(())
    }
}
