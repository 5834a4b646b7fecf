//! Completes the command lines of commands that read a file for `train`: `data`, `eval` and `memory` take what
//! they share with it.

use std::ffi::OsString;

use clap::parser::ValueSource;
use clap::{ArgMatches, Command};

use super::complete::{config_file, preset_of, tell_of_adapter};
use super::layers::{self, Entry, Layers};
use crate::error::Result;

/// The command line of `reader`, completed from `--config`: a file for `train`, whose other settings are
/// checked and left alone.
///
/// # Errors
/// Those of [`settings_file::read_toml`](super::settings_file::read_toml) and [`layers::compatible`].
pub fn complete_reader(
    reader: &Command,
    train: &Command,
    matches: &ArgMatches,
) -> Result<Vec<OsString>> {
    let mut file = config_file(train, matches)?;
    let preset = preset_of(&file).map(|preset| layers::preset_entries(preset.settings()));
    if reader.get_name() == "eval" {
        file = evaluated(file, matches);
    }
    let mut below = Layers::new(reader, matches);
    tell_of_adapter(&below, &file);
    for entries in [file, preset.unwrap_or_default()] {
        below.add(&layers::known_to(reader, entries))?;
    }
    Ok(below.into_arguments())
}

/// The data of `eval` are those that `train` evaluates on, held out of its data or files of their own, unless the
/// command line names others.
fn evaluated(file: Vec<Entry>, matches: &ArgMatches) -> Vec<Entry> {
    let given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
    let (has_data, has_split) = (given("data"), given("validation_split"));
    let holds_out = |entry: &Entry| {
        let share = entry.values.first().and_then(|share| share.parse::<f64>().ok());
        entry.flag == "validation-split" && share.is_some_and(|share| share > 0.0)
    };
    let is_split = has_split || (!has_data && file.iter().any(holds_out));
    let take = |entry: Entry| match &*entry.flag {
        "data" | "eval-data" if has_data => None,
        "eval-data" if is_split => None,
        "eval-data" => Some(Entry { flag: "data".into(), ..entry }),
        "data" | "validation-split" | "seed" if !is_split => None,
        _ => Some(entry),
    };
    file.into_iter().filter_map(take).collect()
}
