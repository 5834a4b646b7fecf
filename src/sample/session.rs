//! A model that answers: weights, one adapter at a time, tokenizer and chat template.

use std::path::Path;

use nibble_quant::BlockFormat;
use serde_json::{Map, Value, json};

use super::{Sampler, TextStream};
use crate::adapter::{Adapter, PeftAdapter};
use crate::checkpoint::Checkpoint;
use crate::data::ChatTokenizer;
use crate::data::template::ChatTemplate;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::families::spec_from_config;
use crate::model::spec::ModelSpec;
use crate::model::weights::Weights;
use crate::plan::Settings;

/// Tokens of a prompt that are fed at a time.
const PREFILL_TOKENS: usize = 512;

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// An end-of-sequence token.
    EndOfSequence,
    /// `--max-new-tokens` or the context is reached.
    Length,
}

/// A model at rest or at work.
pub struct Session {
    /// Its tokenizer.
    pub tokenizer: ChatTokenizer,
    template: Option<ChatTemplate>,
    model: Option<Model>,
    eos_ids: Vec<u32>,
    context_tokens: usize,
}

impl Session {
    /// Loads model and adapter. An adapter that has more than LoRA on linears is merged while
    /// loading.
    ///
    /// # Errors
    /// Whatever is wrong with the files.
    pub fn open(
        path: &Path,
        quantization: Option<&BlockFormat>,
        adapter: Option<&Path>,
        context_tokens: usize,
    ) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let spec = spec_from_config(checkpoint.config())?;
        let tokenizer = ChatTokenizer::open(path)?;
        let (weights, adapter) = load_weights(&checkpoint, &spec, quantization, adapter)?;
        let context_tokens = context_tokens.min(spec.learned_positions.unwrap_or(usize::MAX));
        let mut eos_ids = tokenizer.eos_ids().to_vec();
        eos_ids.extend(spec.eos_token_ids.iter().filter(|id| !tokenizer.eos_ids().contains(id)));
        let template = tokenizer.compile_template()?;
        let model = Some(equip(spec, weights, adapter.as_ref(), context_tokens)?);
        Ok(Session { tokenizer, template, model, eos_ids, context_tokens })
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        self.model().spec()
    }

    /// Takes another adapter in place of the present one, or none.
    ///
    /// # Errors
    /// What is wrong with the adapter; the session is then without one.
    pub fn set_adapter(&mut self, folder: Option<&Path>) -> Result<()> {
        let adapter = folder.map(|folder| Adapter::load(folder, self.spec())).transpose()?;
        let model = self.model.take().expect("present between calls");
        let spec = model.spec().clone();
        self.model =
            Some(equip(spec, model.into_weights(), adapter.as_ref(), self.context_tokens)?);
        Ok(())
    }

    /// Text of a conversation for the model to continue.
    ///
    /// # Errors
    /// `Input` when the model has no chat template or the template refuses.
    pub fn render(&self, messages: &[(&str, &str)]) -> Result<String> {
        let Some(template) = &self.template else {
            return Err(Error::input("the tokenizer has no chat template")
                .hint("use `nibble generate --raw` with this base model"));
        };
        let message = |(role, content): &(&str, &str)| json!({"role": role, "content": content});
        let messages: Vec<Value> = messages.iter().map(message).collect();
        template.render(&messages, &Map::new(), true)
    }

    /// Continues `prompt` until an end-of-sequence token or `max_new_tokens`; `on_text` gets the
    /// text as it comes.
    ///
    /// # Errors
    /// `Usage` when the prompt does not fit the context; what `on_text` returns.
    pub fn generate(
        &mut self,
        prompt: &str,
        sampler: &mut Sampler,
        max_new_tokens: usize,
        mut on_text: impl FnMut(&str) -> Result<()>,
    ) -> Result<Finish> {
        let Session { tokenizer, model, eos_ids, context_tokens, .. } = self;
        let model = model.as_mut().expect("present between calls");
        let mut history = prompt_ids(tokenizer, prompt)?;
        if history.len() >= *context_tokens {
            return Err(Error::usage(format_args!(
                "the prompt has {} tokens, the context {context_tokens}",
                history.len()
            ))
            .hint("raise `--context-length` or shorten the prompt"));
        }
        model.clear_cache();
        let (last, before) = history.split_last().expect("a prompt has a token");
        for piece in before.chunks(PREFILL_TOKENS) {
            model.decode(piece)?;
        }
        let mut next = *last;
        let mut stream = TextStream::new(tokenizer);
        let mut finish = Finish::Length;
        for _ in 0..max_new_tokens.min(*context_tokens - history.len()) {
            next = sampler.next(model.decode(&[next])?, &history)?;
            if eos_ids.contains(&next) {
                finish = Finish::EndOfSequence;
                break;
            }
            history.push(next);
            let text = stream.push(next)?;
            if !text.is_empty() {
                on_text(&text)?;
            }
        }
        on_text(&stream.finish()?)?;
        Ok(finish)
    }

    fn model(&self) -> &Model {
        self.model.as_ref().expect("present between calls")
    }
}

/// Ids of a rendered prompt, behind a BOS where the tokenizer wants one.
///
/// # Errors
/// `Usage` when it is empty, `Input` when the tokenizer refuses it.
pub(crate) fn prompt_ids(tokenizer: &ChatTokenizer, prompt: &str) -> Result<Vec<u32>> {
    let mut ids = tokenizer.encode(prompt)?;
    if let Some(bos) = tokenizer.bos().filter(|_| tokenizer.adds_bos())
        && ids.first() != Some(&bos.id)
    {
        ids.insert(0, bos.id);
    }
    if ids.is_empty() {
        return Err(Error::usage("the prompt is empty"));
    }
    Ok(ids)
}

/// Weights, and the adapter unless it could only be merged into them.
///
/// # Errors
/// Whatever is wrong with the files.
pub fn load_weights(
    checkpoint: &Checkpoint,
    spec: &ModelSpec,
    quantization: Option<&BlockFormat>,
    adapter: Option<&Path>,
) -> Result<(Weights, Option<Adapter>)> {
    let Some(folder) = adapter else {
        return Ok((Weights::load(checkpoint, spec, quantization, None)?, None));
    };
    let adapter = PeftAdapter::open(folder, spec)?;
    if adapter.beyond_lora().is_empty() {
        let weights = Weights::load(checkpoint, spec, quantization, None)?;
        return Ok((weights, Some(adapter.into_trainable()?)));
    }
    let merge = adapter.merge(spec)?;
    Ok((Weights::load(checkpoint, spec, quantization, Some(&merge))?, None))
}

fn equip(
    spec: ModelSpec,
    weights: Weights,
    adapter: Option<&Adapter>,
    context_tokens: usize,
) -> Result<Model> {
    let settings = Settings {
        tokens: PREFILL_TOKENS.min(context_tokens),
        longest_document: PREFILL_TOKENS.min(context_tokens),
        logit_rows: 1,
        policies: Vec::new(),
        targets: adapter.map(|adapter| adapter.targets.clone()).unwrap_or_default(),
        lora_dropout: false,
        bf16_working: false,
        threads: rayon::current_num_threads(),
        cache_tokens: context_tokens,
    };
    let mut model = Model::new(spec, weights, settings, None)?;
    if let Some(adapter) = adapter {
        model.parameters_mut().load(adapter);
    }
    Ok(model)
}
