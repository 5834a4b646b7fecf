//! A tokenizer as a GGUF file's metadata. Source: llama.cpp `convert_hf_to_gguf.py`,
//! `gguf-py/gguf/vocab.py`.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value as Metadata;
use serde_json::Value;

use super::ChatTokenizer;
use super::pre_tokenizers::Splitter;
use super::sentence_piece::{META_SPACE, PHI3_TOKENS, named_phi3};
use super::token_kinds::{BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED};
use super::tokenizer::guarded;
use crate::error::{Error, Result};

impl ChatTokenizer {
    /// The fields `tokenizer.…`, with a token for each of the model's `vocab_size` rows.
    ///
    /// # Errors
    /// `Input` for a tokenizer that llama.cpp has no name for.
    pub fn gguf_fields(&self, vocab_size: usize) -> Result<Vec<(String, Metadata)>> {
        // The library fills all ids up to the highest.
        const MOST_WITHOUT_ROW: usize = 1 << 20;
        let highest = self.tokenizer.get_vocab(true).into_values().max().unwrap_or(0) as usize;
        if highest > vocab_size + MOST_WITHOUT_ROW {
            return Err(without_row(highest, vocab_size));
        }
        let text = guarded(|| self.tokenizer.to_string(false))?;
        let json: Value = serde_json::from_str(&text)
            .map_err(|e| Error::input(format_args!("tokenizer: {e}")))?;
        let model = &json["model"];
        if model["type"] != "BPE" {
            return Err(unnamed(format_args!("its model is {}", model["type"])));
        }
        let mut fields = match model["byte_fallback"] == true {
            true => self.sentence_piece(&json, vocab_size)?,
            false => self.byte_pairs(&json, vocab_size)?,
        };
        let mut put = |key: &str, value| fields.push((format!("tokenizer.{key}"), value));
        let special = [("bos", self.bos()), ("eos", self.eos()), ("padding", self.pad())];
        for (name, token) in special {
            if let Some(token) = token {
                check_row(token.id, vocab_size)?;
                put(&format!("ggml.{name}_token_id"), Metadata::U32(token.id));
            }
        }
        if let Some(token) = &self.unknown {
            check_row(token.id, vocab_size)?;
            put("ggml.unknown_token_id", Metadata::U32(token.id));
        }
        put("ggml.add_bos_token", Metadata::Bool(self.adds_bos()));
        put("ggml.add_eos_token", Metadata::Bool(false));
        for (key, value) in self.gguf_templates() {
            put(&key, value);
        }
        Ok(fields)
    }

    /// `name` for `general.name`: that of a Phi-3 tells llama.cpp that its special tokens take the spaces
    /// behind them, which files have no field for. Source: llama.cpp `llama-vocab.cpp`.
    pub fn gguf_name(&self, name: &str) -> String {
        let added = self.tokenizer.get_added_tokens_decoder();
        let takes_spaces = added.values().any(|token| token.special && token.rstrip);
        let is_phi3 = PHI3_TOKENS.iter().all(|token| self.id(token).is_some()) && takes_spaces;
        match (is_phi3, named_phi3(name)) {
            (true, false) => format!("Phi-3 {name}"),
            // Which would look for tokens that are not there.
            (false, true) => format!("Phi {}", name.to_ascii_lowercase().replace("phi", "")),
            _ => name.to_string(),
        }
    }

    /// Byte pairs as GPT-2 has them.
    fn byte_pairs(&self, json: &Value, vocab_size: usize) -> Result<Vec<(String, Metadata)>> {
        let Some(splitter) = Splitter::of(&self.tokenizer) else {
            return Err(unnamed("it splits text in a way of its own"));
        };
        let tokens = tokens(json, vocab_size)?;
        let ignore_merges = json["model"]["ignore_merges"] == true;
        let mut fields = common("gpt2", splitter.name(ignore_merges), &tokens);
        let merges = merges(json).map(|(left, right)| Metadata::String(format!("{left} {right}")));
        fields.push(("tokenizer.ggml.merges".into(), Metadata::Array(merges.collect())));
        Ok(fields)
    }

    /// SentencePiece's byte pairs: the merge that makes a token is its score.
    fn sentence_piece(&self, json: &Value, vocab_size: usize) -> Result<Vec<(String, Metadata)>> {
        let tokens = tokens(json, vocab_size)?;
        let mut made_by: HashMap<String, usize> = HashMap::new();
        for (rank, (left, right)) in merges(json).enumerate() {
            made_by.entry(format!("{left}{right}")).or_insert(rank);
        }
        let score = |(text, kind): &(String, i32)| match (*kind, made_by.get(text)) {
            (NORMAL, Some(rank)) => -(*rank as f32),
            // Single characters are there from the start: nothing is merged into them.
            (NORMAL, None) => -(made_by.len() as f32),
            _ => 0.0,
        };
        let scores = tokens.iter().map(score).map(Metadata::F32).collect();
        let mut fields = common("llama", "default", &tokens);
        fields.push(("tokenizer.ggml.scores".into(), Metadata::Array(scores)));
        let pieces = format!("{}{}", json["normalizer"], json["pre_tokenizer"]);
        // transformers 5 writes `always`.
        let schemes = ["Prepend", r#""prepend_scheme":"first""#, r#""prepend_scheme":"always""#];
        let prefix = schemes.iter().any(|scheme| pieces.contains(scheme));
        fields.push(("tokenizer.ggml.add_space_prefix".into(), Metadata::Bool(prefix)));
        Ok(fields)
    }
}

fn unnamed(why: impl std::fmt::Display) -> Error {
    Error::input(format_args!("llama.cpp has no name for this tokenizer that is known here: {why}"))
        .hint("llama.cpp's `convert_hf_to_gguf.py` knows more of them: give it the merged folder")
}

fn common(model: &str, pre: &str, tokens: &[(String, i32)]) -> Vec<(String, Metadata)> {
    let texts = tokens.iter().map(|(text, _)| Metadata::String(text.clone())).collect();
    let kinds = tokens.iter().map(|(_, kind)| Metadata::I32(*kind)).collect();
    vec![
        ("tokenizer.ggml.model".into(), Metadata::String(model.into())),
        ("tokenizer.ggml.pre".into(), Metadata::String(pre.into())),
        ("tokenizer.ggml.tokens".into(), Metadata::Array(texts)),
        ("tokenizer.ggml.token_type".into(), Metadata::Array(kinds)),
    ]
}

/// A token with a meaning needs a row.
fn check_row(id: u32, vocab_size: usize) -> Result<()> {
    if (id as usize) < vocab_size { Ok(()) } else { Err(without_row(id as usize, vocab_size)) }
}

fn without_row(id: usize, vocab_size: usize) -> Error {
    Error::input(format_args!("tokenizer: token {id} is outside the model's {vocab_size} rows"))
        .hint("the tokenizer belongs to another model, or its embedding was not resized")
}

/// Text and kind of the token of every row.
fn tokens(json: &Value, vocab_size: usize) -> Result<Vec<(String, i32)>> {
    let mut tokens: Vec<(String, i32)> =
        (0..vocab_size).map(|id| (format!("[PAD{id}]"), UNUSED)).collect();
    let fallback = json["model"]["byte_fallback"] == true;
    let unknown = json["model"]["unk_token"].as_str();
    let mut put = |text: &str, id: usize, kind: i32| match tokens.get_mut(id) {
        Some(token) => {
            *token = (text.to_string(), kind);
            Ok(())
        }
        None => Err(without_row(id, vocab_size)),
    };
    for (text, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
        let is_byte = fallback && text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
        let id = id.as_u64().unwrap_or(u64::MAX) as usize;
        let kind = match is_byte {
            true => BYTE,
            // As they are written below: of a tokenizer that was in such a file before.
            false if *text == format!("[PAD{id}]") => UNUSED,
            false => NORMAL,
        };
        put(text, id, kind)?;
    }
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        let text = token["content"].as_str().unwrap_or_default();
        let kind = match token["special"] == true {
            true if fallback && unknown == Some(text) => UNKNOWN,
            true => CONTROL,
            false => USER_DEFINED,
        };
        // llama.cpp looks for users' own in the text as it is, and writes them so.
        let text = if fallback && kind == USER_DEFINED {
            text.replace(META_SPACE, " ")
        } else {
            text.to_string()
        };
        let id = token["id"].as_u64().unwrap_or(u64::MAX) as usize;
        // Beyond the rows there are tokens for images, of models that have none.
        if id < vocab_size {
            put(&text, id, kind)?;
        }
    }
    Ok(tokens)
}

/// Pairs in the order in which they are merged: `"a b"` or `["a", "b"]`.
fn merges(json: &Value) -> impl Iterator<Item = (&str, &str)> {
    let merges = json["model"]["merges"].as_array().into_iter().flatten();
    merges.filter_map(|merge| match merge {
        Value::String(pair) => pair.split_once(' '),
        pair => Some((pair[0].as_str()?, pair[1].as_str()?)),
    })
}
