//! Chat templates: Jinja as transformers runs it, and which part of the text the assistant said.
//!
//! Assistant spans come from the template's own `{% generation %}` marks where it has them, else from
//! rendering the conversation turn by turn: what a turn adds behind the generation prompt is the
//! assistant's. Source: transformers `utils/chat_template_utils.py`.

use std::ops::Range;

use minijinja::value::{Kwargs, ViaDeserialize};
use minijinja::{Environment, ErrorKind, UndefinedBehavior, context};
use serde::Serialize;
use serde_json::Value;

use crate::error::{Error, Result};

/// Private-use characters that stand for the marks while a template renders.
const GENERATION_BEGIN: char = '\u{f8f0}';
const GENERATION_END: char = '\u{f8f1}';

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    marked: bool,
    bos_token: String,
    eos_token: String,
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// Text to tokenize.
    pub text: String,
    /// Byte ranges that the assistant said.
    pub assistant: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// Compiles `source`; the token texts are the template's `bos_token` and `eos_token`.
    ///
    /// # Errors
    /// `Input` with Jinja's message when it does not compile.
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Self> {
        let (source, marked) = replace_marks(source);
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned("chat", source)
            .map_err(|e| Error::input(format_args!("chat template: {e:#}")))?;
        Ok(ChatTemplate {
            environment,
            marked,
            bos_token: bos_token.to_string(),
            eos_token: eos_token.to_string(),
        })
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// `Input` with the template's complaint.
    pub fn render(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let text = self.render_marked(messages, tools, add_generation_prompt)?;
        Ok(text.replace([GENERATION_BEGIN, GENERATION_END], ""))
    }

    fn render_marked(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let render = || {
            self.environment.get_template("chat")?.render(context! {
                messages => messages,
                tools => tools,
                documents => Value::Null,
                add_generation_prompt => add_generation_prompt,
                bos_token => self.bos_token,
                eos_token => self.eos_token,
            })
        };
        render().map_err(|e| Error::input(format_args!("chat template: {}", cause(&e))))
    }

    /// The text of a conversation and the assistant's parts of it.
    ///
    /// # Errors
    /// `Input` when the template refuses, or when it changes earlier text as turns are added, so
    /// that nobody can say who said what.
    pub fn render_with_spans(&self, messages: &[Value], tools: Option<&Value>) -> Result<Rendered> {
        let text = self.render_marked(messages, tools, false)?;
        if self.marked {
            return Ok(marked_spans(&text));
        }
        let mut assistant: Vec<Range<usize>> = Vec::new();
        for (turn, message) in messages.iter().enumerate() {
            if message["role"] != "assistant" {
                continue;
            }
            let before = self.render(&messages[..turn], tools, true)?;
            let after = self.render(&messages[..=turn], tools, false)?;
            let begin = match assistant.last() {
                // Consecutive assistant turns: a template may render no prompt between them.
                Some(last) if !text.starts_with(&before) => last.end,
                _ => before.len(),
            };
            if !text.starts_with(&after) || !text.is_char_boundary(begin) || begin > after.len() {
                return Err(Error::input(format_args!(
                    "chat template: turn {turn} changes the text before it"
                ))
                .hint(
                    "the template needs `{% generation %}` marks for a loss on assistant turns; \
                     or train on everything with `--train-on all`",
                ));
            }
            assistant.push(begin..after.len());
        }
        Ok(Rendered { text, assistant })
    }
}

/// Replaces `{% generation %}` and `{% endgeneration %}`, which minijinja does not know.
fn replace_marks(source: &str) -> (String, bool) {
    let mark = |word: &str, mark: char| {
        let pattern = format!(r"\{{%(-?)\s*{word}\s*(-?)%\}}");
        let regex = regex::Regex::new(&pattern).expect("the pattern is valid");
        (regex, format!("{{{{${{1}} '{mark}' ${{2}}}}}}"))
    };
    let (begin, begin_text) = mark("generation", GENERATION_BEGIN);
    let (end, end_text) = mark("endgeneration", GENERATION_END);
    let marked = begin.is_match(source);
    let replaced = begin.replace_all(source, begin_text.as_str());
    (end.replace_all(&replaced, end_text.as_str()).into_owned(), marked)
}

fn marked_spans(marked: &str) -> Rendered {
    let (mut text, mut assistant, mut begin) = (String::new(), Vec::new(), None);
    for character in marked.chars() {
        match character {
            GENERATION_BEGIN => begin = Some(text.len()),
            GENERATION_END => assistant.extend(begin.take().map(|begin| begin..text.len())),
            other => text.push(other),
        }
    }
    Rendered { text, assistant }
}

/// The innermost message: what a template's `raise_exception` said, or Jinja's own complaint.
fn cause(error: &minijinja::Error) -> String {
    error.detail().map_or_else(|| format!("{error:#}"), str::to_string)
}

fn raise_exception(message: String) -> std::result::Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// Python's `strftime` of the current day, UTC; templates use `%d`, `%b`, `%B`, `%Y`, `%m`.
fn strftime_now(format: String) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let (year, month, day) = civil_date(now.map_or(0, |now| now.as_secs() / 86_400));
    let name = MONTHS[month - 1];
    format
        .replace("%d", &format!("{day:02}"))
        .replace("%m", &format!("{month:02}"))
        .replace("%b", &name[..3])
        .replace("%B", name)
        .replace("%Y", &year.to_string())
}

/// Year, month and day of a day since 1970-01-01: Howard Hinnant's `civil_from_days`.
fn civil_date(days: u64) -> (u64, usize, u64) {
    let z = days + 719_468;
    let (era, of_era) = (z / 146_097, z % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year + era * 400 + u64::from(month <= 2), month as usize, day)
}

/// `json.dumps(value, ensure_ascii=False, indent=…)`, as transformers' own `tojson`.
fn to_json(
    value: ViaDeserialize<Value>,
    options: Kwargs,
) -> std::result::Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(
            &mut out,
            crate::checkpoint::writer::PythonJson,
        )),
        Some(width) => {
            let spaces = " ".repeat(width);
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
    };
    let failed = |e: String| minijinja::Error::new(ErrorKind::BadSerialization, e);
    written.map_err(|e| failed(e.to_string()))?;
    String::from_utf8(out).map_err(|e| failed(e.to_string()))
}
