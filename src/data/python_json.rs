//! Values of a template as Python's `json.dumps` writes them.
//!
//! Source: transformers' `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`,
//! which hands its arguments on to `json.dumps`. What is undefined is null here, and an error there.

use std::fmt::Write;

use minijinja::value::{Kwargs, Rest, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind};

use super::python_float::repr;

/// The filter `tojson`.
pub(super) fn to_json(value: &Value, arguments: Rest<Value>) -> Result<String, Error> {
    let style = Style::of(&arguments)?;
    let mut out = String::new();
    style.write(value, 0, &mut out)?;
    Ok(out)
}

/// How JSON is written.
struct Style {
    ensure_ascii: bool,
    /// What each level is indented by; none for all in one line.
    indent: Option<String>,
    between_items: String,
    behind_key: String,
    sort_keys: bool,
}

impl Style {
    fn of(arguments: &[Value]) -> Result<Self, Error> {
        const NAMES: [&str; 4] = ["ensure_ascii", "indent", "separators", "sort_keys"];
        let (positional, named): (&[Value], Kwargs) = from_args(arguments)?;
        let mut given: [Value; 4] = Default::default();
        if positional.len() > given.len() {
            return Err(invalid("tojson takes at most four arguments"));
        }
        for (index, (name, given)) in NAMES.into_iter().zip(&mut given).enumerate() {
            let named = named.get::<Option<Value>>(name)?;
            *given = named.or(positional.get(index).cloned()).unwrap_or_default();
        }
        named.assert_all_used()?;
        let [ensure_ascii, indent, separators, sort_keys] = given;
        let indent = indent_of(&indent)?;
        let (between_items, behind_key) = match is_nothing(&separators) {
            true => ((if indent.is_some() { "," } else { ", " }).into(), ": ".into()),
            false => pair(&separators)?,
        };
        let (ensure_ascii, sort_keys) = (ensure_ascii.is_true(), sort_keys.is_true());
        Ok(Style { ensure_ascii, indent, between_items, behind_key, sort_keys })
    }

    /// Writes `value`, which stands `depth` levels deep.
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        match value.kind() {
            ValueKind::Undefined | ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value)),
            ValueKind::String => self.quote(value.as_str().unwrap_or_default(), out),
            ValueKind::Map => self.map(value, depth, out)?,
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.enclosed(['[', ']'], &items, depth, out, |item, out| {
                    self.write(item, depth + 1, out)
                })?;
            }
            other => return Err(invalid(format!("an object of type {other} is no JSON"))),
        }
        Ok(())
    }

    fn map(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        let mut items = Vec::new();
        for key in value.try_iter()? {
            items.push((key_text(&key), value.get_item(&key)?));
        }
        if self.sort_keys {
            items.sort_by(|(a, _), (b, _)| a.cmp(b));
        }
        self.enclosed(['{', '}'], &items, depth, out, |(key, item), out| {
            self.quote(key, out);
            out.push_str(&self.behind_key);
            self.write(item, depth + 1, out)
        })
    }

    /// Items between brackets, each on a line of its own where there is an indent.
    fn enclosed<T>(
        &self,
        [open, close]: [char; 2],
        items: &[T],
        depth: usize,
        out: &mut String,
        mut write: impl FnMut(&T, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                out.push_str(&self.between_items);
            }
            self.new_line(depth + 1, out);
            write(item, out)?;
        }
        if !items.is_empty() {
            self.new_line(depth, out);
        }
        out.push(close);
        Ok(())
    }

    fn new_line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
    }

    fn quote(&self, text: &str, out: &mut String) {
        let quoted = serde_json::Value::from(text).to_string();
        for character in quoted.chars() {
            if !self.ensure_ascii || matches!(character, ' '..='~') {
                out.push(character);
                continue;
            }
            for unit in character.encode_utf16(&mut [0; 2]) {
                write!(out, "\\u{unit:04x}").expect("a text grows");
            }
        }
    }
}

fn is_nothing(value: &Value) -> bool {
    value.is_undefined() || value.is_none()
}

/// A number of spaces, or what to indent by itself.
fn indent_of(indent: &Value) -> Result<Option<String>, Error> {
    if is_nothing(indent) {
        return Ok(None);
    }
    if let Some(text) = indent.as_str() {
        return Ok(Some(text.into()));
    }
    let spaces = i64::try_from(indent.clone())?;
    Ok(Some(" ".repeat(spaces.try_into().unwrap_or(0))))
}

/// What stands between items, and behind a key.
fn pair(separators: &Value) -> Result<(String, String), Error> {
    let texts: Vec<Value> = separators.try_iter()?.collect();
    match texts.iter().map(Value::as_str).collect::<Vec<_>>()[..] {
        [Some(item), Some(key)] => Ok((item.into(), key.into())),
        _ => Err(invalid("tojson's `separators` are two texts")),
    }
}

fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    match f64::try_from(value.clone()) {
        Ok(number) if number.is_nan() => "NaN".into(),
        Ok(number) if number.is_infinite() => {
            (if number > 0.0 { "Infinity" } else { "-Infinity" }).into()
        }
        Ok(number) => repr(number),
        Err(_) => value.to_string(),
    }
}

/// Keys of JSON are texts.
fn key_text(key: &Value) -> String {
    match key.kind() {
        ValueKind::None => "null".into(),
        ValueKind::Bool => (if key.is_true() { "true" } else { "false" }).into(),
        ValueKind::Number => number(key),
        _ => key.to_string(),
    }
}

fn invalid(what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

#[cfg(test)]
mod tests {
    use super::super::jinja::environment;

    fn render(source: &str) -> Result<String, minijinja::Error> {
        let context = minijinja::context! {
            map => serde_json::json!({"b": [1, 2e-5, true, null, {"é": []}], "a": "<&>'"}),
            odd => "\u{7f}\u{8}\u{c}\u{1}\u{2028}\\🤖",
        };
        environment(0).render_str(source, &context)
    }

    /// Expected texts: transformers' engine under Python 3.11.
    #[test]
    fn json_is_written_as_by_python() {
        for (source, expected) in [
            ("{{ map | tojson }}", r#"{"b": [1, 2e-05, true, null, {"é": []}], "a": "<&>'"}"#),
            (
                "{{ map | tojson(true, none, none, true) }}",
                r#"{"a": "<&>'", "b": [1, 2e-05, true, null, {"\u00e9": []}]}"#,
            ),
            (
                "{{ map | tojson(sort_keys=true, separators=(',', ':')) }}",
                r#"{"a":"<&>'","b":[1,2e-05,true,null,{"é":[]}]}"#,
            ),
            (
                "{{ map.b | tojson(false, 2) }}",
                "[\n  1,\n  2e-05,\n  true,\n  null,\n  {\n    \"é\": []\n  }\n]",
            ),
            (
                "{{ {'a': [1, 2]} | tojson(indent=1, separators=(' ; ', ' = ')) }}",
                "{\n \"a\" = [\n  1 ; \n  2\n ]\n}",
            ),
            ("{{ [1, {}] | tojson(indent='--') }}", "[\n--1,\n--{}\n]"),
            ("{{ [1] | tojson(indent=0) }}", "[\n1\n]"),
            ("{{ {1: 2, 1.5: 3, none: 5} | tojson }}", r#"{"1": 2, "1.5": 3, "null": 5}"#),
            ("{{ odd | tojson }}", "\"\u{7f}\\b\\f\\u0001\u{2028}\\\\🤖\""),
            ("{{ odd | tojson(true) }}", r#""\u007f\b\f\u0001\u2028\\\ud83e\udd16""#),
        ] {
            assert_eq!(render(source).unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn arguments_that_python_refuses_are_refused() {
        for source in [
            "{{ 1 | tojson(separators=(',',)) }}",
            "{{ 1 | tojson(separators=[1, 2]) }}",
            "{{ 1 | tojson(indent=[]) }}",
            "{{ 1 | tojson(colour=1) }}",
            "{{ 1 | tojson(1, 2, none, 4, 5) }}",
        ] {
            assert!(render(source).is_err(), "{source}");
        }
    }
}
