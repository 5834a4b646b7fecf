//! Single files.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::lock::Lock;
use super::{is_there, keep_beside, parent, rename, sibling, sync_folder};
use crate::error::{Error, Result};

/// A file under construction; dropped without [`commit`](AtomicFile::commit), it is removed.
#[derive(Debug)]
pub struct AtomicFile {
    destination: PathBuf,
    temporary: PathBuf,
    overwrite: bool,
    /// The open file; none once it is closed.
    file: Option<File>,
    _lock: Lock,
}

impl AtomicFile {
    /// Starts writing `destination`, which the commit replaces only with `overwrite`.
    ///
    /// # Errors
    /// `Usage` where another process writes it, `Io` when the temporary file cannot be made.
    pub fn create(destination: &Path, overwrite: bool) -> Result<Self> {
        let lock = Lock::beside(destination)?;
        let temporary = sibling(destination, ".partial");
        // Not emptied: it may be a link, or have another name.
        let _ = fs::remove_file(&temporary);
        let file = File::create_new(&temporary).map_err(|e| Error::io("write", destination, e))?;
        let destination = destination.to_path_buf();
        Ok(AtomicFile { destination, temporary, overwrite, file: Some(file), _lock: lock })
    }

    /// The path that the file will have.
    pub fn destination(&self) -> &Path {
        &self.destination
    }

    /// Flushes it and renames it into place. Returns its bytes.
    ///
    /// # Errors
    /// `Io`; `Input` where another file came there meanwhile and is not to be overwritten: what was written
    /// has then the name that the hint tells. The destination is as it was.
    pub fn commit(mut self) -> Result<u64> {
        let written = || {
            let file = self.open()?;
            file.sync_all()?;
            Ok(file.metadata()?.len())
        };
        let bytes = written().map_err(|e: io::Error| Error::io("write", &self.destination, e))?;
        // Windows renames no file that is open.
        self.file = None;
        let placed = match self.overwrite {
            true => rename(&self.temporary, &self.destination),
            false => place_new(&self.temporary, &self.destination),
        };
        if let Err(error) = placed {
            let _ = fs::remove_file(&self.temporary);
            return Err(error);
        }
        sync_folder(&parent(&self.destination))?;
        Ok(bytes)
    }

    fn open(&self) -> io::Result<&File> {
        self.file.as_ref().ok_or_else(|| ErrorKind::NotFound.into())
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.open()?.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            // Nothing to report to: the error that led here is on its way.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Gives a finished file its name where that is free, and another one where it is not.
fn place_new(temporary: &Path, destination: &Path) -> Result<()> {
    // Unlike a rename, a second name never takes the place of a file.
    if fs::hard_link(temporary, destination).is_ok() {
        // One that stays is removed by the next to write here.
        let _ = fs::remove_file(temporary);
        return Ok(());
    }
    // Not all file systems have second names.
    if is_there(destination) {
        return keep_beside(temporary, destination);
    }
    rename(temporary, destination)
}

/// Writes a file under a temporary name, flushes it and renames it into place.
///
/// # Errors
/// `Io`; an existing file is then as it was, and the temporary one is gone.
pub fn write_file(path: &Path, contents: &[u8]) -> Result<()> {
    write_with(path, |file| file.write_all(contents).map_err(|e| Error::io("write", path, e)))
}

/// [`write_file`] with contents that `write` makes.
///
/// # Errors
/// Those of `write`, and `Io`; an existing file is then as it was, and the temporary one is gone.
pub fn write_with(path: &Path, write: impl FnOnce(&mut AtomicFile) -> Result<()>) -> Result<()> {
    let mut file = AtomicFile::create(path, true)?;
    write(&mut file)?;
    file.commit().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a");
        write_file(&path, b"before").unwrap();
        let failed = write_with(&path, |file| {
            file.write_all(b"half").unwrap();
            Err(Error::input("no more"))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"before");
        let mut file = AtomicFile::create(&path, true).unwrap();
        file.write_all(b"after").unwrap();
        assert_eq!(file.commit().unwrap(), 5);
        assert_eq!(fs::read(&path).unwrap(), b"after");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_came_meanwhile_stays_and_what_was_written_does_too() {
        let root = tempfile::tempdir().unwrap();
        let [path, kept] = ["a.gguf", "a-3.gguf"].map(|name| root.path().join(name));
        fs::write(root.path().join("a-2.gguf"), "another's").unwrap();
        let begin = || {
            let mut file = AtomicFile::create(&path, false).unwrap();
            file.write_all(b"new").unwrap();
            file
        };
        let late = begin();
        fs::write(&path, "mine").unwrap();
        let error = late.commit().unwrap_err().to_string();
        assert!(error.contains("a.gguf is there") && error.contains("a-3.gguf"), "{error}");
        assert_eq!([&path, &kept].map(|path| fs::read(path).unwrap()), [&b"mine"[..], b"new"]);
        fs::remove_file(&path).unwrap();
        assert_eq!(begin().commit().unwrap(), 3);
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 3);
    }

    #[test]
    fn what_a_killed_run_left_is_written_over_and_what_one_at_work_writes_is_not() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a");
        fs::write(root.path().join(".a.partial"), "what a killed run left").unwrap();
        let mut file = AtomicFile::create(&path, true).unwrap();
        file.write_all(b"first").unwrap();
        let refused = write_file(&path, b"second").unwrap_err().to_string();
        assert!(refused.contains("another process is writing"), "{refused}");
        file.commit().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"first");
        write_file(&path, b"third").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"third");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }
}
