//! A conversation as one template takes it.
//!
//! As vLLM does, and as most templates need, content in text parts becomes one text unless the template goes
//! through the parts itself, and a tool call's arguments are an object even where they were saved as JSON
//! text, unless the template can only do with the text. A message that calls tools and says nothing says an
//! empty text where the template needs one.

use std::borrow::Cow;

use serde_json::Value;

use super::chat::Chat;
use super::json_text;
use super::message::{calls, texts};
use super::template::ChatTemplate;

impl Chat {
    /// What the template is to render, whole or in part.
    pub(super) fn for_template(&self, template: &ChatTemplate) -> Cow<'_, Self> {
        let chat = self.with_joined_parts(template);
        if !chat.messages.iter().any(calls) {
            return chat;
        }
        let parsed = chat.with_objects_as_arguments().map(Cow::Owned);
        let shapes = parsed.into_iter().chain([chat]);
        let mut shapes: Vec<Cow<Chat>> = shapes
            .flat_map(|chat| {
                let told = chat.with_text_beside_calls().map(Cow::Owned);
                std::iter::once(chat).chain(told)
            })
            .collect();
        let renders = |chat: &Chat| template.render(&chat.messages, &chat.variables, false).is_ok();
        let taken = match shapes.len() {
            1 => 0,
            _ => shapes.iter().position(|chat| renders(chat)).unwrap_or(0),
        };
        shapes.swap_remove(taken)
    }

    /// The conversation with an empty text beside calls that have none, for templates that put the text before
    /// them whatever it is; none if all have a text.
    fn with_text_beside_calls(&self) -> Option<Self> {
        let is_silent = |message: &Value| calls(message) && message["content"].is_null();
        if !self.messages.iter().any(is_silent) {
            return None;
        }
        let mut chat = self.clone();
        for message in chat.messages.iter_mut().filter(|message| is_silent(message)) {
            message["content"] = "".into();
        }
        Some(chat)
    }

    /// The conversation with one text for the parts of each message, which most templates need: of all but
    /// the user's, of which alone it is known that the template goes through them, and of these, too, where
    /// it does not.
    fn with_joined_parts(&self, template: &ChatTemplate) -> Cow<'_, Self> {
        let in_parts = |message: &Value| message["content"].is_array();
        if !self.messages.iter().any(in_parts) {
            return Cow::Borrowed(self);
        }
        let takes_parts = template.takes_parts();
        let separator = if takes_parts { "" } else { "\n" };
        let mut chat = self.clone();
        for message in chat.messages.iter_mut().filter(|message| in_parts(message)) {
            if !takes_parts || message["role"] != "user" {
                let texts: Vec<&str> = texts(message).collect();
                message["content"] = texts.join(separator).into();
            }
        }
        Cow::Owned(chat)
    }

    /// The conversation with the objects that arguments of calls are the JSON text of; none if there is no
    /// such text.
    fn with_objects_as_arguments(&self) -> Option<Self> {
        if !self.messages.iter().any(calls) {
            return None;
        }
        let (mut chat, mut found) = (self.clone(), false);
        let messages = chat.messages.iter_mut();
        let all = messages.filter_map(|message| message.get_mut("tool_calls")?.as_array_mut());
        for call in all.flatten() {
            let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
            if let Some(text) = arguments.as_str()
                && let Ok(object @ Value::Object(_)) = json_text::read(text)
            {
                *arguments = object;
                found = true;
            }
        }
        found.then_some(chat)
    }
}
