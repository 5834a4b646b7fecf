//! Tables that are one JSON object: pandas' `DataFrame.to_json(FILE)` writes columns, each an object of its rows by
//! their numbers, and with `orient="index"` rows by their numbers. They are refused, with what writes records.

use serde_json::{Map, Value};

use super::rejection::Rejection;

const RECORDS: &str = "write a record on each line, as pandas does with \
                       `to_json(FILE, orient=\"records\", lines=True)`";

/// A value that is no such table.
///
/// # Errors
/// What the table consists of.
pub(super) fn no_table(value: Value) -> Result<Value, Rejection> {
    let Some(fields) = value.as_object().filter(|fields| !fields.is_empty()) else {
        return Ok(value);
    };
    let what = if fields.values().all(|field| field.as_object().is_some_and(is_numbered)) {
        let names: Vec<&String> = fields.keys().collect();
        format!("the file is one table of the columns {names:?}, whose rows are numbered")
    } else if is_numbered(fields) && fields.values().all(Value::is_object) {
        format!("the file is one table of {} numbered rows", fields.len())
    } else {
        return Ok(value);
    };
    Err(Rejection::new(what).hint(RECORDS))
}

/// Whether all names are numbers, of which there is one at least.
fn is_numbered(fields: &Map<String, Value>) -> bool {
    let is_number = |name: &String| !name.is_empty() && name.bytes().all(|it| it.is_ascii_digit());
    !fields.is_empty() && fields.keys().all(is_number)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// What pandas 2 writes of two records, and what records may have in them.
    #[test]
    fn tables_are_refused_and_records_are_not() {
        let by_columns =
            json!({"prompt": {"0": "a", "7": "b"}, "completion": {"0": "c", "7": "d"}});
        let by_rows = json!({"0": {"prompt": "a"}, "1": {"prompt": "b"}});
        for (table, what) in [
            (by_columns, "of the columns [\"prompt\", \"completion\"], whose rows are numbered"),
            (by_rows, "the file is one table of 2 numbered rows"),
        ] {
            let rejection = no_table(table).unwrap_err();
            assert!(rejection.reason.contains(what), "{rejection:?}");
            assert!(rejection.hint.unwrap().contains("orient=\"records\", lines=True"));
        }
        for record in [
            json!({"text": "a", "votes": {"0": 3}}),
            json!({"prompt": {"role": "user", "content": "a"}, "completion": {"0": "b"}}),
            json!({"1": "a"}),
            json!({"text": {}}),
            json!({}),
            json!([{"0": {}}]),
        ] {
            assert_eq!(no_table(record.clone()), Ok(record));
        }
    }
}
