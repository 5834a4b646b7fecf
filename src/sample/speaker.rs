//! Text in and out of a model: what `generate`, `chat` and the sample answers of a run share.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::stop_strings::StopStrings;
use super::{Sampler, TextStream};
use crate::data::template::ChatTemplate;
use crate::data::{ChatTokenizer, TemplateChoice};
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::model::Model;

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// An end-of-sequence token.
    EndOfSequence,
    /// A string that was to end it.
    StopString,
    /// The most tokens that were allowed, or the context is full.
    Length,
    /// The listener had enough.
    Stopped,
}

/// What a listener says to a piece of text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// More.
    Continue,
    /// Enough.
    Stop,
}

/// Room for prompt and answer, and what else ends it.
#[derive(Debug, Clone, Copy)]
pub struct Limits<'a> {
    /// Longest answer, in tokens.
    pub max_new_tokens: usize,
    /// Longest prompt and answer together, in tokens.
    pub context_tokens: usize,
    /// Tokens of the prompt that the model is fed at a time.
    pub prefill_tokens: usize,
    /// Texts that end the answer, which they are no part of; tokens that are no text may be among them.
    pub stop_strings: &'a [String],
}

/// What a model is to continue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// A conversation as the chat template wrote it, a BOS included where the model knows one there.
    Chat(String),
    /// Text as it stands.
    Text(String),
}

/// A model's tokenizer, its chat template and the tokens that end its answers.
pub struct Speaker {
    tokenizer: ChatTokenizer,
    template: Option<ChatTemplate>,
    eos_ids: Vec<u32>,
    /// The ends of sequence of the model's config.
    model_eos_ids: Vec<u32>,
}

impl Speaker {
    /// `eos_ids` are those of the model's config, beside the tokenizer's own.
    ///
    /// # Errors
    /// `Input` when the chat template does not compile.
    pub fn new(tokenizer: ChatTokenizer, eos_ids: &[u32]) -> Result<Self> {
        let template = tokenizer.compile_template()?;
        let mut all = tokenizer.eos_ids().to_vec();
        all.extend(eos_ids.iter().filter(|id| !tokenizer.eos_ids().contains(id)));
        Ok(Speaker { tokenizer, template, eos_ids: all, model_eos_ids: eos_ids.to_vec() })
    }

    /// Speaks as another adapter of the model was taught: [`ChatTokenizer::open_again`].
    ///
    /// # Errors
    /// As there; then all stays as it is.
    pub fn follow(
        &mut self,
        model: &Path,
        chosen: &TemplateChoice,
        adapter: Option<&Path>,
    ) -> Result<()> {
        let tokenizer = self.tokenizer.open_again(model, chosen, adapter)?;
        *self = Speaker::new(tokenizer, &self.model_eos_ids)?;
        Ok(())
    }

    /// A conversation (role and content) for the model to continue.
    ///
    /// # Errors
    /// `Input` when the model has no chat template or the template refuses.
    pub fn render(&self, messages: &[(&str, &str)]) -> Result<Prompt> {
        let Some(template) = &self.template else {
            return Err(Error::input("the tokenizer has no chat template: this is no chat model")
                .hint(
                    "choose one with `--chat-template`, such as `alpaca` after training on its records; \
                     `nibble generate --raw` continues text",
                ));
        };
        let message = |(role, content): &(&str, &str)| json!({"role": role, "content": content});
        let messages: Vec<Value> = messages.iter().map(message).collect();
        template.render(&messages, &Map::new(), true).map(Prompt::Chat)
    }

    /// A prompt as a user's turn where there is a chat template, else as text to continue.
    ///
    /// # Errors
    /// `Input` when the template refuses.
    pub fn prompt(&self, text: &str) -> Result<Prompt> {
        match self.template {
            Some(_) => self.render(&[("user", text)]),
            None => Ok(Prompt::Text(text.to_string())),
        }
    }

    /// Ids of a prompt, those of text behind a BOS where the tokenizer wants one: as in training.
    ///
    /// # Errors
    /// `Usage` when it is empty, `Input` when the tokenizer refuses it.
    pub fn ids(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        let ids = match prompt {
            Prompt::Chat(text) => self.tokenizer.encode(text)?,
            Prompt::Text(text) => self.tokenizer.encode_plain(text)?,
        };
        if ids.is_empty() {
            return Err(Error::usage("the prompt is empty").hint("give some text"));
        }
        Ok(ids)
    }

    /// The text of a prompt, tokens that are no text included.
    ///
    /// # Errors
    /// `Input` when an id is outside the vocabulary.
    pub fn prompt_text(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, false)
    }

    /// The text of an answer, up to its end-of-sequence token.
    ///
    /// # Errors
    /// As [`prompt_text`](Self::prompt_text).
    pub fn answer_text(&self, ids: &[u32]) -> Result<String> {
        let end = ids.iter().position(|id| self.eos_ids.contains(id)).unwrap_or(ids.len());
        self.tokenizer.decode(&ids[..end], true)
    }

    /// Lets `model` continue `prompt` until an end-of-sequence token, a stop string, a limit, or the wish of
    /// `listener`, who gets the text as it comes.
    ///
    /// # Errors
    /// `Usage` when the prompt does not fit the context; those of model and listener.
    pub fn answer<K: Kernels>(
        &self,
        model: &mut Model<K>,
        prompt: &Prompt,
        sampler: &mut Sampler,
        limits: Limits<'_>,
        listener: impl FnMut(&str) -> Result<Wish>,
    ) -> Result<Finish> {
        self.extend(model, self.ids(prompt)?, sampler, limits, listener)
    }

    /// Lets `model` continue the ids of a prompt, of which there is one at least, as [`answer`](Self::answer)
    /// does a prompt.
    ///
    /// # Errors
    /// As [`answer`](Self::answer).
    pub fn extend<K: Kernels>(
        &self,
        model: &mut Model<K>,
        mut history: Vec<u32>,
        sampler: &mut Sampler,
        limits: Limits<'_>,
        mut listener: impl FnMut(&str) -> Result<Wish>,
    ) -> Result<Finish> {
        self.feed(model, &history, limits)?;
        let mut next = *history.last().expect("a prompt has a token");
        let mut stream = TextStream::new(&self.tokenizer);
        let mut stops = StopStrings::new(limits.stop_strings);
        let stop_ids = self.added_ids(limits.stop_strings);
        let mut finish = Finish::Length;
        for _ in 0..limits.max_new_tokens.min(limits.context_tokens - history.len()) {
            next = sampler.next(&model.decode(&[next])?, &history)?;
            if self.eos_ids.contains(&next) {
                finish = Finish::EndOfSequence;
                break;
            }
            if stop_ids.contains(&next) {
                finish = Finish::StopString;
                break;
            }
            history.push(next);
            let (text, stopped) = stops.push(&stream.push(next)?);
            let wish = listener(&text)?;
            if stopped {
                return Ok(Finish::StopString);
            }
            if wish == Wish::Stop {
                finish = Finish::Stopped;
                break;
            }
        }
        let (text, stopped) = stops.push(&stream.finish()?);
        listener(&(text + &stops.finish()))?;
        Ok(if stopped { Finish::StopString } else { finish })
    }

    /// Lets the model read all of a prompt but its last token.
    fn feed<K: Kernels>(
        &self,
        model: &mut Model<K>,
        prompt: &[u32],
        limits: Limits<'_>,
    ) -> Result<()> {
        let (context, tokens) = (limits.context_tokens, prompt.len());
        if tokens >= context {
            let what = format_args!("the prompt has {tokens} tokens, the context {context}");
            return Err(Error::usage(what).hint(match model.spec().learned_positions {
                Some(most) if context >= most => {
                    "shorten the prompt: the model has no more positions"
                }
                _ => "raise `--context-length` or shorten the prompt",
            }));
        }
        model.clear_cache();
        let before = &prompt[..tokens.saturating_sub(1)];
        for piece in before.chunks(limits.prefill_tokens.max(1)) {
            model.decode_piece(piece, tokens)?;
        }
        Ok(())
    }

    /// Ids of those of `texts` that are added tokens: special ones among them are in no text.
    fn added_ids(&self, texts: &[String]) -> Vec<u32> {
        if texts.is_empty() {
            return Vec::new();
        }
        let added = self.tokenizer.added_tokens();
        texts
            .iter()
            .filter(|text| added.contains(text))
            .filter_map(|it| self.tokenizer.id(it))
            .collect()
    }
}
