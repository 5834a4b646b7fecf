//! Settings from several places: command line over `--config` file over resumed run over preset
//! over the default written in the derive.
//!
//! Every place speaks the flags' names and its values go through the flags' own parsers, so a file
//! cannot hold what the command line would refuse. Lower layers are appended to the command line
//! as `--flag=value`, but only where no higher layer has set that flag or one that excludes it.

use std::ffi::OsString;
use std::path::Path;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};

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

/// The flag that settings of a new adapter exclude.
const INIT_ADAPTER: &str = "init-adapter";

/// Flags that say where settings come from, and are not settings.
pub(super) const NOT_SETTINGS: [&str; 4] = ["config", "preset", "resume", "help"];

/// Finds the flag `name` (kebab or snake case), be it an alias.
pub(super) fn find<'a>(command: &'a Command, name: &str) -> Option<&'a Arg> {
    let name = name.replace('_', "-");
    let aliased = |arg: &Arg| arg.get_visible_aliases().is_some_and(|all| all.contains(&&*name));
    command.get_arguments().find(|arg| arg.get_long() == Some(&name) || aliased(arg))
}

/// Those of another command's settings that `command` has.
pub fn known_to(command: &Command, entries: Vec<Entry>) -> Vec<Entry> {
    let known = |entry: Entry| Some(Entry { flag: long(find(command, &entry.flag)?), ..entry });
    entries.into_iter().filter_map(known).collect()
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

/// The name of a flag.
pub(super) fn long(arg: &Arg) -> String {
    arg.get_long().unwrap_or_default().to_string()
}

/// `command` without required flags: a layer alone need not have them.
pub fn partial(command: &Command) -> Command {
    command.clone().mut_args(|arg| arg.required(false))
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

/// A setting as the command line has it.
pub(super) fn arguments(entry: &Entry) -> impl Iterator<Item = OsString> {
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
        let begins_with = entries.iter().find(|entry| entry.flag == INIT_ADAPTER);
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

    /// Those of `entries` that an adapter to begin with brings along, if one was given in a layer above.
    pub fn brought_along<'e>(&self, entries: &'e [Entry]) -> Vec<&'e Entry> {
        let given = self.set.iter().any(|flag| flag == INIT_ADAPTER);
        let brought = |entry: &&Entry| given && exclude(self.command, INIT_ADAPTER, &entry.flag);
        entries.iter().filter(brought).collect()
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
