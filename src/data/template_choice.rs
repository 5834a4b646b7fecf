//! What is asked for of chat templates, beside what model and adapter bring.

use serde_json::{Map, Value};

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
