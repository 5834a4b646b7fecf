//! What a chat template leaves out of a conversation: the model would be trained on an answer to
//! something that it never saw.

use serde_json::{Map, Value};

use super::chat::Chat;
use super::record::Rejection;
use super::spans::END_OF_REASONING;
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

    /// Refuses a conversation in whose text an answer does not stand.
    ///
    /// # Errors
    /// Which one.
    pub(super) fn check_answers(&self, text: &str) -> Result<(), Rejection> {
        let mut answers = (0..).zip(&self.messages).filter(|(_, message)| is_answer(message));
        match answers.find(|(_, message)| is_missing(message, text)) {
            Some((index, _)) => {
                let what = format!("the chat template leaves messages[{index}].content out");
                Err(Rejection::new(what).hint(
                    "does it know the role `assistant`? Choose another `--chat-template`, such as \
                     `chatml`",
                ))
            }
            None => Ok(()),
        }
    }

    /// Messages to the assistant that are not in the text; what tools say may be written otherwise.
    pub(super) fn content_left_out(&self, text: &str) -> usize {
        let is_heard = |message: &&Value| {
            ["system", "developer", "user"].into_iter().any(|role| message["role"] == role)
        };
        let heard = self.messages.iter().filter(is_heard);
        heard.filter(|message| is_missing(message, text)).count()
    }

    /// Messages whose reasoning is not in the text.
    pub(super) fn reasoning_left_out(&self, text: &str) -> usize {
        let reasoning = |message: &&Value| {
            let given = REASONING.iter().find_map(|name| message[*name].as_str()).map(str::trim);
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

fn is_answer(message: &Value) -> bool {
    message["role"] == "assistant"
}

/// Whether `text` lacks what a message says.
fn is_missing(message: &Value, text: &str) -> bool {
    longest_line(message).is_some_and(|line| !text.contains(line))
}

/// A line to know what a message says by, if it says something: templates write white space, and
/// reasoning before the answer, in their own way.
pub(super) fn longest_line(message: &Value) -> Option<&str> {
    let content = message["content"].as_str()?;
    let (_, answer) = content.rsplit_once(END_OF_REASONING).unwrap_or(("", content));
    answer.lines().map(str::trim).filter(|line| !line.is_empty()).max_by_key(|line| line.len())
}

fn calls(message: &Value) -> bool {
    message["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty())
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
    fn what_is_said_has_to_be_in_the_text() {
        let said = chat(json!({"messages": [
            {"role": "system", "content": "rules"},
            {"role": "user", "content": " first\n  the second line \n"},
            {"role": "assistant", "content": "<think>\na long thought\n</think>\n\nyes\nno"},
            {"role": "tool", "content": "\"quoted\""},
        ]}));
        let text = "rules first the second line yes";
        assert!(said.check_answers(text).is_ok());
        assert_eq!(said.content_left_out(text), 0);
        let refused = said.check_answers("rules a long thought").unwrap_err().reason;
        assert_eq!(refused, "the chat template leaves messages[2].content out");
        assert_eq!(said.content_left_out("yes"), 2);
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
        assert_eq!([1, 2, 3].map(|index| chat.is_empty_answer(index)), [false, true, true]);
    }
}
