//! Rows of a data file: what kind of example each is.
//!
//! Known shapes: `text`; `prompt` and `completion`, texts or messages; Alpaca (`instruction`, `input`,
//! `output`); ShareGPT (`conversations` of `from`/`value`); OpenAI (`messages` of `role`/`content`, with
//! `tools`); and ready tokens (`input_ids`, `labels`).

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::chat::{Chat, has_messages, tool_list, variables};
use super::token_record;

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
                Format::Tokens => token_record::is_read(field),
            }
    }

    /// The format whose keys `record` has. Those that are null count where no format has all others:
    /// [`parse`] then says which they are.
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

fn no_object(record: &Value) -> Rejection {
    Rejection::new(format!("record is {}, expected an object", kind(record)))
}

/// One example.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    /// A plain document.
    Text(String),
    /// A prompt and what should follow it.
    Completion {
        /// Not trained.
        prompt: String,
        /// Trained.
        completion: String,
    },
    /// An instruction and its answer: turns for a model that has a chat template, text for others.
    Instruction {
        /// As turns.
        chat: Chat,
        /// As Alpaca's text, where that has a place for all of it.
        text: Option<(String, String)>,
    },
    /// Turns for the chat template.
    Chat(Chat),
    /// Ready tokens.
    Tokens {
        /// Ids.
        input_ids: Vec<u32>,
        /// Labels, −100 where masked; all trained if absent.
        labels: Option<Vec<i32>>,
    },
}

/// A reason why a record cannot be used, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Rejection {
    /// What is wrong.
    pub reason: String,
    /// The way out.
    pub hint: Option<String>,
}

impl Rejection {
    pub(super) fn new(reason: impl Into<String>) -> Self {
        Rejection { reason: reason.into(), hint: None }
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// A way out where there is none yet.
    pub(super) fn or_hint(self, hint: impl Into<String>) -> Self {
        if self.hint.is_some() { self } else { self.hint(hint) }
    }
}

/// Reads `record` as `format`.
///
/// # Errors
/// Why it is no record of that format.
pub fn parse(record: &Value, format: Format) -> Result<Record, Rejection> {
    if !record.is_object() {
        return Err(no_object(record));
    }
    match format {
        Format::Text => Ok(Record::Text(trained_text(record, "text")?)),
        Format::Prompt => prompt_completion(record),
        Format::Alpaca => alpaca(record),
        Format::Sharegpt => Chat::new(record, "conversations").map(Record::Chat),
        Format::Messages => Chat::new(record, "messages").map(Record::Chat),
        Format::Tokens => token_record::read(record),
    }
}

/// Text on both sides, or lists of messages on both (TRL's conversational form).
fn prompt_completion(record: &Value) -> Result<Record, Rejection> {
    if record["label"].is_boolean() {
        let what = "field `label` is true or false: whether the completion is a good one";
        return Err(Rejection::new(what).hint(
            "for supervised training keep the good ones, without `label` (or call it otherwise by \
             `--rename-columns label=good`)",
        ));
    }
    // Of text a completion may look like a list of messages, and be none.
    if has_messages(&record["prompt"]) || record["completion"].is_array() {
        return Chat::of_prompt_and_completion(record).map(Record::Chat);
    }
    let spoken = optional_text(record, "system").map_or(true, |text| text.is_some());
    let offered = tool_list(record, "tools").map_or(true, |tools| !tools.is_empty());
    for (key, given) in [("system", spoken), ("tools", offered)] {
        if given {
            let what = format!("field `{key}` has no place beside a `prompt` that is text");
            return Err(Rejection::new(what).hint(format!(
                "give `prompt` and `completion` as lists of messages, or leave the field out by \
                 `--rename-columns {key}=unused`"
            )));
        }
    }
    Ok(Record::Completion {
        prompt: text(record, "prompt")?,
        completion: trained_text(record, "completion")?,
    })
}

/// Source of the text: the Alpaca release. LLaMA-Factory's `system` and `history` are read too.
fn alpaca(record: &Value) -> Result<Record, Rejection> {
    let (instruction, output) = (text(record, "instruction")?, trained_text(record, "output")?);
    let (input, system) = (optional_text(record, "input")?, optional_text(record, "system")?);
    let mut messages = Vec::new();
    let mut say = |role: &str, content: &str| {
        messages.push(json!({"role": role, "content": content}));
    };
    if let Some(system) = system {
        say("system", system);
    }
    let history = match record.get("history") {
        None | Some(Value::Null) => &[][..],
        Some(Value::String(text)) if text.is_empty() => &[],
        Some(_) => list(record, "history")?,
    };
    for turn in history {
        let (Some(question), Some(answer)) = (turn[0].as_str(), turn[1].as_str()) else {
            return Err(Rejection::new("field `history` is no list of questions and answers"));
        };
        say("user", question);
        say("assistant", answer);
    }
    match input {
        Some(input) => say("user", &format!("{instruction}\n\n{input}")),
        None => say("user", &instruction),
    }
    say("assistant", &output);
    let variables = variables(record)?;
    let plain = system.is_none() && history.is_empty() && variables.is_empty();
    let text = plain.then(|| (alpaca_text(&instruction, input), output));
    let chat = Chat { messages, variables, prompt_messages: 0 };
    Ok(Record::Instruction { chat, text })
}

fn alpaca_text(instruction: &str, input: Option<&str>) -> String {
    match input {
        None => format!(
            "Below is an instruction that describes a task. Write a response that appropriately \
             completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
        ),
        Some(input) => format!(
            "Below is an instruction that describes a task, paired with an input that provides \
             further context. Write a response that appropriately completes the request.\n\n\
             ### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        ),
    }
}

/// What is trained; null, as rows of a table have it, is an empty text.
fn trained_text(record: &Value, key: &str) -> Result<String, Rejection> {
    if record.get(key).is_some_and(Value::is_null) { Ok(String::new()) } else { text(record, key) }
}

fn text(record: &Value, key: &str) -> Result<String, Rejection> {
    match record.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => {
            Err(Rejection::new(format!("field `{key}` is {}, expected text", kind(other))))
        }
        None => Err(missing(record, key)),
    }
}

/// A text that may be missing, null or empty.
pub(super) fn optional_text<'a>(
    record: &'a Value,
    key: &str,
) -> Result<Option<&'a str>, Rejection> {
    match record.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
        Some(other) => {
            Err(Rejection::new(format!("field `{key}` is {}, expected text", kind(other))))
        }
    }
}

pub(super) fn list<'a>(record: &'a Value, key: &str) -> Result<&'a Vec<Value>, Rejection> {
    match record.get(key) {
        Some(Value::Array(items)) => Ok(items),
        Some(other) => {
            Err(Rejection::new(format!("field `{key}` is {}, expected a list", kind(other))))
        }
        None => Err(missing(record, key)),
    }
}

fn missing(record: &Value, key: &str) -> Rejection {
    let rejection = Rejection::new(format!("record has no field `{key}`"));
    match Format::detect(record) {
        Ok(format) => rejection.hint(format!(
            "this record has format `{0}`: pass `--format {0}` if the whole file has",
            format.name()
        )),
        Err(Rejection { hint: Some(hint), .. }) => rejection.hint(hint),
        Err(_) => rejection,
    }
}

pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
