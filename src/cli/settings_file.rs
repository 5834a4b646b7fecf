//! A file of settings: every row checked by itself, and all that is wrong with any of them said at once.
//!
//! TOML alone is read. What other programs call their settings is pointed to ours
//! ([`super::synonyms`]), and passed over where it asks for nothing.

use std::any::TypeId;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, Command};
use toml::Spanned;
use toml::de::DeValue;

use super::layers::{self, Entry, NOT_SETTINGS, find, long};
use super::synonyms;
use crate::data::TemplateKwargs;
use crate::error::{Error, Message, Result};
use crate::nearest::nearest;
use crate::train::scheduler_kwargs::SchedulerKwargs;

/// Formats that other programs read their settings from, by the endings of their files, and how a row of
/// theirs is written here.
const OTHER_FORMATS: [(&str, &str, &str); 3] = [
    ("yaml", "YAML", "`name = value` for `name: value`"),
    ("yml", "YAML", "`name = value` for `name: value`"),
    ("json", "JSON", "`name = value` for `\"name\": value,` and no braces around all"),
];

/// Settings of ours as others write that they are to be what they are by themselves.
const BY_ITSELF: [(&str, &str); 1] = [("bf16", "auto")];

const WINDOWS_PATH: &str = "a path of Windows stands in single quotes: `'C:\\models'`";

/// The settings of a TOML file, checked one by one against the flags of `command`.
///
/// # Errors
/// `Usage` with file and line, or all lines: not TOML, an unknown name (with the nearest known one), a
/// name that is there twice, a value that the flag does not take.
pub fn read_toml(command: &Command, path: &Path) -> Result<Vec<Entry>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
    check_format(path)?;
    let line = |offset: usize| text[..offset].matches('\n').count() + 1;
    let table = toml::de::DeTable::parse(&text).map_err(|error| {
        let place = error.span().map(|span| line(span.start));
        let shown = place.map_or(String::new(), |line| format!(":{line}"));
        let row = place.and_then(|line| text.lines().nth(line - 1)).unwrap_or_default();
        Error::usage(format_args!("{}{shown}: {}", path.display(), error.message())).hint(
            if has_drive(row) {
                WINDOWS_PATH
            } else {
                "write one `name = value` a line, text in quotes, each name once"
            },
        )
    })?;
    let mut rows: Vec<_> = table.get_ref().iter().collect();
    rows.sort_by_key(|(key, _)| key.span().start);
    let mut entries: Vec<Entry> = Vec::new();
    let mut problems: Vec<(usize, Error)> = Vec::new();
    for (key, value) in rows {
        let line = line(key.span().start);
        let place = format!("{}:{line}", path.display());
        if is_idle(command, key.get_ref(), value.get_ref()) {
            continue;
        }
        let row = entry(command, key.get_ref(), value.get_ref(), place);
        let row = row.and_then(|row| alone(row, &entries));
        match row.and_then(|row| check(command, &row).map(|()| row)) {
            Ok(row) => entries.push(row),
            Err(error) => problems.push((line, error)),
        }
    }
    if problems.is_empty() { Ok(entries) } else { Err(together(path, problems)) }
}

fn check_format(path: &Path) -> Result<()> {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    let other = OTHER_FORMATS.iter().find(|(other, _, _)| ending.eq_ignore_ascii_case(other));
    other.map_or(Ok(()), |(_, format, row)| {
        let what = format_args!("{}: settings are read from TOML, not {format}", path.display());
        Err(Error::usage(what)
            .hint(format_args!("write {row}, text in quotes, into a file `.toml`")))
    })
}

/// Whether a text has the beginning of a path of Windows in it.
fn has_drive(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.windows(3).any(|it| it[0].is_ascii_alphabetic() && it[1..] == *b":\\")
}

/// One problem with its hint, or a line for each of several.
fn together(path: &Path, problems: Vec<(usize, Error)>) -> Error {
    let path = path.display();
    let count = problems.len();
    let mut text = format!("{path}: {count} settings cannot be used");
    for (line, error) in &problems {
        let message = error.message();
        let hint = message.hint.as_ref().map_or(String::new(), |hint| format!("; {hint}"));
        text += &format!("\n  line {line}: {}{hint}", message.what);
    }
    match problems.into_iter().next() {
        Some((line, error)) if count == 1 => error.at(format_args!("{path}:{line}")),
        _ => Error::usage(text)
            .hint("all settings are in `nibble train --help`, under the same names"),
    }
}

/// Whether a row asks for nothing that is not so without it.
fn is_idle(command: &Command, name: &str, value: &DeValue<'_>) -> bool {
    let values = texts(value);
    let is = |(ours, usual): &(&str, &str)| {
        name == *ours && values.as_ref().is_some_and(|values| values == &[*usual])
    };
    BY_ITSELF.iter().any(is) || synonyms::asks_for_nothing(command, name, values.as_deref())
}

fn entry(command: &Command, name: &str, value: &DeValue<'_>, place: String) -> Result<Entry> {
    let arg = known(command, name, value)?;
    if arg.get_value_parser().type_id() == TypeId::of::<PathBuf>() {
        let items = match value {
            DeValue::Array(items) if is_list(arg) => items.iter().map(Spanned::get_ref).collect(),
            value => vec![value],
        };
        items.into_iter().try_for_each(|item| check_path(name, item))?;
    }
    let object =
        if takes_json(arg) { json(value).filter(serde_json::Value::is_object) } else { None };
    let values = object.map(|object| vec![object.to_string()]).or_else(|| texts(value));
    let values = values.ok_or_else(|| {
        Error::usage(format_args!("`{name}` cannot be a date or nested"))
            .hint("write the value as on the command line")
    })?;
    Ok(Entry { flag: long(arg), values: in_one(arg, values), place })
}

/// A number for a path is a mistake: it would be looked for as a file of that name. So is `\t` behind a drive,
/// which double quotes make a tab.
fn check_path(name: &str, value: &DeValue<'_>) -> Result<()> {
    let (got, example) = match value {
        DeValue::String(text) => {
            let bytes = text.as_bytes();
            let is_drive = matches!(bytes, [drive, b':', ..] if drive.is_ascii_alphabetic());
            if is_drive && bytes.iter().any(u8::is_ascii_control) {
                let what = format_args!("`{name}` is {text:?} with an escape, expected a path");
                return Err(Error::usage(what).hint(WINDOWS_PATH));
            }
            return Ok(());
        }
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

/// The flag of a setting.
fn known<'a>(command: &'a Command, name: &str, value: &DeValue<'_>) -> Result<&'a Arg> {
    match find(command, name) {
        Some(arg) if !NOT_SETTINGS.contains(&&*long(arg)) || long(arg) == "preset" => Ok(arg),
        Some(_) => Err(Error::usage(format_args!("`{name}` belongs on the command line"))
            .hint("leave it out of the file")),
        None => {
            Err(Error::usage(format_args!("unknown key `{name}`"))
                .hint(instead(command, name, value)))
        }
    }
}

/// What to write instead of the unknown key `name`.
fn instead(command: &Command, name: &str, value: &DeValue<'_>) -> String {
    let same = synonyms::ours(command, name);
    let hint = synonyms::hint(command, name, "");
    if matches!(value, DeValue::Table(_)) && (same.is_some() || hint.is_none()) {
        return format!("settings have no sections: remove `{name}`");
    }
    match hint {
        Some(hint) => match same.and_then(|ours| refusal(command, ours, value)) {
            Some(refusal) => format!("{hint}: {refusal}"),
            None => hint,
        },
        None => {
            let flags = command.get_arguments().filter_map(Arg::get_long);
            let settings = flags.filter(|flag| !NOT_SETTINGS.contains(flag) || *flag == "preset");
            match nearest(&name.replace('_', "-"), settings) {
                close if close.is_empty() => "see `nibble train --help`".to_string(),
                close => format!("did you mean {close}?"),
            }
        }
    }
}

/// Why `flag` would not take the value of its synonym.
fn refusal(command: &Command, flag: &str, value: &DeValue<'_>) -> Option<String> {
    let row = entry(command, flag, value, String::new());
    let error = row.and_then(|row| check(command, &row)).err()?;
    let Message { what, hint } = error.message();
    Some(hint.as_ref().map_or(what.clone(), |hint| format!("{what}, {hint}")))
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

/// Whether a flag takes a JSON object, which a file may have as a table.
fn takes_json(arg: &Arg) -> bool {
    let parsed = arg.get_value_parser().type_id();
    parsed == TypeId::of::<TemplateKwargs>() || parsed == TypeId::of::<SchedulerKwargs>()
}

/// A TOML value as JSON has it; NaN and infinity are texts, and dates are none.
fn json(value: &DeValue<'_>) -> Option<serde_json::Value> {
    use serde_json::Value;
    Some(match value {
        DeValue::String(text) => Value::from(text.to_string()),
        DeValue::Integer(number) => {
            Value::from(i64::from_str_radix(number.as_str(), number.radix()).ok()?)
        }
        DeValue::Float(number) => {
            let finite = number.as_str().parse::<f64>().ok().and_then(serde_json::Number::from_f64);
            finite.map_or_else(|| Value::from(number.as_str()), Value::from)
        }
        DeValue::Boolean(value) => Value::from(*value),
        DeValue::Array(items) => {
            items.iter().map(|item| json(item.get_ref())).collect::<Option<_>>()?
        }
        DeValue::Table(table) => {
            let row = |key: &str, value| Some((key.to_string(), json(value)?));
            let rows = table.iter().map(|(key, value)| row(key.get_ref(), value.get_ref()));
            Value::Object(rows.collect::<Option<_>>()?)
        }
        DeValue::Datetime(_) => return None,
    })
}

/// A list for a flag that is given once is one value, with commas: `["q_proj", "v_proj"]`.
fn in_one(arg: &Arg, values: Vec<String>) -> Vec<String> {
    if is_list(arg) { values } else { vec![values.join(",")] }
}

/// Whether a flag may be repeated, and has a value for each time.
fn is_list(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Append)
}

/// A float without a fraction is the whole number, which flags for counts take: `16.0`.
fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => Some(number.to_string()),
        DeValue::Float(number) => {
            let whole =
                number.as_str().split_once('.').filter(|(_, rest)| rest.bytes().all(|b| b == b'0'));
            Some(whole.map_or(number.as_str(), |(whole, _)| whole).to_string())
        }
        DeValue::Boolean(value) => Some(value.to_string()),
        DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => None,
    }
}

/// Runs one setting through its flag's parser.
fn check(command: &Command, entry: &Entry) -> Result<()> {
    let argv = std::iter::once(OsString::from("train")).chain(layers::arguments(entry));
    match layers::partial(command).try_get_matches_from(argv) {
        Ok(_) => Ok(()),
        Err(error) => Err(layers::readable(command, &error)),
    }
}
