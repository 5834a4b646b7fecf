//! One example of a data file, read in the format that its records have.

use serde_json::{Value, json};

use super::chat::{Chat, has_messages, tool_list, variables};
use super::fields::{list, optional_text, text, trained_text};
use super::format::{Format, no_object};
use super::rejection::Rejection;
use super::renames;
use super::token_record;

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
        /// The instruction and its answer as turns.
        chat: Chat,
        /// The two as Alpaca's text, where that has a place for all of it.
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

/// Reads `record` as `format`.
///
/// # Errors
/// Why it is no record of that format.
pub fn parse(record: &Value, format: Format) -> Result<Record, Rejection> {
    if !record.is_object() {
        return Err(no_object(record));
    }
    if !matches!(format, Format::Text | Format::Tokens) {
        check_supervised(record)?;
    }
    match format {
        Format::Text => Ok(Record::Text(trained_text(record, "text")?)),
        Format::Prompt => prompt_completion(record),
        Format::Alpaca => alpaca(record),
        Format::Sharegpt => Chat::new(record, "conversations").map(Record::Chat),
        Format::Messages => Chat::new(record, "messages").map(Record::Chat),
        Format::Tokens => {
            let (input_ids, labels) = token_record::read(record)?;
            Ok(Record::Tokens { input_ids, labels })
        }
    }
}

/// Refuses answers that a field says to be good or bad, and a better one beside a worse one: trained as they
/// stand, the bad ones would be learned, or the better one lost. Refuses answers to pictures and sounds, too,
/// which the model would not see.
fn check_supervised(record: &Value) -> Result<(), Rejection> {
    let rated = |field: &&str| match &record[*field] {
        Value::Bool(_) => true,
        // A cell of a table.
        Value::String(text) => ["true", "false"].iter().any(|word| text.eq_ignore_ascii_case(word)),
        _ => false,
    };
    if let Some(field) = ["label", "kto_tag"].into_iter().find(rated) {
        let what = format!("field `{field}` is true or false: whether the answer is a good one");
        return Err(Rejection::new(what).hint(format!(
            "for supervised training keep the good ones, without `{field}` (or call it otherwise by \
             `--rename-columns {field}=good`)"
        )));
    }
    // Some files have the better one as the record's messages, too.
    let is_lost = record["chosen"] != record["messages"];
    if !record["chosen"].is_null() && !record["rejected"].is_null() && is_lost {
        return Err(renames::preferences(record));
    }
    let shows = |field: &&str| match &record[*field] {
        Value::Null => false,
        Value::Array(items) => !items.is_empty(),
        Value::String(path) => !path.is_empty(),
        _ => true,
    };
    match ["image", "images", "videos", "audios"].into_iter().find(shows) {
        Some(field) => Err(Rejection::new(format!("field `{field}`: only text can be trained"))
            .hint(format!(
                "leave such records out; if the text can do without, `--rename-columns {field}=unused`"
            ))),
        None => Ok(()),
    }
}

/// Text on both sides, or lists of messages on both (TRL's conversational form).
fn prompt_completion(record: &Value) -> Result<Record, Rejection> {
    // Of text a completion may look like a list of messages, and be none.
    let (prompt, completion) = (&record["prompt"], &record["completion"]);
    let is_listed = |field: &Value| field.is_array() || field.is_object();
    if has_messages(prompt) || prompt.is_object() || is_listed(completion) {
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
        Some(input) if instruction.is_empty() => say("user", input),
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
