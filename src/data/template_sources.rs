//! Where a tokenizer keeps its chat templates: one, or several by name.
//!
//! Several are a list of `{"name", "template"}` in `tokenizer_config.json`, files in
//! `additional_chat_templates/`, or keys `tokenizer.chat_template.NAME` of a GGUF file. As
//! transformers does, `tool_use` is for conversations with tools, `default` for all others.

use std::path::Path;

use candle_core::quantized::gguf_file::Value as Metadata;
use serde_json::{Value, json};

use crate::checkpoint::atomic::write_file;
use crate::checkpoint::{is_there, read_json};
use crate::error::{Error, Result};

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";
pub const CHAT_FILE: &str = "chat_template.jinja";
const CONFIG_FILE: &str = "tokenizer_config.json";
const MORE_TEMPLATES: &str = "additional_chat_templates";

/// The Jinja sources of a tokenizer's chat templates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateSources {
    /// The template for conversations.
    pub chat: String,
    /// The template for conversations with tools, where that is another.
    pub tool_use: Option<String>,
}

impl TemplateSources {
    /// Templates of these texts. All line endings become `\n`, as Jinja's do wherever they stand: a template
    /// that was saved on Windows would put others into every prompt.
    pub fn new(chat: &str, tool_use: Option<&str>) -> Self {
        let lines = |text: &str| text.replace("\r\n", "\n").replace('\r', "\n");
        TemplateSources { chat: lines(chat), tool_use: tool_use.map(lines) }
    }

    /// The templates of a tokenizer's folder; `config` is its `tokenizer_config.json`. Files come before the
    /// config.
    ///
    /// # Errors
    /// `Io` when a file cannot be read.
    pub fn of_folder(folder: &Path, config: &Value) -> Result<Option<Self>> {
        let read = |path: &Path| match is_there(path) {
            true => std::fs::read_to_string(path).map(Some).map_err(|e| Error::io("read", path, e)),
            false => Ok(None),
        };
        let tools = folder.join(MORE_TEMPLATES).join(format!("{TOOL_USE}.jinja"));
        match read(&folder.join(CHAT_FILE))? {
            Some(chat) => Ok(Some(TemplateSources::new(&chat, read(&tools)?.as_deref()))),
            None => Ok(Self::of_config(&config["chat_template"])),
        }
    }

    /// The templates that an adapter's folder brings.
    ///
    /// # Errors
    /// `Io` or `Input` when a file cannot be read.
    pub fn of_adapter(folder: &Path) -> Result<Option<Self>> {
        let config = folder.join(CONFIG_FILE);
        let config = if is_there(&config) { read_json(&config)? } else { Value::Null };
        Self::of_folder(folder, &config)
    }

    /// The templates that `folder` has spread over more than the files of [`TOKENIZER_FILES`].
    ///
    /// [`TOKENIZER_FILES`]: super::TOKENIZER_FILES
    ///
    /// # Errors
    /// `Io` or `Input` when a file cannot be read.
    pub fn of_several_files(folder: &Path) -> Result<Option<Self>> {
        if folder.join(MORE_TEMPLATES).exists() { Self::of_adapter(folder) } else { Ok(None) }
    }

    /// Writes them into a folder, in place of any that it has: one as a file, several into
    /// `tokenizer_config.json`.
    ///
    /// # Errors
    /// `Io` when the disk refuses; `Input` when there is such a config, and damaged.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let (file, path) = (folder.join(CHAT_FILE), folder.join(CONFIG_FILE));
        if self.tool_use.is_none() {
            return write_file(&file, self.chat.as_bytes());
        }
        let mut config = if path.exists() { read_json(&path)? } else { json!({}) };
        config["chat_template"] = self.to_json();
        write_file(&path, format!("{config:#}\n").as_bytes())?;
        if file.exists() {
            std::fs::remove_file(&file).map_err(|e| Error::io("remove", &file, e))?;
        }
        Ok(())
    }

    /// The templates of a config: one text, or a list of named ones, of which the first stands in for a
    /// missing default.
    fn of_config(value: &Value) -> Option<Self> {
        let Value::Array(named) = value else {
            return Some(TemplateSources::new(value.as_str()?, None));
        };
        let find = |name: &str| named.iter().find(|entry| entry["name"] == name);
        let text = |entry: Option<&Value>| entry?["template"].as_str().map(str::to_string);
        let chat = text(find(DEFAULT).or(named.first()))?;
        Some(TemplateSources::new(&chat, text(find(TOOL_USE)).as_deref()))
    }

    /// The templates of a GGUF file, whose texts `field` finds under `tokenizer.`
    pub fn of_gguf(field: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let chat = field("chat_template")?;
        let tool_use = field(&format!("chat_template.{TOOL_USE}"));
        Some(TemplateSources::new(&chat, tool_use.as_deref()))
    }

    /// The fields of a GGUF file.
    pub fn gguf_fields(&self) -> Vec<(String, Metadata)> {
        let text = |text: &String| Metadata::String(text.clone());
        let mut fields = vec![("chat_template".to_string(), text(&self.chat))];
        if let Some(tool_use) = &self.tool_use {
            fields.push((format!("chat_template.{TOOL_USE}"), text(tool_use)));
            let names = vec![Metadata::String(TOOL_USE.to_string())];
            fields.push(("chat_templates".to_string(), Metadata::Array(names)));
        }
        fields
    }

    /// The value of `chat_template` in `tokenizer_config.json`.
    pub fn to_json(&self) -> Value {
        match &self.tool_use {
            None => self.chat.clone().into(),
            Some(tool_use) => json!([
                {"name": DEFAULT, "template": self.chat},
                {"name": TOOL_USE, "template": tool_use},
            ]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(chat: &str, tool_use: Option<&str>) -> Option<TemplateSources> {
        Some(TemplateSources { chat: chat.into(), tool_use: tool_use.map(str::to_string) })
    }

    /// jinja2's lexer does so, in texts and in strings.
    #[test]
    fn line_endings_are_those_of_jinja() {
        let config = json!({"chat_template": "a\r\n{{ 'b\r\nc' }}\r\n\rd\n"});
        let folder = tempfile::tempdir().unwrap();
        let from_config = TemplateSources::of_folder(folder.path(), &config).unwrap();
        assert_eq!(from_config, sources("a\n{{ 'b\nc' }}\n\nd\n", None));
        std::fs::write(folder.path().join(CHAT_FILE), "x\r\ny").unwrap();
        assert_eq!(TemplateSources::of_adapter(folder.path()).unwrap(), sources("x\ny", None));
    }

    #[test]
    fn one_or_several_by_name() {
        let read = |value: Value| TemplateSources::of_config(&value);
        let named = |name: &str, text: &str| json!({"name": name, "template": text});
        assert_eq!(read(json!("a")), sources("a", None));
        assert_eq!(read(json!(null)), None);
        assert_eq!(read(json!([named("rag", "r"), named("default", "d")])), sources("d", None));
        assert_eq!(
            read(json!([named("rag", "r"), named("tool_use", "t")])),
            sources("r", Some("t"))
        );
        let both = sources("d", Some("t"));
        for sources in [both, sources("d", None)] {
            assert_eq!(sources.as_ref().and_then(|one| read(one.to_json())), sources);
        }
    }

    #[test]
    fn files_come_before_the_config() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let config = json!({"chat_template": "of the config"});
        let read = || TemplateSources::of_folder(folder.path(), &config);
        assert_eq!(read()?, sources("of the config", None));
        std::fs::write(folder.path().join("chat_template.jinja"), "of the file").unwrap();
        assert_eq!(read()?, sources("of the file", None));
        let more = folder.path().join("additional_chat_templates");
        std::fs::create_dir(&more).unwrap();
        std::fs::write(more.join("tool_use.jinja"), "with tools").unwrap();
        assert_eq!(read()?, sources("of the file", Some("with tools")));
        Ok(())
    }

    #[test]
    fn what_is_saved_is_what_is_read() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(CONFIG_FILE);
        std::fs::write(&path, r#"{"eos_token": "<end>", "chat_template": "before"}"#).unwrap();
        for sources in [sources("a", None), sources("a", Some("t")), sources("b", Some("u"))] {
            sources.as_ref().unwrap().save(folder.path())?;
            assert_eq!(TemplateSources::of_adapter(folder.path())?, sources);
            assert_eq!(read_json(&path)?["eos_token"], "<end>");
        }
        Ok(())
    }

    #[test]
    fn those_of_a_gguf_file() {
        let one = |key: &str| (key == "chat_template").then(|| "a".to_string());
        assert_eq!(TemplateSources::of_gguf(one), sources("a", None));
        let all = |key: &str| Some(key.to_string());
        let tools = "chat_template.tool_use";
        assert_eq!(TemplateSources::of_gguf(all), sources("chat_template", Some(tools)));
    }
}
