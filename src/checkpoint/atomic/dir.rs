//! Folders.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use super::lock::Lock;
use super::{check_destination, is_there, keep_beside, parent, rename, sibling, sync, sync_folder};
use crate::checkpoint::elsewhere::check_not_in_home;
use crate::error::{Error, Result};

/// A folder under construction; dropped without [`commit`](AtomicDir::commit), it is removed.
#[derive(Debug)]
pub struct AtomicDir {
    destination: PathBuf,
    temporary: PathBuf,
    overwrite: bool,
    committed: bool,
    _lock: Lock,
}

impl AtomicDir {
    /// Starts filling `destination`, which must not exist or be an empty folder, unless
    /// `overwrite` allows to replace it at commit. A link is followed.
    ///
    /// # Errors
    /// `Usage` when the destination is not empty, no folder or in `~`, or another process is filling it; `Io`
    /// when the temporary folder cannot be made.
    pub fn create(destination: &Path, overwrite: bool) -> Result<Self> {
        let destination = &followed(destination)?;
        check_destination(destination, overwrite)?;
        if destination.file_name().is_none() {
            let what = format_args!("{} is no folder name", destination.display());
            return Err(Error::usage(what));
        }
        check_not_in_home(destination)?;
        make_folder(&parent(destination))?;
        let lock = Lock::beside(destination)?;
        put_back(destination)?;
        // What is there may have come while another process had the lock.
        check_destination(destination, overwrite)?;
        let temporary = sibling(destination, ".partial");
        if temporary.exists() {
            fs::remove_dir_all(&temporary).map_err(|e| Error::io("remove", &temporary, e))?;
        }
        make_folder(&temporary)?;
        let destination = destination.to_path_buf();
        Ok(AtomicDir { destination, temporary, overwrite, committed: false, _lock: lock })
    }

    /// The folder to write files into until the commit.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Flushes all files and renames the folder into place. What it replaces is removed, or stays beside it,
    /// hidden and told of, where the system refuses.
    ///
    /// # Errors
    /// `Io`; `Input` where files came there meanwhile and are not to be overwritten: what was written has
    /// then the name that the hint tells. The destination is as it was.
    pub fn commit(mut self) -> Result<()> {
        let entries = fs::read_dir(&self.temporary);
        for entry in entries.map_err(|e| Error::io("list", &self.temporary, e))? {
            let path = entry.map_err(|e| Error::io("list", &self.temporary, e))?.path();
            sync(&path)?;
        }
        sync_folder(&self.temporary)?;
        if !self.overwrite && check_destination(&self.destination, false).is_err() {
            return keep_beside(&self.temporary, &self.destination);
        }
        let replaces = self.destination.exists();
        let old = replaces.then(|| free_replaced_name(&self.destination));
        if let Some(old) = &old {
            rename(&self.destination, old)?;
        }
        if let Err(error) = rename(&self.temporary, &self.destination) {
            if let Some(old) = &old {
                let _ = rename(old, &self.destination);
            }
            return Err(error);
        }
        self.committed = true;
        sync_folder(&parent(&self.destination))?;
        if let Some(old) = &old
            && let Err(error) = fs::remove_dir_all(old)
        {
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
    let names = [sibling(destination, REPLACED)].into_iter().chain(replaced(destination));
    let replaced = names.rev().find(|path| path.is_dir());
    let replaced = replaced.filter(|_| !destination.exists());
    replaced.map_or(Ok(false), |replaced| rename(&replaced, destination).map(|()| true))
}

fn make_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| Error::io("create", path, e))
}

/// `destination` itself, or the folder that it is a link to, be that just moved away.
fn followed(destination: &Path) -> Result<PathBuf> {
    // Without a dot at the end.
    let destination: PathBuf = destination.components().collect();
    let Ok(target) = destination.read_link() else { return Ok(destination) };
    let target = parent(&destination).join(target);
    if !destination.exists() && replaced(&target).iter().any(|path| path.is_dir()) {
        return Ok(target);
    }
    destination.canonicalize().map_err(|_| {
        let what = format_args!("{} is a link to what is not there", destination.display());
        Error::usage(what).hint("remove it, or make the folder that it leads to")
    })
}

const REPLACED: &str = ".replaced";

/// What commits put away of `destination` until the new folder was in place, and could not remove, the
/// latest last: a longer name is a later one.
fn replaced(destination: &Path) -> Vec<PathBuf> {
    let first = sibling(destination, REPLACED);
    let first = first.file_name().unwrap_or_default().as_encoded_bytes();
    let is_one = |name: &OsStr| {
        let rest = name.as_encoded_bytes().strip_prefix(first);
        rest.is_some_and(|rest| rest.iter().all(|&byte| byte == b'~'))
    };
    let entries = fs::read_dir(parent(destination)).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name()).collect();
    names.retain(|name| is_one(name));
    names.sort_by_key(|name| name.len());
    names.into_iter().map(|name| parent(destination).join(name)).collect()
}

/// A name behind those of what stays in spite of being removed.
fn free_replaced_name(destination: &Path) -> PathBuf {
    replaced(destination).iter().for_each(|old| drop(fs::remove_dir_all(old)));
    let mut name = replaced(destination).pop().unwrap_or_else(|| sibling(destination, REPLACED));
    // Folders may not be listed, and names be the same in other letters.
    while is_there(&name) {
        name.as_mut_os_string().push("~");
    }
    name
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
    fn a_folder_that_was_filled_meanwhile_stays_and_what_was_written_does_too() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("Llama-3.1-8B");
        let dir = AtomicDir::create(&out, false).unwrap();
        fs::write(dir.path().join("a"), "new").unwrap();
        fs::create_dir(&out).unwrap();
        fs::write(out.join("a"), "mine").unwrap();
        let error = dir.commit().unwrap_err().to_string();
        assert!(error.contains("3.1-8B is there") && error.contains("3.1-8B-2"), "{error}");
        let read = |folder: &str| fs::read_to_string(root.path().join(folder).join("a")).unwrap();
        assert_eq!([read("Llama-3.1-8B"), read("Llama-3.1-8B-2")], ["mine", "new"]);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2);
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
        fs::create_dir(root.path().join(".out.partial")).unwrap();
        fs::write(root.path().join(".out.nibble-lock"), "").unwrap();
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
        // Killed between the two renames of a commit.
        fs::write(disk.join("a"), "before").unwrap();
        fs::rename(&disk, root.path().join(".disk.replaced")).unwrap();
        AtomicDir::create(&link, false).unwrap_err();
        assert_eq!(fs::read_to_string(link.join("a")).unwrap(), "before");
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
        fs::write(sibling(&out, REPLACED), "a file is no folder that can be removed").unwrap();
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
        // With a gap where one could be removed.
        for (folder, text) in [(".out.replaced", "older"), (".out.replaced~~", "newer")] {
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
