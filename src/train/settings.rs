//! A run's settings as text, and which of them a resumed run may change.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// Every setting of a run: flag name in snake case, and its value or values as text.
pub type SettingsEcho = BTreeMap<String, Vec<String>>;

/// All settings of a run, in its output folder; a file for `--config`.
pub const SETTINGS_FILE: &str = "settings.toml";

/// Settings that decide where, how fast, how closely watched and how long a run is, but not the numbers of
/// the steps that it has made. The contents of model and data, as a chat template writes them, are compared
/// by themselves, so their paths may change.
const NEUTRAL: [&str; 28] = [
    "activations",
    "bad_records",
    "chat_template",
    "chat_template_kwargs",
    "data",
    "dequantized_blocks",
    "early_stopping_patience",
    "early_stopping_threshold",
    "eval_data",
    "eval_steps",
    "eval_strategy",
    "load_best_model_at_end",
    "logging_steps",
    "max_steps",
    "memory_budget",
    "model",
    "num_train_epochs",
    "out",
    "rename_columns",
    "sample_max_new_tokens",
    "sample_prompt",
    "sample_steps",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "self_checks",
    "threads",
    "weights",
];

/// The settings of a checkpoint, and those that change no number as `last` has them: a session that came
/// to no checkpoint may have changed them.
pub fn renewed(saved: SettingsEcho, last: &SettingsEcho) -> SettingsEcho {
    let neutral = |name: &String| NEUTRAL.contains(&name.as_str());
    let own = saved.into_iter().filter(|(name, _)| !neutral(name));
    own.chain(last.clone().into_iter().filter(|(name, _)| neutral(name))).collect()
}

/// Settings that are text, whatever their value looks like: paths and prompts.
pub const TEXTS: [&str; 8] = [
    "chat_template",
    "data",
    "eval_data",
    "init_adapter",
    "layers_pattern",
    "model",
    "out",
    "sample_prompt",
];

/// How a dense base is packed, and what that is unless it is asked for otherwise. One that is 4-bit already is
/// used as stored: a run on it has no such settings.
const PACKING: [(&str, &str); 3] =
    [("quantization", "nf4"), ("block_size", "64"), ("double_quant", "true")];

/// How a dense base is packed where nobody asks: the value of the setting `name`, if it is about that.
pub fn usual_packing(name: &str) -> Option<&'static str> {
    PACKING.iter().find(|(of_packing, _)| *of_packing == name).map(|(_, usual)| *usual)
}

fn is_packing(name: &str) -> bool {
    usual_packing(name).is_some()
}

/// The settings of a run on a base that is 4-bit already.
pub fn without_packing(settings: &SettingsEcho) -> SettingsEcho {
    let own = settings.iter().filter(|(name, _)| !is_packing(name));
    own.map(|(name, values)| (name.clone(), values.clone())).collect()
}

/// What a setting is where it is not set: `bf16` on a CPU, since on a GPU there is but one value.
const NOT_SET: [(&str, &str); 2] = [("bf16", "false"), ("lr_scheduler_kwargs", "{}")];

/// What differs between two runs and changes their numbers, as `name was a, now b`. How the base is packed is
/// compared where both of them packed it; otherwise its loss tells.
pub fn changes(was: &SettingsEcho, now: &SettingsEcho) -> Vec<String> {
    let names: std::collections::BTreeSet<&String> = was.keys().chain(now.keys()).collect();
    let neutral = |name: &str| NEUTRAL.contains(&name);
    let show = |values: Option<&Vec<String>>| match values {
        Some(values) => values.join(","),
        None => "not set".to_string(),
    };
    let of = |echo: &SettingsEcho, name: &String| {
        let unset = NOT_SET.iter().find(|(known, _)| known == name);
        echo.get(name).cloned().or(unset.map(|(_, value)| vec![value.to_string()]))
    };
    let stored =
        |name: &String| is_packing(name) && !(was.contains_key(name) && now.contains_key(name));
    names
        .into_iter()
        .filter(|name| !neutral(name) && !stored(name))
        .filter(|name| !same(of(was, name).as_ref(), of(now, name).as_ref()))
        .map(|name| format!("{name} was {}, now {}", show(was.get(name)), show(now.get(name))))
        .collect()
}

fn same(was: Option<&Vec<String>>, now: Option<&Vec<String>>) -> bool {
    match (was, now) {
        (Some(was), Some(now)) if was.len() == now.len() => {
            was.iter().zip(now).all(|(was, now)| same_value(was, now))
        }
        (was, now) => was == now,
    }
}

/// Whether two texts are one number or one JSON object, however it is written; null is what is not there.
fn same_value(was: &str, now: &str) -> bool {
    let number = |text: &str| text.parse::<f64>().ok();
    let object = |text: &str| serde_json::from_str::<Map<String, Value>>(text).ok();
    was == now
        || number(was).zip(number(now)).is_some_and(|(was, now)| was == now)
        || object(was).zip(object(now)).is_some_and(|(was, now)| {
            let fields =
                |object: &Map<String, Value>| object.values().filter(|it| !it.is_null()).count();
            let same = |(name, was): (&String, &Value)| {
                was.is_null() || now.get(name).is_some_and(|now| equal(was, now))
            };
            fields(&was) == fields(&now) && was.iter().all(same)
        })
}

/// Numbers are equal by value: 2 is 2.0.
fn equal(was: &Value, now: &Value) -> bool {
    match (was.as_f64(), now.as_f64()) {
        (Some(was), Some(now)) => was == now,
        _ => was == now,
    }
}

/// The settings as JSON: numbers and booleans as such, several values as an array.
pub fn to_json(settings: &SettingsEcho) -> Value {
    let value = |text: &String| match serde_json::from_str(text) {
        Ok(value @ (Value::Number(_) | Value::Bool(_))) => value,
        _ => Value::String(text.clone()),
    };
    let field = |(name, values): (&String, &Vec<String>)| {
        let json = match values.as_slice() {
            [one] => value(one),
            many => Value::Array(many.iter().map(value).collect()),
        };
        (name.clone(), json)
    };
    Value::Object(settings.iter().map(field).collect())
}

/// The settings as a TOML file for `--config`.
pub fn to_toml(settings: &SettingsEcho) -> String {
    let number = |text: &String| match text.parse::<toml::Value>() {
        Ok(value @ (toml::Value::Integer(_) | toml::Value::Float(_) | toml::Value::Boolean(_))) => {
            Some(value)
        }
        _ => None,
    };
    let value = |name: &str, text: &String| {
        let number = (!TEXTS.contains(&name)).then(|| number(text)).flatten();
        number.unwrap_or_else(|| toml::Value::String(text.clone()))
    };
    let line = |(name, values): (&String, &Vec<String>)| {
        let value = match values.as_slice() {
            [one] => value(name, one),
            many => toml::Value::Array(many.iter().map(|one| value(name, one)).collect()),
        };
        format!("{name} = {value}\n")
    };
    settings.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn echo(pairs: &[(&str, &str)]) -> SettingsEcho {
        pairs.iter().map(|(name, value)| (name.to_string(), vec![value.to_string()])).collect()
    }

    #[test]
    fn what_is_set_to_what_it_is_anyway_is_no_change() {
        let (unset, off, on) = (echo(&[]), echo(&[("bf16", "false")]), echo(&[("bf16", "true")]));
        assert_eq!(changes(&unset, &off), [""; 0]);
        assert_eq!(changes(&off, &unset), [""; 0]);
        assert_eq!(changes(&unset, &on), ["bf16 was not set, now true"]);
        assert_eq!(changes(&unset, &echo(&[("lr_scheduler_kwargs", "{ }")])), [""; 0]);
    }

    #[test]
    fn packing_is_compared_where_both_runs_packed() {
        let (nf4, fp4) = (echo(&[("quantization", "nf4")]), echo(&[("quantization", "fp4")]));
        assert_eq!(changes(&nf4, &fp4), ["quantization was nf4, now fp4"]);
        let stored = without_packing(&fp4);
        assert_eq!(stored, echo(&[]));
        assert_eq!(changes(&nf4, &stored), [""; 0]);
        assert_eq!(changes(&stored, &fp4), [""; 0]);
    }

    #[test]
    fn only_what_changes_the_numbers_is_named() {
        let was =
            echo(&[("learning_rate", "2e-4"), ("seed", "42"), ("threads", "2"), ("out", "a")]);
        let now = echo(&[("learning_rate", "0.0002"), ("seed", "1"), ("out", "b"), ("x", "1")]);
        assert_eq!(changes(&was, &now), ["seed was 42, now 1", "x was not set, now 1"]);
    }

    #[test]
    fn a_json_object_is_the_same_however_it_is_written() {
        let kwargs = |text| echo(&[("lr_scheduler_kwargs", text)]);
        let was = kwargs("{\"lr_end\": 0, \"power\": 2}");
        assert_eq!(changes(&was, &kwargs("{\"power\":2,\"lr_end\":0}")), [""; 0]);
        let now = kwargs("{\"power\": 3, \"lr_end\": 0}");
        assert_eq!(changes(&was, &now).len(), 1);
    }

    #[test]
    fn what_changes_no_number_is_that_of_the_last_session() {
        let saved = echo(&[("seed", "1"), ("max_steps", "4"), ("eval_steps", "2")]);
        let last = echo(&[("seed", "2"), ("max_steps", "8"), ("save_steps", "3")]);
        let expected = echo(&[("seed", "1"), ("max_steps", "8"), ("save_steps", "3")]);
        assert_eq!(renewed(saved, &last), expected);
    }

    #[test]
    fn text_stays_text_in_toml() {
        let settings = echo(&[("model", "3"), ("sample_prompt", "0x10"), ("seed", "3")]);
        let toml = "model = \"3\"\nsample_prompt = \"0x10\"\nseed = 3\n";
        assert_eq!(to_toml(&settings), toml);
    }

    #[test]
    fn json_and_toml_have_types() {
        let mut settings =
            echo(&[("seed", "42"), ("packing", "true"), ("out", "1x"), ("r", "2e-4")]);
        settings.insert("prompts".into(), vec!["a".into(), "b".into()]);
        let json = serde_json::json!({"seed": 42, "packing": true, "out": "1x", "r": 2e-4,
            "prompts": ["a", "b"]});
        assert_eq!(to_json(&settings), json);
        let toml =
            "out = \"1x\"\npacking = true\nprompts = [\"a\", \"b\"]\nr = 0.0002\nseed = 42\n";
        assert_eq!(to_toml(&settings), toml);
    }
}
