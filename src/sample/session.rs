//! A model that answers: weights, one adapter at a time, and its speaker.

use std::path::{Path, PathBuf};

use nibble_quant::BlockFormat;

use super::{Finish, Limits, Prompt, Sampler, Speaker, Wish};
use crate::adapter::{Adapter, PeftAdapter};
use crate::checkpoint::{Checkpoint, CheckpointKind};
use crate::data::ChatTokenizer;
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::kernels::cpu::Cpu;
use crate::model::Model;
use crate::model::families::spec_from_config;
use crate::model::spec::ModelSpec;
use crate::model::weights::Weights;
use crate::plan::Settings;

/// Tokens of a prompt that are fed at a time.
const PREFILL_TOKENS: usize = 512;

/// A model at rest or at work.
pub struct Session<K: Kernels = Cpu> {
    kernels: K,
    speaker: Speaker,
    /// Absent only where another adapter could not be taken.
    model: Option<Model<K>>,
    kind: CheckpointKind,
    /// Whether an adapter is merged into the weights, which are then no longer the base's.
    merged: bool,
    path: PathBuf,
    chat_template: Option<String>,
    quantization: Option<BlockFormat>,
    context_tokens: usize,
}

impl<K: Kernels> Session<K> {
    /// Loads model and adapter. `chat_template`, a name or a file, is used whatever model and adapter
    /// bring. An adapter that has more than LoRA on linears is merged while
    /// loading.
    ///
    /// # Errors
    /// Whatever is wrong with the files.
    pub fn open(
        kernels: K,
        path: &Path,
        quantization: Option<&BlockFormat>,
        adapter: Option<&Path>,
        chat_template: Option<&str>,
        context_tokens: usize,
    ) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let spec = spec_from_config(checkpoint.config())?;
        kernels.check_model(&spec)?;
        let tokenizer = ChatTokenizer::open_for(path, chat_template, adapter)?;
        let given = adapter.is_some();
        let (weights, adapter) = load_weights(&checkpoint, &spec, quantization, adapter)?;
        let merged = given && adapter.is_none();
        let context_tokens = spec.possible_length(context_tokens);
        let speaker = Speaker::new(tokenizer, &spec.eos_token_ids)?;
        let weights = weights.upload(&kernels)?;
        let model = Some(answering(&kernels, spec, weights, adapter.as_ref(), context_tokens)?);
        let (path, quantization) = (path.to_path_buf(), quantization.copied());
        let kind = checkpoint.kind();
        let chat_template = chat_template.map(str::to_string);
        Ok(Session {
            kernels,
            speaker,
            model,
            kind,
            merged,
            path,
            chat_template,
            quantization,
            context_tokens,
        })
    }

    /// What the base's weights were when they were read.
    pub fn kind(&self) -> CheckpointKind {
        self.kind
    }

    /// What it is.
    ///
    /// # Errors
    /// `Usage` when the session is over.
    pub fn spec(&self) -> Result<&ModelSpec> {
        Ok(self.model()?.spec())
    }

    /// Text in and out of it.
    pub fn speaker(&self) -> &Speaker {
        &self.speaker
    }

    /// Takes another adapter in place of the present one, or none. The weights stay, unless the
    /// present or the other one has to be merged into them: then they are loaded anew.
    ///
    /// # Errors
    /// What is wrong with the adapter; the present one then stays. When the model cannot be loaded
    /// anew, or the memory for the other adapter is refused, the session is over.
    pub fn set_adapter(&mut self, folder: Option<&Path>) -> Result<()> {
        let spec = self.model()?.spec().clone();
        let adapter = folder.map(|folder| PeftAdapter::open(folder, &spec)).transpose()?;
        self.speaker.follow(&self.path, self.chat_template.as_deref(), folder)?;
        let merges = adapter.as_ref().is_some_and(|adapter| !adapter.beyond_lora().is_empty());
        let (weights, adapter) = if merges || self.merged {
            self.model = None;
            let checkpoint = Checkpoint::open(&self.path)?;
            let format = self.quantization.as_ref();
            let (weights, adapter) = load_weights(&checkpoint, &spec, format, folder)?;
            (weights.upload(&self.kernels)?, adapter)
        } else {
            let adapter = adapter.map(PeftAdapter::into_trainable).transpose()?;
            let Some(model) = self.model.take() else { return Ok(()) };
            (model.into_weights(), adapter)
        };
        self.merged = merges;
        let context_tokens = self.context_tokens;
        let model = answering(&self.kernels, spec, weights, adapter.as_ref(), context_tokens)?;
        self.model = Some(model);
        Ok(())
    }

    /// Continues `prompt`: see [`Speaker::answer`].
    ///
    /// # Errors
    /// As there.
    pub fn answer(
        &mut self,
        prompt: &Prompt,
        sampler: &mut Sampler,
        max_new_tokens: usize,
        listener: impl FnMut(&str) -> Result<Wish>,
    ) -> Result<Finish> {
        let context_tokens = self.context_tokens;
        let limits = Limits { max_new_tokens, context_tokens, prefill_tokens: PREFILL_TOKENS };
        let Session { speaker, model, .. } = self;
        let model = model.as_mut().ok_or_else(without_model)?;
        speaker.answer(model, prompt, sampler, limits, listener)
    }

    fn model(&self) -> Result<&Model<K>> {
        self.model.as_ref().ok_or_else(without_model)
    }
}

fn without_model() -> Error {
    Error::budget("the model was given up when it could not take another adapter")
        .hint("start again with that adapter, and a smaller `--context-length` or more free memory")
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

/// A model that is not trained, with `adapter`; `settings` lack what depends on those two.
///
/// # Errors
/// `Budget` when the memory is refused, and those of the backend.
pub fn equip<K: Kernels>(
    kernels: &K,
    spec: ModelSpec,
    weights: Weights<K>,
    adapter: Option<&Adapter>,
    settings: Settings,
) -> Result<Model<K>> {
    let targets = adapter.map(|adapter| adapter.targets.clone()).unwrap_or_default();
    let settings = Settings { targets, bf16_working: K::TAKES_BF16, ..settings };
    let mut model = Model::with_kernels(kernels.clone(), spec, weights, settings)?;
    if let Some(adapter) = adapter {
        model.parameters_mut().load(adapter);
    }
    Ok(model)
}

fn answering<K: Kernels>(
    kernels: &K,
    spec: ModelSpec,
    weights: Weights<K>,
    adapter: Option<&Adapter>,
    context_tokens: usize,
) -> Result<Model<K>> {
    let settings = Settings::of_pass(PREFILL_TOKENS.min(context_tokens), 1);
    let settings = Settings { cache_tokens: context_tokens, ..settings };
    let model = equip(kernels, spec, weights, adapter, settings);
    model.map_err(|error| shorter(error, context_tokens))
}

/// The memory that was refused is that of the context: the flag that `generate` and `chat` have.
fn shorter(error: Error, context_tokens: usize) -> Error {
    match error {
        Error::Budget(_) => error.hint(format_args!(
            "lower `--context-length`, which is {context_tokens}, or free memory"
        )),
        other => other,
    }
}
