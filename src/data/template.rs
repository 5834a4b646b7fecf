//! A model's chat template: from a conversation to text, and which of it the assistant said.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::panic::resume_unwind;
use std::sync::OnceLock;
use std::thread;

use minijinja::Environment;
use serde_json::{Map, Value, json};

use super::jinja::{
    GENERATION_BEGIN, GENERATION_END, cause, environment, is_refusal, replace_generation_blocks,
};
use super::json_text::Exact;
use super::strftime::unix_seconds_now;
use crate::error::{Error, Result};

/// When training data are rendered: Llama 3's own default date. Some templates put the current date
/// into the system prompt; the same file must give the same tokens on any day.
pub const DATE_OF_DATA: u64 = 1_721_952_000;

/// The way out where a template refuses nothing, but fails.
pub(super) const TEMPLATE_FAILS: &str = "the template fails by itself, or for want \
     of what it expects of a conversation: choose another by `--chat-template`";

/// What minijinja needs of the stack for each byte of an expression that nests, such as `1+1+1…`: about 140, and
/// several times that without optimization.
const STACK_BYTES_PER_BYTE: usize = 1024;
const LEAST_STACK_BYTES: usize = 2 << 20;

/// Adds `source` to the environment, on a stack that its deepest expression cannot overflow.
fn compile(mut environment: Environment<'static>, source: String) -> Result<Environment<'static>> {
    let stack_bytes = LEAST_STACK_BYTES.saturating_add(source.len() * STACK_BYTES_PER_BYTE);
    let add = || environment.add_template_owned("chat", source);
    let added = thread::scope(|scope| {
        let thread = thread::Builder::new().stack_size(stack_bytes).spawn_scoped(scope, add);
        thread.map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
    });
    let failed = |what: &dyn fmt::Display| Error::input(format_args!("chat template: {what}"));
    added.map_err(|e| failed(&e))?.map_err(|e| failed(&format_args!("{e:#}")))?;
    Ok(environment)
}

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    has_generation_blocks: bool,
    /// What it sees by default: special tokens, and what was asked for.
    defaults: Map<String, Value>,
    tool_use: Option<Box<ChatTemplate>>,
    takes_parts: OnceLock<bool>,
}

impl ChatTemplate {
    /// Compiles `source`; the template sees `defaults` (`bos_token`, `eos_token`, …) where a conversation has
    /// no variables of these names. Its clock shows the present.
    ///
    /// # Errors
    /// `Input` with Jinja's message when it does not compile.
    pub fn new(source: &str, defaults: Map<String, Value>) -> Result<Self> {
        Self::at(unix_seconds_now(), source, defaults)
    }

    /// Compiles `source` as [`new`](ChatTemplate::new) does, with a clock that shows a fixed time.
    ///
    /// # Errors
    /// As there.
    pub fn at(unix_seconds: u64, source: &str, defaults: Map<String, Value>) -> Result<Self> {
        let (source, has_generation_blocks) = replace_generation_blocks(source);
        let environment = compile(environment(unix_seconds), source)?;
        let (tool_use, takes_parts) = (None, OnceLock::new());
        let template =
            ChatTemplate { environment, has_generation_blocks, defaults, tool_use, takes_parts };
        Ok(template)
    }

    /// Leaves conversations with tools to another template, if there is one.
    pub fn with_tool_use(mut self, tool_use: Option<ChatTemplate>) -> Self {
        self.tool_use = tool_use.map(Box::new);
        self
    }

    /// The variables of its own that the template, or that for tools, reads: not the conversation, nor special
    /// tokens.
    pub(super) fn variables(&self) -> BTreeSet<String> {
        const CONVERSATION: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];
        let template = self.environment.get_template("chat");
        let read = template.map(|template| template.undeclared_variables(false));
        let is_own = |name: &String| {
            let is_token = name.ends_with("_token") && self.defaults.contains_key(name);
            let is_function = self.environment.globals().any(|(global, _)| global == name);
            !is_token && !is_function && !CONVERSATION.contains(&name.as_str())
        };
        let own = read.into_iter().flatten().filter(is_own);
        let of_tools = self.tool_use.iter().flat_map(|template| template.variables());
        own.chain(of_tools).collect()
    }

    /// The template for a conversation with `variables`.
    pub fn for_variables(&self, variables: &Map<String, Value>) -> &ChatTemplate {
        match &self.tool_use {
            Some(tool_use) if variables.contains_key("tools") => tool_use,
            _ => self,
        }
    }

    /// Whether the template goes through the parts of a message's content, which others would write as a
    /// list.
    pub(super) fn takes_parts(&self) -> bool {
        *self.takes_parts.get_or_init(|| {
            let [first, second] = ["Part1", "Part2"];
            let part = |text: &str| json!({"type": "text", "text": text});
            let messages = [json!({"role": "user", "content": [part(first), part(second)]})];
            let rendered = self.render(&messages, &Map::new(), false);
            rendered.is_ok_and(|text| {
                let is_list = text.contains("'type'") || text.contains("\"type\"");
                text.contains(first) && text.contains(second) && !is_list
            })
        })
    }

    /// The text of a conversation; the template sees `variables` (`tools`, …) too.
    ///
    /// # Errors
    /// `Input` with the template's complaint.
    pub fn render(
        &self,
        messages: &[Value],
        variables: &Map<String, Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        self.render_converted(&converted(messages), variables, add_generation_prompt)
    }

    /// Renders messages that are [`converted`] already, as [`render`](ChatTemplate::render) does.
    pub(super) fn render_converted(
        &self,
        messages: &[minijinja::Value],
        variables: &Map<String, Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let text = self.render_marked(messages, variables, add_generation_prompt)?;
        if self.has_generation_blocks {
            return Ok(text.replace([GENERATION_BEGIN, GENERATION_END], ""));
        }
        Ok(text)
    }

    /// Whether the template itself marks what the assistant says.
    pub(super) fn has_generation_blocks(&self) -> bool {
        self.has_generation_blocks
    }

    /// Renders as [`render_converted`](ChatTemplate::render_converted) does, with the marks of generation
    /// blocks.
    pub(super) fn render_marked(
        &self,
        messages: &[minijinja::Value],
        variables: &Map<String, Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let none = || minijinja::Value::from(());
        let mut context = BTreeMap::from([("tools", none()), ("documents", none())]);
        for (name, value) in self.defaults.iter().chain(variables) {
            context.insert(name, minijinja::Value::from_serialize(Exact(value)));
        }
        context.insert("messages", messages.to_vec().into());
        context.insert("add_generation_prompt", add_generation_prompt.into());
        let render = || self.environment.get_template("chat")?.render(&context);
        render().map_err(|e| {
            let error = Error::input(format_args!("chat template: {}", cause(&e)));
            if is_refusal(&e) { error } else { error.hint(TEMPLATE_FAILS) }
        })
    }
}

/// Names of what the assistant thinks before it answers.
pub(super) const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Messages as a template sees them: to be made once where several texts are rendered of them.
pub(super) fn converted(messages: &[Value]) -> Vec<minijinja::Value> {
    let convert = |message| minijinja::Value::from_serialize(Exact(&normalized(message)));
    messages.iter().map(convert).collect()
}

/// A message as transformers hands it to templates: without keys that are null, and with reasoning
/// under all of its names.
fn normalized(message: &Value) -> Value {
    let Some(fields) = message.as_object() else { return message.clone() };
    let mut fields = fields.clone();
    fields.retain(|_, value| !value.is_null());
    if let Some(reasoning) = REASONING.iter().find_map(|name| fields.get(*name)).cloned() {
        fields.entry("thinking").or_insert_with(|| reasoning.clone());
        fields.insert("reasoning_content".into(), reasoning);
    }
    Value::Object(fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversations_with_tools_have_a_template_of_their_own() -> Result<()> {
        let compile = |source: &str| ChatTemplate::new(source, Map::new());
        let tools = compile("{{ tools | length }} tools: {{ messages[0].content }}")?;
        let template = compile("{{ messages[0].content }}")?.with_tool_use(Some(tools));
        let messages = [json!({"role": "user", "content": "hello"})];
        let given = Map::from_iter([("tools".to_string(), json!([{"name": "add"}]))]);
        let render =
            |variables| template.for_variables(variables).render(&messages, variables, false);
        let none = Map::new();
        assert_eq!(render(&none)?, "hello");
        assert_eq!(render(&given)?, "1 tools: hello");
        let alone = compile("{{ messages[0].content }}")?;
        assert_eq!(alone.for_variables(&given).render(&messages, &given, false)?, "hello");
        Ok(())
    }

    #[test]
    fn expressions_nest_as_deeply_as_they_are_long() -> Result<()> {
        let sum = format!("{{{{ 1{} }}}}", "+1".repeat(100_000));
        let branches = format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(10_000));
        for (source, text) in [(sum, "100001"), (branches, "")] {
            assert_eq!(
                ChatTemplate::new(&source, Map::new())?.render(&[], &Map::new(), false)?,
                text
            );
        }
        Ok(())
    }
}
