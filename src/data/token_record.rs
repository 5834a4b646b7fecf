//! Records of ready tokens, as TRL and others store them.

use serde_json::Value;

use super::batch::MASKED;
use super::fields::list;
use super::format::LOSS_MASKS;
use super::rejection::Rejection;
use crate::plural::noun;

/// Ids, and their labels where not all are trained.
type Tokens = (Vec<u32>, Option<Vec<i32>>);

/// A record of `input_ids`. Labels are those that are given, or the ids; a 0 in one of [`LOSS_MASKS`] masks
/// one. Padding goes: tokens that `attention_mask` has a 0 or `false` for.
///
/// # Errors
/// Which list is none of numbers, or of another length than the ids; that the record is of several
/// documents.
pub(super) fn read(record: &Value) -> Result<Tokens, Rejection> {
    list(record, "input_ids")?;
    let ids = numbers(record, "input_ids", "token ids", Value::as_i64)?.unwrap_or_default();
    let beside = |key: &str, what: &str, number: fn(&Value) -> Option<i64>| {
        let found = numbers::<i32>(record, key, what, number)?;
        let count = found.as_ref().map_or(ids.len(), Vec::len);
        if count != ids.len() {
            let (count, key) = (count, noun(count, key.trim_end_matches('s')));
            return Err(Rejection::new(format!("{count} {key} for {} input_ids", ids.len()))
                .hint("each id has its own"));
        }
        Ok(found)
    };
    let zero_or_not = |value: &Value| match value.as_f64() {
        // Megatron's are floats.
        Some(number) => (number.fract() == 0.0).then(|| i64::from(number != 0.0)),
        None => value.as_bool().map(i64::from),
    };
    let mut labels = beside("labels", "labels", Value::as_i64)?;
    for key in LOSS_MASKS {
        let Some(mask) = beside(key, "numbers", zero_or_not)? else { continue };
        let own = || ids.iter().map(|&id: &u32| id as i32).collect();
        let labels = labels.get_or_insert_with(own).iter_mut();
        labels.zip(mask).filter(|(_, kept)| *kept == 0).for_each(|(label, _)| *label = MASKED);
    }
    let positions = beside("position_ids", "positions", Value::as_i64)?;
    let mask = beside("attention_mask", "numbers", zero_or_not)?;
    let mask = mask.unwrap_or_else(|| vec![1; ids.len()]);
    fn heard<T>(values: Vec<T>, mask: &[i32]) -> Vec<T> {
        values.into_iter().zip(mask).filter(|(_, heard)| **heard != 0).map(|(it, _)| it).collect()
    }
    let positions = positions.map(|positions| heard(positions, &mask)).unwrap_or_default();
    let lengths = record["seq_lengths"].as_array().map_or(1, Vec::len);
    if lengths > 1 || positions.windows(2).any(|pair| i64::from(pair[1]) != i64::from(pair[0]) + 1)
    {
        return Err(Rejection::new("several documents are packed into one record")
            .hint("give each as a record of its own: `--packing` fills rows with them"));
    }
    let labels = labels.map(|labels| heard(labels, &mask));
    Ok((heard(ids, &mask), labels))
}

/// A list of whole numbers, if it is there.
fn numbers<T: TryFrom<i64>>(
    record: &Value,
    key: &str,
    what: &str,
    number: fn(&Value) -> Option<i64>,
) -> Result<Option<Vec<T>>, Rejection> {
    if record.get(key).is_none_or(Value::is_null) {
        return Ok(None);
    }
    let number = |value: &Value| number(value).and_then(|number| T::try_from(number).ok());
    let numbers = list(record, key)?.iter().map(number).collect::<Option<_>>();
    let other = || Rejection::new(format!("`{key}` holds something else than {what}"));
    numbers.ok_or_else(other).map(Some)
}
