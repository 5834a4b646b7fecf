//! What a chat template leaves out of a conversation: the model would be trained on an answer to
//! something that it never saw.

use serde_json::{Map, Value};

use super::chat::Chat;
use super::message::{calls, inline_reasoning, longest_line};
use super::rejection::Rejection;
use super::template::{ChatTemplate, REASONING};

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
        let unseen = self.calls_without_trace(messages, variables);
        for index in unseen {
            let mut without = messages.clone();
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

    /// Refuses a conversation whose text would be the same if one of the answers were empty.
    ///
    /// # Errors
    /// Which one.
    pub(super) fn check_answers(&self, chat: &Chat, text: &str) -> Result<(), Rejection> {
        // Calls of tools may stand for what is said beside them.
        let is_answer = |message: &Value| message["role"] == "assistant" && !calls(message);
        let mut answers = (0..chat.messages.len()).filter(|&i| is_answer(&chat.messages[i]));
        match answers.find(|&index| self.leaves_out(chat, index, text)) {
            Some(index) => {
                let what = format!("the chat template leaves messages[{index}].content out");
                Err(Rejection::new(what).hint(
                    "does it know the role `assistant`? Choose another `--chat-template`, such as \
                     `chatml`",
                ))
            }
            None => Ok(()),
        }
    }

    /// Other messages that make no difference to the text by what they say.
    pub(super) fn content_left_out(&self, chat: &Chat, text: &str) -> usize {
        let is_heard = |message: &Value| match message["role"].as_str() {
            Some("system" | "developer" | "user") => true,
            Some("assistant") => calls(message),
            _ => false,
        };
        let heard = (0..chat.messages.len()).filter(|&index| is_heard(&chat.messages[index]));
        heard.filter(|&index| self.leaves_out(chat, index, text)).count()
    }

    /// Most templates write what is said as it stands, which is quickly seen.
    fn leaves_out(&self, chat: &Chat, index: usize, text: &str) -> bool {
        let Chat { messages, variables, .. } = chat;
        let is_found = longest_line(&messages[index]).is_none_or(|line| text.contains(line));
        !is_found && self.without_content(messages, variables, index).as_deref() == Some(text)
    }

    /// The text of a conversation in which message `index` says nothing; `None` where that is refused.
    pub(super) fn without_content(
        &self,
        messages: &[Value],
        variables: &Map<String, Value>,
        index: usize,
    ) -> Option<String> {
        let mut messages = messages.to_vec();
        messages[index]["content"] = "".into();
        self.render(&messages, variables, false).ok()
    }

    /// Messages of whose calls the text may have nothing: names of their own for all calls are not in it.
    fn calls_without_trace(
        &self,
        messages: &[Value],
        variables: &Map<String, Value>,
    ) -> Vec<usize> {
        let mark = |index: usize| format!("tool_of_message_{index}_");
        let mut marked = messages.to_vec();
        let calling: Vec<usize> = (0..messages.len()).filter(|&i| calls(&messages[i])).collect();
        if calling.is_empty() {
            return calling;
        }
        for &index in &calling {
            for call in marked[index]["tool_calls"].as_array_mut().into_iter().flatten() {
                let holder =
                    if call["function"].is_object() { &mut call["function"] } else { call };
                if let Some(fields) = holder.as_object_mut() {
                    fields.insert("name".into(), mark(index).into());
                }
            }
        }
        let text = self.render(&marked, variables, false).unwrap_or_default();
        calling.into_iter().filter(|&index| !text.contains(&mark(index))).collect()
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
            let field = REASONING.iter().find_map(|name| message[*name].as_str()).map(str::trim);
            let given = field.or_else(|| inline_reasoning(message));
            given.is_some_and(|given| !given.is_empty() && !text.contains(given))
        };
        self.messages.iter().filter(reasoning).count()
    }

    /// Whether the assistant says nothing in message `index`.
    pub(super) fn is_empty_answer(&self, index: usize) -> bool {
        let message = &self.messages[index];
        let silent = |key: &str| message[key].as_str().is_none_or(|text| text.trim().is_empty());
        silent("content") && REASONING.into_iter().all(silent) && !calls(message)
    }
}

fn left_out(what: &str) -> Rejection {
    Rejection::new(format!("the chat template leaves {what} out")).hint(
        "give a `--chat-template` that knows tools, or take them out of the data; a column is left \
             out by `--rename-columns tools=unused`",
    )
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
        // No name, but a trace all the same.
        let counts = "{% for m in messages %}{{ m.tool_calls | length }}{% endfor %}";
        assert_eq!(reason(counts, &called), None);
        let kwargs = json!({"tools": null, "enable_thinking": false});
        let mut none = chat(json!({
            "messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": kwargs,
        }));
        assert_eq!((reason(PLAIN, &none), none.has_tools()), (None, false));
        none = chat(json!({
            "messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"tools": []},
        }));
        assert_eq!((reason(PLAIN, &none), none.has_tools()), (None, false));
        assert!(called.has_tools() && offered.has_tools() && !plain.has_tools());
    }

    #[test]
    fn what_is_said_has_to_make_a_difference() {
        let call = json!({"type": "function", "function": {"name": "f", "arguments": {}}});
        let said = chat(json!({"messages": [
            {"role": "system", "content": "rules"},
            {"role": "user", "content": " first\n  the second line \n"},
            {"role": "assistant", "content": "<think>\na long thought\n</think>\n\nyes\n\"no\""},
            {"role": "assistant", "content": "I look.", "tool_calls": [call]},
            {"role": "tool", "content": "\"quoted\""},
        ]}));
        let found = |template: &str| {
            let template = ChatTemplate::at(0, template, Map::new()).unwrap();
            let text = template.render(&said.messages, &said.variables, false).unwrap();
            let refused = template.check_answers(&said, &text).err().map(|it| it.reason);
            (refused, template.content_left_out(&said, &text))
        };
        let each = |body: &str| format!("{{% for m in messages %}}{body}{{% endfor %}}");
        assert_eq!(found(&each("[{{ m.role }}] {{ m.content }}")), (None, 0));
        // As a call alone, in JSON, in capitals, without the thought, and without white space.
        let calls = "{% if m.tool_calls %}{{ m.tool_calls }}{% else %}{{ m.content }}{% endif %}";
        assert_eq!(found(&each(calls)), (None, 1));
        for written in ["tojson", "upper", "length", "replace('\\n', '')"] {
            assert_eq!(found(&each(&format!("{{{{ m.content | {written} }}}}"))), (None, 0));
        }
        assert_eq!(found(&each("{{ m.content.split('</think>')[-1] | trim }}")), (None, 0));
        let deaf = "{% if m.role != 'assistant' %}{{ m.content }}{% endif %}";
        let out = Some("the chat template leaves messages[2].content out".to_string());
        assert_eq!(found(&each(deaf)), (out, 1));
        let user = "{% if m.role in ['user', 'assistant'] %}{{ m.content }}{% endif %}";
        assert_eq!(found(&each(user)), (None, 1));
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
        let inline = self::chat(json!({"messages": [
            {"role": "user", "content": "a </think> b"},
            {"role": "assistant", "content": "<think>\nso it is\n</think>\n\nb"},
            {"role": "assistant", "content": "<think>\n\n</think>\n\nc"},
        ]}));
        let kept = "<think>\nso it is\n</think>\n\nb";
        assert_eq!((inline.reasoning_left_out("b c"), inline.reasoning_left_out(kept)), (1, 0));
        assert_eq!([1, 2, 3].map(|index| chat.is_empty_answer(index)), [false, true, true]);
    }
}
