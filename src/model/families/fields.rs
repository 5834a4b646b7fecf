//! A `config.json`, field by field.

use serde_json::Value;

use crate::error::{Error, Result};

/// More blocks than any model has.
pub(crate) const MOST_LAYERS: usize = 10_000;

pub(super) fn unsupported(field: &str, value: impl std::fmt::Display, hint: &str) -> Error {
    Error::input(format_args!("config.json: {field} = {value} is not supported")).hint(hint)
}

/// Typed access to a JSON object; null counts as absent.
pub(super) struct Fields<'a>(pub &'a Value);

impl<'a> Fields<'a> {
    pub fn present(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    /// The config with values for what is absent.
    pub fn with_defaults<V: Into<Value>>(
        &self,
        defaults: impl IntoIterator<Item = (&'static str, V)>,
    ) -> Value {
        let mut config = self.0.clone();
        for (key, value) in defaults {
            if self.present(key).is_none() {
                config[key] = value.into();
            }
        }
        config
    }

    /// The default of a key that is not there at all: null stands for something else.
    pub fn if_absent<T>(&self, key: &str, default: T) -> Option<T> {
        self.0.get(key).is_none().then_some(default)
    }

    pub fn required(&self, key: &str) -> Result<&'a Value> {
        self.present(key)
            .ok_or_else(|| Error::input(format_args!("config.json: field `{key}` is missing")))
    }

    pub fn text(&self, key: &str) -> Result<&'a str> {
        let value = self.required(key)?;
        value.as_str().ok_or_else(|| wrong_type(key, "text", value))
    }

    pub fn text_or(&self, key: &str, default: &'static str) -> Result<&'a str> {
        if self.present(key).is_some() { self.text(key) } else { Ok(default) }
    }

    pub fn size(&self, key: &str) -> Result<usize> {
        let value = self.required(key)?;
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        size.ok_or_else(|| wrong_type(key, "a non-negative whole number", value))
    }

    /// A number of blocks: more than any model has would only take memory.
    pub fn layers(&self, key: &str) -> Result<usize> {
        let layers = self.size(key)?;
        if layers > MOST_LAYERS {
            let what =
                format_args!("config.json: {key} is {layers}, expected at most {MOST_LAYERS}");
            return Err(Error::input(what));
        }
        Ok(layers)
    }

    pub fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        if self.present(key).is_some() { self.size(key) } else { Ok(default) }
    }

    /// A window of attention. Only an absent key takes the default: null stands for none.
    pub fn window_or(&self, default: Option<usize>) -> Result<Option<usize>> {
        const KEY: &str = "sliding_window";
        match self.0.get(KEY) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(_) => self.size(KEY).map(Some),
        }
    }

    pub fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        match self.present(key) {
            Some(value) => value.as_f64().ok_or_else(|| wrong_type(key, "a number", value)),
            None => Ok(default),
        }
    }

    /// A number above 0. Only an absent key takes the default: null stands for none.
    pub fn positive_or(&self, key: &str, default: Option<f32>) -> Result<Option<f32>> {
        let Some(value) = self.0.get(key) else { return Ok(default) };
        if value.is_null() {
            return Ok(None);
        }
        let number = value.as_f64().map(|number| number as f32);
        let number = number.filter(|number| number.is_normal() && *number > 0.0);
        number.map(Some).ok_or_else(|| wrong_type(key, "a number above 0", value))
    }

    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.present(key) {
            Some(value) => value.as_bool().ok_or_else(|| wrong_type(key, "true or false", value)),
            None => Ok(default),
        }
    }

    /// `id` or `[id, …]`.
    pub fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let Some(value) = self.present(key) else { return Ok(Vec::new()) };
        let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match value {
            Value::Array(items) => items.iter().map(one).collect::<Option<Vec<_>>>(),
            single => one(single).map(|id| vec![id]),
        };
        ids.ok_or_else(|| wrong_type(key, "a token id or a list of them", value))
    }

    /// A window in the layers that `layer_types` gives one; where it is silent, in those that `slides`.
    pub fn windows(
        &self,
        num_layers: usize,
        window: usize,
        slides: impl Fn(usize) -> bool,
    ) -> Result<Vec<Option<usize>>> {
        let slide = match self.layers_that_slide(num_layers)? {
            Some(listed) => listed,
            None => (0..num_layers).map(slides).collect(),
        };
        Ok(slide.into_iter().map(|slides| slides.then_some(window)).collect())
    }

    fn layers_that_slide(&self, num_layers: usize) -> Result<Option<Vec<bool>>> {
        const KEY: &str = "layer_types";
        let Some(value) = self.present(KEY) else { return Ok(None) };
        let kinds = value.as_array().map_or(&[][..], Vec::as_slice);
        if kinds.len() != num_layers {
            return Err(wrong_type(KEY, &format!("a list of {num_layers} names"), value));
        }
        let slides = |kind: &Value| match kind.as_str() {
            Some("sliding_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            _ => Err(unsupported(KEY, kind, "use `full_attention` or `sliding_attention`")),
        };
        kinds.iter().map(slides).collect::<Result<_>>().map(Some)
    }

    /// An error when `key` is present and `supported` refuses its value.
    pub fn unless(&self, key: &str, supported: impl Fn(&Value) -> bool, hint: &str) -> Result<()> {
        match self.present(key) {
            Some(value) if !supported(value) => Err(unsupported(key, value, hint)),
            _ => Ok(()),
        }
    }
}

pub(super) fn wrong_type(key: &str, expected: &str, got: &Value) -> Error {
    Error::input(format_args!("config.json: field `{key}` must be {expected}, got {got}"))
}
