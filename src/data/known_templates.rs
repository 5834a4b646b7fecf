//! Chat templates that are known by name, for models that bring none.

use super::tokenizer::ChatTokenizer;
use crate::error::{Error, Result};
use crate::nearest::nearest;

/// A template, and the tokens that it cannot do without.
struct Known {
    name: &'static str,
    source: &'static str,
    tokens: &'static [&'static str],
}

/// Tools and their calls would be left out silently.
const NO_TOOLS: &str = include_str!("templates/no-tools.jinja");

const KNOWN: [Known; 5] = [
    Known { name: "alpaca", source: include_str!("templates/alpaca.jinja"), tokens: &[] },
    Known {
        name: "chatml",
        source: include_str!("templates/chatml.jinja"),
        tokens: &["<|im_start|>", "<|im_end|>"],
    },
    Known {
        name: "gemma",
        source: include_str!("templates/gemma.jinja"),
        tokens: &["<start_of_turn>", "<end_of_turn>"],
    },
    Known {
        name: "llama-3",
        source: include_str!("templates/llama-3.jinja"),
        tokens: &["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    },
    Known { name: "zephyr", source: include_str!("templates/zephyr.jinja"), tokens: &[] },
];

/// The Jinja source of the template `name` for `tokenizer`, behind a BOS where that wants one; none if no
/// template is called so.
///
/// # Errors
/// `Input` when the tokenizer lacks a token that it needs: spelled out in others, nothing would end an
/// answer.
pub fn known_template(name: &str, tokenizer: &ChatTokenizer) -> Result<Option<String>> {
    let Some(known) = KNOWN.iter().find(|known| known.name == name) else { return Ok(None) };
    let lacking = |token: &&&str| tokenizer.id(token).is_none();
    if let Some(token) = known.tokens.iter().find(lacking) {
        let what = format_args!("chat template `{name}`: the tokenizer has no token {token}");
        return Err(Error::input(what).hint("`alpaca` and `zephyr` need none of their own"));
    }
    if known.tokens.is_empty() && tokenizer.eos().is_none() {
        let what = format_args!("chat template `{name}`: the tokenizer has no eos_token");
        return Err(Error::input(what).hint("name one in tokenizer_config.json"));
    }
    let bos = if tokenizer.adds_bos() { "{{- bos_token -}}\n" } else { "" };
    Ok(Some(format!("{NO_TOOLS}{bos}{}", known.source)))
}

/// What to say of a `name` that is no file's either.
pub fn unknown_template(name: &str) -> Error {
    let names = || KNOWN.iter().map(|known| known.name);
    let what = format_args!("chat template `{name}` is neither a file nor a known name");
    let all = names().collect::<Vec<_>>().join(", ");
    Error::usage(what).hint(match nearest(name, names()) {
        close if close.is_empty() => format!("known are {all}; or give a Jinja file"),
        close => format!("did you mean {close}?"),
    })
}
