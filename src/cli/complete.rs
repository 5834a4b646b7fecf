//! Completes the command line of `nibble train` from the places that [`super::layers`] orders.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{ArgMatches, Command, ValueEnum};

use super::layers::{self, Entry, Layers};
use super::settings_file;
use super::train::Preset;
use crate::error::{Error, Result};
use crate::train::settings::{self, SETTINGS_FILE, SettingsEcho};

/// Settings of the run that `--out` holds, for `--resume`.
pub type SavedSettings = dyn Fn(&Path) -> Option<SettingsEcho>;

/// The command line of `nibble train`, completed from `--config`, the resumed run and the preset.
///
/// # Errors
/// Those of [`settings_file::read_toml`] and [`layers::compatible`].
pub fn complete(
    command: &Command,
    matches: &ArgMatches,
    saved: &SavedSettings,
) -> Result<Vec<OsString>> {
    let mut below = Layers::new(command, matches);
    let asked = |entry: &Entry| !is_outdone(matches, &entry.flag);
    let mut file = config_file(command, matches)?;
    file.retain(asked);
    tell_of_adapter(&below, &file);
    below.add(&file)?;
    if matches.get_flag("resume") {
        let in_file = || {
            let entry = file.iter().find(|entry| entry.flag == "out")?;
            entry.values.first().map(PathBuf::from)
        };
        let out = matches.get_one::<PathBuf>("out").cloned().or_else(in_file);
        if let Some(out) = out {
            let mut entries = resumed(command, &out, saved)?;
            entries.retain(asked);
            // A run that is asked for epochs is not to end at its steps of before.
            if matches.value_source("num_train_epochs") == Some(ValueSource::CommandLine) {
                entries.retain(|entry| entry.flag != "max-steps");
            }
            let has_model =
                matches.contains_id("model") || file.iter().any(|entry| entry.flag == "model");
            if entries.is_empty() && !has_model {
                let what = format_args!("{} holds no run to resume", out.display());
                return Err(Error::usage(what).hint("start one with `--model` and `--data`"));
            }
            below.add(&entries)?;
        }
    }
    let preset = matches.get_one::<Preset>("preset").copied();
    if let Some(preset) = preset.or_else(|| preset_of(&file)) {
        below.add(&layers::preset_entries(preset.settings()))?;
    }
    Ok(below.into_arguments())
}

/// Whether a setting of a lower layer says when to do what the command line gives an interval for.
fn is_outdone(matches: &ArgMatches, flag: &str) -> bool {
    let interval = match flag {
        "eval-strategy" => "eval_steps",
        "save-strategy" => "save_steps",
        _ => return false,
    };
    matches.value_source(interval) == Some(ValueSource::CommandLine)
}

/// The settings of `--config`, under the flags of `train`.
pub(super) fn config_file(train: &Command, matches: &ArgMatches) -> Result<Vec<Entry>> {
    let path = matches.get_one::<PathBuf>("config");
    let read = |path: &PathBuf| layers::compatible(train, settings_file::read_toml(train, path)?);
    path.map_or(Ok(Vec::new()), read)
}

/// Says which settings of a file are those of a new adapter, where the command line has one to begin with.
pub(super) fn tell_of_adapter(above: &Layers, file: &[Entry]) {
    let unused = above.brought_along(file);
    let names: Vec<String> = unused.iter().map(|entry| format!("`{}`", entry.flag)).collect();
    if let Some(Entry { place, .. }) = unused.first() {
        let file = place.rsplit_once(':').map_or(place.as_str(), |(file, _)| file);
        let names = names.join(", ");
        eprintln!(
            "note: {file} has settings that `--init-adapter` brings along, unused here: {names}"
        );
    }
}

pub(super) fn preset_of(file: &[Entry]) -> Option<Preset> {
    let entry = file.iter().find(|entry| entry.flag == "preset")?;
    Preset::from_str(entry.values.first()?, false).ok()
}

/// Settings of the run in `out`: its newest checkpoint's and the last session's, else those that it began
/// with.
fn resumed(command: &Command, out: &Path, saved: &SavedSettings) -> Result<Vec<Entry>> {
    let file = out.join(SETTINGS_FILE);
    let read = || -> Result<SettingsEcho> {
        let entries = settings_file::read_toml(command, &file)?.into_iter();
        Ok(entries.map(|entry| (entry.flag.replace('-', "_"), entry.values)).collect())
    };
    let last = file.exists().then(read).transpose();
    let settings = match (saved(out), last) {
        (Some(saved), Ok(Some(last))) if last.contains_key("model") => {
            // No session writes what another one would not take.
            let edits = settings::changes(&saved, &last);
            if !edits.is_empty() {
                let (file, edits) = (file.display(), edits.join(", "));
                eprintln!("warning: {file} was edited, and the run goes on without that: {edits}");
            }
            settings::renewed(saved, &last)
        }
        (Some(saved), last) => {
            if let Err(error) = last {
                eprintln!("warning: {error}; the settings are the checkpoint's");
            }
            saved
        }
        (None, Ok(Some(last))) => last,
        (None, Ok(None)) => return Ok(Vec::new()),
        (None, Err(error)) => return Err(error),
    };
    Ok(layers::saved_entries(command, &settings))
}

#[cfg(test)]
mod tests;
