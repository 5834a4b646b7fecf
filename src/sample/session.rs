//! A model that answers: weights, one adapter at a time, and its speaker.

use std::path::Path;

use nibble_quant::BlockFormat;

use super::{AdaptedModel, Finish, Limits, Prompt, Sampler, Speaker, Wish};
use crate::adapter::PeftAdapter;
use crate::checkpoint::{Checkpoint, CheckpointKind};
use crate::data::{ChatTokenizer, TemplateChoice};
use crate::error::Result;
use crate::kernels::Kernels;
use crate::kernels::cpu::Cpu;
use crate::model::families::spec_from_config;
use crate::model::spec::ModelSpec;
use crate::plan::Settings;

/// Tokens of a prompt that are fed at a time.
const PREFILL_TOKENS: usize = 512;

/// A model at rest or at work.
pub struct Session<K: Kernels = Cpu> {
    model: AdaptedModel<K>,
    speaker: Speaker,
    kind: CheckpointKind,
    chat_template: TemplateChoice,
    context_tokens: usize,
}

impl<K: Kernels> Session<K> {
    /// Loads model and adapter. What is asked for as `chat_template` is used whatever these bring.
    ///
    /// # Errors
    /// Whatever is wrong with the files; `Budget`.
    pub fn open(
        kernels: K,
        path: &Path,
        quantization: Option<&BlockFormat>,
        adapter: Option<&Path>,
        chat_template: TemplateChoice,
        context_tokens: usize,
    ) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let spec = spec_from_config(checkpoint.config())?;
        kernels.check_model(&spec)?;
        let tokenizer = ChatTokenizer::open_for(path, &chat_template, adapter)?;
        let adapter = adapter.map(|folder| PeftAdapter::open(folder, &spec)).transpose()?;
        let context_tokens = spec.possible_length(context_tokens);
        let speaker = Speaker::new(tokenizer, &spec.eos_token_ids)?;
        let settings = Settings {
            cache_tokens: context_tokens,
            ..Settings::of_pass(PREFILL_TOKENS.min(context_tokens), 1)
        };
        // The flag that `generate` and `chat` have.
        let shorter =
            format!("lower `--context-length`, which is {context_tokens}, or free memory");
        let model = AdaptedModel::load(
            kernels,
            &checkpoint,
            spec,
            quantization,
            adapter,
            settings,
            Some(shorter),
        )?;
        let kind = checkpoint.kind();
        Ok(Session { model, speaker, kind, chat_template, context_tokens })
    }

    /// What the base's weights were when they were read.
    pub fn kind(&self) -> CheckpointKind {
        self.kind
    }

    /// What it is.
    ///
    /// # Errors
    /// `Budget` when the session is over.
    pub fn spec(&self) -> Result<&ModelSpec> {
        Ok(self.model.model()?.spec())
    }

    /// Text in and out of it.
    pub fn speaker(&self) -> &Speaker {
        &self.speaker
    }

    /// Takes another adapter in place of the present one, or none: [`AdaptedModel::set_adapter`].
    ///
    /// # Errors
    /// What is wrong with the adapter; the present one then stays. When the model cannot be loaded
    /// anew, or the memory for the other adapter is refused, the session is over.
    pub fn set_adapter(&mut self, folder: Option<&Path>) -> Result<()> {
        let adapter = folder.map(|folder| self.model.open_adapter(folder)).transpose()?;
        self.speaker.follow(self.model.path(), &self.chat_template, folder)?;
        self.model.set_adapter(adapter)
    }

    /// Continues `prompt` for so many tokens at most, or until one of these strings: see [`Speaker::answer`].
    ///
    /// # Errors
    /// As [`Speaker::answer`].
    pub fn answer(
        &mut self,
        prompt: &Prompt,
        sampler: &mut Sampler,
        (max_new_tokens, stop_strings): (usize, &[String]),
        listener: impl FnMut(&str) -> Result<Wish>,
    ) -> Result<Finish> {
        let context_tokens = self.context_tokens;
        let prefill_tokens = PREFILL_TOKENS;
        let limits = Limits { max_new_tokens, context_tokens, prefill_tokens, stop_strings };
        let model = self.model.model_mut()?;
        self.speaker.answer(model, prompt, sampler, limits, listener)
    }
}
