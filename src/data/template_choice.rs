//! What is asked for of chat templates, beside what model and adapter bring.

use std::path::Path;

use serde_json::{Map, Value};

use super::known_templates::KnownTemplate;
use super::template_sources::CHAT_FILE;

/// `--chat-template` and `--chat-template-kwargs`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TemplateChoice {
    /// A template by name or as a Jinja file, in place of that of model and adapter.
    pub template: Option<String>,
    /// Variables for the template, such as Qwen3's `enable_thinking`; those of a record come before them.
    pub kwargs: Map<String, Value>,
}

impl TemplateChoice {
    /// Of flags that may be absent.
    pub fn new(template: Option<&String>, kwargs: Option<&TemplateKwargs>) -> Self {
        let kwargs = kwargs.map(|kwargs| kwargs.0.clone()).unwrap_or_default();
        TemplateChoice { template: template.cloned(), kwargs }
    }

    /// With the copy that `folder` has of the template, where that is the file `own` of the run, which is gone;
    /// the name.
    pub fn or_copy(&mut self, folder: &Path, own: Option<&str>) -> Option<String> {
        let is_gone = |name: &&String| {
            let known = KnownTemplate::find(name).is_some();
            own == Some(name) && !known && !Path::new(name).is_file()
        };
        let gone = self.template.as_ref().filter(is_gone)?;
        let copy = folder.join(CHAT_FILE);
        let copy = copy.to_str().filter(|copy| Path::new(copy).is_file())?;
        let gone = gone.clone();
        self.template = Some(copy.to_string());
        Some(gone)
    }
}

/// Variables for a chat template, as a JSON object.
#[derive(Debug, Clone, PartialEq)]
pub struct TemplateKwargs(Map<String, Value>);

impl std::str::FromStr for TemplateKwargs {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let object = serde_json::from_str(text);
        object.map(TemplateKwargs).map_err(|_| {
            "expected a JSON object\nhint: in quotes, as `'{\"enable_thinking\": false}'`"
                .to_string()
        })
    }
}
