//! The adapter's `README.md`: the metadata that the Hub reads, and how to use the adapter.

use super::super::lora::Adapter;

/// A model card with the front matter that PEFT writes and a short text.
pub fn model_card(adapter: &Adapter) -> String {
    let base = adapter.base_model.as_deref().unwrap_or("");
    let mut card = String::from("---\n");
    if !base.is_empty() {
        card += &format!("base_model: {}\n", yaml_text(base));
    }
    card += "library_name: peft\npipeline_tag: text-generation\ntags:\n";
    if !base.is_empty() {
        card += &format!("- {}\n", yaml_text(&format!("base_model:adapter:{base}")));
    }
    card += "- lora\n- nibble\n- transformers\n---\n\n";
    card += &text(adapter, if base.is_empty() { "BASE_MODEL" } else { base });
    card
}

fn text(adapter: &Adapter, base: &str) -> String {
    let config = &adapter.config;
    let scale = if config.use_rslora { "alpha / √r" } else { "alpha / r" };
    format!(
        "# LoRA adapter\n\n\
         Trained with Nibble {version}: rank {r}, alpha {alpha}, scale {scale}, dropout {dropout}, \
         {parameters} parameters in {modules} modules.\n\n\
         ```python\n\
         from peft import PeftModel\n\
         from transformers import AutoModelForCausalLM\n\n\
         model = AutoModelForCausalLM.from_pretrained({base})\n\
         model = PeftModel.from_pretrained(model, \"path/to/this/folder\")\n\
         ```\n",
        base = from_pretrained(base),
        version = env!("CARGO_PKG_VERSION"),
        r = config.r,
        alpha = config.lora_alpha,
        dropout = config.lora_dropout,
        parameters = adapter.parameters(),
        modules = adapter.targets.len(),
    )
}

/// What transformers takes for `base`: a GGUF file by its folder and its name.
fn from_pretrained(base: &str) -> String {
    match base.ends_with(".gguf") {
        true => {
            let (folder, file) = base.rsplit_once('/').unwrap_or((".", base));
            format!("{folder:?}, gguf_file={file:?}")
        }
        false => format!("{base:?}"),
    }
}

/// Quoted where plain YAML would read something else than the text.
fn yaml_text(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-');
    let colons_inside = !text.contains(": ") && !text.ends_with(':');
    let starts_plain = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/');
    if starts_plain && colons_inside && text.chars().all(|c| plain(c) || c == ':') {
        text.to_string()
    } else {
        serde_json::Value::from(text).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gguf_base_is_loaded_as_transformers_does_it() {
        assert_eq!(from_pretrained("owner/model"), r#""owner/model""#);
        assert_eq!(from_pretrained("runs/a.gguf"), r#""runs", gguf_file="a.gguf""#);
        assert_eq!(from_pretrained("a.gguf"), r#"".", gguf_file="a.gguf""#);
    }

    #[test]
    fn names_are_quoted_where_yaml_needs_it() {
        for (name, expected) in [
            ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
            ("base_model:adapter:a/b", "base_model:adapter:a/b"),
            ("../base", "\"../base\""),
            ("a: b", "\"a: b\""),
            ("with \"quotes\"\n", "\"with \\\"quotes\\\"\\n\""),
        ] {
            assert_eq!(yaml_text(name), expected);
        }
    }
}
