//! A model that answers: weights, one adapter at a time, and its speaker.

use std::path::Path;

use nibble_quant::BlockFormat;

use super::{Finish, Limits, Sampler, Speaker, Wish};
use crate::adapter::{Adapter, PeftAdapter};
use crate::checkpoint::Checkpoint;
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
    context_tokens: usize,
}

impl<K: Kernels> Session<K> {
    /// Loads model and adapter. An adapter that has more than LoRA on linears is merged while
    /// loading.
    ///
    /// # Errors
    /// Whatever is wrong with the files.
    pub fn open(
        kernels: K,
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
        let speaker = Speaker::new(tokenizer, &spec.eos_token_ids)?;
        let weights = weights.upload(&kernels)?;
        let model = equip(&kernels, spec, weights, adapter.as_ref(), context_tokens)?;
        let model = Some(model);
        Ok(Session { kernels, speaker, model, context_tokens })
    }

    /// Text in and out of it.
    pub fn speaker(&self) -> &Speaker {
        &self.speaker
    }

    /// Takes another adapter in place of the present one, or none.
    ///
    /// # Errors
    /// What is wrong with the adapter; the present one then stays. `Budget` when the memory for
    /// the other one is refused: the session is then over.
    pub fn set_adapter(&mut self, folder: Option<&Path>) -> Result<()> {
        let spec = self.model()?.spec().clone();
        let adapter = folder.map(|folder| Adapter::load(folder, &spec)).transpose()?;
        let Some(model) = self.model.take() else { return Ok(()) };
        let weights = model.into_weights();
        let model = equip(&self.kernels, spec, weights, adapter.as_ref(), self.context_tokens)?;
        self.model = Some(model);
        Ok(())
    }

    /// Continues `text`: see [`Speaker::answer`].
    ///
    /// # Errors
    /// As there.
    pub fn answer(
        &mut self,
        text: &str,
        sampler: &mut Sampler,
        max_new_tokens: usize,
        listener: impl FnMut(&str) -> Result<Wish>,
    ) -> Result<Finish> {
        let context_tokens = self.context_tokens;
        let limits = Limits { max_new_tokens, context_tokens, prefill_tokens: PREFILL_TOKENS };
        let Session { speaker, model, .. } = self;
        let model = model.as_mut().ok_or_else(without_model)?;
        speaker.answer(model, text, sampler, limits, listener)
    }

    fn model(&self) -> Result<&Model<K>> {
        self.model.as_ref().ok_or_else(without_model)
    }
}

fn without_model() -> Error {
    Error::budget("the model was given up when an adapter did not fit the memory")
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

fn equip<K: Kernels>(
    kernels: &K,
    spec: ModelSpec,
    weights: Weights<K>,
    adapter: Option<&Adapter>,
    context_tokens: usize,
) -> Result<Model<K>> {
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
    let mut model = Model::on(kernels.clone(), spec, weights, settings, None)?;
    if let Some(adapter) = adapter {
        model.parameters_mut().load(adapter);
    }
    Ok(model)
}
