//! The Jinja environment of chat templates: minijinja made to behave like transformers' Jinja2.
//!
//! Source: transformers `utils/chat_template_utils.py` (`_cached_compile_jinja_template`): block
//! trimming, loop controls, `raise_exception`, `strftime_now`, its own `tojson`, and `{% generation %}`
//! blocks. Values print as Python prints them (`True`, `None`, `['a']`).

use std::fmt;

use minijinja::value::{Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, UndefinedBehavior};

use super::python_float::repr;
use super::python_json::to_json;
use super::python_methods;
use super::strftime::strftime;

/// Private-use characters around the text of a `{% generation %}` block.
pub(super) const GENERATION_BEGIN: char = '\u{f8f0}';
/// The end of what the assistant says: see [`GENERATION_BEGIN`].
pub(super) const GENERATION_END: char = '\u{f8f1}';

/// Instructions after which a template is stopped that renders one conversation: some seconds. A message takes a
/// few hundred.
const FUEL: u64 = 100_000_000;

/// An environment in which it is `unix_seconds` o'clock.
pub(super) fn environment(unix_seconds: u64) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_unknown_method_callback(python_methods::call);
    environment.set_formatter(print);
    environment.set_fuel(Some(FUEL));
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", move |format: String| strftime(&format, unix_seconds));
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |value: &Value| python_str(value));
    environment.add_filter("trim", trim);
    environment.add_filter("truncate", python_methods::truncate);
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter("join", join);
    environment.add_test("number", |value: &Value| {
        matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
    });
    environment.add_test("sequence", |value: &Value| {
        use ValueKind::{Map, Seq, String, Undefined};
        matches!(value.kind(), Seq | Map | String | Undefined)
    });
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_filter("generation", |text: String| {
        format!("{GENERATION_BEGIN}{text}{GENERATION_END}")
    });
    environment
}

/// Writes `{% generation %}` blocks, which minijinja does not know, as filter blocks: they trim
/// white space in the same way. Returns whether there are any.
pub(super) fn replace_generation_blocks(source: &str) -> (String, bool) {
    let replace = |source: &str, word: &str, tag: &str| {
        let pattern = format!(r"\{{%([-+]?)\s*{word}\s*([-+]?)%\}}");
        let regex = regex::Regex::new(&pattern).expect("the pattern is valid");
        let with = format!("{{%${{1}} {tag} ${{2}}%}}");
        (regex.replace_all(source, with.as_str()).into_owned(), regex.is_match(source))
    };
    let (source, found) = replace(source, "generation", "filter generation");
    (replace(&source, "endgeneration", "endfilter").0, found)
}

/// What went wrong: what the template's `raise_exception` said, or Jinja's own complaint.
pub(super) fn cause(error: &Error) -> String {
    match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => format!("it does not end within {FUEL} instructions"),
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_string(),
        _ => format!("{error:#}"),
    }
}

/// Whether the template refuses what it was given, by `raise_exception`.
pub(super) fn is_refusal(error: &Error) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.is::<Refusal>())
}

fn raise_exception(message: String) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message).with_source(Refusal))
}

/// What tells the template's own complaints from Jinja's.
#[derive(Debug)]
struct Refusal;

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("the template refuses")
    }
}

impl std::error::Error for Refusal {}

/// A value as text without white space, or these characters, at its ends.
fn trim(value: &Value, characters: Option<String>) -> String {
    let text = python_str(value);
    match characters {
        Some(characters) => text.trim_matches(|c| characters.contains(c)).to_string(),
        None => text.trim().to_string(),
    }
}

/// Items as they print.
fn join(value: &Value, between: Option<String>) -> Result<String, Error> {
    let items: Vec<String> = value.try_iter()?.map(|item| python_str(&item)).collect();
    Ok(items.join(between.as_deref().unwrap_or_default()))
}

/// Zero for what is undefined.
fn length(value: &Value) -> Result<usize, Error> {
    if value.is_undefined() {
        return Ok(0);
    }
    value.len().ok_or_else(|| {
        let what = format!("object of type {} has no length", value.kind());
        Error::new(ErrorKind::InvalidOperation, what)
    })
}

fn print(out: &mut Output, _: &State, value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => out.write_str(text),
        None => out.write_str(&python_str(value)),
    }
    .map_err(Error::from)
}

/// Python's `str(value)`.
fn python_str(value: &Value) -> String {
    match value.kind() {
        ValueKind::String | ValueKind::Undefined => value.to_string(),
        _ => python_repr(value),
    }
}

fn python_repr(value: &Value) -> String {
    match value.kind() {
        ValueKind::None => "None".into(),
        ValueKind::Bool => (if value.is_true() { "True" } else { "False" }).into(),
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Number if !value.is_integer() => {
            f64::try_from(value.clone()).map_or_else(|_| value.to_string(), repr)
        }
        ValueKind::Seq => {
            let items = value.try_iter().into_iter().flatten();
            format!("[{}]", items.map(|item| python_repr(&item)).collect::<Vec<_>>().join(", "))
        }
        ValueKind::Map => {
            let keys = value.try_iter().into_iter().flatten();
            let item = |key: Value| {
                let item = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", python_repr(&key), python_repr(&item))
            };
            format!("{{{}}}", keys.map(item).collect::<Vec<_>>().join(", "))
        }
        _ => value.to_string(),
    }
}

/// Python's `repr` of a string.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for character in text.chars() {
        match character {
            '\n' => out += "\\n",
            '\r' => out += "\\r",
            '\t' => out += "\\t",
            '\\' => out += "\\\\",
            c if c == quote => out.extend(['\\', c]),
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected texts: transformers' engine under Python 3.11.
    #[test]
    fn values_print_as_in_python() {
        let environment = environment(0);
        let context = minijinja::context! {
            map => serde_json::json!({"b": [1, 2.5, true, null], "a": "it's", "é": "q\"'"}),
        };
        for (source, expected) in [
            ("{{ map }}", r#"{'b': [1, 2.5, True, None], 'a': "it's", 'é': 'q"\''}"#),
            ("{{ true }} {{ none }} {{ 1.0 }} {{ map.b[2] }}", "True None 1.0 True"),
            ("{{ 2e-5 }} {{ [1e16, -0.0] }} {{ 1e22 | string }}", "2e-05 [1e+16, -0.0] 1e+22"),
            ("{{ [2e-5, true, none] | join(',') }} {{ [1, 2] | join }}", "2e-05,True,None 12"),
            ("{{ 'a' is sequence }} {{ {} is sequence }} {{ 1 is sequence }}", "True True False"),
            ("{{ [] is sequence }} {{ none is sequence }}", "True False"),
            ("{{ true is number }} {{ true is integer }} {{ 'a' is number }}", "True False False"),
            ("{{ map.none_such }}|{{ 'a b'.split()[0] }}", "|a"),
            ("{{ map.b | trim }}{{ '--a-'  | trim('-') }}", "[1, 2.5, True, None]a"),
            (
                "{{ none_such | length }} {{ none is iterable }} {{ 'a' is iterable }}",
                "0 False True",
            ),
            ("{{ none_such is iterable }} {{ 1 is iterable }} {{ map | length }}", "True False 3"),
        ] {
            assert_eq!(environment.render_str(source, &context).unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn a_template_without_an_end_is_stopped() {
        let endless =
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        let error = environment(0).render_str(endless, ()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfFuel);
    }

    #[test]
    fn generation_blocks_trim_white_space_as_blocks_do() {
        let (source, found) =
            replace_generation_blocks("a\n  {% generation %}\n b {%- endgeneration -%}\n c");
        assert!(found);
        assert_eq!(environment(0).render_str(&source, ()).unwrap(), "a\n\u{f8f0} b\u{f8f1}c");
        assert!(!replace_generation_blocks("{{ generation }}").1);
    }
}
