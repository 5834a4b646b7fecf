//! The `checkpoint-N` folders of a run: written whole, verified before they are used, thinned out.
//!
//! Each holds the adapter in PEFT's files, [`super::state`]'s two files, and `SHA256SUMS` over all
//! of them in the format of `sha256sum`, so that a damaged checkpoint is known as such: a run
//! resumes from the newest intact one.

use std::path::{Path, PathBuf};
use std::time::Instant;
use std::{fs, io};

use super::digest;
use super::events::SaveEvent;
use super::optimizer_file::{self, OPTIMIZER_FILE};
use super::settings::SettingsEcho;
use super::state::{self, TrainState};
use super::trainee::Trainee;
use crate::checkpoint::atomic::{self, AtomicDir};
use crate::error::{Error, Result};

/// Checksums of all other files of a checkpoint.
pub const SUMS_FILE: &str = "SHA256SUMS";
const PREFIX: &str = "checkpoint-";

/// `checkpoint-N`.
pub fn name(step: u64) -> String {
    format!("{PREFIX}{step}")
}

/// Steps of the checkpoints in `out`, newest first, intact or not.
pub fn steps(out: &Path) -> Vec<u64> {
    let entries = fs::read_dir(out).into_iter().flatten().flatten();
    let step = |entry: fs::DirEntry| entry.file_name().to_str()?.strip_prefix(PREFIX)?.parse().ok();
    let mut steps: Vec<u64> = entries.filter_map(step).collect();
    steps.sort_unstable_by(|a, b| b.cmp(a));
    steps
}

/// Writes `checkpoint-{state.step}` into `out`: whole, or not at all.
///
/// # Errors
/// `Io`, with the newest intact checkpoint in the hint.
pub fn save<M: Trainee>(model: &mut M, state: &TrainState, out: &Path) -> Result<SaveEvent> {
    let start = Instant::now();
    let checkpoint = name(state.step);
    let write = || -> Result<u64> {
        let folder = AtomicDir::create(&out.join(&checkpoint), true)?;
        model.write_adapter(folder.path())?;
        optimizer_file::write(model, folder.path())?;
        state.write(folder.path())?;
        let bytes = seal(folder.path())?;
        folder.commit()?;
        Ok(bytes)
    };
    let bytes = write().map_err(|error| with_survivor(error, out))?;
    Ok(event(state, bytes, start.elapsed().as_secs_f64()))
}

fn event(state: &TrainState, bytes: u64, seconds: f64) -> SaveEvent {
    let is_best = state.best.is_some_and(|best| best.step == state.step);
    SaveEvent { step: state.step, checkpoint: name(state.step), bytes, seconds, is_best }
}

/// Tells of the checkpoint to go on from when the system refused to write.
pub fn with_survivor(error: Error, out: &Path) -> Error {
    if !matches!(error, Error::Io(..) | Error::Budget(_)) || error.message().hint.is_some() {
        return error;
    }
    match steps(out).into_iter().find(|&step| verify(&out.join(name(step))).is_ok()) {
        Some(step) => {
            let survivor = name(step);
            let mend = if lacks_room(&error) { "make room" } else { "mend that" };
            error.hint(format_args!("{survivor} is intact: {mend} and continue with `--resume`"))
        }
        None => error.hint("no checkpoint was written before"),
    }
}

fn lacks_room(error: &Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    match error {
        Error::Io(_, why) => matches!(why.kind(), StorageFull | QuotaExceeded | FileTooLarge),
        _ => true,
    }
}

/// Writes `SHA256SUMS`; returns the bytes of all files.
fn seal(folder: &Path) -> Result<u64> {
    let (mut sums, mut bytes) = (String::new(), 0);
    for path in files(folder)? {
        bytes += fs::metadata(&path).map_err(|e| Error::io("read", &path, e))?.len();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        sums.push_str(&format!("{}  {name}\n", digest::file(&path)?));
    }
    atomic::write_file(&folder.join(SUMS_FILE), sums.as_bytes())?;
    Ok(bytes + sums.len() as u64)
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(|e| Error::io("list", folder, e))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    Ok(paths)
}

/// Checks that every file of a checkpoint is there and as it was written.
///
/// # Errors
/// `Input` naming the damaged or missing file.
pub fn verify(folder: &Path) -> Result<()> {
    let path = folder.join(SUMS_FILE);
    let sums = fs::read_to_string(&path)
        .map_err(|e| Error::input(format_args!("no readable {SUMS_FILE} ({e})")))?;
    for line in sums.lines() {
        let (sum, name) = line
            .split_once("  ")
            .ok_or_else(|| Error::input(format_args!("{SUMS_FILE} has a bad line `{line}`")))?;
        let is_plain = Path::new(name).file_name().is_some_and(|file| file == name);
        // A pipe or a device would never come to an end.
        if !is_plain || folder.join(name).metadata().is_ok_and(|it| !it.is_file()) {
            return Err(Error::input(format_args!("{SUMS_FILE} names `{name}`, which is no file")));
        }
        let got = digest::file(&folder.join(name))
            .map_err(|error| Error::input(error.message().what.clone()))?;
        if got != sum {
            return Err(Error::input(format_args!("{name} is damaged: SHA-256 differs")));
        }
    }
    for name in [state::STATE_FILE, OPTIMIZER_FILE] {
        if !sums.lines().any(|line| line.ends_with(&format!("  {name}"))) {
            return Err(Error::input(format_args!("{name} is not in {SUMS_FILE}")));
        }
    }
    Ok(())
}

/// The newest intact checkpoint.
pub struct Found {
    /// The checkpoint's folder.
    pub folder: PathBuf,
    /// Where the run stood then.
    pub state: TrainState,
}

impl Found {
    /// The event of its saving, which its own history cannot know. How long it took is forgotten.
    pub fn event(&self) -> SaveEvent {
        let sizes = files(&self.folder).unwrap_or_default().into_iter();
        let bytes = sizes.filter_map(|path| Some(fs::metadata(path).ok()?.len())).sum();
        event(&self.state, bytes, 0.0)
    }
}

/// Finds the newest intact checkpoint of `out`; tells `report` about each damaged one.
pub fn newest(out: &Path, report: &mut dyn FnMut(&str)) -> Option<Found> {
    for step in steps(out) {
        let folder = out.join(name(step));
        match verify(&folder).and_then(|()| TrainState::read(&folder)) {
            Ok(state) => return Some(Found { folder, state }),
            Err(error) => report(&format!("skipping {}: {}", name(step), error.message().what)),
        }
    }
    None
}

/// Settings of the run in `out`: those of its newest intact checkpoint.
pub fn saved_settings(out: &Path) -> Option<SettingsEcho> {
    newest(out, &mut |_| ()).map(|found| found.state.identity.settings)
}

/// Of the checkpoints up to step `newest`, removes all but the newest `limit`, at least one, and the one of
/// step `best`. Later ones stay: they could not be read, and the run went on from an earlier one. Other
/// files stay, too.
///
/// # Errors
/// `Io`.
pub fn thin_out(out: &Path, newest: u64, limit: usize, best: Option<u64>) -> Result<()> {
    let own = steps(out).into_iter().filter(|step| *step <= newest);
    let old = own.skip(limit.max(1)).filter(|step| Some(*step) != best);
    // One that stays keeps no other.
    old.map(|step| remove(out, step)).fold(Ok(()), Result::and)
}

/// Renames before removing: a checkpoint that is cut off half-way must not look like one.
fn remove(out: &Path, step: u64) -> Result<()> {
    let (from, to) = (out.join(name(step)), out.join(format!(".{}.removed", name(step))));
    atomic::rename(&from, &to)?;
    fs::remove_dir_all(&to).map_err(|e| Error::io("remove", &to, e))
}

/// Removes what an interrupted session left behind under temporary names, but for a checkpoint that was
/// about to be written again.
pub fn clear_leftovers(out: &Path) {
    let entries = fs::read_dir(out).into_iter().flatten().flatten();
    for entry in entries {
        let file_name = entry.file_name();
        let name = file_name.to_string_lossy();
        if let Some(hidden) = name.strip_prefix('.').filter(|name| name.starts_with(PREFIX)) {
            let checkpoint = hidden.split('.').next().unwrap_or(hidden);
            // One that cannot be moved is removed like the rest: the disk is in a bad state.
            let _ = atomic::put_back(&out.join(checkpoint));
            // Only in the way of disk space: the next save replaces it in any case.
            let _ = fs::remove_dir_all(entry.path()).or_else(|_| fs::remove_file(entry.path()));
        }
    }
}
