//! Chat templates that are known by name, for models that bring none.

use std::path::Path;

use crate::checkpoint::elsewhere::{TILDE, is_in_home};
use crate::error::Error;
use crate::nearest::nearest;

/// A template that is known by name.
pub(super) struct KnownTemplate {
    name: &'static str,
    /// Jinja, but for a BOS and the refusal of tools.
    body: &'static str,
    /// Tokens that it cannot do without; none where the end of a sequence ends its answers.
    pub(super) tokens: &'static [&'static str],
}

impl KnownTemplate {
    /// The one that is called `name`.
    pub(super) fn find(name: &str) -> Option<&'static Self> {
        KNOWN.iter().find(|known| known.name == name)
    }

    /// The template's Jinja source, behind a BOS for tokenizers that want one.
    pub(super) fn source(&self, bos: bool) -> String {
        let bos = if bos { "{{- bos_token -}}\n" } else { "" };
        format!("{NO_TOOLS}{bos}{}", self.body)
    }
}

/// Tools and their calls would be left out silently.
const NO_TOOLS: &str = include_str!("templates/no-tools.jinja");

const KNOWN: [KnownTemplate; 5] = [
    KnownTemplate { name: "alpaca", body: include_str!("templates/alpaca.jinja"), tokens: &[] },
    KnownTemplate {
        name: "chatml",
        body: include_str!("templates/chatml.jinja"),
        tokens: &["<|im_start|>", "<|im_end|>"],
    },
    KnownTemplate {
        name: "gemma",
        body: include_str!("templates/gemma.jinja"),
        tokens: &["<start_of_turn>", "<end_of_turn>"],
    },
    KnownTemplate {
        name: "llama-3",
        body: include_str!("templates/llama-3.jinja"),
        tokens: &["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    },
    KnownTemplate { name: "zephyr", body: include_str!("templates/zephyr.jinja"), tokens: &[] },
];

/// What to say of a `name` that is no file's either.
pub fn unknown_template(name: &str) -> Error {
    let names = || KNOWN.iter().map(|known| known.name);
    let what = format_args!("chat template `{name}` is neither a file nor a known name");
    let all = names().collect::<Vec<_>>().join(", ");
    if is_in_home(Path::new(name)) {
        return Error::usage(what).hint(TILDE);
    }
    Error::usage(what).hint(match nearest(name, names()) {
        close if close.is_empty() => format!("known are {all}; or give a Jinja file"),
        close => format!("did you mean {close}?"),
    })
}
