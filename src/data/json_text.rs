//! JSON as Python writes and reads it: with NaN and Infinity, which are null here, and with integers of any
//! length, where serde_json would round those that 64 bits do not hold.
//!
//! Such an integer is kept as an object of one field ([`LONG_INTEGER`]), which no format takes for a number
//! of its own, and is a number again for templates ([`Exact`]). More than 128 bits are refused.

use serde::de::{DeserializeOwned, Error as _, IgnoredAny};
use serde::ser::{Serialize, Serializer};
use serde_json::{Error, Value};

use super::rejection::Rejection;

/// Private-use: the name of the only field of a long integer's object, whose value is its digits.
const LONG_INTEGER: &str = "\u{f8f4}";
/// Integers of fewer characters fit into 64 bits.
const LONG: usize = 19;

/// The value that a text is, or the list.
///
/// # Errors
/// Why it is none.
pub(super) fn read<T: DeserializeOwned>(text: &str) -> Result<T, Error> {
    match plain(text)? {
        // An error's place is that in the text.
        Some(plain) => serde_json::from_str(&plain).or_else(|_| serde_json::from_str(text)),
        None => serde_json::from_str(text),
    }
}

/// The value that the text of a record is.
///
/// # Errors
/// Where it is not JSON.
pub(super) fn record(text: &str) -> Result<Value, Rejection> {
    read(text).map_err(|error| not_json(text, &error))
}

fn not_json(text: &str, error: &Error) -> Rejection {
    let (line, column) = (error.line(), error.column());
    let message = error.to_string();
    let message = message.split(" at line ").next().unwrap_or_default();
    let place = match line {
        0 => return Rejection::new(message).hint("write it as text, in quotes"),
        1 => format!("column {column}"),
        _ => format!("its line {line}, column {column}"),
    };
    let rejection = Rejection::new(format!("not valid JSON at {place}: {message}"));
    if error.is_eof() {
        rejection.hint("each record stands on one line, or the file is one JSON list")
    } else if (line, column) == (1, 1) {
        rejection.hint("each line is a JSON object: plain text is `{\"text\": \"…\"}`")
    } else if is_followed(text, line, column) {
        rejection.hint(
            "one object follows another: write each on a line of its own, such as by `jq -c . FILE`, or a comma \
             between two of a list",
        )
    } else {
        rejection
    }
}

/// Whether an object is over where an error is, and another one begins.
fn is_followed(text: &str, line: usize, column: usize) -> bool {
    let before: usize = text.split('\n').take(line - 1).map(|row| row.len() + 1).sum();
    let parts = column.checked_sub(1).and_then(|column| text.split_at_checked(before + column));
    parts.is_some_and(|(first, rest)| {
        rest.starts_with('{') && serde_json::from_str::<IgnoredAny>(first).is_ok()
    })
}

/// `text` in what serde_json reads without loss; none where it is that already.
fn plain(text: &str) -> Result<Option<String>, Error> {
    let begins = |c: char| matches!(c, '"' | 'N' | 'I' | '-' | '0'..='9');
    let (mut out, mut copied, mut at) = (None::<String>, 0, 0);
    while let Some(before) = text[at..].find(begins) {
        let begin = at + before;
        let from = &text[begin..];
        let length = match from.strip_prefix('"') {
            None => from.find(|c: char| !is_of_word(c)).unwrap_or(from.len()),
            Some(_) => match string_length(from) {
                Some(length) => length,
                None => return Ok(None),
            },
        };
        at = begin + length;
        if let Some(other) = other_word(&text[begin..at])? {
            let out = out.get_or_insert_default();
            out.push_str(&text[copied..begin]);
            out.push_str(&other);
            copied = at;
        }
    }
    Ok(out.map(|out| out + &text[copied..]))
}

fn is_of_word(character: char) -> bool {
    character.is_ascii_alphanumeric() || matches!(character, '-' | '+' | '.')
}

/// What a number that serde_json does not read as it stands is written as.
fn other_word(token: &str) -> Result<Option<String>, Error> {
    let digits = token.strip_prefix('-').unwrap_or(token);
    if matches!(digits, "NaN" | "Infinity") {
        return Ok(Some("null".into()));
    }
    if token == "-0" {
        return Ok(Some("0".into()));
    }
    let is_integer = !digits.starts_with('0') && digits.bytes().all(|byte| byte.is_ascii_digit());
    let fits = || token.parse::<i64>().is_ok() || token.parse::<u64>().is_ok();
    if digits.len() < LONG || !is_integer || fits() {
        return Ok(None);
    }
    if token.parse::<i128>().is_err() && token.parse::<u128>().is_err() {
        let what = format!("an integer of {} digits is longer than 128 bits", digits.len());
        return Err(Error::custom(what));
    }
    Ok(Some(format!("{{\"{LONG_INTEGER}\":\"{token}\"}}")))
}

/// Bytes of the JSON string that `text` begins with, quotes included.
fn string_length(text: &str) -> Option<usize> {
    let mut escaped = false;
    let end = text.bytes().skip(1).position(|byte| {
        let ends = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    });
    end.map(|end| end + 2)
}

/// The digits of a long integer, if a value is one.
pub(super) fn long_integer(value: &Value) -> Option<&str> {
    let fields = value.as_object().filter(|fields| fields.len() == 1)?;
    fields.get(LONG_INTEGER)?.as_str()
}

/// A value in which long integers are numbers.
pub(super) struct Exact<'a>(pub &'a Value);

impl Serialize for Exact<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if let Some(digits) = long_integer(self.0) {
            return match (digits.parse(), digits.parse()) {
                (Ok(number), _) => serializer.serialize_i128(number),
                (_, Ok(number)) => serializer.serialize_u128(number),
                _ => serializer.serialize_str(digits),
            };
        }
        match self.0 {
            Value::Array(items) => serializer.collect_seq(items.iter().map(Exact)),
            Value::Object(fields) => {
                serializer.collect_map(fields.iter().map(|(name, value)| (name, Exact(value))))
            }
            other => other.serialize(serializer),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn value(text: &str) -> Result<Value, Error> {
        read(text)
    }

    #[test]
    fn names_of_numbers_are_null_and_texts_stay() {
        let text = r#"{"a": NaN, "b": [-Infinity,Infinity], "NaN": "\"NaN -0", "c": -0}"#;
        let expected = json!({"a": null, "b": [null, null], "NaN": "\"NaN -0", "c": 0});
        assert_eq!(value(text).unwrap(), expected);
        for text in ["{\"a\": NaNa}", "[1, nan]", "[\"", "NaN NaN", "[Nix]"] {
            assert!(value(text).is_err(), "{text}");
        }
        assert!(value("[-0.0]").unwrap()[0].as_f64().unwrap().is_sign_negative());
    }

    #[test]
    fn objects_that_follow_one_another_are_told() {
        let says = |text: &str| record(text).unwrap_err().hint.unwrap_or_default();
        for text in ["{\"é\": 1}{\"b\": 2}", "{\"a\": {}} \t{", "{\"a\":\n1\n}\n {\"b\": 2}"] {
            assert!(says(text).starts_with("one object follows another: write each"), "{text}");
        }
        for text in ["{\"a\": 1}}", "{\"a\": 1, {\"b\": 2}}", "{\"a\": 1} x", "{\"a\"{\"b\": 2}"] {
            assert_eq!(says(text), "", "{text}");
        }
    }

    #[test]
    fn long_integers_are_kept_to_the_digit() {
        for (token, is_long) in [
            ("9223372036854775807", false),
            ("-9223372036854775808", false),
            ("18446744073709551615", false),
            ("18446744073709551616", true),
            ("-9223372036854775809", true),
            ("340282366920938463463374607431768211455", true),
            ("18446744073709551616.0", false),
            ("18446744073709551616e2", false),
        ] {
            let read = value(&format!("{{\"n\": [{token}]}}")).unwrap();
            assert_eq!(long_integer(&read["n"][0]), is_long.then_some(token));
            if !token.contains(['.', 'e']) {
                let source = "{{ n[0] }} {{ n }} {{ n | tojson }}";
                let environment = super::super::jinja::environment(0);
                let text = environment.render_str(source, Exact(&read));
                assert_eq!(text.unwrap(), format!("{token} [{token}] [{token}]"));
            }
        }
        assert_eq!(value("\"12345678901234567890123\"").unwrap(), "12345678901234567890123");
        for text in ["[00018446744073709551616]", "[18446744073709551616a]"] {
            assert!(value(text).is_err(), "{text}");
        }
        let longer = record("{\"n\": 340282366920938463463374607431768211456}").unwrap_err();
        assert_eq!(longer.reason, "an integer of 39 digits is longer than 128 bits");
    }
}
