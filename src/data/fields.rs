//! The fields of a record, read as what they should be.

use serde_json::Value;

use super::format::Format;
use super::rejection::{Rejection, kind};

/// What is trained; null, as rows of a table have it, is an empty text.
pub(super) fn trained_text(record: &Value, key: &str) -> Result<String, Rejection> {
    if record.get(key).is_some_and(Value::is_null) { Ok(String::new()) } else { text(record, key) }
}

/// A text that has to be there.
pub(super) fn text(record: &Value, key: &str) -> Result<String, Rejection> {
    match record.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => {
            Err(Rejection::new(format!("field `{key}` is {}, expected text", kind(other))))
        }
        None => Err(missing(record, key)),
    }
}

/// A text that may be missing, null or empty.
pub(super) fn optional_text<'a>(
    record: &'a Value,
    key: &str,
) -> Result<Option<&'a str>, Rejection> {
    match record.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
        Some(other) => {
            Err(Rejection::new(format!("field `{key}` is {}, expected text", kind(other))))
        }
    }
}

/// A list that has to be there.
pub(super) fn list<'a>(record: &'a Value, key: &str) -> Result<&'a Vec<Value>, Rejection> {
    match record.get(key) {
        Some(Value::Array(items)) => Ok(items),
        Some(other) => {
            Err(Rejection::new(format!("field `{key}` is {}, expected a list", kind(other))))
        }
        None => Err(missing(record, key)),
    }
}

fn missing(record: &Value, key: &str) -> Rejection {
    let rejection = Rejection::new(format!("record has no field `{key}`"));
    match Format::detect(record) {
        Ok(format) => rejection.hint(format!(
            "this record has format `{0}`: pass `--format {0}` if the whole file has",
            format.name()
        )),
        Err(Rejection { hint: Some(hint), .. }) => rejection.hint(hint),
        Err(_) => rejection,
    }
}
