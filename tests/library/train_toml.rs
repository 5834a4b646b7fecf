//! `docs/train.toml`, the example of a config file, is complete and true.

use std::any::TypeId;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::{Arg, Command, CommandFactory};
use nibble::cli::Cli;
use nibble::cli::layers::Entry;
use nibble::cli::settings_file::read_toml;
use nibble::train::settings::TEXTS;

const EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/train.toml");

fn train() -> Command {
    Cli::command().find_subcommand("train").unwrap().clone()
}

fn entries(path: &Path) -> BTreeMap<String, Vec<String>> {
    let entry = |entry: Entry| (entry.flag, entry.values);
    read_toml(&train(), path).unwrap().into_iter().map(entry).collect()
}

/// The example with its commented settings switched on.
fn with_everything() -> String {
    let setting = |line: &str| {
        let name = line.split([' ', '[', ']']).find(|word| !word.is_empty()).unwrap_or_default();
        let table = line.starts_with('[') && line.ends_with(']');
        !name.contains('#') && (line.contains(" = ") || table)
    };
    let text = std::fs::read_to_string(EXAMPLE).unwrap();
    let lines = text.lines().map(|line| match line.strip_prefix("# ") {
        Some(rest) if setting(rest) => rest,
        _ => line,
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn the_example_holds_the_defaults() {
    let command = train();
    for (flag, values) in entries(Path::new(EXAMPLE)) {
        if ["model", "data", "out"].contains(&flag.as_str()) {
            continue;
        }
        let arg = command.get_arguments().find(|arg| arg.get_long() == Some(&flag)).unwrap();
        let defaults = arg.get_default_values().iter().map(|value| value.to_str().unwrap());
        assert_eq!(values, defaults.collect::<Vec<_>>(), "{flag}");
    }
}

#[test]
fn the_example_names_every_setting_with_a_value_that_it_takes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("everything.toml");
    std::fs::write(&path, with_everything()).unwrap();
    let entries = entries(&path);
    let not_settings = ["config", "resume", "help", "version"];
    let command = train();
    let flags = command.get_arguments().filter_map(Arg::get_long);
    for flag in flags.filter(|flag| !not_settings.contains(flag)) {
        assert!(entries.contains_key(flag), "docs/train.toml does not name {flag}");
    }
}

#[test]
fn texts_are_the_flags_for_paths_and_texts() {
    let command = train();
    let is_text = |arg: &&Arg| {
        let kind = arg.get_value_parser().type_id();
        let path = kind == TypeId::of::<PathBuf>() && arg.get_long() != Some("config");
        path || (kind == TypeId::of::<String>() && arg.get_action().takes_values())
    };
    let flags = command.get_arguments().filter(is_text).filter_map(Arg::get_long);
    let mut flags: Vec<String> = flags.map(|flag| flag.replace('-', "_")).collect();
    flags.sort();
    assert_eq!(flags, TEXTS);
}
