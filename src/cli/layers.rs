//! Settings from several places: command line over `--config` file over resumed run over preset
//! over the default written in the derive.
//!
//! Every place speaks the flags' names and its values go through the flags' own parsers, so a file
//! cannot hold what the command line would refuse. Lower layers are appended to the command line
//! as `--flag=value`, but only where no higher layer has set that flag or one that excludes it.

use std::any::TypeId;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use toml::Spanned;
use toml::de::DeValue;

use super::synonyms;
use crate::error::{Error, HINT, Result};
use crate::nearest::nearest;
use crate::train::settings::{self, SettingsEcho};

/// One setting of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Flag name, with hyphens.
    pub flag: String,
    /// Its value; several for a flag that takes a list or is repeated.
    pub values: Vec<String>,
    /// Where it stands, for messages.
    pub place: String,
}

/// Flags that say where settings come from, and are not settings.
const NOT_SETTINGS: [&str; 4] = ["config", "preset", "resume", "help"];

/// Settings that had no effect, and are in the files of runs from before they went.
const RETIRED: [&str; 1] = ["loraplus-lr-embedding"];

/// Finds the flag `name` (kebab or snake case), be it an alias.
fn find<'a>(command: &'a Command, name: &str) -> Option<&'a Arg> {
    let name = name.replace('_', "-");
    let aliased = |arg: &Arg| arg.get_visible_aliases().is_some_and(|all| all.contains(&&*name));
    command.get_arguments().find(|arg| arg.get_long() == Some(&name) || aliased(arg))
}

/// Those of another command's settings that `command` has.
pub fn known_to(command: &Command, entries: Vec<Entry>) -> Vec<Entry> {
    let known = |entry: Entry| Some(Entry { flag: long(find(command, &entry.flag)?), ..entry });
    entries.into_iter().filter_map(known).collect()
}

/// The settings of a TOML file, checked one by one against the flags of `command`.
///
/// # Errors
/// `Usage` with file and line: not TOML, an unknown name (with the nearest known one), a name that
/// is there twice, a value that the flag does not take.
pub fn read_toml(command: &Command, path: &Path) -> Result<Vec<Entry>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
    if path.extension().is_some_and(|it| it == "yaml" || it == "yml") {
        let what = format_args!("{}: settings are read from TOML, not YAML", path.display());
        return Err(Error::usage(what)
            .hint("write `name = value` for `name: value`, text in quotes, into a file `.toml`"));
    }
    let line = |offset: usize| text[..offset].matches('\n').count() + 1;
    let table = toml::de::DeTable::parse(&text).map_err(|error| {
        let place = error.span().map_or(String::new(), |span| format!(":{}", line(span.start)));
        Error::usage(format_args!("{}{place}: {}", path.display(), error.message()))
            .hint("write one `name = value` a line, text in quotes, each name once")
    })?;
    let mut rows: Vec<_> = table.get_ref().iter().collect();
    rows.retain(|(key, _)| !RETIRED.contains(&&*key.get_ref().replace('_', "-")));
    rows.sort_by_key(|(key, _)| key.span().start);
    let mut entries: Vec<Entry> = Vec::new();
    for (key, value) in rows {
        let place = format!("{}:{}", path.display(), line(key.span().start));
        let row = entry(command, key.get_ref(), value.get_ref(), place.clone());
        let row = row.and_then(|row| alone(row, &entries)).map_err(|error| error.at(&place))?;
        entries.push(row);
    }
    entries.iter().try_for_each(|entry| check(command, entry))?;
    Ok(entries)
}

/// The settings of a file that can stand together. A run's own file has all of them: what equals the
/// default is left out where it is excluded by what does not.
///
/// # Errors
/// `Usage` with the places of two that exclude each other.
pub fn compatible(command: &Command, entries: Vec<Entry>) -> Result<Vec<Entry>> {
    let set = |entry: &&Entry| !is_default(command, &entry.flag, &entry.values);
    let excluded = |one: &Entry, other: &Entry| exclude(command, &one.flag, &other.flag);
    let idle = |entry: &&Entry| {
        !set(entry) && entries.iter().filter(set).any(|other| excluded(entry, other))
    };
    let kept: Vec<Entry> = entries.iter().filter(|entry| !idle(entry)).cloned().collect();
    for (index, entry) in kept.iter().enumerate() {
        let earlier = kept[..index].iter().find(|earlier| excluded(entry, earlier));
        if let Some(Entry { flag, place, .. }) = earlier {
            let what = format_args!("`{}` excludes `{flag}`, which is in {place}", entry.flag);
            return Err(Error::usage(what).hint("keep one of them").at(&entry.place));
        }
    }
    Ok(kept)
}

/// Whether two flags cannot be given together.
fn exclude(command: &Command, one: &str, other: &str) -> bool {
    let excludes = |one: &Arg, other: &Arg| {
        let conflicts = command.get_arg_conflicts_with(one);
        conflicts.iter().any(|conflict| conflict.get_id() == other.get_id())
    };
    let both = find(command, one).zip(find(command, other));
    both.is_some_and(|(one, other)| excludes(one, other) || excludes(other, one))
}

/// The usual value of a packing flag. It is not the flag's clap default, since a base that is already packed may
/// be packed otherwise. A run on a dense base always records it, so a value equal to it is no request.
fn usual_packing(flag: &str) -> Option<&'static str> {
    settings::usual_packing(&flag.replace('-', "_"))
}

fn is_usual_packing(flag: &str, values: &[String]) -> bool {
    usual_packing(flag).is_some_and(|usual| values == [usual])
}

fn is_default(command: &Command, flag: &str, values: &[String]) -> bool {
    if is_usual_packing(flag, values) {
        return true;
    }
    let defaults = find(command, flag).map(Arg::get_default_values).unwrap_or_default();
    values.iter().map(OsString::from).eq(defaults.iter().map(OsString::from))
}

fn entry(command: &Command, name: &str, value: &DeValue<'_>, place: String) -> Result<Entry> {
    let arg = known(command, name, matches!(value, DeValue::Table(_)))?;
    if arg.get_value_parser().type_id() == TypeId::of::<PathBuf>() {
        let items = match value {
            DeValue::Array(items) if is_list(arg) => items.iter().map(Spanned::get_ref).collect(),
            value => vec![value],
        };
        items.into_iter().try_for_each(|item| check_path(name, item))?;
    }
    let values = texts(value).ok_or_else(|| {
        Error::usage(format_args!("`{name}` cannot be a date or nested"))
            .hint("write the value as on the command line")
    })?;
    Ok(Entry { flag: long(arg), values: in_one(arg, values), place })
}

/// A number for a path is a mistake: it would be looked for as a file of that name.
fn check_path(name: &str, value: &DeValue<'_>) -> Result<()> {
    let (got, example) = match value {
        DeValue::String(_) => return Ok(()),
        value => match scalar(value) {
            Some(text) => (text.clone(), text),
            None => ("no single value".to_string(), "FOLDER".to_string()),
        },
    };
    let what = format_args!("`{name}` is {got}, expected a path in quotes");
    Err(Error::usage(what).hint(format_args!("`{name} = \"{example}\"`")))
}

/// `entry`, unless its setting is among the `earlier` ones: TOML itself sees two names in `lora-r`
/// and `lora_r`.
fn alone(entry: Entry, earlier: &[Entry]) -> Result<Entry> {
    let Some(first) = earlier.iter().find(|first| first.flag == entry.flag) else {
        return Ok(entry);
    };
    let (flag, place) = (&entry.flag, &first.place);
    let what = format_args!("`{flag}` is set again, expected once; it is in {place}, too");
    let snake = flag.replace('-', "_");
    Err(Error::usage(what).hint(format_args!("`{snake}` and `{flag}` are one setting: keep one")))
}

fn long(arg: &Arg) -> String {
    arg.get_long().unwrap_or_default().to_string()
}

/// The flag of a setting; `is_section` if it has settings of its own.
fn known<'a>(command: &'a Command, name: &str, is_section: bool) -> Result<&'a Arg> {
    let settings = || {
        command
            .get_arguments()
            .filter_map(Arg::get_long)
            .filter(|long| !NOT_SETTINGS.contains(long) || *long == "preset")
    };
    let wanted = name.replace('_', "-");
    match find(command, name) {
        Some(arg) if settings().any(|long| arg.get_long() == Some(long)) => Ok(arg),
        Some(_) => Err(Error::usage(format_args!("`{name}` belongs on the command line"))
            .hint("leave it out of the file")),
        None => {
            let error = Error::usage(format_args!("unknown key `{name}`"));
            if is_section {
                let hint = format_args!("settings have no sections: remove `{name}`");
                return Err(error.hint(hint));
            }
            let meant = synonyms::ours(command, &wanted.to_lowercase());
            if let Some(flag) = meant.filter(|flag| NOT_SETTINGS.contains(flag)) {
                return Err(error.hint(format_args!("on the command line it is `--{flag}`")));
            }
            if let Some(hint) = synonyms::hint(command, name, "") {
                return Err(error.hint(hint));
            }
            match nearest(&wanted, settings()) {
                close if close.is_empty() => Err(error.hint("see `nibble train --help`")),
                close => Err(error.hint(format_args!("did you mean {close}?"))),
            }
        }
    }
}

/// A TOML value as the command line would have it; a table is a list of `key=value`.
fn texts(value: &DeValue<'_>) -> Option<Vec<String>> {
    match value {
        DeValue::Array(items) => items.iter().map(|item| scalar(item.get_ref())).collect(),
        DeValue::Table(table) => {
            let row = |key: &str, value| Some(format!("{key}={}", scalar(value)?));
            table.iter().map(|(key, value)| row(key.get_ref(), value.get_ref())).collect()
        }
        value => Some(vec![scalar(value)?]),
    }
}

/// A list for a flag that is given once is one value, with commas: `["q_proj", "v_proj"]`.
fn in_one(arg: &Arg, values: Vec<String>) -> Vec<String> {
    if is_list(arg) { values } else { vec![values.join(",")] }
}

/// Whether a flag may be repeated, and has a value for each time.
fn is_list(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Append)
}

fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => Some(number.to_string()),
        DeValue::Float(number) => Some(number.as_str().to_string()),
        DeValue::Boolean(value) => Some(value.to_string()),
        DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => None,
    }
}

/// `command` without required flags: a layer alone need not have them.
pub fn partial(command: &Command) -> Command {
    command.clone().mut_args(|arg| arg.required(false))
}

/// Runs one setting through its flag's parser.
fn check(command: &Command, entry: &Entry) -> Result<()> {
    let argv = std::iter::once(OsString::from("train")).chain(arguments(entry));
    match partial(command).try_get_matches_from(argv) {
        Ok(_) => Ok(()),
        Err(error) => Err(readable(command, &error).at(&entry.place)),
    }
}

/// clap's message without its prefix and its usage lines; possible values, its tip or a parser's
/// hint become the hint, or what is said of a flag of `command` that is not there.
pub fn readable(command: &Command, error: &clap::Error) -> Error {
    let text = error.render().to_string();
    let mut lines = text.lines().take_while(|line| !line.trim().is_empty()).map(str::trim);
    let first = lines.next().unwrap_or("invalid setting");
    let first = first.strip_prefix("error: ").unwrap_or(first);
    let tip = text.lines().find_map(|line| line.trim().strip_prefix("tip: "));
    let rest: Vec<&str> = lines.collect();
    if let (ErrorKind::UnknownArgument, Some(ContextValue::String(tried))) =
        (error.kind(), error.get(ContextKind::InvalidArg))
    {
        return unknown(command, first, tried);
    }
    match (&rest[..], tip) {
        ([], Some(tip)) => Error::usage(first).hint(tip),
        ([], None) => Error::usage(first),
        ([values, ..], _) if values.starts_with('[') => {
            Error::usage(first).hint(values.trim_matches(['[', ']']))
        }
        ([hint], _) if hint.starts_with(HINT) => Error::usage(first).hint(&hint[HINT.len()..]),
        (rest, _) => Error::usage(format_args!("{first} {}", rest.join(", "))),
    }
}

/// An unknown argument, with the flag of `command` that was meant, if one can tell.
fn unknown(command: &Command, what: &str, tried: &str) -> Error {
    let error = Error::usage(what);
    let has = |flag: &str| find(command, flag).is_some();
    if let Some(hint) = synonyms::hint(command, tried, "--") {
        return error.hint(hint);
    }
    if !tried.starts_with('-') {
        if Path::new(tried).extension().is_some_and(|it| it == "toml") && has("config") {
            return error.hint(format_args!("settings are read by `--config {tried}`"));
        }
        if tried.ends_with("_proj") && has("target-modules") {
            return error.hint("a list is one value with commas: `--target-modules q_proj,v_proj`");
        }
    }
    let flags = command.get_arguments().filter_map(Arg::get_long).map(|long| format!("--{long}"));
    let flags: Vec<String> = flags.collect();
    let tried = tried.replace('_', "-");
    let negated = tried.strip_prefix("--no-").and_then(|name| find(command, name));
    if let Some(name) = negated.filter(|arg| is_switch(arg)).and_then(Arg::get_long) {
        return error.hint(format_args!("`--{name} false`"));
    }
    match nearest(&tried, flags.iter().map(String::as_str)) {
        close if close.is_empty() => error,
        close => error.hint(format_args!("did you mean {close}?")),
    }
}

/// Whether a flag is true or false.
fn is_switch(arg: &Arg) -> bool {
    let values: Vec<String> =
        arg.get_possible_values().iter().map(|value| value.get_name().to_string()).collect();
    values == ["true", "false"]
}

fn arguments(entry: &Entry) -> impl Iterator<Item = OsString> {
    entry.values.iter().map(|value| format!("--{}={value}", entry.flag).into())
}

/// What was set so far, from the highest layer down.
pub struct Layers<'a> {
    command: &'a Command,
    set: Vec<String>,
    arguments: Vec<OsString>,
}

impl<'a> Layers<'a> {
    /// Starts with what `matches` found on the command line.
    pub fn new(command: &'a Command, matches: &ArgMatches) -> Self {
        let on_command_line = |arg: &&Arg| {
            let source = matches.value_source(arg.get_id().as_str());
            source == Some(ValueSource::CommandLine)
        };
        let set = command.get_arguments().filter(on_command_line).map(long).collect();
        Layers { command, set, arguments: Vec::new() }
    }

    /// Adds a layer below all others: those of its settings that are still free.
    ///
    /// # Errors
    /// `Usage` where that would leave out the adapter to begin with: a new one would be trained in its place.
    pub fn add(&mut self, entries: &[Entry]) -> Result<()> {
        let begins_with = entries.iter().find(|entry| entry.flag == "init-adapter");
        let instead = begins_with.and_then(|entry| Some((entry, self.excluding(entry)?)));
        if let Some((Entry { flag, place, .. }, other)) = instead {
            let what = format_args!("`--{other}` is for a new adapter, {place} has `{flag}`");
            return Err(Error::usage(what).hint("leave one of them out"));
        }
        let free: Vec<&Entry> = entries.iter().filter(|entry| !self.decided(entry)).collect();
        let asked = free.iter().filter(|entry| !is_usual_packing(&entry.flag, &entry.values));
        self.arguments.extend(asked.flat_map(|entry| arguments(entry)));
        self.set.extend(free.iter().map(|entry| entry.flag.clone()));
        Ok(())
    }

    /// Arguments to append to the command line.
    pub fn into_arguments(self) -> Vec<OsString> {
        self.arguments
    }

    fn decided(&self, entry: &Entry) -> bool {
        self.set.contains(&entry.flag) || self.excluding(entry).is_some()
    }

    /// A setting that cannot be given together with `entry`.
    fn excluding(&self, entry: &Entry) -> Option<&String> {
        self.set.iter().find(|set| exclude(self.command, set, &entry.flag))
    }
}

/// A preset's settings as a layer.
pub fn preset_entries(settings: &[(&str, &str)]) -> Vec<Entry> {
    let entry = |(flag, value): &(&str, &str)| Entry {
        flag: flag.to_string(),
        values: vec![value.to_string()],
        place: "preset".to_string(),
    };
    settings.iter().map(entry).collect()
}

/// A saved run's settings as a layer. What equals the default is left out: it would be in the way
/// of flags that exclude it.
pub fn saved_entries(command: &Command, saved: &SettingsEcho) -> Vec<Entry> {
    let entries = saved.iter().filter_map(|(name, values)| {
        let flag = long(find(command, name)?);
        let place = "saved run".to_string();
        (!is_default(command, &flag, values)).then(|| Entry { flag, values: values.clone(), place })
    });
    entries.collect()
}

/// Whether a flag has its default, and one that excludes it is given: an adapter to begin with has a rank
/// of its own.
fn is_displaced(command: &Command, matches: &ArgMatches, arg: &Arg) -> bool {
    let source = |arg: &Arg| matches.value_source(arg.get_id().as_str());
    let given = |other: &Arg| source(other) == Some(ValueSource::CommandLine);
    let mut others = command.get_arguments().filter(|other| given(other));
    let excluded = |other: &Arg| match (arg.get_long(), other.get_long()) {
        (Some(one), Some(other)) => exclude(command, one, other),
        _ => false,
    };
    source(arg) == Some(ValueSource::DefaultValue) && others.any(excluded)
}

/// All settings in `matches`, defaults included.
pub fn echo(command: &Command, matches: &ArgMatches) -> SettingsEcho {
    let values = |arg: &Arg| -> Option<Vec<String>> {
        let raw = matches.try_get_raw(arg.get_id().as_str()).ok()??;
        Some(raw.map(|value| value.to_string_lossy().into_owned()).collect())
    };
    let settings = command.get_arguments().filter(|arg| {
        arg.get_long().is_some_and(|long| !NOT_SETTINGS.contains(&long))
            && !matches!(arg.get_action(), ArgAction::Help | ArgAction::HelpLong)
            && !is_displaced(command, matches, arg)
    });
    let packing = |arg: &Arg| Some(vec![usual_packing(arg.get_long()?)?.to_string()]);
    let values = |arg: &Arg| values(arg).or_else(|| packing(arg));
    settings.filter_map(|arg| Some((long(arg).replace('-', "_"), values(arg)?))).collect()
}
