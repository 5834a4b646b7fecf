//! Files and folders that appear whole or not at all.
//!
//! Both are filled under a temporary sibling name, flushed to disk, and made visible by one rename. What an
//! interrupted run left under the temporary name is removed by the next; one that is still at work holds a
//! lock beside it, and the next one is refused.

mod dir;
mod file;
mod lock;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use crate::error::{Error, Result};

pub use dir::{AtomicDir, put_back};
pub use file::{AtomicFile, write_file, write_with};
pub(crate) use lock::{Afterwards, Lock};

/// Makes a file that grows beyond the limit of the process (`ulimit -f`) an error of the write, as on a full
/// disk, in place of a signal that ends the program without a word.
pub fn outlive_size_limits() {
    #[cfg(unix)]
    {
        let noticed = std::sync::Arc::default();
        // Where it is refused, such a write ends the program: no reason to stop here.
        let _ = signal_hook::flag::register(libc::SIGXFSZ, noticed);
    }
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
    if is_mount_point(destination) {
        let shown = destination.display();
        let what =
            format_args!("{shown} is a mount point, which no new folder can take the place of");
        let inside = destination.join("new");
        let hint = format!("choose a folder in it: `--out {}`", inside.display());
        return Err(Error::usage(what).hint(hint));
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

/// Whether a disk, or another folder, is mounted at `folder`.
fn is_mount_point(folder: &Path) -> bool {
    let Ok(folder) = folder.canonicalize() else { return false };
    #[cfg(target_os = "linux")]
    if let Ok(mounts) = fs::read_to_string("/proc/self/mountinfo") {
        // proc(5): the fifth field, with octal codes for what would end it.
        let escapes = [('\\', "\\134"), (' ', "\\040"), ('\t', "\\011"), ('\n', "\\012")];
        let written = escapes
            .iter()
            .fold(folder.to_string_lossy().into_owned(), |text, (character, code)| {
                text.replace(*character, code)
            });
        return mounts.lines().any(|line| line.split(' ').nth(4) == Some(&*written));
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let disk = |path: &Path| path.metadata().map(|metadata| metadata.dev()).ok();
        disk(&folder).is_some() && disk(&folder) != disk(&parent(&folder))
    }
    #[cfg(not(unix))]
    {
        let _ = folder;
        false
    }
}

/// Refuses to put a file in the place of what is none, such as a device or a pipe.
///
/// # Errors
/// `Usage` when `output` is there and no file, or is to be left alone and there.
pub fn check_new_file(output: &Path, overwrite: bool) -> Result<()> {
    let shown = output.display();
    let Ok(there) = output.metadata() else {
        return match output.symlink_metadata() {
            Ok(_) if !overwrite => Err(Error::usage(format_args!("{shown} is a link to nothing"))
                .hint("give another `--out`, or `--overwrite`")),
            _ => Ok(()),
        };
    };
    if there.is_dir() {
        return Err(Error::usage(format_args!("{shown} is a folder, expected the name of a file"))
            .hint(format_args!("such as `--out {}`", output.join("model.gguf").display())));
    }
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

/// How often, and how long between, what somebody else has open is tried again.
const TRIES_IN_USE: usize = 50;
const PAUSE_IN_USE: Duration = Duration::from_millis(100);

/// Whether Windows refused because somebody else has the file open. Source: winerror.h,
/// ERROR_ACCESS_DENIED, ERROR_SHARING_VIOLATION, ERROR_LOCK_VIOLATION.
fn in_use(error: &io::Error) -> bool {
    cfg!(windows) && error.raw_os_error().is_some_and(|code| [5, 32, 33].contains(&code))
}

/// Renames a file or a folder. Windows refuses while somebody has a file in it open, such as a scanner of
/// what was just written: there it is tried again for a while.
///
/// # Errors
/// `Io`.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    let mut tries_left = TRIES_IN_USE;
    loop {
        match fs::rename(from, to) {
            Err(error) if tries_left > 0 && in_use(&error) => sleep(PAUSE_IN_USE),
            renamed => return renamed.map_err(|e| Error::io("rename to", to, e)),
        }
        tries_left -= 1;
    }
}

/// Gives what was to be `destination`, where something else is now, a free name beside it.
///
/// # Errors
/// `Input` with that name in the hint; `Io` when it cannot be given.
fn keep_beside(temporary: &Path, destination: &Path) -> Result<()> {
    let kept = free_name(destination, temporary.is_dir());
    rename(temporary, &kept)?;
    let what = format_args!("{} is there: it came while it was written", destination.display());
    Err(Error::input(what).hint(format_args!("what was written is {}", kept.display())))
}

/// `NAME-2` of a folder, `NAME-2.EXTENSION` of a file, or with the next number that is free.
fn free_name(path: &Path, folder: bool) -> PathBuf {
    // The dots of a folder's name are of versions and sizes.
    let stem = if folder { path.file_name() } else { path.file_stem() };
    let extension = path.extension().filter(|_| !folder);
    let mut number = 2;
    loop {
        let mut name = stem.unwrap_or_default().to_os_string();
        name.push(format!("-{number}"));
        if let Some(extension) = extension {
            name.push(".");
            name.push(extension);
        }
        let free = path.with_file_name(name);
        if !is_there(&free) {
            return free;
        }
        number += 1;
    }
}

/// Whether there is a file, a folder or a link, be it one that leads nowhere: that is somebody's, too, and to be
/// told of when it is opened.
pub(crate) fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
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
    use std::io::ErrorKind::{InvalidInput, Unsupported};
    if cfg!(windows) {
        return Ok(());
    }
    match sync(path) {
        // Some file systems of networks flush files alone.
        Err(Error::Io(_, why)) if matches!(why.kind(), InvalidInput | Unsupported) => Ok(()),
        done => done,
    }
}

/// `.NAME` and `suffix`, beside `path`.
fn sibling(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(suffix);
    parent(path).join(name)
}
