//! What kind of example the records of a file are, told by their fields.
//!
//! Known shapes: `text`; `prompt` and `completion`, texts or messages; Alpaca (`instruction`, `input`,
//! `output`); ShareGPT (`conversations` of `from`/`value`); OpenAI (`messages` of `role`/`content`, with
//! `tools`); and ready tokens (`input_ids`, `labels`).

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::rejection::{Rejection, kind};
use super::renames::unknown;

/// Lists of zeros and ones beside the ids, a one for each that is trained: TRL's and Megatron's names.
pub(super) const LOSS_MASKS: [&str; 3] = ["completion_mask", "assistant_masks", "loss_mask"];

/// What is read beside `input_ids`, but for masks of the loss.
const BESIDE_TOKENS: [&str; 4] = ["labels", "attention_mask", "position_ids", "seq_lengths"];

/// The shape of a file's records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// `text`: plain documents
    Text,
    /// `prompt` and `completion`
    Prompt,
    /// `instruction`, `input`, `output`
    Alpaca,
    /// `conversations` of `from` and `value`
    Sharegpt,
    /// `messages` of `role` and `content`
    Messages,
    /// `input_ids` and, optionally, `labels`
    Tokens,
}

impl Format {
    /// The keys that records of this format have.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Format::Text => &["text"],
            Format::Prompt => &["prompt", "completion"],
            Format::Alpaca => &["instruction", "output"],
            Format::Sharegpt => &["conversations"],
            Format::Messages => &["messages"],
            Format::Tokens => &["input_ids"],
        }
    }

    /// The fields that records of this format are read from.
    pub(super) fn is_read(self, field: &str) -> bool {
        const OF_CHATS: [&str; 4] = ["system", "tools", "functions", "chat_template_kwargs"];
        self.keys().contains(&field)
            || match self {
                Format::Text => false,
                Format::Alpaca => {
                    field == "input" || field == "history" || OF_CHATS.contains(&field)
                }
                Format::Prompt | Format::Sharegpt | Format::Messages => OF_CHATS.contains(&field),
                Format::Tokens => BESIDE_TOKENS.contains(&field) || LOSS_MASKS.contains(&field),
            }
    }

    /// The format whose keys `record` has. Those that are null count where no format has all others:
    /// [`parse`](super::record::parse) then says which they are.
    ///
    /// # Errors
    /// Why there is none, or that there are several.
    pub fn detect(record: &Value) -> Result<Self, Rejection> {
        let Some(fields) = record.as_object() else {
            return Err(no_object(record));
        };
        let with_keys = |has: &dyn Fn(&str) -> bool| -> Vec<Format> {
            let fits = |format: &&Format| format.keys().iter().all(|key| has(key));
            Format::value_variants().iter().filter(fits).copied().collect()
        };
        // Columns of a table are there even where a row has nothing in them.
        let mut found = with_keys(&|key| fields.get(key).is_some_and(|value| !value.is_null()));
        if found.is_empty() {
            found = with_keys(&|key| fields.contains_key(key));
        }
        match found[..] {
            [format] => Ok(format),
            [] => Err(unknown(record)),
            _ => {
                let flags: Vec<String> =
                    found.iter().map(|format| format!("`--format {}`", format.name())).collect();
                let names: Vec<&String> = fields.keys().collect();
                let what = format!("the fields {names:?} fit several formats");
                Err(Rejection::new(what).hint(format!("pass {}", flags.join(" or "))))
            }
        }
    }

    /// The format's name, as `--format` has it.
    pub fn name(self) -> String {
        let value = self.to_possible_value().expect("no format is hidden");
        value.get_name().to_string()
    }
}

pub(super) fn no_object(record: &Value) -> Rejection {
    Rejection::new(format!("record is {}, expected an object", kind(record)))
}
