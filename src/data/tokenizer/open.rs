//! A tokenizer out of the files that hold one.

use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::Value as Metadata;
use candle_core::quantized::tokenizer::TokenizerFromGguf;
use serde_json::{Map, Value};
use tokenizers::Tokenizer;

use super::{ChatTokenizer, SpecialToken, puts_in_front};
use crate::checkpoint::{is_there, lfs_pointer, map_file, read_gguf_header, read_json};
use crate::data::pre_tokenizers::{self, set_splitter, with_added_tokens};
use crate::data::sentence_piece::{self, is_sentence_piece};
use crate::data::template_sources::TemplateSources;
use crate::error::{Error, Result, candle_text};

impl ChatTokenizer {
    /// The tokenizer of a Hugging Face folder; `model` is that of the model, whose configs name ends of
    /// sequences, too.
    pub(super) fn from_folder(folder: &Path, model: &Path) -> Result<Self> {
        let tokenizer = open_tokenizer(folder)?;
        let config = optional_json(&folder.join("tokenizer_config.json"))?;
        let map = optional_json(&folder.join("special_tokens_map.json"))?;
        let of_model = model_ends(model)?;
        // What a file says is null is none.
        let named = |key: &str| [&config, &map].into_iter().find_map(|file| file.get(key));
        let special = |key: &str| {
            let text = special_text(named(key)?)?;
            let id = tokenizer.token_to_id(&text)?;
            Some(SpecialToken { text, id })
        };
        // GPT-2's files leave it to transformers' class of the tokenizer.
        let by_id = |id: u32| Some(SpecialToken { text: tokenizer.id_to_token(id)?, id });
        let unnamed = of_model.first().filter(|_| named("eos_token").is_none());
        let eos = special("eos_token").or_else(|| by_id(*unnamed?));
        let mut eos_ids: Vec<u32> = eos.iter().map(|token| token.id).collect();
        for id in of_model {
            if !eos_ids.contains(&id) {
                eos_ids.push(id);
            }
        }
        let bos = special("bos_token");
        // As transformers 5, which does not read the setting: it stands in folders of older ones.
        let adds = bos.as_ref().is_some_and(|bos| puts_in_front(&tokenizer, bos));
        Ok(ChatTokenizer {
            bos,
            eos,
            pad: special("pad_token"),
            unknown: special("unk_token"),
            eos_ids,
            add_bos_token: adds || config["add_bos_token"] == true,
            templates: TemplateSources::of_folder(folder, &config)?,
            template_kwargs: Map::new(),
            own: (None, 0),
            home: PathBuf::new(),
            tokenizer,
        })
    }

    /// The tokenizer of a `.gguf` file.
    pub(super) fn from_gguf(path: &Path) -> Result<Self> {
        let bytes = map_file(path)?;
        let damaged = |e: candle_core::Error| {
            let cause = candle_text(&e);
            Error::input(format_args!("{}: tokenizer metadata: {cause}", path.display()))
        };
        let content = read_gguf_header(&bytes).map_err(|e| e.at(path.display()))?;
        let tokenizer = if is_sentence_piece(&content) {
            sentence_piece::from_gguf(&content).map_err(|e| e.at(path.display()))?
        } else {
            let mut tokenizer = Tokenizer::from_gguf(&content).map_err(damaged)?;
            let placed = |e: Error| e.at(path.display());
            set_splitter(&mut tokenizer, &content).map_err(placed)?;
            with_added_tokens(&tokenizer, &content).map_err(placed)?
        };
        let field = |key: &str| content.metadata.get(&format!("tokenizer.{key}"));
        let special = |key: &str| {
            let id = field(&format!("ggml.{key}")).and_then(|value| value.to_u32().ok())?;
            Some(SpecialToken { text: tokenizer.id_to_token(id)?, id })
        };
        let eos = special("eos_token_id");
        let text = |key: &str| field(key).and_then(|value| value.to_string().ok());
        // llama.cpp's defaults where the file does not say.
        let adds_bos = match field("ggml.add_bos_token") {
            Some(flag) => matches!(flag, Metadata::Bool(true)),
            None => {
                text("ggml.model").is_some_and(|model| model == "llama")
                    || text("ggml.pre").is_some_and(|name| pre_tokenizers::adds_bos(name))
            }
        };
        Ok(ChatTokenizer {
            bos: special("bos_token_id"),
            pad: special("padding_token_id"),
            unknown: special("unknown_token_id"),
            eos_ids: eos.iter().map(|token| token.id).collect(),
            eos,
            add_bos_token: adds_bos,
            templates: TemplateSources::of_gguf(|key| text(key).cloned()),
            template_kwargs: Map::new(),
            own: (None, 0),
            home: PathBuf::new(),
            tokenizer,
        })
    }
}

/// The tokenizer of `tokenizer.json` in `folder`.
fn open_tokenizer(folder: &Path) -> Result<Tokenizer> {
    let path = folder.join("tokenizer.json");
    if !path.exists() {
        let what = format!("{} has no tokenizer.json", folder.display());
        return Err(Error::input(what).hint(
            "save the tokenizer with transformers' `AutoTokenizer.from_pretrained(..).save_pretrained`",
        ));
    }
    let mut tokenizer = read_tokenizer(&path).map_err(|reason| {
        if let Some(pointer) = std::fs::read(&path).ok().and_then(|bytes| lfs_pointer(&bytes)) {
            return pointer.at(path.display());
        }
        Error::input(format_args!("{}: {reason}", path.display()))
            .hint("the file is damaged, or written by a newer `tokenizers` library")
    })?;
    // Fixed-length padding and truncation are for inference servers; here they corrupt data.
    tokenizer.with_padding(None);
    tokenizer
        .with_truncation(None)
        .map_err(|e| Error::input(format_args!("{}: {e}", path.display())))?;
    Ok(tokenizer)
}

/// Ends of sequences that the configs of the model in `folder` name, in transformers' order.
fn model_ends(folder: &Path) -> Result<Vec<u32>> {
    let mut ends = Vec::new();
    for file in ["generation_config.json", "config.json"] {
        ends.extend(ids(&optional_json(&folder.join(file))?["eos_token_id"]));
    }
    Ok(ends)
}

fn optional_json(path: &Path) -> Result<Value> {
    if is_there(path) { read_json(path) } else { Ok(Value::Null) }
}

/// `"</s>"` or `{"content": "</s>", …}`.
fn special_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value["content"].as_str()).map(str::to_string)
}

fn ids(value: &Value) -> Vec<u32> {
    let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(items) => items.iter().filter_map(one).collect(),
        single => one(single).into_iter().collect(),
    }
}

/// Tries all parts of a tokenizer: some panic over what they were made from once they are used.
fn probe(tokenizer: &Tokenizer) {
    for text in ["a b", " ", ""] {
        for special in [false, true] {
            // What is refused is an error to whoever asks for it.
            let ids = tokenizer.encode(text, special).map(|encoding| encoding.get_ids().to_vec());
            let _ = tokenizer.decode(&ids.unwrap_or_default(), special);
        }
    }
}

/// Reads `tokenizer.json`. The library panics over some damaged files: that is an error like others.
fn read_tokenizer(path: &Path) -> std::result::Result<Tokenizer, String> {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let result = std::panic::catch_unwind(|| Tokenizer::from_file(path).inspect(probe));
    std::panic::set_hook(hook);
    match result {
        Ok(tokenizer) => tokenizer.map_err(|e| e.to_string()),
        Err(_) => Err("not a tokenizer that the `tokenizers` library reads".into()),
    }
}
