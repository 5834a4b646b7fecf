//! SentencePiece's byte pairs out of a GGUF file: the tokenizers of Llama 2, Mistral, Gemma
//! and their kin.
//!
//! The file has a score for each token, and no merges: a pair may be merged if what it makes is a token,
//! and the highest score comes first. Source: llama.cpp `llm_tokenizer_spm`; transformers
//! `convert_slow_tokenizer.py: generate_merges`.

use std::fmt::Display;

use candle_core::quantized::gguf_file::{Content, Value as Metadata};
use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence as Normalizers};
use tokenizers::{AddedToken, Tokenizer};

use super::token_kinds::{CONTROL, UNKNOWN, USER_DEFINED};
use crate::error::{Error, Result};

/// What stands for a space.
pub(super) const META_SPACE: &str = "▁";

/// Tokens that llama.cpp takes for granted in a Phi-3: spaces behind the first three stay.
pub(super) const PHI3_TOKENS: [&str; 4] = ["<unk>", "<s>", "<|endoftext|>", "</s>"];

/// Whether llama.cpp takes a model of this name for a Phi-3.
pub(super) fn named_phi3(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    name.contains("phi-3") || name.contains("phi3")
}

/// Whether the file's tokenizer is one.
pub(super) fn is_sentence_piece(content: &Content) -> bool {
    let model = content.metadata.get("tokenizer.ggml.model");
    model.and_then(|model| model.to_string().ok()).is_some_and(|model| model == "llama")
}

/// Builds it.
///
/// # Errors
/// `Input`, without the file's name, for metadata that are missing or do not fit each other.
pub(super) fn from_gguf(content: &Content) -> Result<Tokenizer> {
    let field = |key: &str| content.metadata.get(&format!("tokenizer.ggml.{key}"));
    let mut tokens = texts(field("tokens"))?;
    let scores = numbers(field("scores"), "scores", tokens.len())?;
    let kinds = numbers(field("token_type"), "token_type", tokens.len())?;
    let kind = |id: usize| kinds[id] as i32;
    // Users' own are looked for in text as it is; some files have spaces in them as pieces have.
    for (_, token) in tokens.iter_mut().enumerate().filter(|(id, _)| kind(*id) == USER_DEFINED) {
        *token = token.replace(META_SPACE, " ");
    }
    let vocab: Vocab =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), id as u32)).collect();
    let merges = merges(&tokens, &scores, &vocab);
    let mut builder = BPE::builder().vocab_and_merges(vocab, merges).byte_fallback(true);
    builder = builder.fuse_unk(true);
    if let Some(unknown) = (0..tokens.len()).find(|&id| kind(id) == UNKNOWN) {
        builder = builder.unk_token(tokens[unknown].clone());
    }
    let mut tokenizer = Tokenizer::new(builder.build().map_err(wrong)?);
    let prefix = !matches!(field("add_space_prefix"), Some(Metadata::Bool(false)));
    let spaces = NormalizerWrapper::from(Replace::new(" ", META_SPACE).map_err(wrong)?);
    let prepend = prefix.then(|| Prepend::new(META_SPACE.to_string()).into());
    let steps: Vec<NormalizerWrapper> = prepend.into_iter().chain([spaces]).collect();
    tokenizer.with_normalizer(Some(Normalizers::new(steps))).map_err(wrong)?;
    let mut steps: Vec<DecoderWrapper> = vec![
        Replace::new(META_SPACE, " ").map_err(wrong)?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ];
    if prefix {
        steps.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(Decoders::new(steps)));
    let name = content.metadata.get("general.name").and_then(|name| name.to_string().ok());
    let is_phi3 = name.is_some_and(|name| named_phi3(name));
    let takes_spaces = |token: &String| is_phi3 && !PHI3_TOKENS[..3].contains(&token.as_str());
    let of = |wanted: &[i32], special: bool| -> Vec<AddedToken> {
        let ids = (0..tokens.len()).filter(|&id| wanted.contains(&kind(id)));
        let added = |token: &String| AddedToken::from(token.clone(), special).normalized(false);
        ids.map(|id| added(&tokens[id]).rstrip(takes_spaces(&tokens[id]))).collect()
    };
    tokenizer.add_special_tokens(of(&[UNKNOWN, CONTROL], true)).map_err(wrong)?;
    tokenizer.add_tokens(of(&[USER_DEFINED], false)).map_err(wrong)?;
    Ok(tokenizer)
}

fn wrong(why: impl Display) -> Error {
    Error::input(format_args!("tokenizer metadata: {why}"))
}

/// Every pair of tokens that makes a token, best score first.
fn merges(tokens: &[String], scores: &[f64], vocab: &Vocab) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    for (whole, &score) in tokens.iter().zip(scores) {
        for (at, _) in whole.char_indices().skip(1) {
            let (left, right) = whole.split_at(at);
            if let (Some(first), Some(second)) = (vocab.get(left), vocab.get(right)) {
                pairs.push((score, *first, *second, (left.to_string(), right.to_string())));
            }
        }
    }
    pairs.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    pairs.into_iter().map(|(.., pair)| pair).collect()
}

fn texts(value: Option<&Metadata>) -> Result<Vec<String>> {
    let missing = || wrong("tokens are missing");
    let values = value.and_then(|value| value.to_vec().ok()).ok_or_else(missing)?;
    values.iter().map(|text| text.to_string().cloned().map_err(|_| missing())).collect()
}

/// Numbers of a list, one for each token.
fn numbers(value: Option<&Metadata>, key: &str, count: usize) -> Result<Vec<f64>> {
    let number = |value: &Metadata| match value {
        Metadata::F32(x) => Some(f64::from(*x)),
        Metadata::I32(x) => Some(f64::from(*x)),
        Metadata::U32(x) => Some(f64::from(*x)),
        _ => None,
    };
    let values = value.and_then(|value| value.to_vec().ok());
    let values: Option<Vec<f64>> = values.and_then(|values| values.iter().map(number).collect());
    match values {
        Some(values) if values.len() == count => Ok(values),
        Some(values) => Err(wrong(format_args!("{} {key} for {count} tokens", values.len()))),
        None => Err(wrong(format_args!("{key} are missing"))),
    }
}
