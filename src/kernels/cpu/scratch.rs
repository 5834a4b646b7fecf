//! What layers offload, in a file: written in the forward pass, read in the backward pass.
//!
//! The file has no name and is gone with the run. What is written goes through the system's page
//! cache, which is not the program's memory and is given up when memory is short.

use std::fs::File;
use std::path::Path;

use crate::error::{Error, Result};
use crate::plan::{MemoryPlan, Region};
use crate::system::disk;

/// The file, and where each region begins in it.
pub struct Scratch {
    file: Option<File>,
    offsets: Vec<u64>,
    failure: Option<Error>,
}

impl Scratch {
    /// A file in `folder`; none where nothing is offloaded. Its room on the disk is taken at once, where the
    /// system can: a step is no time to run out of it.
    ///
    /// # Errors
    /// `Io` when the file cannot be made, or as large.
    pub fn new(plan: &MemoryPlan, folder: Option<&Path>) -> Result<Self> {
        let mut end = 0;
        let mut place = |region: &Region| {
            let start = end;
            end += region.bytes() as u64;
            start
        };
        let offsets: Vec<u64> = plan.offloaded.iter().map(&mut place).collect();
        let folder = folder.map_or_else(std::env::temp_dir, Path::to_path_buf);
        let make = || {
            let file = tempfile::tempfile_in(&folder)?;
            // Not tried without: a disk is filled to the brim before that fails.
            if disk::free_bytes(&folder).is_some_and(|free| free < end) {
                return Err(std::io::ErrorKind::StorageFull.into());
            }
            file.set_len(end)?;
            take_room(&file, end).map(|()| file)
        };
        let file = (!offsets.is_empty()).then(make).transpose();
        let file = file.map_err(|e| {
            let error = Error::io("offload to a file in", &folder, e);
            error.or_hint("`--activations checkpoint` needs no file")
        })?;
        Ok(Scratch { file, offsets, failure: None })
    }

    /// Writes region `index`.
    pub fn write(&mut self, index: usize, values: &[f32]) {
        self.access("write", index, |file, offset| {
            write_at(file, bytemuck::cast_slice(values), offset)
        });
    }

    /// Reads region `index`.
    pub fn read(&mut self, index: usize, values: &mut [f32]) {
        self.access("read", index, |file, offset| {
            read_at(file, bytemuck::cast_slice_mut(values), offset)
        });
    }

    /// The first thing that went wrong.
    ///
    /// # Errors
    /// That.
    pub fn check(&mut self) -> Result<()> {
        self.failure.take().map_or(Ok(()), Err)
    }

    fn access(
        &mut self,
        act: &str,
        index: usize,
        access: impl FnOnce(&File, u64) -> std::io::Result<()>,
    ) {
        let file = self.file.as_ref().expect("regions are planned");
        if let Err(e) = access(file, self.offsets[index]) {
            let failure = Error::io(act, Path::new("the file of offloaded activations"), e);
            self.failure.get_or_insert(failure);
        }
    }
}

/// Takes the disk's room for `bytes`; only Linux does without writing them.
#[cfg(target_os = "linux")]
fn take_room(file: &File, bytes: u64) -> std::io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    use rustix::io::Errno;
    match fallocate(file, FallocateFlags::empty(), 0, bytes) {
        Err(Errno::NOSPC) => Err(Errno::NOSPC.into()),
        // Not all file systems can.
        _ => Ok(()),
    }
}

#[cfg(not(target_os = "linux"))]
fn take_room(_file: &File, _bytes: u64) -> std::io::Result<()> {
    Ok(())
}

#[cfg(unix)]
fn write_at(file: &File, bytes: &[u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(unix)]
fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

#[cfg(not(unix))]
fn write_at(mut file: &File, bytes: &[u8], offset: u64) -> std::io::Result<()> {
    use std::io::{Seek, SeekFrom, Write};
    file.seek(SeekFrom::Start(offset))?;
    file.write_all(bytes)
}

#[cfg(not(unix))]
fn read_at(mut file: &File, bytes: &mut [u8], offset: u64) -> std::io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{RegionId, RegionType};

    #[test]
    fn a_disk_without_the_room_is_found_before_a_step() {
        let folder = tempfile::tempdir().unwrap();
        let plan = |elements| {
            let region = Region::new(RegionId::Cache(0), RegionType::F32, elements);
            MemoryPlan { regions: Vec::new(), offloaded: vec![region] }
        };
        let mut scratch = Scratch::new(&plan(100), Some(folder.path())).unwrap();
        scratch.write(0, &[1.5; 100]);
        let mut values = [0.0; 100];
        scratch.read(0, &mut values);
        scratch.check().unwrap();
        assert_eq!(values, [1.5; 100]);
        // 16 TiB, or what a file system cannot even name.
        let error = Scratch::new(&plan(1 << 42), Some(folder.path())).err().unwrap().to_string();
        assert!(error.contains("hint: `--activations checkpoint` needs no file"), "{error}");
    }
}
