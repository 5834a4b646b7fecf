//! The adapter's `README.md`: the metadata that the Hub reads, and how to use the adapter.

use nibble_quant::BlockFormat;

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
         {loading}",
        loading = loading(base, adapter.base_packing.as_ref(), adapter.base_is_part),
        version = env!("CARGO_PKG_VERSION"),
        r = config.r,
        alpha = config.lora_alpha,
        dropout = config.lora_dropout,
        parameters = adapter.parameters(),
        modules = adapter.targets.len(),
    )
}

/// How the base that the adapter was trained on is loaded, and the adapter on it.
fn loading(base: &str, packing: Option<&BlockFormat>, is_part: bool) -> String {
    let python = |imports: &str, before: &str, base: &str| {
        format!(
            "```python\n{imports}\n\n{before}model = AutoModelForCausalLM.from_pretrained({base})\n\
             model = PeftModel.from_pretrained(model, \"path/to/this/folder\")\n```\n"
        )
    };
    let plain = "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM";
    let quoted = format!("'{}'", base.replace('\'', r"'\''"));
    let Some(format) = packing else {
        if is_part {
            return format!(
                "It was trained on the text model of its base, which\n\n\
                 ```\nnibble quantize --model {quoted} --out base-text --skip .\n```\n\n\
                 writes for transformers:\n\n{}",
                python(plain, "", "\"base-text\"")
            );
        }
        return python(plain, "", &from_pretrained(base));
    };
    let BlockFormat { quant_type, block_size, double_quant } = format;
    let kind = quant_type.as_str();
    if is_part || base.ends_with(".gguf") || *block_size != BlockFormat::default().block_size {
        return format!(
            "It was trained on the base in 4 bits, which\n\n\
             ```\nnibble quantize --model {quoted} --out base-4bit --quant-type {kind} \
             --block-size {block_size} --double-quant {double_quant}\n```\n\n\
             writes for transformers:\n\n{}",
            python(plain, "", "\"base-4bit\"")
        );
    }
    let imports = "import torch\nfrom peft import PeftModel\n\
                   from transformers import AutoModelForCausalLM, BitsAndBytesConfig";
    let double_quant = if *double_quant { "True" } else { "False" };
    let before = format!(
        "packing = BitsAndBytesConfig(\n    load_in_4bit=True,\n    \
         bnb_4bit_quant_type=\"{kind}\",\n    bnb_4bit_use_double_quant={double_quant},\n    \
         bnb_4bit_compute_dtype=torch.bfloat16,\n)\n"
    );
    let base = format!("{}, quantization_config=packing", from_pretrained(base));
    format!("It was trained on the base in 4 bits:\n\n{}", python(imports, &before, &base))
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
    fn the_base_is_loaded_as_training_packed_it() {
        let nf4 = BlockFormat::default();
        assert!(!loading("owner/model", None, false).contains("BitsAndBytesConfig"));
        let text = loading("owner/model", Some(&nf4), false);
        for line in [
            "It was trained on the base in 4 bits:",
            "    bnb_4bit_quant_type=\"nf4\",",
            "    bnb_4bit_use_double_quant=True,",
            "model = AutoModelForCausalLM.from_pretrained(\"owner/model\", quantization_config=packing)",
        ] {
            assert!(text.lines().any(|it| it == line), "{line}: {text}");
        }
        // What transformers cannot pack by itself.
        for (base, block_size) in [("a.gguf", 64), ("owner/model", 128)] {
            let text = loading(base, Some(&BlockFormat { block_size, ..nf4 }), false);
            let command = format!(
                "nibble quantize --model '{base}' --out base-4bit --quant-type nf4 \
                                   --block-size {block_size} --double-quant true\n"
            );
            assert!(text.contains(&command), "{text}");
            assert!(text.contains("from_pretrained(\"base-4bit\")"), "{text}");
        }
    }

    /// transformers' class for text and images has other paths for the same modules.
    #[test]
    fn the_text_model_of_a_larger_one_is_written_first() {
        let nf4 = BlockFormat::default();
        for (packing, command) in [
            (None, "nibble quantize --model 'a/gemma-3' --out base-text --skip .\n"),
            (Some(&nf4), "nibble quantize --model 'a/gemma-3' --out base-4bit --quant-type nf4"),
        ] {
            let text = loading("a/gemma-3", packing, true);
            assert!(text.contains(command) && !text.contains("from_pretrained(\"a/"), "{text}");
        }
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
