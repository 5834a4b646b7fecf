//! One process at a time writes a file or a folder.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;

use super::{PAUSE_IN_USE, TRIES_IN_USE, in_use, sibling};
use crate::error::{Error, Result};

/// A locked file. One that a killed process left is free.
#[derive(Debug)]
pub(crate) struct Lock {
    path: PathBuf,
    /// The locked file; none once it is closed.
    file: Option<File>,
    afterwards: Afterwards,
}

/// What becomes of a locked file when the lock is given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Afterwards {
    /// The file goes with the lock.
    Removed,
    /// The file stays where it is.
    Kept,
}

impl Lock {
    /// The lock of whoever writes `destination`: a file beside it.
    ///
    /// # Errors
    /// `Usage` where another process is writing `destination`; `Io` when no file can be made beside it.
    pub(super) fn beside(destination: &Path) -> Result<Self> {
        let taken = Lock::take(sibling(destination, ".nibble-lock"), Afterwards::Removed);
        let taken = taken.map_err(|e| Error::io("write", destination, e))?;
        taken.ok_or_else(|| {
            let what = format_args!("another process is writing {}", destination.display());
            Error::usage(what).hint("wait for it, or choose another place")
        })
    }

    /// Makes and locks the file `path`; none where another process has the lock. Where the system has no
    /// locks, two processes are not told apart.
    ///
    /// # Errors
    /// The system's, when the file cannot be made.
    pub fn take(path: PathBuf, afterwards: Afterwards) -> io::Result<Option<Self>> {
        let mut tries = 0;
        loop {
            tries += 1;
            let file = match open(&path) {
                Err(error) if in_use(&error) && tries < TRIES_IN_USE => {
                    sleep(PAUSE_IN_USE);
                    continue;
                }
                Err(error) if in_use(&error) => return Ok(None),
                file => file?,
            };
            if let Err(TryLockError::WouldBlock) = file.try_lock() {
                return Ok(None);
            }
            // Whoever had it before may have removed it between the two. On file systems that give a file
            // another number each time, no name is ever the same file's.
            if tries >= TRIES_IN_USE || is_named(&file, &path) {
                return Ok(Some(Lock { path, file: Some(file), afterwards }));
            }
        }
    }

    /// Gives the lock back, and removes its file in any case.
    pub fn remove(mut self) {
        self.afterwards = Afterwards::Removed;
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let is_ours = self.file.as_ref().and_then(|file| file.metadata().ok());
        let is_ours = is_ours.is_some_and(|metadata| metadata.len() == 0);
        if self.afterwards == Afterwards::Kept || !is_ours {
            return;
        }
        if cfg!(windows) {
            self.file = None;
        }
        // What is left is free: nothing to tell anybody.
        let _ = fs::remove_file(&self.path);
    }
}

/// Opens the file, or makes it; on Windows for this process alone, so that nobody else removes it either.
fn open(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.write(true).create(true).truncate(false);
    #[cfg(windows)]
    {
        use std::os::windows::fs::OpenOptionsExt;
        options.share_mode(0);
    }
    options.open(path)
}

/// Whether `path` is still the name of `file`.
fn is_named(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let found = path.metadata().map(identity);
        file.metadata().map(identity).is_ok_and(|own| found.is_ok_and(|found| found == own))
    }
    #[cfg(not(unix))]
    {
        let _ = (file, path);
        true
    }
}
