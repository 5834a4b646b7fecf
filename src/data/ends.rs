//! Tokens that end an assistant's turn.
//!
//! The tokenizer of a base model may name `<|endoftext|>` as its end of sequence while the chat
//! template ends turns with `<|im_end|>`; some templates end the last turn otherwise than the ones
//! before. What a model is taught to end a turn with is what generation must stop at.

use serde_json::{Map, json};

use super::template::ChatTemplate;

/// Tokens that end an assistant's turn, found by rendering two questions and answers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct TurnEnds {
    /// The token after the last answer.
    pub last: Option<String>,
    /// The token after an answer that another question follows.
    pub between: Option<String>,
}

impl TurnEnds {
    /// The ends in a template, where `tokens` are the texts of all added tokens; nothing of a template that
    /// refuses such a conversation.
    pub fn of(template: &ChatTemplate, tokens: &[String]) -> Self {
        let [question, answer, again, last] = ["Question1", "Answer1", "Question2", "Answer2"];
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        let messages = [
            message("user", question),
            message("assistant", answer),
            message("user", again),
            message("assistant", last),
        ];
        let Ok(text) = template.render(&messages, &Map::new(), false) else {
            return TurnEnds::default();
        };
        let behind = |content: &str| {
            let rest = text.split_once(content)?.1.trim_start();
            let found = tokens
                .iter()
                .filter(|token| !token.trim().is_empty() && rest.starts_with(token.as_str()));
            found.max_by_key(|token| token.len()).map(|token| token.to_string())
        };
        // What follows an answer may as well begin the next question.
        let between = behind(answer).filter(|end| behind(question).as_ref() == Some(end));
        TurnEnds { last: behind(last), between }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(source: &str) -> TurnEnds {
        let template = ChatTemplate::new(source, Map::new()).unwrap();
        let tokens = ["<end>", "<end>s", "<stop>", "<user>", "<bot>", " "];
        TurnEnds::of(&template, &tokens.map(str::to_string))
    }

    #[test]
    fn ends_are_what_follows_an_answer() {
        let turns = |last: &str| {
            format!(
                "{{% for m in messages %}}<{{{{ 'bot' if m.role == 'assistant' else m.role }}}}>\
                 {{{{ m.content }}}}{{{{ {last} }}}} {{% endfor %}}"
            )
        };
        let both = |last: &str, between: &str| TurnEnds {
            last: Some(last.into()).filter(|text: &String| !text.is_empty()),
            between: Some(between.into()).filter(|text: &String| !text.is_empty()),
        };
        assert_eq!(ends(&turns("'\n<end>\n'")), both("<end>", "<end>"));
        assert_eq!(ends(&turns("'<stop>' if loop.last else '<end>'")), both("<stop>", "<end>"));
        assert_eq!(ends(&turns("''")), both("", ""), "`<user>` is no end");
        assert_eq!(ends("{{ raise_exception('no') }}"), both("", ""));
    }
}
