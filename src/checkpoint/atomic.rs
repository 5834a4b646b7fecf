//! Files and folders that appear whole or not at all.
//!
//! A folder is filled under a temporary sibling name, every file is flushed to disk, and one rename
//! makes it visible. What an interrupted run left under the temporary name is removed by the next.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use crate::error::{Error, Result};

/// From now on a file that grows beyond the limit of the process (`ulimit -f`) is an error of the write, as
/// on a full disk, and no signal that ends the program without a word.
pub fn outlive_size_limits() {
    #[cfg(unix)]
    {
        let noticed = std::sync::Arc::default();
        // Where it is refused, such a write ends the program: no reason to stop here.
        let _ = signal_hook::flag::register(libc::SIGXFSZ, noticed);
    }
}

/// A folder under construction; dropped without [`commit`](AtomicDir::commit), it is removed.
#[derive(Debug)]
pub struct AtomicDir {
    destination: PathBuf,
    temporary: PathBuf,
    committed: bool,
}

impl AtomicDir {
    /// Starts filling `destination`, which must not exist or be an empty folder, unless
    /// `overwrite` allows to replace it at commit.
    ///
    /// # Errors
    /// `Usage` when the destination is not empty, `Io` when the temporary folder cannot be made.
    pub fn create(destination: &Path, overwrite: bool) -> Result<Self> {
        check_destination(destination, overwrite)?;
        let name = destination.file_name().and_then(|name| name.to_str());
        let Some(name) = name else {
            let what = format_args!("{} is no folder name", destination.display());
            return Err(Error::usage(what));
        };
        let temporary = parent(destination).join(format!(".{name}.partial"));
        if put_back(destination)? {
            check_destination(destination, overwrite)?;
        }
        if temporary.exists() {
            fs::remove_dir_all(&temporary).map_err(|e| Error::io("remove", &temporary, e))?;
        }
        fs::create_dir_all(&temporary).map_err(|e| Error::io("create", &temporary, e))?;
        Ok(AtomicDir { destination: destination.to_path_buf(), temporary, committed: false })
    }

    /// Where to write files until the commit.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Flushes all files and renames the folder into place. What it replaces is removed, or stays beside it,
    /// hidden and told of, where the system refuses.
    ///
    /// # Errors
    /// `Io`; the destination is then as it was.
    pub fn commit(mut self) -> Result<()> {
        let entries = fs::read_dir(&self.temporary);
        for entry in entries.map_err(|e| Error::io("list", &self.temporary, e))? {
            let path = entry.map_err(|e| Error::io("list", &self.temporary, e))?.path();
            sync(&path)?;
        }
        sync_folder(&self.temporary)?;
        let mut old = replaced_name(&self.destination);
        let replaces = self.destination.exists();
        if replaces {
            // What an earlier commit could not remove stays where it is.
            while fs::remove_dir_all(&old).is_err() && old.exists() {
                old.as_mut_os_string().push("~");
            }
            rename(&self.destination, &old)?;
        }
        if let Err(error) = rename(&self.temporary, &self.destination) {
            if replaces {
                let _ = rename(&old, &self.destination);
            }
            return Err(error);
        }
        self.committed = true;
        sync_folder(&parent(&self.destination))?;
        if replaces && let Err(error) = fs::remove_dir_all(&old) {
            eprintln!("warning: {} was replaced and cannot be removed: {error}", old.display());
        }
        Ok(())
    }
}

impl Drop for AtomicDir {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing to report to: the error that led here is on its way.
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// Moves the folder back that was moved away for a new `destination`, where an earlier run ended between
/// the two renames of its commit; whether it did.
///
/// # Errors
/// `Io`.
pub fn put_back(destination: &Path) -> Result<bool> {
    let replaced = replaced_name(destination);
    let is_missing = replaced.is_dir() && !destination.exists();
    if is_missing {
        rename(&replaced, destination)?;
    }
    Ok(is_missing)
}

/// Refuses a destination with files in it: they could be somebody's work.
///
/// # Errors
/// `Usage` when it is not empty and may not be overwritten, or no folder.
pub fn check_destination(destination: &Path, overwrite: bool) -> Result<()> {
    if destination.exists() && !destination.is_dir() {
        let what = format_args!("{} is a file, expected a folder", destination.display());
        return Err(Error::usage(what).hint("choose another `--out`"));
    }
    let occupied = match fs::read_dir(destination) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => destination.exists(),
    };
    if occupied && !overwrite {
        return Err(Error::usage(format_args!("{} is not empty", destination.display()))
            .hint("choose another `--out`, or replace it with `--overwrite`"));
    }
    Ok(())
}

/// Refuses to put a file in the place of what is none, such as a device or a pipe.
///
/// # Errors
/// `Usage` when `output` is there and no file, or is to be left alone and there.
pub fn check_new_file(output: &Path, overwrite: bool) -> Result<()> {
    let Ok(there) = output.metadata() else { return Ok(()) };
    let shown = output.display();
    if !there.is_file() {
        return Err(Error::usage(format_args!("{shown} is no file that could be replaced"))
            .hint("choose another `--out`"));
    }
    if !overwrite {
        return Err(Error::usage(format_args!("{shown} is there already"))
            .hint("give another `--out`, or `--overwrite`"));
    }
    Ok(())
}

/// Refuses to write where what is read would be replaced.
///
/// # Errors
/// `Usage` when `input` is `output` or lies in it.
pub fn check_not_within(input: &Path, output: &Path) -> Result<()> {
    match (input.canonicalize(), output.canonicalize()) {
        (Ok(input), Ok(output)) if input.starts_with(&output) => {
            let what = format_args!("{} would be replaced while it is read", input.display());
            Err(Error::usage(what).hint("choose another `--out`"))
        }
        _ => Ok(()),
    }
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
pub fn write_with(path: &Path, write: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("file");
    let temporary = parent(path).join(format!(".{name}.partial"));
    let refused = |error| Error::io("write", path, error);
    let written = File::create(&temporary).map_err(refused).and_then(|mut file| {
        write(&mut file)?;
        file.sync_all().map_err(refused)
    });
    if let Err(error) = written {
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    rename(&temporary, path)?;
    sync_folder(&parent(path))
}

/// Flushes a file that a library wrote through a temporary one, which only its owner may read, and
/// opens it to those who may read its folder.
///
/// # Errors
/// `Io`.
pub fn finish_file(path: &Path) -> Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        const NOT_EXECUTABLE: u32 = 0o666;
        fs::metadata(parent(path))
            .map(|folder| fs::Permissions::from_mode(folder.permissions().mode() & NOT_EXECUTABLE))
            .and_then(|permissions| fs::set_permissions(path, permissions))
            .map_err(|e| Error::io("write", path, e))?;
    }
    sync(path)
}

/// Where a commit puts what it replaces until the new folder is in place.
fn replaced_name(destination: &Path) -> PathBuf {
    let name = destination.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    parent(destination).join(format!(".{name}.replaced"))
}

/// Renames a file or a folder. Windows refuses while somebody has a file in it open, such as a scanner of
/// what was just written: there it is tried again for a while.
///
/// # Errors
/// `Io`.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    const PAUSE: Duration = Duration::from_millis(100);
    /// winerror.h: ERROR_ACCESS_DENIED, ERROR_SHARING_VIOLATION, ERROR_LOCK_VIOLATION.
    const IN_USE: [i32; 3] = [5, 32, 33];
    let in_use =
        |error: &io::Error| error.raw_os_error().is_some_and(|code| IN_USE.contains(&code));
    let mut tries_left = if cfg!(windows) { 50 } else { 0 };
    loop {
        match fs::rename(from, to) {
            Err(error) if tries_left > 0 && in_use(&error) => sleep(PAUSE),
            renamed => return renamed.map_err(|e| Error::io("rename to", to, e)),
        }
        tries_left -= 1;
    }
}

/// The folder that a path is in.
pub fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

fn sync(path: &Path) -> Result<()> {
    // Windows flushes what may be written alone.
    let file = File::options().read(true).write(cfg!(windows)).open(path);
    file.map_err(|e| Error::io("open", path, e))?
        .sync_all()
        .map_err(|e| Error::io("flush", path, e))
}

/// The names in a folder; on Windows that is left to the system.
fn sync_folder(path: &Path) -> Result<()> {
    if cfg!(windows) { Ok(()) } else { sync(path) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("out");
        let unfinished = AtomicDir::create(&out, false).unwrap();
        fs::write(unfinished.path().join("a"), "half").unwrap();
        drop(unfinished);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
        let dir = AtomicDir::create(&out, false).unwrap();
        fs::write(dir.path().join("a"), "whole").unwrap();
        dir.commit().unwrap();
        assert_eq!(fs::read_to_string(out.join("a")).unwrap(), "whole");
        let refused = AtomicDir::create(&out, false).unwrap_err().to_string();
        assert!(refused.contains("not empty") && refused.contains("--overwrite"), "{refused}");
        let replacing = AtomicDir::create(&out, true).unwrap();
        fs::write(replacing.path().join("b"), "new").unwrap();
        replacing.commit().unwrap();
        assert!(!out.join("a").exists() && out.join("b").exists());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }

    /// As when somebody's file in it is open on Windows.
    #[test]
    fn what_an_earlier_commit_could_not_remove_is_in_no_ones_way() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("out");
        fs::write(replaced_name(&out), "a file is no folder that can be removed").unwrap();
        for text in ["first", "second"] {
            let dir = AtomicDir::create(&out, true).unwrap();
            fs::write(dir.path().join("a"), text).unwrap();
            dir.commit().unwrap();
            assert_eq!(fs::read_to_string(out.join("a")).unwrap(), text);
        }
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_folder_that_was_being_replaced_is_not_lost() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("out");
        // Killed between the two renames: the old folder aside, the new one not yet in place.
        for folder in [".out.replaced", ".out.partial"] {
            fs::create_dir(root.path().join(folder)).unwrap();
        }
        fs::write(root.path().join(".out.replaced/a"), "old").unwrap();
        AtomicDir::create(&out, false).unwrap_err();
        assert_eq!(fs::read_to_string(out.join("a")).unwrap(), "old");
        drop(AtomicDir::create(&out, true).unwrap());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
        assert!(check_not_within(&out.join("a"), &out).is_err());
        assert!(check_not_within(root.path(), &out).is_ok());
    }
}
