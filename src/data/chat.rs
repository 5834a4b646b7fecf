//! Conversations as chat templates want them, from the shapes that data sets have.
//!
//! OpenAI's `role`/`content` and ShareGPT's `from`/`value` are both read, whatever the list is called, and so
//! are texts in turns (LIMA) and pairs of `input` and `output` (Capybara). Images and sounds are refused.

use serde_json::{Map, Value, json};

use super::fields::{list, optional_text};
use super::json_text;
use super::rejection::{Rejection, kind};

/// What chat templates call those who speak; another name may be a slip of the pen.
const ROLES: [&str; 7] =
    ["system", "developer", "user", "assistant", "tool", "function", "ipython"];

/// What else they are called, and the role.
const USUAL_ROLES: [(&str, &str); 13] = [
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("assistant", "assistant"),
    ("model", "assistant"),
    ("chatgpt", "assistant"),
    ("bing", "assistant"),
    ("bard", "assistant"),
    ("bot", "assistant"),
    ("system", "system"),
    ("tool", "tool"),
    ("observation", "tool"),
    ("function_response", "tool"),
];

/// The role that others call `name`, in letters of any case.
pub(super) fn usual_role(name: &str) -> Option<&'static str> {
    USUAL_ROLES.iter().find(|(theirs, _)| theirs.eq_ignore_ascii_case(name)).map(|(_, role)| *role)
}

/// Turns for the chat template.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Chat {
    /// Message objects with `role` and `content` or `tool_calls`.
    pub messages: Vec<Value>,
    /// What else the template sees: `tools`, and the record's `chat_template_kwargs`.
    pub variables: Map<String, Value>,
    /// How many messages at the beginning are never trained.
    pub prompt_messages: usize,
}

impl Chat {
    /// Reads the messages in the list `key` of `record`, and its tools.
    ///
    /// # Errors
    /// Which turn is no message.
    pub fn new(record: &Value, key: &str) -> Result<Self, Rejection> {
        let mut messages = messages(record, key, 0)?;
        if let Some(system) = optional_text(record, "system")?.filter(|_| !messages.is_empty()) {
            let own = messages.first().filter(|message| message["role"] == "system");
            match own.map(|message| message["content"].as_str()) {
                None => messages.insert(0, json!({"role": "system", "content": system})),
                Some(own) if own == Some(system) => {}
                Some(_) => {
                    let what = format!("field `system` is another than {key}[0], the system's");
                    return Err(Rejection::new(what)
                        .hint("leave the field out by `--rename-columns system=unused`"));
                }
            }
        }
        Ok(Chat { messages, variables: variables(record)?, prompt_messages: 0 })
    }

    /// Reads the messages in `prompt`, and those in `completion`, which go on from them.
    ///
    /// # Errors
    /// As [`new`](Chat::new).
    pub fn of_prompt_and_completion(record: &Value) -> Result<Self, Rejection> {
        let mut chat = Chat::new(record, "prompt")?;
        chat.prompt_messages = chat.messages.len();
        let completion = &record["completion"];
        match completion.as_str().filter(|_| !has_messages(completion)) {
            Some("") => {}
            Some(text) => chat.messages.push(json!({"role": "assistant", "content": text})),
            None => chat.messages.extend(messages(record, "completion", chat.messages.len())?),
        }
        Ok(chat)
    }

    /// Whether the assistant's message `index` is trained: not in the prompt, nor with OpenAI's
    /// `"weight": 0`, Axolotl's `"train": false` or ms-swift's `"loss": false`.
    pub fn is_trained(&self, index: usize) -> bool {
        index >= self.prompt_messages && self.messages[index]["weight"].as_f64() != Some(0.0)
    }

    /// Roles that templates seldom know, one for each message that has one.
    pub fn unknown_roles(&self) -> Vec<String> {
        let roles = self.messages.iter().filter_map(|message| message["role"].as_str());
        roles.filter(|role| !ROLES.contains(role)).map(str::to_string).collect()
    }

    /// Whether nothing keeps any message from being trained: neither a prompt nor the message itself.
    pub fn is_all_trained(&self) -> bool {
        (0..self.messages.len()).all(|index| self.is_trained(index))
    }
}

/// The messages in the list `key`, which may be JSON text: a cell of a table; so many stand before them.
fn messages(record: &Value, key: &str, before: usize) -> Result<Vec<Value>, Rejection> {
    let parsed: Vec<Value>;
    let turns = match record.get(key) {
        Some(Value::String(text)) if text.trim_start().starts_with('[') => {
            parsed = json_text::read(text).map_err(|e| {
                Rejection::new(format!("field `{key}` is text, but no JSON list: {e}"))
            })?;
            &parsed
        }
        // A row of a table with nothing in it.
        Some(Value::Null) => return Ok(Vec::new()),
        // An answer by itself, as LLaMA-Factory has preferred ones.
        Some(message) if says_who(message) => std::slice::from_ref(message),
        Some(Value::Object(columns)) => {
            parsed = rows(columns).ok_or_else(|| {
                Rejection::new(format!("field `{key}` is an object, expected a list"))
            })?;
            &parsed
        }
        _ => list(record, key)?,
    };
    let mut messages = Vec::with_capacity(turns.len());
    for (turn, message) in turns.iter().enumerate() {
        let at_turn = |reason: Rejection| Rejection {
            reason: format!("{key}[{turn}]{}", reason.reason),
            ..reason
        };
        match message {
            // LIMA's: user and assistant in turns.
            Value::String(text) => {
                let role = if (before + turn).is_multiple_of(2) { "user" } else { "assistant" };
                messages.push(json!({"role": role, "content": text}));
            }
            // Capybara's: a question and its answer.
            Value::Object(pair) if !pair.contains_key("role") && !pair.contains_key("from") => {
                match (pair.get("input"), pair.get("output")) {
                    (Some(Value::String(asked)), Some(Value::String(answer))) => messages.extend([
                        json!({"role": "user", "content": asked}),
                        json!({"role": "assistant", "content": answer}),
                    ]),
                    _ => messages.push(read(message).map_err(at_turn)?),
                }
            }
            message => messages.push(read(message).map_err(at_turn)?),
        }
    }
    Ok(messages)
}

/// Whether a field holds messages: a list, or JSON text of one.
pub(super) fn has_messages(field: &Value) -> bool {
    let listed = |turns: Vec<Value>| !turns.is_empty() && turns.iter().all(says_who);
    match field {
        Value::Array(_) => true,
        Value::String(text) if text.trim_start().starts_with('[') => {
            json_text::read(text).is_ok_and(listed)
        }
        _ => false,
    }
}

/// Whether a message names its speaker.
pub(super) fn says_who(message: &Value) -> bool {
    message["role"].is_string() || message["from"].is_string()
}

/// The rows of columns of one length, as older versions of `datasets` keep lists of objects.
fn rows(columns: &Map<String, Value>) -> Option<Vec<Value>> {
    let length = columns.values().next()?.as_array()?.len();
    let mut rows = vec![Map::new(); length];
    for (name, column) in columns {
        let column = column.as_array().filter(|column| column.len() == length)?;
        for (row, value) in rows.iter_mut().zip(column) {
            row.insert(name.clone(), value.clone());
        }
    }
    Some(rows.into_iter().map(Value::Object).collect())
}

/// What a template sees beside the messages: tools, which OpenAI once called functions, and the record's
/// own variables.
///
/// # Errors
/// Which field is not of its type.
pub(super) fn variables(record: &Value) -> Result<Map<String, Value>, Rejection> {
    let given = |key: &str| record.get(key).filter(|value| !value.is_null());
    let mut variables = match given("chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(fields)) => {
            let offers = |value: &Value| value.as_array().is_none_or(|tools| !tools.is_empty());
            let mut fields = fields.clone();
            fields.retain(|key, value| key != "tools" || (!value.is_null() && offers(value)));
            fields
        }
        Some(other) => {
            let got = kind(other);
            let what = format!("field `chat_template_kwargs` is {got}, expected an object");
            return Err(Rejection::new(what));
        }
    };
    let functions = tool_list(record, "functions")?.into_iter().map(as_tool).collect();
    let tools = Some(tool_list(record, "tools")?).filter(|tools| !tools.is_empty());
    let tools: Vec<Value> = tools.unwrap_or(functions);
    if !tools.is_empty() {
        variables.insert("tools".into(), tools.into());
    }
    Ok(variables)
}

/// A list, or JSON text of one: data sets whose columns have one type keep tools so.
pub(super) fn tool_list(record: &Value, key: &str) -> Result<Vec<Value>, Rejection> {
    let tools = match record.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::String(text)) if matches!(text.trim(), "" | "null") => return Ok(Vec::new()),
        Some(Value::String(text)) => json_text::read(text)
            .map_err(|e| Rejection::new(format!("field `{key}` is text, but no JSON: {e}")))?,
        Some(tools) => tools.clone(),
    };
    match tools {
        Value::Array(tools) => Ok(tools),
        other => {
            let what = format!("field `{key}` is {}, expected a list", kind(&other));
            Err(Rejection::new(what))
        }
    }
}

/// A function, or a call of one, as OpenAI writes it today.
fn as_tool(function: Value) -> Value {
    json!({"type": "function", "function": function})
}

/// A message of either shape.
fn read(message: &Value) -> Result<Value, Rejection> {
    let Some(fields) = message.as_object() else {
        return Err(Rejection::new(format!(" is {}, expected an object", kind(message))));
    };
    let is_trained = is_trained(fields)?;
    let mut read = shaped(fields)?;
    if !is_trained {
        read["weight"] = 0.into();
    }
    Ok(read)
}

/// What a message says about its own loss: OpenAI's `weight`, LLaMA-Factory's `loss_weight`, Axolotl's `train`
/// and ms-swift's `loss`.
fn is_trained(fields: &Map<String, Value>) -> Result<bool, Rejection> {
    let mut said: Option<(&str, bool)> = None;
    for name in ["weight", "loss_weight", "train", "loss"] {
        let given = fields.get(name).unwrap_or(&Value::Null);
        let trains = match (name, given, given.as_f64()) {
            (_, Value::Null, _) => continue,
            ("weight" | "loss_weight", _, Some(weight @ (0.0 | 1.0))) => weight == 1.0,
            ("weight" | "loss_weight", ..) => {
                let what = format!(".{name} is {given}, expected 0 or 1");
                return Err(Rejection::new(what).hint("0 leaves an answer untrained"));
            }
            (_, &Value::Bool(trains), _) => trains,
            _ => {
                let what = format!(".{name} is {given}, expected true or false");
                return Err(Rejection::new(what).hint("false leaves an answer untrained"));
            }
        };
        match said {
            Some((other, before)) if before != trains => {
                let what = format!(" is to be trained by one of `{other}` and `{name}` alone");
                return Err(Rejection::new(what).hint("keep the one that is right"));
            }
            _ => said = Some((name, trains)),
        }
    }
    Ok(said.is_none_or(|(_, trains)| trains))
}

fn shaped(fields: &Map<String, Value>) -> Result<Value, Rejection> {
    let field = |key: &str| fields.get(key).unwrap_or(&Value::Null);
    if fields.contains_key("role") || !fields.contains_key("from") {
        return openai(fields);
    }
    let content = match field("value") {
        Value::String(text) => text,
        other => return Err(Rejection::new(format!(".value is {}, expected text", kind(other)))),
    };
    let from = field("from").as_str();
    let role = match from.and_then(usual_role) {
        Some(role) => role,
        None if from == Some("function_call") => return function_call(content),
        None => {
            return Err(Rejection::new(format!(
                ".from is `{}`, expected human, gpt, system, function_call or observation",
                from.unwrap_or("no text")
            )));
        }
    };
    Ok(json!({"role": role, "content": content}))
}

fn openai(fields: &Map<String, Value>) -> Result<Value, Rejection> {
    let given = |key: &str| fields.get(key).filter(|value| !value.is_null());
    if given("role").and_then(Value::as_str).is_none() {
        return Err(Rejection::new(".role is missing or no text"));
    }
    let mut fields = fields.clone();
    // Halfway to ShareGPT.
    if let Some(role) = fields["role"].as_str().and_then(usual_role) {
        fields.insert("role".into(), role.into());
    }
    if !fields.contains_key("content")
        && let Some(said) = fields.shift_remove("value")
    {
        fields.insert("content".into(), said);
    }
    // What calls were before there could be several.
    if let Some(call) = fields.remove("function_call").filter(|call| !call.is_null()) {
        if !call["name"].is_string() {
            return Err(Rejection::new(format!(".function_call has no name: {call}")));
        }
        if given("tool_calls").is_none() {
            fields.insert("tool_calls".into(), json!([as_tool(call)]));
        }
    }
    match fields.get("content").filter(|content| !content.is_null()) {
        None if fields.get("tool_calls").is_some_and(|calls| !calls.is_null()) => {}
        None => return Err(Rejection::new(" has no content and no tool_calls")),
        Some(Value::String(_)) => {}
        Some(Value::Array(parts)) => {
            let texts = parts.iter().map(part).collect::<Result<Vec<_>, _>>()?;
            let content = match texts[..] {
                [] => "".into(),
                [text] => text.into(),
                _ => texts.iter().map(|text| json!({"type": "text", "text": text})).collect(),
            };
            fields.insert("content".into(), content);
        }
        Some(other) => {
            return Err(Rejection::new(format!(".content is {}, expected text", kind(other))));
        }
    }
    Ok(Value::Object(fields))
}

/// The text of a part: OpenAI's `text`, or LLaMA-Factory's `value`.
fn part(part: &Value) -> Result<&str, Rejection> {
    let text = part["text"].as_str().or_else(|| part["value"].as_str());
    match (part["type"].as_str(), text) {
        (Some("text") | None, Some(text)) => Ok(text),
        (Some("text"), None) => {
            let what = ".content has a part of type `text` without `text`";
            Err(Rejection::new(what))
        }
        (kind, _) => {
            let what = format!(".content has a part of type `{}`", kind.unwrap_or("?"));
            Err(Rejection::new(what).hint("only text can be trained"))
        }
    }
}

/// LLaMA-Factory's way of saying that the assistant calls tools: one call or a list, as JSON text.
fn function_call(text: &str) -> Result<Value, Rejection> {
    let calls: Value = json_text::read(text)
        .map_err(|e| Rejection::new(format!(".value is a function_call, but no JSON: {e}")))?;
    let calls = if let Value::Array(calls) = calls { calls } else { vec![calls] };
    if let Some(call) = calls.iter().find(|call| !call["name"].is_string()) {
        return Err(Rejection::new(format!(".value is a function_call without a name: {call}")));
    }
    let calls: Vec<Value> = calls.into_iter().map(as_tool).collect();
    openai(json!({"role": "assistant", "tool_calls": calls}).as_object().expect("just made"))
}
