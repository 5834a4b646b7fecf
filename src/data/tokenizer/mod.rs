//! Tokenizer, special tokens and chat template of a model.
//!
//! From a Hugging Face folder (`tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`,
//! `generation_config.json`) or rebuilt from a GGUF file's metadata by candle.

mod coding;
mod open;

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::Value as Metadata;
use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::processors::sequence::Sequence;

pub(super) use coding::guarded;

use super::ends::TurnEnds;
use super::known_templates::{KnownTemplate, unknown_template};
use super::strftime::unix_seconds_now;
use super::template::ChatTemplate;
use super::template_choice::TemplateChoice;
use super::template_sources::TemplateSources;
use super::tokenizer_files::TokenizerFiles;
use crate::error::{Error, Result};

/// A model's tokenizer.
#[derive(Debug, Clone)]
pub struct ChatTokenizer {
    pub(super) tokenizer: Tokenizer,
    bos: Option<SpecialToken>,
    eos: Option<SpecialToken>,
    pad: Option<SpecialToken>,
    pub(super) unknown: Option<SpecialToken>,
    /// The ids that end a generation; the first is `eos`.
    eos_ids: Vec<u32>,
    add_bos_token: bool,
    templates: Option<TemplateSources>,
    /// What templates see by default, beside the special tokens.
    template_kwargs: Map<String, Value>,
    /// The templates of the tokenizer's files, and how many of `eos_ids` are from there.
    own: (Option<TemplateSources>, usize),
    /// The folder or file that the tokenizer was read from.
    home: PathBuf,
}

/// A token with a meaning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecialToken {
    /// Text.
    pub text: String,
    /// Id.
    pub id: u32,
}

impl ChatTokenizer {
    /// Opens the tokenizer of a model folder or `.gguf` file.
    ///
    /// # Errors
    /// `Input` when a file is missing, damaged, or names tokens that the vocabulary lacks.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_beside(path, path)
    }

    /// The tokenizer at `path` for the model at `model`, whose configs name ends of sequences, too.
    fn open_beside(path: &Path, model: &Path) -> Result<Self> {
        let opened = if path.extension().is_some_and(|extension| extension == "gguf") {
            Self::from_gguf(path)
        } else {
            Self::from_folder(path, model)
        };
        let mut tokenizer = opened.map_err(|error| {
            error.or_hint("the tokenizer is damaged: get another copy of the model's files")
        })?;
        tokenizer.own = (tokenizer.templates.clone(), tokenizer.eos_ids.len());
        tokenizer.home = path.to_path_buf();
        tokenizer.learn_turn_end();
        Ok(tokenizer)
    }

    /// The tokenizer of `model`, or that of `adapter` if it brings one, with the chat templates that are
    /// `chosen`, known by name or a file's, else those that the adapter was trained with.
    ///
    /// # Errors
    /// As [`open`](ChatTokenizer::open); `Usage` for an unknown name; `Input` when a template does not
    /// compile.
    pub fn open_for(model: &Path, chosen: &TemplateChoice, adapter: Option<&Path>) -> Result<Self> {
        let mut tokenizer = Self::open_beside(home(model, adapter), model)?;
        tokenizer.choose_templates(chosen, adapter)?;
        Ok(tokenizer)
    }

    /// The tokenizer for another adapter, without reading the files again that it has read.
    ///
    /// # Errors
    /// As [`open_for`](ChatTokenizer::open_for).
    pub fn open_again(
        &self,
        model: &Path,
        chosen: &TemplateChoice,
        adapter: Option<&Path>,
    ) -> Result<Self> {
        if home(model, adapter) != self.home {
            return Self::open_for(model, chosen, adapter);
        }
        let mut tokenizer = self.clone();
        tokenizer.choose_templates(chosen, adapter)?;
        Ok(tokenizer)
    }

    /// Whether it was read from the same files as the other one, with the same chat templates.
    pub fn reads_like(&self, other: &Self) -> bool {
        self.home == other.home && self.templates == other.templates
    }

    fn choose_templates(&mut self, chosen: &TemplateChoice, adapter: Option<&Path>) -> Result<()> {
        let (sources, place) = match (chosen.template.as_deref(), adapter) {
            (Some(name), _) => (Some(self.named(name)?), Path::new(name)),
            (None, Some(folder)) => (TemplateSources::of_adapter(folder)?, folder),
            (None, None) => (None, Path::new("")),
        };
        let is_other = sources.is_some();
        self.templates = sources.or_else(|| self.own.0.clone());
        self.template_kwargs = chosen.kwargs.clone();
        if is_other {
            self.compile_template().map_err(|error| error.at(place.display()))?;
        }
        self.check_kwargs()?;
        self.learn_turn_end();
        Ok(())
    }

    /// A variable that the template does not read would be given in vain.
    fn check_kwargs(&self) -> Result<()> {
        if self.template_kwargs.is_empty() {
            return Ok(());
        }
        let Some(template) = self.compile_template()? else {
            let what = "`--chat-template-kwargs`: the tokenizer has no chat template";
            return Err(Error::usage(what).hint("choose one by `--chat-template`"));
        };
        let known = template.variables();
        let Some(name) = self.template_kwargs.keys().find(|name| !known.contains(*name)) else {
            return Ok(());
        };
        let what = format_args!("`--chat-template-kwargs`: the chat template reads no `{name}`");
        let known: Vec<String> = known.iter().map(|name| format!("`{name}`")).collect();
        Err(Error::usage(what).hint(match &known[..] {
            [] => "it has no variables: leave the flag out".to_string(),
            known => format!("it reads {}", known.join(", ")),
        }))
    }

    /// A template that is known by name, or that of a file.
    fn named(&self, name: &str) -> Result<TemplateSources> {
        let path = Path::new(name);
        let chat = match KnownTemplate::find(name) {
            Some(known) => {
                self.check_tokens(name, known)?;
                known.source(self.adds_bos())
            }
            None if path.is_file() => {
                let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
                // Editors put it there, and every prompt would begin with it.
                text.strip_prefix('\u{feff}').unwrap_or(&text).to_string()
            }
            None => return Err(unknown_template(name)),
        };
        Ok(TemplateSources::new(&chat, None))
    }

    /// Refuses a template whose tokens are none of this tokenizer's: spelled out in others, nothing would end
    /// an answer.
    fn check_tokens(&self, name: &str, known: &KnownTemplate) -> Result<()> {
        let lacking = known.tokens.iter().find(|token| self.id(token).is_none());
        if let Some(token) = lacking {
            let what = format_args!("chat template `{name}`: the tokenizer has no token {token}");
            return Err(Error::input(what).hint("`alpaca` and `zephyr` need none of their own"));
        }
        if known.tokens.is_empty() && self.eos().is_none() {
            let what = format_args!("chat template `{name}`: the tokenizer has no eos_token");
            return Err(Error::input(what).hint("name one in tokenizer_config.json"));
        }
        Ok(())
    }

    /// What the folder of an adapter of `model` needs for being read as it was trained: the files,
    /// where they are not the model's, and chat templates that are not in the files.
    ///
    /// # Errors
    /// `Io` when a file cannot be opened.
    pub fn beyond_the_model(&self, model: &Path) -> Result<TokenizerFiles> {
        let files = match self.home == model {
            true => TokenizerFiles::default(),
            false => TokenizerFiles::of_folder(&self.home)?,
        };
        let other = self.templates.clone().filter(|_| self.templates != self.own.0);
        Ok(files.with_templates(other))
    }

    /// Generation must stop at what the chat template ends a turn with. A template that does not
    /// compile is reported where it is needed.
    fn learn_turn_end(&mut self) {
        self.eos_ids.truncate(self.own.1);
        let Ok(Some(template)) = self.compile_template() else { return };
        let last = TurnEnds::of(&template, &self.added_tokens()).last;
        let id = last.and_then(|text| self.id(&text));
        self.eos_ids.extend(id.filter(|id| !self.eos_ids.contains(id)));
    }

    /// Writes the files that transformers' `AutoTokenizer` loads.
    ///
    /// # Errors
    /// `Io` when the disk refuses.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let text = |token: &Option<SpecialToken>| token.as_ref().map(|token| token.text.clone());
        let specials = json!({
            "bos_token": text(&self.bos),
            "eos_token": text(&self.eos),
            "pad_token": text(&self.pad),
            "unk_token": text(&self.unknown),
        });
        let mut config = specials.clone();
        config["add_bos_token"] = self.add_bos_token.into();
        config["clean_up_tokenization_spaces"] = false.into();
        config["tokenizer_class"] = "PreTrainedTokenizerFast".into();
        if let Some(templates) = &self.templates {
            config["chat_template"] = templates.to_json();
        }
        let id = |token: &Option<SpecialToken>| token.as_ref().map(|token| token.id);
        let eos = if self.eos_ids.len() > 1 { json!(self.eos_ids) } else { json!(id(&self.eos)) };
        let generation = json!({
            "bos_token_id": id(&self.bos),
            "eos_token_id": eos,
            "pad_token_id": id(&self.pad),
        });
        let path = folder.join("tokenizer.json");
        let tokenizer = self
            .with_bos_in_front()?
            .to_string(true)
            .map_err(|e| Error::input(format_args!("{}: {e}", path.display())))?;
        for (name, contents) in [
            ("tokenizer.json", tokenizer),
            ("tokenizer_config.json", format!("{config:#}\n")),
            ("special_tokens_map.json", format!("{specials:#}\n")),
            ("generation_config.json", format!("{generation:#}\n")),
        ] {
            let path = folder.join(name);
            std::fs::write(&path, contents).map_err(|e| Error::io("write", &path, e))?;
        }
        Ok(())
    }

    /// The tokenizer with a post-processor that puts the BOS in front, if it wants one: transformers 5 reads
    /// that, not `add_bos_token`, where there is a `tokenizer.json`. No text is encoded with it here.
    fn with_bos_in_front(&self) -> Result<Cow<'_, Tokenizer>> {
        let wanted = self.bos.as_ref().filter(|_| self.add_bos_token);
        let Some(bos) = wanted.filter(|bos| !puts_in_front(&self.tokenizer, bos)) else {
            return Ok(Cow::Borrowed(&self.tokenizer));
        };
        let SpecialToken { text, id } = bos;
        let piece = |sequence: &str, type_id: usize| {
            let bos = json!({"SpecialToken": {"id": text, "type_id": type_id}});
            [bos, json!({"Sequence": {"id": sequence, "type_id": type_id}})]
        };
        let pair = [piece("A", 0), piece("B", 1)].concat();
        let template = json!({
            "type": "TemplateProcessing",
            "single": piece("A", 0),
            "pair": pair,
            "special_tokens": {text: {"id": text, "ids": [id], "tokens": [text]}},
        });
        let template: PostProcessorWrapper = serde_json::from_value(template)
            .map_err(|e| Error::input(format_args!("the tokenizer's BOS `{text}`: {e}")))?;
        let before = self.tokenizer.get_post_processor().cloned();
        let mut tokenizer = self.tokenizer.clone();
        let all = before.into_iter().chain([template]).collect();
        tokenizer.with_post_processor(Some(Sequence::new(all)));
        Ok(Cow::Owned(tokenizer))
    }

    /// Ids of the vocabulary without added tokens; may be fewer than the model has rows.
    pub fn own_vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(false)
    }

    /// Beginning of sequence.
    pub fn bos(&self) -> Option<&SpecialToken> {
        self.bos.as_ref()
    }

    /// End of sequence.
    pub fn eos(&self) -> Option<&SpecialToken> {
        self.eos.as_ref()
    }

    /// Padding, where the model has one: templates may ask for it.
    pub fn pad(&self) -> Option<&SpecialToken> {
        self.pad.as_ref()
    }

    /// The ids that end a generation.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// Whether plain text gets a BOS in front (`add_bos_token`).
    pub fn adds_bos(&self) -> bool {
        self.add_bos_token
    }

    /// The chat templates as a GGUF file has them.
    pub(super) fn gguf_templates(&self) -> Vec<(String, Metadata)> {
        self.templates.as_ref().map(TemplateSources::gguf_fields).unwrap_or_default()
    }

    /// The chat template's Jinja source.
    pub fn chat_template(&self) -> Option<&str> {
        self.templates.as_ref().map(|templates| templates.chat.as_str())
    }

    /// What a chat template sees of the tokenizer: `bos_token`, `eos_token`, `pad_token` and
    /// `unk_token`, those that there are.
    pub fn special_tokens(&self) -> Map<String, Value> {
        let named = [
            ("bos_token", &self.bos),
            ("eos_token", &self.eos),
            ("pad_token", &self.pad),
            ("unk_token", &self.unknown),
        ];
        let text = |(name, token): (&str, &Option<SpecialToken>)| {
            Some((name.to_string(), token.as_ref()?.text.clone().into()))
        };
        named.into_iter().filter_map(text).collect()
    }

    /// The chat templates, compiled; their clock shows the present.
    ///
    /// # Errors
    /// `Input` when one does not compile.
    pub fn compile_template(&self) -> Result<Option<ChatTemplate>> {
        self.compile_template_at(unix_seconds_now())
    }

    /// Compiles the template as [`compile_template`](ChatTokenizer::compile_template) does, with a clock that
    /// stands.
    ///
    /// # Errors
    /// As there.
    pub fn compile_template_at(&self, unix_seconds: u64) -> Result<Option<ChatTemplate>> {
        let Some(sources) = &self.templates else { return Ok(None) };
        let mut seen = self.special_tokens();
        seen.extend(self.template_kwargs.clone());
        let compile = |source: &str| ChatTemplate::at(unix_seconds, source, seen.clone());
        let template = compile(&sources.chat)?;
        let tool_use = sources.tool_use.as_deref().map(compile).transpose()?;
        Ok(Some(template.with_tool_use(tool_use)))
    }

    /// The token `id` as it stands in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// Texts of the tokens that were added to the vocabulary: special ones and others.
    pub fn added_tokens(&self) -> Vec<String> {
        let added = self.tokenizer.get_added_tokens_decoder();
        added.into_values().map(|token| token.content).collect()
    }

    /// The added tokens that the chat template writes, and Mistral's and Llama 2's marks, which need not be tokens.
    pub(super) fn template_tokens(&self) -> Vec<String> {
        let Some(sources) = &self.templates else { return Vec::new() };
        let mut tokens = self.added_tokens();
        tokens.extend(["[INST]", "[/INST]"].map(String::from));
        tokens.sort_unstable();
        tokens.dedup();
        tokens.retain(|token| !token.trim().is_empty() && sources.chat.contains(token.as_str()));
        tokens
    }

    /// Whether the token `id` takes the spaces behind it, as markers of some models do.
    pub fn takes_spaces(&self, id: u32) -> bool {
        let added = self.tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        added.get(&id).is_some_and(|token| token.rstrip)
    }

    /// The id of the token `text`.
    pub fn id(&self, text: &str) -> Option<u32> {
        self.tokenizer.token_to_id(text)
    }
}

/// Whether the tokenizer's post-processor begins a text with `bos`.
fn puts_in_front(tokenizer: &Tokenizer, bos: &SpecialToken) -> bool {
    let processed = tokenizer.encode_fast("a", true);
    processed.is_ok_and(|encoding| encoding.get_ids().first() == Some(&bos.id))
}

/// The place of the tokenizer that an adapter of `model` was trained with.
fn home<'a>(model: &'a Path, adapter: Option<&'a Path>) -> &'a Path {
    adapter.filter(|folder| folder.join("tokenizer.json").exists()).unwrap_or(model)
}
