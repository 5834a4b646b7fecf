//! Rows of a data file: what kind of example each is.
//!
//! Known shapes: `text`; `prompt` and `completion`; Alpaca (`instruction`, `input`, `output`);
//! ShareGPT (`conversations` of `from`/`value`); OpenAI (`messages` of `role`/`content`, with `tools`);
//! and ready tokens (`input_ids`, `labels`).

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

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

    /// The format whose keys `record` has.
    pub fn detect(record: &Value) -> Option<Self> {
        let all = [
            Format::Tokens,
            Format::Messages,
            Format::Sharegpt,
            Format::Prompt,
            Format::Alpaca,
            Format::Text,
        ];
        all.into_iter().find(|format| format.keys().iter().all(|key| record.get(key).is_some()))
    }
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
    /// Turns for the chat template.
    Chat {
        /// OpenAI's message objects.
        messages: Vec<Value>,
        /// Tools that the template shows to the model.
        tools: Option<Value>,
    },
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
}

/// Reads `record` as `format`.
///
/// # Errors
/// Why it is no record of that format.
pub fn parse(record: &Value, format: Format) -> Result<Record, Rejection> {
    if !record.is_object() {
        return Err(Rejection::new(format!("record is {}, expected an object", kind(record))));
    }
    match format {
        Format::Text => Ok(Record::Text(text(record, "text")?)),
        Format::Prompt => prompt_completion(record),
        Format::Alpaca => alpaca(record),
        Format::Sharegpt => sharegpt(record),
        Format::Messages => {
            let messages = list(record, "messages")?.clone();
            messages
                .iter()
                .enumerate()
                .try_for_each(|(turn, message)| check_turn(turn, message))?;
            let tools = record.get("tools").filter(|tools| !tools.is_null()).cloned();
            chat(messages, tools)
        }
        Format::Tokens => tokens(record),
    }
}

fn prompt_completion(record: &Value) -> Result<Record, Rejection> {
    // TRL's conversational form has lists of messages on both sides.
    if let (Some(prompt), Some(completion)) =
        (record["prompt"].as_array(), record["completion"].as_array())
    {
        let messages: Vec<Value> = prompt.iter().chain(completion).cloned().collect();
        messages.iter().enumerate().try_for_each(|(turn, message)| check_turn(turn, message))?;
        return chat(messages, None);
    }
    Ok(Record::Completion {
        prompt: text(record, "prompt")?,
        completion: text(record, "completion")?,
    })
}

/// The prompt text of the Alpaca release, with and without an input.
fn alpaca(record: &Value) -> Result<Record, Rejection> {
    let (instruction, output) = (text(record, "instruction")?, text(record, "output")?);
    let input = record.get("input").and_then(Value::as_str).unwrap_or_default();
    let prompt = if input.is_empty() {
        format!(
            "Below is an instruction that describes a task. Write a response that appropriately \
             completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
        )
    } else {
        format!(
            "Below is an instruction that describes a task, paired with an input that provides \
             further context. Write a response that appropriately completes the request.\n\n\
             ### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        )
    };
    Ok(Record::Completion { prompt, completion: output })
}

fn sharegpt(record: &Value) -> Result<Record, Rejection> {
    let turns = list(record, "conversations")?;
    let mut messages = Vec::with_capacity(turns.len() + 1);
    if let Some(system) = record.get("system").and_then(Value::as_str).filter(|s| !s.is_empty()) {
        messages.push(json!({"role": "system", "content": system}));
    }
    for (turn, message) in turns.iter().enumerate() {
        let from = message.get("from").and_then(Value::as_str);
        let role = match from {
            Some("human" | "user") => "user",
            Some("gpt" | "assistant" | "model" | "chatgpt" | "bing") => "assistant",
            Some("system") => "system",
            Some("tool" | "observation" | "function_response") => "tool",
            other => {
                return Err(Rejection::new(format!(
                    "conversations[{turn}].from is `{}`, expected human, gpt, system or tool",
                    other.unwrap_or("missing")
                )));
            }
        };
        let Some(content) = message.get("value").and_then(Value::as_str) else {
            return Err(Rejection::new(format!("conversations[{turn}].value is no text")));
        };
        messages.push(json!({"role": role, "content": content}));
    }
    chat(messages, None)
}

fn check_turn(turn: usize, message: &Value) -> Result<(), Rejection> {
    if message.get("role").and_then(Value::as_str).is_none() {
        return Err(Rejection::new(format!("messages[{turn}].role is missing or no text")));
    }
    let has = |key: &str| message.get(key).is_some_and(|value| !value.is_null());
    if !has("content") && !has("tool_calls") {
        return Err(Rejection::new(format!("messages[{turn}] has no content and no tool_calls")));
    }
    Ok(())
}

fn chat(messages: Vec<Value>, tools: Option<Value>) -> Result<Record, Rejection> {
    if messages.is_empty() {
        return Err(Rejection::new("conversation has no messages"));
    }
    Ok(Record::Chat { messages, tools })
}

fn tokens(record: &Value) -> Result<Record, Rejection> {
    let input_ids = list(record, "input_ids")?
        .iter()
        .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
        .collect::<Option<Vec<u32>>>()
        .ok_or_else(|| Rejection::new("`input_ids` holds something else than token ids"))?;
    let labels = match record.get("labels").filter(|labels| !labels.is_null()) {
        None => None,
        Some(_) => {
            let labels = list(record, "labels")?
                .iter()
                .map(|label| label.as_i64().and_then(|label| i32::try_from(label).ok()))
                .collect::<Option<Vec<i32>>>()
                .ok_or_else(|| Rejection::new("`labels` holds something else than labels"))?;
            if labels.len() != input_ids.len() {
                return Err(Rejection::new(format!(
                    "{} labels for {} input_ids",
                    labels.len(),
                    input_ids.len()
                )));
            }
            Some(labels)
        }
    };
    Ok(Record::Tokens { input_ids, labels })
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

fn list<'a>(record: &'a Value, key: &str) -> Result<&'a Vec<Value>, Rejection> {
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
        Some(format) => {
            let name = format.to_possible_value().map(|value| value.get_name().to_string());
            rejection.hint(format!("pass `--format {}` for this file", name.unwrap_or_default()))
        }
        None => rejection,
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
