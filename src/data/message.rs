//! What a message of a conversation says.

use serde_json::Value;

/// The end of what a reasoning model thinks: templates see the answer behind it.
pub(super) const END_OF_REASONING: &str = "</think>";

/// A line to know what a message says by, if it says something: templates write white space, and
/// reasoning before the answer, in their own way.
pub(super) fn longest_line(message: &Value) -> Option<&str> {
    let content = texts(message).last()?;
    let (_, answer) = content.rsplit_once(END_OF_REASONING).unwrap_or(("", content));
    answer.lines().map(str::trim).filter(|line| !line.is_empty()).max_by_key(|line| line.len())
}

/// What the assistant thinks in the text of its answer, before it answers.
pub(super) fn inline_reasoning(message: &Value) -> Option<&str> {
    let content = message["content"].as_str().filter(|_| message["role"] == "assistant")?;
    let (thoughts, _) = content.rsplit_once(END_OF_REASONING)?;
    Some(thoughts.trim().trim_start_matches("<think>").trim())
}

/// What a message says: one text, or parts of it.
pub(super) fn texts(message: &Value) -> impl Iterator<Item = &str> {
    let content = &message["content"];
    let parts = content.as_array().into_iter().flatten().filter_map(|part| part["text"].as_str());
    content.as_str().into_iter().chain(parts)
}

/// Whether a message calls tools.
pub(super) fn calls(message: &Value) -> bool {
    message["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty())
}
