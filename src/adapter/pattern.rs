//! Regular expressions as PEFT's settings use them.
//!
//! PEFT hands them to Python's `re`, whose look-around and back-references the `regex` crate does
//! not have; `fancy_regex` does. A pathological expression stops at a backtracking limit and is an
//! error, not a hang.

use fancy_regex::Regex;

use crate::error::{Error, Result};

/// A compiled expression that remembers its source for messages.
#[derive(Debug)]
pub(super) struct Pattern {
    regex: Regex,
    source: String,
}

impl Pattern {
    /// `re.fullmatch(source, name)`.
    pub fn full(source: &str) -> Result<Self> {
        Self::compile(source, format!(r"\A(?:{source})\z"))
    }

    /// `re.match(rf"(.*\.)?({source})$", name)`: the path ends in the expression.
    pub fn suffix(source: &str) -> Result<Self> {
        Self::compile(source, format!(r"\A(?:.*\.)?(?:{source})\z"))
    }

    /// Group 1 is the number of the block, after a part of the path that matches `list`.
    pub fn block_number(list: &str) -> Result<Self> {
        Self::compile(list, format!(r"\A(?:|.*?\.)(?:{list})\.(?P<number>\d+)\."))
    }

    /// Group 1 is the first number of the path that is a part of its own.
    pub fn first_number() -> Result<Self> {
        Self::compile("first number", r"\A.*?\.[^.]*\.(?P<number>\d+)\.".to_string())
    }

    fn compile(source: &str, full: String) -> Result<Self> {
        let regex = Regex::new(&full).map_err(|e| {
            Error::usage(format_args!("`{source}` is not a regular expression: {e}"))
        })?;
        Ok(Pattern { regex, source: source.to_string() })
    }

    /// Whether the expression matches `name`.
    pub fn matches(&self, name: &str) -> Result<bool> {
        self.regex.is_match(name).map_err(|e| self.too_hard(name, &e))
    }

    /// The block number in `name`, if the expression finds one.
    pub fn number(&self, name: &str) -> Result<Option<usize>> {
        let captures = self.regex.captures(name).map_err(|e| self.too_hard(name, &e))?;
        Ok(captures.and_then(|c| c.name("number")?.as_str().parse().ok()))
    }

    fn too_hard(&self, name: &str, cause: &fancy_regex::Error) -> Error {
        Error::usage(format_args!("cannot match `{}` against `{name}`: {cause}", self.source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const Q: &str = "model.layers.12.self_attn.q_proj";

    #[test]
    fn a_full_match_covers_every_alternative() -> Result<()> {
        assert!(Pattern::full(r".*\.(q|v)_proj")?.matches(Q)?);
        assert!(!Pattern::full("q_proj")?.matches(Q)?);
        assert!(!Pattern::full("model|layers")?.matches(Q)?);
        assert!(Pattern::full(r"model|.*q_proj")?.matches(Q)?);
        Ok(())
    }

    #[test]
    fn a_suffix_starts_at_a_dot() -> Result<()> {
        assert!(Pattern::suffix("q_proj")?.matches(Q)?);
        assert!(Pattern::suffix(r"layers\.\d+\.self_attn\.[qk]_proj")?.matches(Q)?);
        assert!(!Pattern::suffix("_proj")?.matches(Q)?);
        assert!(!Pattern::suffix("self_attn")?.matches(Q)?);
        Ok(())
    }

    #[test]
    fn look_around_works_as_in_python() -> Result<()> {
        let not_twelve = Pattern::full(r"(?!.*layers\.12\.).*_proj")?;
        assert!(!not_twelve.matches(Q)?);
        assert!(not_twelve.matches("model.layers.1.self_attn.q_proj")?);
        Ok(())
    }

    #[test]
    fn block_numbers_are_found() -> Result<()> {
        assert_eq!(Pattern::first_number()?.number(Q)?, Some(12));
        assert_eq!(Pattern::block_number("layers")?.number(Q)?, Some(12));
        assert_eq!(Pattern::block_number("h")?.number(Q)?, None);
        assert_eq!(Pattern::block_number("h")?.number("h.3.attn.c_attn")?, Some(3));
        assert_eq!(Pattern::first_number()?.number("lm_head")?, None);
        Ok(())
    }

    #[test]
    fn a_broken_expression_is_an_error() {
        let error = Pattern::full("(q_proj").unwrap_err();
        assert!(error.to_string().contains("`(q_proj`"), "{error}");
    }

    #[test]
    fn an_explosive_expression_is_an_error_not_a_hang() -> Result<()> {
        let explosive = Pattern::full(r"(\w)(?:\1|\1\1)*c")?;
        let error = explosive.matches(&"a".repeat(64)).unwrap_err();
        assert!(error.to_string().contains("backtracking"), "{error}");
        Ok(())
    }
}
