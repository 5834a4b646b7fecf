//! Values that shells complete, of types that parse themselves.

use std::fmt::Display;
use std::marker::PhantomData;
use std::str::FromStr;

use clap::builder::{PossibleValue, TypedValueParser};
use clap::{Arg, Command};

/// A parser for `T` whose `values` are known to completions. It takes what `T` takes, which may be
/// more, and refuses in its words.
#[derive(Debug)]
pub struct Listed<T> {
    values: &'static [&'static str],
    parsed: PhantomData<fn() -> T>,
}

/// The parser of `T`, completed with `values`.
pub fn listed<T>(values: &'static [&'static str]) -> Listed<T> {
    Listed { values, parsed: PhantomData }
}

impl<T> Clone for Listed<T> {
    fn clone(&self) -> Self {
        listed(self.values)
    }
}

impl<T> TypedValueParser for Listed<T>
where
    T: FromStr<Err: Display> + Clone + Send + Sync + 'static,
{
    type Value = T;

    fn parse_ref(
        &self,
        command: &Command,
        arg: Option<&Arg>,
        value: &std::ffi::OsStr,
    ) -> Result<T, clap::Error> {
        let parse = |text: &str| text.parse::<T>().map_err(|error| error.to_string());
        parse.parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(self.values.iter().map(PossibleValue::new)))
    }
}
