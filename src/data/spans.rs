//! Which parts of a rendered conversation the assistant said, so that only they are trained.
//!
//! Four ways, the first that works:
//! 1. The template's own `{% generation %}` blocks.
//! 2. Rendering turn by turn: a turn is what a model would write after the generation prompt, up to
//!    the end of its turn. Exact wherever adding turns leaves the text before them alone.
//! 3. Marking the assistant's text inside the messages and finding the marks in the rendered text,
//!    for templates that rewrite the past: they move the system prompt, drop old reasoning, or end
//!    the whole text with a token. Taken only if the text without the marks is the true one.
//! 4. From each generation prompt in the text to the next end of a turn, if there are as many as
//!    turns, none comes from a message, and each turn has the text of its message and none of
//!    another's: for turns that are calls of tools, with no text to mark.

use std::ops::Range;

use serde_json::{Map, Value};

use super::chat::Chat;
use super::jinja::{GENERATION_BEGIN, GENERATION_END};
use super::message::{END_OF_REASONING, calls, longest_line, texts};
use super::template::{ChatTemplate, converted};
use crate::error::{Error, Result};

/// Private-use characters around the assistant's text in the third way.
const TEXT_BEGIN: char = '\u{f8f2}';
const TEXT_END: char = '\u{f8f3}';

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// Text to tokenize.
    pub text: String,
    /// What the assistant said, in order.
    pub turns: Vec<Turn>,
}

/// A part of the text that the assistant said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// Bytes of the text, up to and with the end-of-turn token if there is one.
    pub range: Range<usize>,
    /// Which message it is; none if the template's generation blocks are other than its messages.
    pub message: Option<usize>,
}

impl ChatTemplate {
    /// The text of a conversation and the assistant's parts of it; `ends` are the texts of the tokens
    /// that end a turn.
    ///
    /// # Errors
    /// `Input` when the template refuses, or when nobody can say who said what.
    pub fn render_with_turns(&self, chat: &Chat, ends: &[String]) -> Result<Rendered> {
        let Chat { messages, variables, .. } = chat;
        let conversation = Conversation { template: self, messages, variables, ends };
        let said =
            |(index, message): (usize, &Value)| (message["role"] == "assistant").then_some(index);
        let assistant: Vec<usize> = messages.iter().enumerate().filter_map(said).collect();
        let (text, ranges) = conversation.ranges(&assistant)?;
        let known = ranges.len() == assistant.len();
        let turn = |(index, range)| Turn { range, message: known.then(|| assistant[index]) };
        Ok(Rendered { text, turns: ranges.into_iter().enumerate().map(turn).collect() })
    }
}

fn unstable(turn: usize) -> Error {
    Error::input(format_args!("chat template: the text of turn {turn} depends on later turns"))
        .hint(
            "the template needs `{% generation %}` marks for a loss on assistant turns; or train on \
             everything with `--train-on all`",
        )
}

struct Conversation<'a> {
    template: &'a ChatTemplate,
    messages: &'a [Value],
    variables: &'a Map<String, Value>,
    ends: &'a [String],
}

impl Conversation<'_> {
    fn ranges(&self, assistant: &[usize]) -> Result<(String, Vec<Range<usize>>)> {
        if self.template.has_generation_blocks() {
            return self.by_blocks();
        }
        let text = self.template.render(self.messages, self.variables, false)?;
        let unstable_turn = match self.by_turns(&text, assistant) {
            Ok(ranges) => return Ok((text, ranges)),
            Err(turn) => turn,
        };
        let marked = self.by_marks(&text, assistant.len());
        let found = marked.or_else(|| self.by_headers(&text, assistant));
        let ranges = found.ok_or_else(|| unstable(unstable_turn))?;
        Ok((text, ranges))
    }

    fn by_blocks(&self) -> Result<(String, Vec<Range<usize>>)> {
        let marked =
            self.template.render_marked(&converted(self.messages), self.variables, false)?;
        let (text, mut ranges) = unmarked(&marked, GENERATION_BEGIN, GENERATION_END);
        for range in &mut ranges {
            // Marks that leave the end of the turn out: the model must learn to stop.
            if self.last_end(&text[range.clone()]).is_none() {
                range.end += self.end_at(&text[range.end..]).unwrap_or(0);
            }
        }
        Ok((text, ranges))
    }

    /// The second way; the error is the number of the turn that it fails on.
    fn by_turns(
        &self,
        text: &str,
        assistant: &[usize],
    ) -> std::result::Result<Vec<Range<usize>>, usize> {
        let mut ranges = Vec::with_capacity(assistant.len());
        let messages = converted(self.messages);
        for &turn in assistant {
            // A template may well refuse a part of a conversation that it accepts.
            let render = |messages, prompt| {
                self.template.render_converted(messages, self.variables, prompt).map_err(|_| turn)
            };
            let before = render(&messages[..turn], true)?;
            let after = render(&messages[..=turn], false)?;
            let common = common_prefix(text, &after);
            if !text.starts_with(&before) || common < before.len() {
                return Err(turn);
            }
            let said = &text[before.len()..common];
            let length = match self.last_end(said) {
                Some(end) => end,
                None if common == after.len() => said.len(),
                None => return Err(turn),
            };
            ranges.push(before.len()..before.len() + length);
        }
        Ok(ranges)
    }

    /// The third way, if it works.
    fn by_marks(&self, text: &str, turns: usize) -> Option<Vec<Range<usize>>> {
        let messages = self.messages.iter().map(with_marks).collect::<Option<Vec<_>>>()?;
        let marked = self.template.render(&messages, self.variables, false).ok()?;
        let (plain, mut ranges) = unmarked(&marked, TEXT_BEGIN, TEXT_END);
        if plain != text || ranges.len() != turns {
            return None;
        }
        // Reasoning may stand between the prompt and the marked text.
        let header = self.generation_prompt(text).filter(|header| !self.is_quoted(header));
        let mut previous = 0;
        for range in &mut ranges {
            if let Some(header) = &header
                && let Some(at) = text[previous..range.start].find(header)
            {
                range.start = previous + at + header.len();
            }
            range.end += self.end_at(&text[range.end..]).unwrap_or(0);
            previous = range.end;
        }
        Some(ranges)
    }

    /// The fourth way, if it works.
    fn by_headers(&self, text: &str, assistant: &[usize]) -> Option<Vec<Range<usize>>> {
        let turns = assistant.len();
        // Some templates prompt with more than they render, such as the beginning of a thought.
        let prompt = self.generation_prompt(text)?;
        let mut lengths =
            prompt.char_indices().map(|(at, character)| at + character.len_utf8()).rev();
        let header =
            &prompt[..lengths.find(|&length| text.matches(&prompt[..length]).count() == turns)?];
        if self.is_quoted(header) {
            return None;
        }
        let range = |(at, _): (usize, &str)| {
            let begin = at + header.len();
            let end = |end: &String| Some(text[begin..].find(end.as_str())? + end.len());
            Some(begin..begin + self.ends.iter().filter_map(end).min()?)
        };
        let ranges: Vec<Range<usize>> =
            text.match_indices(header).map(range).collect::<Option<_>>()?;
        let says = |(&index, range): (&usize, &Range<usize>)| {
            let message = &self.messages[index];
            let line = longest_line(message).filter(|_| !calls(message));
            line.is_none_or(|line| text[range.clone()].contains(line)) || {
                let without = self.template.without_content(self.messages, self.variables, index);
                without.is_some_and(|without| range.contains(&common_prefix(text, &without)))
            }
        };
        let said_by_it = assistant.iter().zip(&ranges).all(says);
        (said_by_it && !self.holds_others(text, assistant, &ranges)).then_some(ranges)
    }

    /// Whether what somebody else says stands in one of `ranges`: without it, the text is another
    /// from there on. Where a template cannot do without it, its words tell.
    fn holds_others(&self, text: &str, assistant: &[usize], ranges: &[Range<usize>]) -> bool {
        let is_held = |index: usize| {
            let mut ranges = ranges.iter();
            match self.template.without_content(self.messages, self.variables, index) {
                Some(without) => {
                    let at = common_prefix(text, &without);
                    ranges.any(|range| range.contains(&at))
                }
                None => longest_line(&self.messages[index])
                    .is_some_and(|line| ranges.any(|range| text[range.clone()].contains(line))),
            }
        };
        (0..self.messages.len()).filter(|index| !assistant.contains(index)).any(is_held)
    }

    /// What the template adds behind `text`, or else behind the first question, for the model to
    /// answer.
    fn generation_prompt(&self, text: &str) -> Option<String> {
        let added = |messages: &[Value], text: &str| {
            let prompted = self.template.render(messages, self.variables, true).ok()?;
            prompted.strip_prefix(text).filter(|added| !added.is_empty()).map(str::to_string)
        };
        added(self.messages, text).or_else(|| {
            let first = self.messages.iter().position(|message| message["role"] == "assistant")?;
            let question = &self.messages[..first];
            added(question, &self.template.render(question, self.variables, false).ok()?)
        })
    }

    /// Whether somebody says `text`, so that finding it in the conversation proves nothing.
    fn is_quoted(&self, text: &str) -> bool {
        self.messages.iter().flat_map(texts).any(|said| said.contains(text))
    }

    /// The byte behind the last end-of-turn token in `text`.
    fn last_end(&self, text: &str) -> Option<usize> {
        let ends = self.ends.iter().filter_map(|end| Some(text.rfind(end.as_str())? + end.len()));
        ends.max()
    }

    /// The byte behind the end-of-turn token that `text` begins with, white space aside.
    fn end_at(&self, text: &str) -> Option<usize> {
        let begin = text.trim_start();
        let end = self.ends.iter().find(|end| begin.starts_with(end.as_str()))?;
        Some(text.len() - begin.len() + end.len())
    }
}

/// `message` with marks around its visible text, if it is the assistant's; none if there is no text
/// to put them around.
fn with_marks(message: &Value) -> Option<Value> {
    if message["role"] != "assistant" {
        return Some(message.clone());
    }
    let content = message["content"].as_str()?;
    let (body, trimmed) = (content.trim(), content.trim_start());
    if body.is_empty() || calls(message) {
        return None;
    }
    // Templates may trim white space, and drop the reasoning: marks stand inside of the first, and
    // both before and behind the second.
    let lead = &content[..content.len() - trimmed.len()];
    let tail = &trimmed[body.len()..];
    let answer = body.rfind(END_OF_REASONING).map(|at| at + END_OF_REASONING.len());
    let mut marked = format!("{lead}{TEXT_BEGIN}");
    match answer {
        Some(at) => {
            let rest = body[at..].trim_start();
            let reasoning = &body[..body.len() - rest.len()];
            marked += &format!("{reasoning}{TEXT_BEGIN}{rest}");
        }
        None => marked += body,
    }
    marked += &format!("{TEXT_END}{tail}");
    let mut message = message.clone();
    message["content"] = marked.into();
    Some(message)
}

/// `marked` without marks, and the ranges between them; of several beginnings the first counts.
fn unmarked(marked: &str, begin: char, end: char) -> (String, Vec<Range<usize>>) {
    let (mut text, mut spans, mut open) = (String::with_capacity(marked.len()), Vec::new(), None);
    for character in marked.chars() {
        if character == begin {
            open.get_or_insert(text.len());
        } else if character == end {
            spans.extend(open.take().map(|begin| begin..text.len()));
        } else {
            text.push(character);
        }
    }
    (text, spans)
}

/// Length of what two texts begin with, in whole characters.
fn common_prefix(a: &str, b: &str) -> usize {
    let same = a.chars().zip(b.chars()).take_while(|(a, b)| a == b);
    same.map(|(character, _)| character.len_utf8()).sum()
}
