//! The output folder: empty, or that of the run to resume.

use std::fs;
use std::path::{Path, PathBuf};

use crate::adapter::TENSORS_FILE;
use crate::byte_size::ByteSize;
use crate::checkpoint::atomic::{self, Afterwards, Lock};
use crate::checkpoint::elsewhere::check_not_in_home;
use crate::cli::train::OutputArgs;
use crate::error::{Error, Result};
use crate::report::{METRICS_FILE, metrics};
use crate::system::disk;
use crate::train::checkpoints::{self, Found};
use crate::train::events::EndReason;
use crate::train::progress::Progress;
use crate::train::recipe::Recipe;
use crate::train::settings::{SETTINGS_FILE, SettingsEcho, to_toml};
use crate::train::start;
use crate::train::state::Identity;

/// The file that is locked while a run writes into the folder; it also marks it as a run's.
const LOCK_FILE: &str = ".nibble.lock";

/// A folder that belongs to this run.
pub struct Output {
    folder: PathBuf,
    /// The checkpoint to continue from.
    pub found: Option<Found>,
    /// Whether this run made the folder.
    is_new: bool,
    /// The folder's lock; none once the folder is given up.
    lock: Option<Lock>,
}

/// A run that came to its end, for at least one of the two reasons.
pub struct Finished {
    /// The run's last step.
    pub step: u64,
    /// Whether the run was to make no more steps.
    pub all_steps: bool,
    /// The evaluation loss had not fallen for too long.
    pub out_of_patience: bool,
}

/// A run that found a mistake before it began leaves nothing behind.
impl Drop for Output {
    fn drop(&mut self) {
        if is_empty(&self.folder) {
            // What cannot be removed does no harm: `is_empty` passes over it.
            self.lock.take().into_iter().for_each(Lock::remove);
            if self.is_new {
                let _ = fs::remove_dir(&self.folder);
            }
        }
    }
}

impl Output {
    /// Makes or takes over the folder of `args`.
    ///
    /// # Errors
    /// `Usage` when it holds other files or is in `~`, or another process trains into it; `Input` when it has
    /// checkpoints and all are damaged; `Io`.
    pub fn claim(args: &OutputArgs, progress: &Progress) -> Result<Self> {
        let out = args.out.as_path();
        check_not_in_home(out)?;
        if out.is_file() {
            let what = format_args!("--out {} is a file, expected a folder", out.display());
            return Err(Error::usage(what).hint("choose another `--out`"));
        }
        // Copies often lack the hidden file.
        let has_run = || out.join(SETTINGS_FILE).exists() && !checkpoints::steps(out).is_empty();
        let ours = out.join(LOCK_FILE).exists() || has_run();
        let continues = args.resume && ours;
        if !is_empty(out) && !continues {
            return Err(not_empty(out, ours, args.resume));
        }
        let is_new = !out.exists();
        fs::create_dir_all(out).map_err(|e| Error::io("create", out, e))?;
        let lock = lock(out)?;
        let mut output =
            Output { folder: out.to_path_buf(), found: None, is_new, lock: Some(lock) };
        checkpoints::clear_leftovers(out);
        if args.resume {
            output.found = find(out, progress)?;
        }
        Ok(output)
    }

    /// Whether the run to be continued, if there is one, is the one that `identity` describes.
    ///
    /// # Errors
    /// Those of [`start::compare`].
    pub fn check_continues(&self, identity: &Identity) -> Result<()> {
        let compare = |found: &Found| start::compare(&found.state.identity, identity);
        self.found.as_ref().map_or(Ok(()), compare)
    }

    /// How a run of `max_steps` came to its end, if this is one that did.
    pub fn finished(&self, recipe: &Recipe, max_steps: u64) -> Option<Finished> {
        let state = &self.found.as_ref()?.state;
        let end = metrics::last_end(&self.folder.join(METRICS_FILE))?;
        let came_to_an_end = end.reason != EndReason::Interrupted
            && end.step == state.step
            && self.folder.join(TENSORS_FILE).exists();
        let finished = Finished {
            step: state.step,
            all_steps: state.step >= max_steps,
            out_of_patience: recipe.is_out_of_patience(state),
        };
        let is_over = finished.all_steps || finished.out_of_patience;
        (came_to_an_end && is_over).then_some(finished)
    }

    /// Whether the disk has room for checkpoints of `bytes`, beside a file of `offloaded` bytes.
    ///
    /// # Errors
    /// `Input` when not even one fits.
    pub fn check_room(
        &self,
        bytes: u64,
        offloaded: u64,
        args: &OutputArgs,
        progress: &Progress,
    ) -> Result<()> {
        let Some(free) = disk::free_bytes(&self.folder) else { return Ok(()) };
        let beside = match offloaded {
            0 => String::new(),
            bytes => format!(" beside the {} that are offloaded", ByteSize(bytes)),
        };
        let free = free.saturating_sub(offloaded);
        // A new one is whole before the oldest goes; the best one may be kept besides.
        let most = bytes.saturating_mul(args.save_total_limit.get() as u64 + 2);
        let (free, size, out) = (ByteSize(free), ByteSize(bytes), self.folder.display());
        if free.0 < bytes {
            let what = format_args!(
                "{out}: a checkpoint takes about {size}, {free} are free there{beside}"
            );
            return Err(Error::input(what).hint("make room, or choose an `--out` on another disk"));
        }
        if free.0 < most {
            progress.note(&format!(
                "warning: {out} has {free} free{beside}; up to {} of checkpoints are kept there",
                ByteSize(most)
            ));
        }
        Ok(())
    }

    /// Writes down what the run was asked for.
    ///
    /// # Errors
    /// `Io`.
    pub fn write_settings(&self, settings: &SettingsEcho) -> Result<()> {
        let text = to_toml(settings);
        atomic::write_file(&self.folder.join(SETTINGS_FILE), text.as_bytes())
    }
}

/// Whether there is nothing in `folder` but perhaps a lock.
fn is_empty(folder: &Path) -> bool {
    match fs::read_dir(folder) {
        Ok(entries) => entries.flatten().all(|entry| entry.file_name() == LOCK_FILE),
        Err(_) => !folder.exists(),
    }
}

/// What is wrong with a folder that is not empty; whether its files are of a run.
fn not_empty(out: &Path, of_a_run: bool, resume: bool) -> Error {
    let out = out.display();
    if resume && !of_a_run {
        let what = format_args!(
            "--resume: {out} is not the folder of a run: no {SETTINGS_FILE} beside checkpoints"
        );
        return Error::usage(what)
            .hint("name the folder that was the `--out` of the run, with all of its files");
    }
    Error::usage(format_args!("{out} is not empty")).hint(match of_a_run {
        true => "continue its run with `--resume`, or choose another `--out`",
        false => "choose another `--out`",
    })
}

fn lock(out: &Path) -> Result<Lock> {
    let path = out.join(LOCK_FILE);
    let taken = Lock::take(path.clone(), Afterwards::Kept);
    taken.map_err(|e| Error::io("create", &path, e))?.ok_or_else(|| {
        let what = format!("another process is training into {}", out.display());
        Error::usage(what).hint("wait for it, or choose another `--out`")
    })
}

fn find(out: &Path, progress: &Progress) -> Result<Option<Found>> {
    let found = checkpoints::newest(out, &mut |text| progress.note(&format!("warning: {text}")));
    match &found {
        Some(found) => {
            progress.note(&format!("resuming from {}", found.folder.display()));
        }
        None if checkpoints::steps(out).is_empty() && out.join(TENSORS_FILE).exists() => {
            let out = out.display();
            let what =
                format_args!("{out} has a finished adapter, and no checkpoint to resume from");
            return Err(Error::input(what).hint(format_args!(
                "train it further with `--init-adapter {out}` and another `--out`"
            )));
        }
        None if checkpoints::steps(out).is_empty() => {
            progress.note("warning: no checkpoint to resume from; starting at step 0");
        }
        None => {
            let what = format!("no checkpoint in {} can be resumed from", out.display());
            return Err(Error::input(what).hint(
                "the warnings say why; start again in another `--out`, with a checkpoint's adapter as \
                 `--init-adapter` if that is intact",
            ));
        }
    }
    Ok(found)
}
