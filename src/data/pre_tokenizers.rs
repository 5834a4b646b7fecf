//! How text is split before byte pairs are merged, by the names that llama.cpp gives to it in
//! `tokenizer.ggml.pre`. Source: llama.cpp `src/llama-vocab.cpp`.

use candle_core::quantized::gguf_file::{Content, Value as Metadata};
use tokenizers::models::ModelWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _,
    SplitDelimiterBehavior, Tokenizer,
};

use super::token_kinds::{CONTROL, UNKNOWN, USER_DEFINED};
use crate::error::{Error, Result};

const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SEED_CODER: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Names under which Llama 3's words are found by their merges, as all others are: Phi-4's, GLM-4's.
const WITH_MERGES: [&str; 3] = ["dbrx", "smaug-bpe", "chatglm-bpe"];

/// Text on which all of them differ.
const PROBE: &str = "Don't  SHE'LL 1234567 x٣٤ \n\n  naïve—«日本語» (a+b)!?\t\tend... \r\n 3.14 camelCase f(x);\n\n";

/// A way to split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Splitter {
    /// GPT-2's words.
    Gpt2,
    /// GPT-2's words, every digit by itself.
    Smollm,
    /// Llama 3's words, digits by three.
    LlamaBpe,
    /// Llama 3's words, every digit by itself.
    Qwen2,
    /// Qwen 2's words, line breaks apart from what is before them: Seed-OSS's.
    SeedCoder,
    /// Words that end with their 's and begin with capitals, digits by three: Phi-4-mini's.
    Gpt4o,
    /// Words that begin with capitals, every digit by itself: Mistral Nemo's and later ones'.
    Tekken,
}

impl Splitter {
    const ALL: [Splitter; 7] = [
        Splitter::Gpt2,
        Splitter::Smollm,
        Splitter::LlamaBpe,
        Splitter::Qwen2,
        Splitter::SeedCoder,
        Splitter::Gpt4o,
        Splitter::Tekken,
    ];

    /// The pre-tokenizer that llama.cpp calls `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "default" | "gpt-2" | "gpt2" => Splitter::Gpt2,
            "smollm" | "starcoder" | "refact" | "command-r" => Splitter::Smollm,
            "llama-bpe" | "llama3" | "llama-v3" | "lfm2" | "glm4" => Splitter::LlamaBpe,
            name if WITH_MERGES.contains(&name) => Splitter::LlamaBpe,
            "qwen2" | "deepseek-r1-qwen" => Splitter::Qwen2,
            "seed-coder" => Splitter::SeedCoder,
            "gpt-4o" => Splitter::Gpt4o,
            "tekken" => Splitter::Tekken,
            _ => return None,
        })
    }

    /// llama.cpp's name, for a tokenizer that looks words up before it merges, or does not.
    pub fn name(self, ignore_merges: bool) -> &'static str {
        match self {
            Splitter::LlamaBpe if !ignore_merges => WITH_MERGES[0],
            Splitter::Gpt2 => "gpt-2",
            Splitter::Smollm => "smollm",
            Splitter::LlamaBpe => "llama-bpe",
            Splitter::Qwen2 => "qwen2",
            Splitter::SeedCoder => "seed-coder",
            Splitter::Gpt4o => "gpt-4o",
            Splitter::Tekken => "tekken",
        }
    }

    /// The pre-tokenizer of the tokenizers library.
    fn build(self, prefix_space: bool) -> PreTokenizerWrapper {
        let words = |regex: &str| {
            let pattern = SplitPattern::Regex(regex.to_string());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
            let split = split.expect("the expressions are valid").into();
            Sequence::new(vec![split, ByteLevel::new(prefix_space, true, false).into()]).into()
        };
        let bytes = ByteLevel::new(prefix_space, true, true);
        match self {
            Splitter::Gpt2 => bytes.into(),
            Splitter::Smollm => Sequence::new(vec![Digits::new(true).into(), bytes.into()]).into(),
            Splitter::LlamaBpe => words(LLAMA_3),
            Splitter::Qwen2 => words(QWEN_2),
            Splitter::SeedCoder => words(SEED_CODER),
            Splitter::Gpt4o => words(GPT_4O),
            Splitter::Tekken => words(TEKKEN),
        }
    }

    /// The one that splits as `tokenizer` does; none for all others.
    pub fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let pieces = pieces(tokenizer.get_pre_tokenizer()?)?;
        Self::ALL
            .into_iter()
            .find(|splitter| pieces_of(*splitter).is_some_and(|known| known == pieces))
    }
}

/// Whether llama.cpp puts a beginning-of-sequence token before text that is split by this name, where
/// a file does not say.
pub(super) fn adds_bos(name: &str) -> bool {
    matches!(name, "llama-bpe" | "llama3" | "llama-v3" | "tekken")
}

fn pieces_of(splitter: Splitter) -> Option<Vec<String>> {
    pieces(&splitter.build(false))
}

/// What the probe is split into.
fn pieces(pre_tokenizer: &PreTokenizerWrapper) -> Option<Vec<String>> {
    let mut text = PreTokenizedString::from(PROBE);
    pre_tokenizer.pre_tokenize(&mut text).ok()?;
    let splits = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
    Some(splits.into_iter().map(|(piece, _, _)| piece.to_string()).collect())
}

/// Splits text as the file says; candle knows only some of the names, and its default puts a space
/// before the text. An unknown name would give wrong tokens silently.
///
/// # Errors
/// `Input`, without the file's name, for an unknown name.
pub(super) fn set_splitter(tokenizer: &mut Tokenizer, content: &Content) -> Result<()> {
    let field = |key: &str| content.metadata.get(&format!("tokenizer.ggml.{key}"));
    let prefix_space = matches!(field("add_space_prefix"), Some(Metadata::Bool(true)));
    let name = field("pre").and_then(|value| value.to_string().ok());
    let name = name.map_or("default", String::as_str);
    let architecture = content.metadata.get("general.architecture");
    let is_gpt2 = architecture.is_none_or(|it| it.to_string().is_ok_and(|name| name == "gpt2"));
    if name == "default" && !is_gpt2 {
        let what = "the file does not say how its tokenizer splits text (tokenizer.ggml.pre)";
        return Err(Error::input(what).hint(
            "it is older than that: get a newer one, or the Hugging Face folder of the model",
        ));
    }
    let Some(splitter) = Splitter::from_name(name) else {
        return Err(Error::input(format_args!("pre-tokenizer `{name}` is not supported"))
            .hint("use the Hugging Face folder of this model, which has a tokenizer.json"));
    };
    tokenizer.with_pre_tokenizer(Some(splitter.build(prefix_space)));
    tokenizer.with_post_processor(Some(ByteLevel::new(prefix_space, false, true)));
    // Llama 3 and Tekken have words that no merges lead to.
    if matches!(splitter, Splitter::LlamaBpe | Splitter::Tekken)
        && !WITH_MERGES.contains(&name)
        && let ModelWrapper::BPE(mut model) = tokenizer.get_model().clone()
    {
        model.ignore_merges = true;
        tokenizer.with_model(model);
    }
    Ok(())
}

/// The tokenizer `from` with the added tokens as the file has them. candle calls users' own special, such as
/// `<think>`, which decoding then leaves out, and padding rows, too.
///
/// # Errors
/// `Input`, without the file's name, for tokens that cannot be added.
pub(super) fn with_added_tokens(from: &Tokenizer, content: &Content) -> Result<Tokenizer> {
    let field = |key: &str| content.metadata.get(&format!("tokenizer.ggml.{key}"));
    let kinds = field("token_type").and_then(|kinds| kinds.to_vec().ok());
    let Some(kinds) = kinds else { return Ok(from.clone()) };
    let kinds: Vec<i32> = kinds.iter().map(|kind| kind.to_i32().unwrap_or(0)).collect();
    let ends = ["bos_token_id", "eos_token_id"].into_iter().filter_map(field);
    let ends: Vec<u32> = ends.filter_map(|id| id.to_u32().ok()).collect();
    let (mut special, mut own) = (Vec::new(), Vec::new());
    for (id, kind) in (0u32..).zip(&kinds) {
        let Some(text) = from.id_to_token(id) else { continue };
        if [UNKNOWN, CONTROL].contains(kind) || ends.contains(&id) {
            special.push(AddedToken::from(text, true).normalized(false));
        } else if *kind == USER_DEFINED {
            own.push(AddedToken::from(text, false).normalized(false));
        }
    }
    let wrong = |e: tokenizers::Error| Error::input(format_args!("tokenizer metadata: {e}"));
    let mut tokenizer = Tokenizer::new(from.get_model().clone());
    tokenizer.with_normalizer(from.get_normalizer().cloned()).map_err(wrong)?;
    tokenizer.with_pre_tokenizer(from.get_pre_tokenizer().cloned());
    tokenizer.with_post_processor(from.get_post_processor().cloned());
    tokenizer.with_decoder(from.get_decoder().cloned());
    tokenizer.add_special_tokens(special).map_err(wrong)?;
    tokenizer.add_tokens(own).map_err(wrong)?;
    Ok(tokenizer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_tells_them_apart() {
        let all = Splitter::ALL.map(|splitter| pieces_of(splitter).unwrap());
        for (index, pieces) in all.iter().enumerate() {
            assert!(
                all[index + 1..].iter().all(|other| other != pieces),
                "{:?}",
                Splitter::ALL[index]
            );
            let splitter = Splitter::ALL[index];
            for ignore_merges in [true, false] {
                assert_eq!(Splitter::from_name(splitter.name(ignore_merges)), Some(splitter));
            }
        }
    }

    /// What the tokenizers library makes of the probe with the tokenizer.json of Llama 3.1,
    /// Qwen 3 and SmolLM2, and with the published expressions of Seed's, of GPT-4o's and of Tekken.
    #[test]
    fn text_is_split_as_by_the_models_own_tokenizers() {
        let llama = "Don|'t| | SHE|'LL| |123|456|7| x|٣٤| \n\n| | naïve|—«|日本語|»| (|a|+b|)!?|\t|\tend|...| \r\n| |3|.|14| camelCase| f|(x|);\n\n";
        let qwen = "Don|'t| | SHE|'LL| |1|2|3|4|5|6|7| x|٣|٤| \n\n| | naïve|—«|日本語|»| (|a|+b|)!?|\t|\tend|...| \r\n| |3|.|1|4| camelCase| f|(x|);\n\n";
        let seed_coder = "Don|'t| | SHE|'LL| |1|2|3|4|5|6|7| x|٣|٤| \n\n| | naïve|—«|日本語|»| (|a|+b|)!?|\t|\tend|...| \r\n| |3|.|1|4| camelCase| f|(x|);|\n\n";
        let smollm = "Don|'t| | SHE|'|LL| |1|2|3|4|5|6|7| x|٣|٤| \n\n | naïve|—«|日本語|»| (|a|+|b|)!?|\t|\t|end|...| \r\n |3|.|1|4| camelCase| f|(|x|);|\n\n";
        let gpt_4o = "Don't| | SHE'LL| |123|456|7| x|٣٤| \n\n| | naïve|—«|日本語|»| (|a|+b|)!?|\t|\tend|...| \r\n| |3|.|14| camel|Case| f|(x|);\n\n";
        let tekken = "Don|'t| | SHE|'LL| |1|2|3|4|5|6|7| x|٣|٤| \n\n| | naïve|—«|日本語|»| (|a|+b|)!?|\t|\tend|...| \r\n| |3|.|1|4| camel|Case| f|(x|);\n\n";
        let cases = [
            (Splitter::LlamaBpe, llama),
            (Splitter::Qwen2, qwen),
            (Splitter::SeedCoder, seed_coder),
            (Splitter::Smollm, smollm),
            (Splitter::Gpt4o, gpt_4o),
            (Splitter::Tekken, tekken),
        ];
        for (splitter, expected) in cases {
            let mut text = PreTokenizedString::from(PROBE);
            splitter.build(false).pre_tokenize(&mut text).unwrap();
            let splits = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
            let pieces: Vec<&str> =
                splits.iter().map(|(_, (begin, end), _)| &PROBE[*begin..*end]).collect();
            assert_eq!(pieces.join("|"), expected, "{splitter:?}");
        }
    }

    /// Llama 3 looks whole words up before it merges, Phi-4 does not.
    #[test]
    fn merges_are_ignored_where_the_name_says_so() {
        let names = [("llama-bpe", true), ("dbrx", false), ("gpt-4o", false), ("tekken", true)];
        for (name, ignores) in names {
            let pre = Metadata::String(name.into());
            let content = Content {
                magic: candle_core::quantized::gguf_file::VersionedMagic::GgufV3,
                metadata: [("tokenizer.ggml.pre".to_string(), pre)].into(),
                tensor_infos: Default::default(),
                tensor_data_offset: 0,
            };
            let mut tokenizer = Tokenizer::new(tokenizers::models::bpe::BPE::default());
            set_splitter(&mut tokenizer, &content).unwrap();
            let ModelWrapper::BPE(model) = tokenizer.get_model() else { panic!("{name}") };
            assert_eq!(model.ignore_merges, ignores, "{name}");
            assert_eq!(adds_bos(name), ignores, "{name}");
            assert_eq!(Splitter::of(&tokenizer).unwrap().name(ignores), name);
        }
    }

    #[test]
    fn a_tokenizer_is_recognized_by_what_it_does() {
        for splitter in Splitter::ALL {
            let mut tokenizer = Tokenizer::new(tokenizers::models::bpe::BPE::default());
            assert_eq!(Splitter::of(&tokenizer), None);
            tokenizer.with_pre_tokenizer(Some(splitter.build(false)));
            assert_eq!(Splitter::of(&tokenizer), Some(splitter));
            tokenizer.with_pre_tokenizer(Some(splitter.build(true)));
            assert_eq!(Splitter::of(&tokenizer), None, "a space before the text");
        }
    }
}
