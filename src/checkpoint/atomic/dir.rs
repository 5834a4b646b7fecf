//! Folders.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::{check_destination, lock, parent, partial_name, rename, sync, sync_folder};
use crate::error::{Error, Result};

/// Locked while the folder that it is in is being filled, and gone from it once that is committed.
pub const LOCK_FILE: &str = ".lock";

/// A folder under construction; dropped without [`commit`](AtomicDir::commit), it is removed.
#[derive(Debug)]
pub struct AtomicDir {
    destination: PathBuf,
    temporary: PathBuf,
    lock: Option<File>,
    committed: bool,
}

impl AtomicDir {
    /// Starts filling `destination`, which must not exist or be an empty folder, unless
    /// `overwrite` allows to replace it at commit. A link is followed.
    ///
    /// # Errors
    /// `Usage` when the destination is not empty or no folder, or another process is filling it; `Io`
    /// when the temporary folder cannot be made.
    pub fn create(destination: &Path, overwrite: bool) -> Result<Self> {
        check_destination(destination, overwrite)?;
        let destination = &followed(destination)?;
        if destination.file_name().is_none() {
            let what = format_args!("{} is no folder name", destination.display());
            return Err(Error::usage(what));
        }
        let temporary = partial_name(destination);
        if temporary.exists() {
            // A lock that is free, or none, is what an interrupted run left.
            if let Ok(lock_file) = File::open(temporary.join(LOCK_FILE)) {
                lock(&lock_file, destination)?;
            }
            fs::remove_dir_all(&temporary).map_err(|e| Error::io("remove", &temporary, e))?;
        }
        if put_back(destination)? {
            check_destination(destination, overwrite)?;
        }
        fs::create_dir_all(&temporary).map_err(|e| Error::io("create", &temporary, e))?;
        let path = temporary.join(LOCK_FILE);
        let lock_file = File::create(&path).map_err(|e| Error::io("create", &path, e))?;
        lock(&lock_file, destination)?;
        let destination = destination.to_path_buf();
        Ok(AtomicDir { destination, temporary, lock: Some(lock_file), committed: false })
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
        // Locked until it has its name; Windows renames no folder with an open file.
        self.lock = self.lock.take().filter(|_| !cfg!(windows));
        let lock_file = self.temporary.join(LOCK_FILE);
        fs::remove_file(&lock_file).map_err(|e| Error::io("remove", &lock_file, e))?;
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
    let mut replaced = replaced_name(destination);
    // What could not be removed is older than what was moved aside since, under a longer name.
    loop {
        let mut later = replaced.clone();
        later.as_mut_os_string().push("~");
        if !later.is_dir() {
            break;
        }
        replaced = later;
    }
    let is_missing = replaced.is_dir() && !destination.exists();
    if is_missing {
        rename(&replaced, destination)?;
    }
    Ok(is_missing)
}

/// `destination` itself, or the folder that it is a link to.
fn followed(destination: &Path) -> Result<PathBuf> {
    // Without a dot at the end.
    let destination: PathBuf = destination.components().collect();
    if !destination.is_symlink() {
        return Ok(destination);
    }
    destination.canonicalize().map_err(|_| {
        let what = format_args!("{} is a link to what is not there", destination.display());
        Error::usage(what).hint("remove it, or make the folder that it leads to")
    })
}

/// Where a commit puts what it replaces until the new folder is in place.
fn replaced_name(destination: &Path) -> PathBuf {
    let name = destination.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    parent(destination).join(format!(".{name}.replaced"))
}

#[cfg(test)]
mod tests {
    use super::super::check_not_within;
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

    #[test]
    fn two_that_write_the_same_folder_are_kept_apart() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("out");
        let first = AtomicDir::create(&out, false).unwrap();
        fs::write(first.path().join("a"), "first").unwrap();
        for overwrite in [false, true] {
            let refused = AtomicDir::create(&out, overwrite).unwrap_err().to_string();
            assert!(refused.contains("another process is writing"), "{refused}");
        }
        first.commit().unwrap();
        assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
        // One that was killed holds no lock.
        let left = root.path().join(".out.partial");
        fs::create_dir(&left).unwrap();
        fs::write(left.join(LOCK_FILE), "").unwrap();
        drop(AtomicDir::create(&out, true).unwrap());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn a_link_is_followed() {
        let root = tempfile::tempdir().unwrap();
        let [link, disk] = ["link", "disk"].map(|name| root.path().join(name));
        std::os::unix::fs::symlink(&disk, &link).unwrap();
        let refused = AtomicDir::create(&link, false).unwrap_err().to_string();
        assert!(refused.contains("a link to what is not there"), "{refused}");
        fs::create_dir(&disk).unwrap();
        for text in ["first", "second"] {
            let dir = AtomicDir::create(&link.join("."), true).unwrap();
            fs::write(dir.path().join("a"), text).unwrap();
            dir.commit().unwrap();
            assert!(link.is_symlink());
            assert_eq!(fs::read_to_string(disk.join("a")).unwrap(), text);
        }
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_mount_point_is_found_before_the_work() {
        let refused = check_destination(Path::new("/proc"), true).unwrap_err().to_string();
        assert!(refused.contains("/proc is a mount point"), "{refused}");
        assert!(refused.contains("`--out /proc/new`"), "{refused}");
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
    fn of_two_that_were_replaced_the_later_one_comes_back() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("out");
        for (folder, text) in [(".out.replaced", "older"), (".out.replaced~", "newer")] {
            fs::create_dir(root.path().join(folder)).unwrap();
            fs::write(root.path().join(folder).join("a"), text).unwrap();
        }
        assert!(put_back(&out).unwrap());
        assert_eq!(fs::read_to_string(out.join("a")).unwrap(), "newer");
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
