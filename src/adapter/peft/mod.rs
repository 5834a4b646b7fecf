//! PEFT's adapter folders: `adapter_config.json`, `adapter_model.safetensors`, `README.md`.
//!
//! [`PeftAdapter::open`] reads everything that PEFT's LoRA writes: LoRA and rsLoRA on linears,
//! embeddings and the head, DoRA, biases of B, trained base biases, fully trained modules and
//! trained token rows. Plain LoRA on the blocks' linears becomes a trainable
//! [`Adapter`]; the rest can be merged into dense weights. Other adapter types
//! (prompt and prefix tuning and so on) are refused.

mod card;
mod contents;
#[cfg(test)]
mod hostile_tests;
mod settings;
mod tensors;
#[cfg(test)]
mod tests;
mod write;

use std::collections::BTreeMap;
use std::path::Path;

use self::contents::{Contents, Part};
pub use self::settings::{PeftSettings, TokenIndices, TrainedBias};
pub use self::tensors::TENSORS_FILE;
pub use self::write::AdapterFiles;
use super::lora::{Adapter, LoraTensors};
use super::targets::{ModuleKind, Selected, modules, trained_target};
use crate::checkpoint::DenseTensor;
use crate::error::{Error, Result};
use crate::model::spec::{ModelSpec, TensorSpec};

/// One low-rank change: `ΔW = s · B A`, both as Nibble multiplies them, so that for an embedding
/// `[V, D]` A is `[R, D]` and B `[V, R]` (PEFT stores their transposes, exchanged).
#[derive(Debug, Clone)]
pub(super) struct LowRank {
    /// The module, its rank and scale.
    pub target: Selected,
    /// A and B.
    pub tensors: LoraTensors,
    /// DoRA's magnitude: one per row of a linear, one per column of an embedding.
    pub magnitude: Option<Vec<f32>>,
    /// B's bias `[out]`.
    pub bias: Option<Vec<f32>>,
}

/// New values for some rows of an embedding or a tied head.
#[derive(Debug, Clone)]
pub(super) struct TokenRows {
    /// Path of the module.
    pub path: String,
    /// Which rows.
    pub rows: Vec<usize>,
    /// Values of the rows `[rows, D]`.
    pub values: Vec<f32>,
}

/// A new value of a base tensor, in the shape and layout of its inventory entry.
#[derive(Debug, Clone)]
pub(super) struct Replaced {
    pub tensor: TensorSpec,
    pub values: Vec<f32>,
}

/// An adapter as PEFT stores it, checked against a model.
#[derive(Debug, Clone)]
pub struct PeftAdapter {
    pub(super) settings: PeftSettings,
    pub(super) low_rank: Vec<LowRank>,
    pub(super) replaced: Vec<Replaced>,
    pub(super) token_rows: Vec<TokenRows>,
}

impl PeftAdapter {
    /// Reads the adapter in `dir`, which must be one for `spec`.
    ///
    /// # Errors
    /// `Io` or `Input` naming the file: unreadable, another adapter type, an unsupported setting,
    /// or tensors that are not exactly those that the settings imply for this model.
    pub fn open(dir: &Path, spec: &ModelSpec) -> Result<Self> {
        let settings = PeftSettings::read(dir)?;
        let base_model = settings.base_model.clone();
        let tensors = tensors::read(dir)?;
        Self::assemble(settings, tensors, spec).map_err(|error| {
            // Whatever does not fit is the file's fault, not that of a flag.
            let error =
                Error::input(&error.message().what).at(dir.join(tensors::TENSORS_FILE).display());
            match base_model {
                Some(name) => error.hint(format_args!("the adapter was trained on `{name}`")),
                None => error.hint("the adapter does not say which model it was trained on"),
            }
        })
    }

    /// What the settings file says.
    pub fn settings(&self) -> &PeftSettings {
        &self.settings
    }

    fn assemble(
        mut settings: PeftSettings,
        stored: BTreeMap<String, DenseTensor>,
        spec: &ModelSpec,
    ) -> Result<Self> {
        let selected = settings.lora.select(spec, &settings.modules_to_save)?;
        let selected = with_tied_head(selected, &settings, spec);
        // PEFT sets it from the model as well; files of GPT-2 adapters may have it wrong.
        settings.lora.fan_in_fan_out = spec.projections.are_transposed();
        let token_rows = token_rows(&settings, spec)?;
        let contents = Contents::new(&settings, spec, &selected, &token_rows);
        let empty = |target| LowRank {
            target,
            tensors: LoraTensors::default(),
            magnitude: None,
            bias: None,
        };
        let low_rank = selected.into_iter().map(empty).collect();
        let mut adapter = PeftAdapter { settings, low_rank, replaced: Vec::new(), token_rows };
        for (part, tensor) in contents.place(stored)? {
            adapter.put(part, tensor.to_f32());
        }
        Ok(adapter)
    }

    fn put(&mut self, part: Part, values: Vec<f32>) {
        match part {
            Part::A(n) | Part::B(n) if self.low_rank[n].is_embedding() => {
                let LowRank { target, tensors, .. } = &mut self.low_rank[n];
                if matches!(part, Part::A(_)) {
                    tensors.b = transposed(&values, target.r);
                } else {
                    tensors.a = transposed(&values, target.module.out_features);
                }
            }
            Part::A(n) => self.low_rank[n].tensors.a = values,
            Part::B(n) => self.low_rank[n].tensors.b = values,
            Part::BiasOfB(n) => self.low_rank[n].bias = Some(values),
            Part::Magnitude(n) => self.low_rank[n].magnitude = Some(values),
            Part::TokenRows(n) => self.token_rows[n].values = values,
            Part::Base(tensor) => {
                let values = match tensor.transposed {
                    true => transposed(&values, tensor.shape[1]),
                    false => values,
                };
                self.replaced.push(Replaced { tensor, values });
            }
        }
    }

    /// What the adapter has beyond LoRA on the blocks' linears, in words; empty is trainable.
    pub fn beyond_lora(&self) -> Vec<String> {
        let settings = &self.settings;
        let mut features = Vec::new();
        let mut feature = |present: bool, name: &str| {
            if present {
                features.push(name.to_string());
            }
        };
        feature(settings.use_dora, "DoRA");
        feature(settings.lora_bias, "lora_bias");
        feature(settings.bias != TrainedBias::None, "trained base biases");
        feature(!settings.token_indices.is_empty(), "trainable_token_indices");
        for LowRank { target, .. } in &self.low_rank {
            let inside = matches!(target.module.kind, ModuleKind::Linear(..));
            feature(!inside, &format!("LoRA on `{}`", target.module.path));
        }
        for Replaced { tensor, .. } in &self.replaced {
            feature(!tensor.name.ends_with(".bias"), &format!("a full `{}`", tensor.name));
        }
        features
    }

    /// The adapter for training and for the fast path of `generate`.
    ///
    /// # Errors
    /// `Input` when it has a feature that can only be merged.
    pub fn into_trainable(self) -> Result<Adapter> {
        let features = self.beyond_lora();
        if !features.is_empty() {
            return Err(Error::input(format_args!(
                "the adapter has {}, which can be merged, not trained or exported by itself",
                features.join(", ")
            ))
            .hint("`nibble merge` it into its base, and train or export the result"));
        }
        let PeftSettings { lora: config, base_model, .. } = self.settings;
        let mut targets = Vec::new();
        let mut tensors = Vec::new();
        for part in self.low_rank {
            targets.push(trained_target(part.target)?);
            tensors.push(part.tensors);
        }
        let (base_packing, base_is_part) = (None, false);
        Ok(Adapter { config, base_model, base_packing, base_is_part, targets, tensors })
    }
}

impl LowRank {
    pub(super) fn is_embedding(&self) -> bool {
        self.target.module.kind == ModuleKind::Embedding
    }
}

impl Adapter {
    /// Reads the PEFT adapter in `dir` for training on a model of this spec.
    ///
    /// # Errors
    /// Those of [`PeftAdapter::open`] and [`PeftAdapter::into_trainable`].
    pub fn load(dir: &Path, spec: &ModelSpec) -> Result<Self> {
        PeftAdapter::open(dir, spec)?.into_trainable().map_err(|e| e.at(dir.display()))
    }

    /// Loads an adapter to begin a run with, which has a dropout of its own; and the dropout that the adapter
    /// was made with.
    ///
    /// # Errors
    /// Those of [`load`](Self::load) and of [`LoraConfig::check_trainable`](super::LoraConfig::check_trainable).
    pub fn load_to_begin_with(
        dir: &Path,
        spec: &ModelSpec,
        lora_dropout: f64,
    ) -> Result<(Self, f64)> {
        let mut adapter = Adapter::load(dir, spec)?;
        adapter.config.check_trainable().map_err(|e| e.at(dir.display()))?;
        let was = std::mem::replace(&mut adapter.config.lora_dropout, lora_dropout);
        Ok((adapter, was))
    }
}

/// `ensure_weight_tying` gives a head that is tied to an adapted embedding the same adapter.
fn with_tied_head(
    mut selected: Vec<Selected>,
    settings: &PeftSettings,
    spec: &ModelSpec,
) -> Vec<Selected> {
    let at = |path: &str| selected.iter().position(|target| target.module.path == path);
    if let (true, Some(embedding), None) = (
        settings.ensure_weight_tying && spec.tie_word_embeddings,
        at(spec.embedding_module()),
        at(spec.head_module()),
    ) {
        let Selected { r, scale, .. } = selected[embedding];
        let head = modules(spec).into_iter().find(|module| module.kind == ModuleKind::Head);
        selected.extend(head.map(|module| Selected { module, r, scale }));
    }
    selected
}

/// The modules of the trained token rows, without their values.
fn token_rows(settings: &PeftSettings, spec: &ModelSpec) -> Result<Vec<TokenRows>> {
    let vocabulary: Vec<String> = modules(spec)
        .into_iter()
        .filter(|module| !matches!(module.kind, ModuleKind::Linear(..)))
        .map(|module| module.path)
        .collect();
    let place = |tokens: &TokenIndices| {
        let name = tokens.module.as_deref().unwrap_or(spec.embedding_module());
        let path = vocabulary.iter().find(|path| path.ends_with(name)).ok_or_else(|| {
            Error::input(format_args!("trainable_token_indices: no embedding `{name}`"))
        })?;
        if let Some(row) = tokens.rows.iter().find(|row| **row >= spec.vocab_size) {
            return Err(Error::input(format_args!(
                "trainable_token_indices: token {row}, the vocabulary has {}",
                spec.vocab_size
            )));
        }
        Ok(TokenRows { path: path.clone(), rows: tokens.rows.clone(), values: Vec::new() })
    };
    let mut all: Vec<TokenRows> =
        settings.token_indices.iter().map(place).collect::<Result<_>>()?;
    // PEFT stores the rows once where embedding and head share the matrix and the rows.
    let of_embedding = all.iter().find(|tokens| tokens.path == spec.embedding_module());
    if let Some(rows) = of_embedding.map(|tokens| tokens.rows.clone()) {
        let shared = |t: &TokenRows| t.path == spec.head_module() && t.rows == rows;
        all.retain(|tokens| !(spec.tie_word_embeddings && shared(tokens)));
    }
    Ok(all)
}

/// `values` has `rows` rows; the result is its transpose.
fn transposed(values: &[f32], rows: usize) -> Vec<f32> {
    let columns = values.len() / rows.max(1);
    let mut out = Vec::with_capacity(values.len());
    for column in 0..columns {
        out.extend((0..rows).map(|row| values[row * columns + column]));
    }
    out
}
