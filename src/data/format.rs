//! What kind of example the records of a file are, told by their fields.
//!
//! Known shapes: `text`; `prompt` and `completion`, texts or messages; Alpaca (`instruction`, `input`,
//! `output`); ShareGPT (`conversations` of `from`/`value`); OpenAI (`messages` of `role`/`content`, with
//! `tools`); and ready tokens (`input_ids`, `labels`).

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::rejection::{Rejection, kind};

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
        let names: Vec<&str> = fields.keys().map(String::as_str).collect();
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
            [] => Err(unknown(&names)),
            _ => {
                let flags: Vec<String> =
                    found.iter().map(|format| format!("`--format {}`", format.name())).collect();
                let what = format!("the fields {names:?} fit several formats");
                Err(Rejection::new(what).hint(format!("pass {}", flags.join(" or "))))
            }
        }
    }

    /// As `--format` has it.
    pub fn name(self) -> String {
        let value = self.to_possible_value().expect("no format is hidden");
        value.get_name().to_string()
    }
}

/// What others call an instruction, and what should follow it.
const INSTRUCTIONS: [&str; 9] = [
    "instruction",
    "question",
    "query",
    "problem",
    "prompt",
    "user",
    "inputs",
    "dialogue",
    "input",
];
const OUTPUTS: [&str; 10] = [
    "output",
    "response",
    "answer",
    "completion",
    "solution",
    "target",
    "targets",
    "assistant",
    "answers",
    "summary",
];
/// What they call fields beside these, and lists of messages.
const BESIDE: [(&str, &str); 4] = [
    ("context", "input"),
    ("system_prompt", "system"),
    ("conversation", "messages"),
    ("dialog", "messages"),
];

/// Flags that give the fields of a record the names of a format: those of Alpaca, which goes through the
/// chat template, where one field is an instruction and one an output by its name.
fn renames(names: &[&str]) -> Option<String> {
    let plain = |name: &str| name.trim().to_lowercase();
    let called = |known: &[&str]| -> Vec<&str> {
        names.iter().copied().filter(|name| known.contains(&plain(name).as_str())).collect()
    };
    let mut pairs: Vec<(&str, &str)> = Vec::new();
    // Beside another one `input` is what it says.
    let instructions = called(&INSTRUCTIONS);
    let asked = match instructions[..] {
        [one] => Some(one),
        [one, other] | [other, one] if plain(other) == "input" && plain(one) != "input" => {
            Some(one)
        }
        _ => None,
    };
    if let (Some(asked), [answer]) = (asked, &called(&OUTPUTS)[..]) {
        pairs.extend([(asked, "instruction"), (*answer, "output")]);
    }
    let beside = BESIDE
        .iter()
        .flat_map(|(theirs, ours)| called(&[*theirs]).into_iter().map(move |name| (name, *ours)));
    let lists = |ours: &str| ours == "messages";
    let beside: Vec<(&str, &str)> = beside
        .filter(|(_, ours)| lists(ours) == pairs.is_empty() && !names.contains(ours))
        .collect();
    pairs.extend(beside);
    let renamed = |(theirs, ours): &(&str, &str)| match theirs == ours {
        true => None,
        false if theirs.contains(' ') => Some(format!("--rename-columns '{theirs}={ours}'")),
        false => Some(format!("--rename-columns {theirs}={ours}")),
    };
    let flags: Vec<String> = pairs.iter().filter_map(renamed).collect();
    (!flags.is_empty()).then(|| flags.join(" "))
}

/// The fields of a record, the first few.
fn listed(names: &[&str]) -> String {
    const SHOWN: usize = 20;
    let more = names.len().saturating_sub(SHOWN);
    let shown = &names[..names.len() - more];
    if more > 0 { format!("{shown:?} and {more} more") } else { format!("{shown:?}") }
}

fn unknown(names: &[&str]) -> Rejection {
    let what = format!("cannot tell the format of a record with the fields {}", listed(names));
    if names.iter().any(|name| name.contains('\0')) {
        return Rejection::new("the file is UTF-16 text").hint("save it as UTF-8");
    }
    if let [one] = names
        && one.contains(';')
    {
        return Rejection::new(what)
            .hint("columns are set apart by `;` here: save the file with commas");
    }
    if names.contains(&"chosen") && names.contains(&"rejected") {
        return Rejection::new(what).hint(
            "these are preferences; for supervised training keep the `chosen` side: \
             `--rename-columns chosen=messages` where it is a list of messages, or \
             `--rename-columns chosen=completion`",
        );
    }
    if let Some(flags) = renames(names) {
        return Rejection::new(what).hint(format!("if they are what they are called: `{flags}`"));
    }
    Rejection::new(what).hint(
        "expected text, prompt and completion, instruction and output, conversations, messages, \
         or input_ids: other names are told with `--rename-columns OLD=NEW`",
    )
}

pub(super) fn no_object(record: &Value) -> Rejection {
    Rejection::new(format!("record is {}, expected an object", kind(record)))
}
