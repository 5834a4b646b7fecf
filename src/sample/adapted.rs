//! A model that is not trained, and its adapters, one at a time.

use std::path::{Path, PathBuf};

use nibble_quant::BlockFormat;

use crate::adapter::{Adapter, PeftAdapter};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::model::Model;
use crate::model::spec::ModelSpec;
use crate::model::weights::Weights;
use crate::plan::Settings;

/// Weights with one adapter, or none. An adapter that has more than LoRA on linear layers is merged while they
/// are loaded.
pub struct AdaptedModel<K: Kernels> {
    kernels: K,
    path: PathBuf,
    quantization: Option<BlockFormat>,
    /// They lack what depends on the adapter and the backend.
    settings: Settings,
    /// What to do where the memory of a pass is refused.
    way_out: Option<String>,
    /// Absent only where another adapter could not be taken.
    model: Option<Model<K>>,
    /// Whether an adapter is merged into the weights, which are then no longer the base's.
    merged: bool,
}

impl<K: Kernels> AdaptedModel<K> {
    /// Loads the weights of `checkpoint` for passes of `settings`, whose targets and precision are those of
    /// the adapter and the backend. `way_out` is the hint where the memory of a pass is refused.
    ///
    /// # Errors
    /// Whatever is wrong with the files, and `Budget`.
    pub fn load(
        kernels: K,
        checkpoint: &Checkpoint,
        spec: ModelSpec,
        quantization: Option<&BlockFormat>,
        adapter: Option<PeftAdapter>,
        settings: Settings,
        way_out: Option<String>,
    ) -> Result<Self> {
        let merged = adapter.as_ref().is_some_and(is_merged);
        let (weights, adapter) = load_weights(checkpoint, &spec, quantization, adapter)?;
        let weights = weights.upload(&kernels)?;
        let (path, quantization) = (checkpoint.path().to_path_buf(), quantization.copied());
        let mut adapted =
            AdaptedModel { kernels, path, quantization, settings, way_out, model: None, merged };
        adapted.equip(spec, weights, adapter.as_ref())?;
        Ok(adapted)
    }

    /// The folder or file of the weights.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model as it is.
    ///
    /// # Errors
    /// `Budget` where it was given up for an adapter that it could not take.
    pub fn model(&self) -> Result<&Model<K>> {
        self.model.as_ref().ok_or_else(without_model)
    }

    /// The model at work.
    ///
    /// # Errors
    /// As [`model`](Self::model).
    pub fn model_mut(&mut self) -> Result<&mut Model<K>> {
        self.model.as_mut().ok_or_else(without_model)
    }

    /// Whether the weights are those of the base no longer.
    pub fn is_merged(&self) -> bool {
        self.merged
    }

    /// An adapter that this model can take.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn open_adapter(&self, folder: &Path) -> Result<PeftAdapter> {
        PeftAdapter::open(folder, self.model()?.spec())
    }

    /// Takes another adapter in place of the present one, or none. The weights stay, unless the present or
    /// the other one has to be merged into them: then they are loaded anew.
    ///
    /// # Errors
    /// When the model cannot be loaded anew, or the memory for the other adapter is refused: then it is given
    /// up.
    pub fn set_adapter(&mut self, adapter: Option<PeftAdapter>) -> Result<()> {
        let spec = self.model()?.spec().clone();
        let merges = adapter.as_ref().is_some_and(is_merged);
        let (weights, adapter) = if merges || self.merged {
            self.model = None;
            let checkpoint = Checkpoint::open(&self.path)?;
            let format = self.quantization.as_ref();
            let (weights, adapter) = load_weights(&checkpoint, &spec, format, adapter)?;
            (weights.upload(&self.kernels)?, adapter)
        } else {
            let adapter = adapter.map(PeftAdapter::into_trainable).transpose()?;
            let model = self.model.take().ok_or_else(without_model)?;
            (model.into_weights(), adapter)
        };
        self.merged = merges;
        self.equip(spec, weights, adapter.as_ref())
    }

    fn equip(
        &mut self,
        spec: ModelSpec,
        weights: Weights<K>,
        adapter: Option<&Adapter>,
    ) -> Result<()> {
        let targets = adapter.map(|adapter| adapter.targets.clone()).unwrap_or_default();
        let settings = Settings { targets, bf16_working: K::TAKES_BF16, ..self.settings.clone() };
        let model = Model::with_kernels(self.kernels.clone(), spec, weights, settings);
        let mut model = model.map_err(|error| match (&self.way_out, error) {
            (Some(way_out), error @ Error::Budget(_)) => error.hint(way_out),
            (_, error) => error,
        })?;
        if let Some(adapter) = adapter {
            model.parameters_mut().load(adapter);
        }
        self.model = Some(model);
        Ok(())
    }
}

/// Whether an adapter is more than LoRA on linear layers.
fn is_merged(adapter: &PeftAdapter) -> bool {
    !adapter.beyond_lora().is_empty()
}

fn without_model() -> Error {
    Error::budget("the model was given up when it could not take another adapter")
        .hint("start again with that adapter, and a smaller `--context-length` or more free memory")
}

/// Weights, and the adapter unless it is merged into them.
fn load_weights(
    checkpoint: &Checkpoint,
    spec: &ModelSpec,
    quantization: Option<&BlockFormat>,
    adapter: Option<PeftAdapter>,
) -> Result<(Weights, Option<Adapter>)> {
    let Some(adapter) = adapter else {
        return Ok((Weights::load(checkpoint, spec, quantization, None)?, None));
    };
    if !is_merged(&adapter) {
        let weights = Weights::load(checkpoint, spec, quantization, None)?;
        return Ok((weights, Some(adapter.into_trainable()?)));
    }
    let merge = adapter.merge(spec)?;
    Ok((Weights::load(checkpoint, spec, quantization, Some(&merge))?, None))
}
