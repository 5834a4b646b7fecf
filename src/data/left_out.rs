//! What a chat template leaves out of a conversation: the model would be trained on an answer to
//! something that it never saw.

use serde_json::{Map, Value};

use super::chat::Chat;
use super::record::Rejection;
use super::template::ChatTemplate;

impl ChatTemplate {
    /// Refuses a conversation whose tools or calls of tools make no difference to its text.
    ///
    /// # Errors
    /// Which of them.
    pub(super) fn check_tools(&self, chat: &Chat, text: &str) -> Result<(), Rejection> {
        let Chat { messages, variables, .. } = chat;
        // What the template cannot do without is no part that it leaves out.
        let same = |messages: &[Value], variables: &Map<String, Value>| {
            self.render(messages, variables, false).is_ok_and(|without| without == text)
        };
        if variables.contains_key("tools") {
            let mut without = variables.clone();
            without.remove("tools");
            if same(messages, &without) {
                return Err(left_out("field `tools`"));
            }
        }
        for (index, message) in messages.iter().enumerate().filter(|(_, it)| calls(it)) {
            let mut without = messages.clone();
            without[index] = message.clone();
            if let Some(fields) = without[index].as_object_mut() {
                fields.remove("tool_calls");
                fields.entry("content").or_insert("".into());
            }
            if same(&without, variables) {
                return Err(left_out(&format!("messages[{index}].tool_calls")));
            }
        }
        Ok(())
    }
}

impl Chat {
    /// Whether tools are offered or called in it.
    pub(super) fn has_tools(&self) -> bool {
        self.variables.contains_key("tools") || self.messages.iter().any(calls)
    }

    /// Messages whose reasoning is not in the text.
    pub(super) fn reasoning_left_out(&self, text: &str) -> usize {
        let reasoning = |message: &&Value| {
            let given = ["reasoning_content", "thinking", "reasoning"];
            let given = given.iter().find_map(|name| message[*name].as_str()).map(str::trim);
            given.is_some_and(|given| !given.is_empty() && !text.contains(given))
        };
        self.messages.iter().filter(reasoning).count()
    }

    /// Trained messages of the assistant in which nothing is said.
    pub(super) fn empty_answers(&self) -> usize {
        let is_empty = |(index, message): &(usize, &Value)| {
            let silent =
                |key: &str| message[key].as_str().is_none_or(|text| text.trim().is_empty());
            let said = ["content", "reasoning_content", "thinking", "reasoning"];
            message["role"] == "assistant"
                && said.into_iter().all(silent)
                && !calls(message)
                && self.is_trained(*index)
        };
        self.messages.iter().enumerate().filter(is_empty).count()
    }
}

fn calls(message: &Value) -> bool {
    message["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty())
}

fn left_out(what: &str) -> Rejection {
    Rejection::new(format!("the chat template leaves {what} out"))
        .hint("give a `--chat-template` that knows tools, or take them out of the data")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const PLAIN: &str = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}";

    fn chat(record: Value) -> Chat {
        Chat::new(&record, "messages").unwrap()
    }

    fn reason(template: &str, chat: &Chat) -> Option<String> {
        let template = ChatTemplate::at(0, template, Map::new()).unwrap();
        let text = template.render(&chat.messages, &chat.variables, false).unwrap();
        template.check_tools(chat, &text).err().map(|it| it.reason)
    }

    #[test]
    fn tools_that_leave_no_trace_are_refused() {
        let call = json!({"type": "function", "function": {"name": "f", "arguments": {}}});
        let called = chat(json!({"messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "tool_calls": [call]},
        ]}));
        let offered = chat(json!({
            "messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}],
        }));
        let plain = chat(json!({"messages": [{"role": "user", "content": "a"}]}));
        assert_eq!(reason(PLAIN, &plain), None);
        let says = |what: &str| Some(format!("the chat template leaves {what} out"));
        assert_eq!(reason(PLAIN, &called), says("messages[1].tool_calls"));
        assert_eq!(reason(PLAIN, &offered), says("field `tools`"));
        let knows =
            "{{ tools }}{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}";
        assert_eq!([&called, &offered].map(|chat| reason(knows, chat)), [None, None]);
        assert!(called.has_tools() && offered.has_tools() && !plain.has_tools());
    }

    #[test]
    fn reasoning_and_empty_answers_are_counted() {
        let chat = chat(json!({"messages": [
            {"role": "user", "content": ""},
            {"role": "assistant", "content": "b", "reasoning_content": "because"},
            {"role": "assistant", "content": " "},
            {"role": "assistant", "content": "", "weight": 0},
        ]}));
        assert_eq!((chat.reasoning_left_out("b"), chat.reasoning_left_out("because b")), (1, 0));
        assert_eq!(chat.empty_answers(), 1);
    }
}
