//! Pages, the pieces in which the system counts memory: their size, and which of a mapping's are there.
#![allow(unsafe_code)]

/// Bytes of a page: 4 KiB on x86, up to 64 KiB on ARM.
#[cfg(unix)]
pub fn page_bytes() -> usize {
    // SAFETY: asks for a number.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(bytes).expect("every system tells the size of its pages")
}

/// Bytes of a page: Windows has the same on every processor.
#[cfg(not(unix))]
pub fn page_bytes() -> usize {
    4096
}

/// Whether each page of the `length` bytes from `start` on is in memory, be it by request of another process;
/// none where the system does not tell, or these are no mapping nor a part of one that begins at a page.
#[cfg(target_os = "linux")]
pub fn in_memory(start: *const u8, length: usize) -> Option<Vec<bool>> {
    let mut pages = vec![0u8; length.div_ceil(page_bytes())];
    let start = start.cast_mut().cast();
    // SAFETY: there is a byte in `pages` for each page; nothing at `start` is read or written, be it mapped or
    // not.
    let code = unsafe { libc::mincore(start, length, pages.as_mut_ptr()) };
    (code == 0).then(|| pages.into_iter().map(|page| page & 1 == 1).collect())
}

/// The system does not tell.
#[cfg(not(target_os = "linux"))]
pub fn in_memory(_start: *const u8, _length: usize) -> Option<Vec<bool>> {
    None
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use memmap2::MmapOptions;

    use super::*;

    #[test]
    fn pages_are_in_memory_once_they_are_written() {
        let page = page_bytes();
        let mut map = MmapOptions::new().len(3 * page + 1).map_anon().unwrap();
        let seen = |map: &[u8]| in_memory(map.as_ptr(), map.len());
        assert_eq!(seen(&map), Some(vec![false; 4]));
        map[2 * page] = 1;
        assert_eq!(seen(&map), Some(vec![false, false, true, false]));
        assert_eq!(seen(&map[1..]), None, "no page begins there");
    }
}
