//! One process at a time writes a file or a folder.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use super::sibling;
use crate::error::{Error, Result};

/// A locked file beside what is being written; the file goes with the lock. One that a killed process
/// left is free.
#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    /// None once it is closed.
    file: Option<File>,
}

impl Lock {
    /// Where the system has no locks, two processes that write the same are not told apart.
    ///
    /// # Errors
    /// `Usage` where another process is writing `destination`; `Io` when no file can be made beside it.
    pub fn take(destination: &Path) -> Result<Self> {
        let path = sibling(destination, ".lock");
        let mut options = File::options();
        options.write(true).create(true).truncate(false);
        loop {
            let file = options.open(&path).map_err(|e| Error::io("write", destination, e))?;
            if let Err(TryLockError::WouldBlock) = file.try_lock() {
                let what = format_args!("another process is writing {}", destination.display());
                return Err(Error::usage(what).hint("wait for it, or choose another place"));
            }
            // Whoever had it before may have removed it between the two.
            if is_named(&file, &path) {
                return Ok(Lock { path, file: Some(file) });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // What is left is free: nothing to tell anybody. Windows keeps the name of an open file.
        if cfg!(windows) {
            self.file = None;
        }
        let _ = fs::remove_file(&self.path);
    }
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
