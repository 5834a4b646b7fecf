//! The memory-mapped file opener.
#![allow(unsafe_code)]

use std::fs::File;
use std::path::Path;

use bytes::Bytes;
use memmap2::Mmap;

use crate::error::{Error, Result};

/// Maps a file read-only; the bytes stay valid as long as any slice of them lives.
///
/// # Errors
/// `Io` when the file cannot be opened or mapped.
pub fn map_file(path: &Path) -> Result<Bytes> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let length = file.metadata().map_err(|e| Error::io("read the size of", path, e))?.len();
    if length == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: the mapping is private and read-only. A file that another process truncates while it
    // is mapped faults the process; model files are not edited in place, and a reader that copied
    // them would need their size in memory.
    let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io("map", path, e))?;
    Ok(Bytes::from_owner(map))
}
