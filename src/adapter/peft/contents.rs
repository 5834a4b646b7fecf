//! Which tensors an adapter's file must and may hold for a model, and how a file differs.
//!
//! Keys are `base_model.model.` + Hugging Face path + a suffix. Source: PEFT 0.21.2,
//! `get_peft_model_state_dict`.

use std::collections::BTreeMap;
use std::fmt;

use super::super::targets::{ModuleKind, Selected};
use super::TokenRows;
use super::settings::{PeftSettings, TrainedBias};
use crate::checkpoint::DenseTensor;
use crate::error::{Error, Result};
use crate::model::spec::{ModelSpec, TensorRole, TensorSpec};

/// What PEFT puts before the model's own names.
const PREFIX: &str = "base_model.model.";

/// What a stored tensor is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// A of the selected module with this number.
    A(usize),
    /// B of it.
    B(usize),
    /// B's bias.
    BiasOfB(usize),
    /// DoRA's magnitude.
    Magnitude(usize),
    /// New rows for the token list with this number.
    TokenRows(usize),
    /// The new value of a base tensor.
    Base(TensorSpec),
}

/// A tensor that may be in the file.
struct Slot {
    part: Part,
    shape: Vec<usize>,
    required: bool,
}

/// The keys that fit a model and settings.
pub struct Contents {
    slots: BTreeMap<String, Slot>,
}

impl Contents {
    /// The keys of an adapter with these settings on `spec`; `selected` are its modules, `rows` its
    /// trained token rows.
    pub fn new(
        settings: &PeftSettings,
        spec: &ModelSpec,
        selected: &[Selected],
        rows: &[TokenRows],
    ) -> Self {
        let mut contents = Contents { slots: BTreeMap::new() };
        for (number, target) in selected.iter().enumerate() {
            contents.add_low_rank(settings, number, target);
        }
        for (number, tokens) in rows.iter().enumerate() {
            let shape = vec![tokens.rows.len(), spec.hidden_size];
            let key = format!("{}.token_adapter.trainable_tokens_delta", tokens.path);
            contents.add(&key, Part::TokenRows(number), shape, true);
        }
        for tensor in base_tensors(spec) {
            contents.add_base(settings, selected, tensor);
        }
        contents
    }

    /// Sorts the tensors of a file into their places.
    ///
    /// # Errors
    /// `Input` with the differences when a key is missing, unknown or of another shape.
    pub fn place(
        &self,
        tensors: BTreeMap<String, DenseTensor>,
    ) -> Result<Vec<(Part, DenseTensor)>> {
        let mut difference = Difference::default();
        for (key, slot) in &self.slots {
            match tensors.get(key) {
                None if slot.required => {
                    difference.missing.push(format!("{key} {:?}", slot.shape));
                }
                Some(tensor) if tensor.shape != slot.shape => difference
                    .shape
                    .push(format!("{key} expected {:?}, got {:?}", slot.shape, tensor.shape)),
                _ => {}
            }
        }
        let mut placed = Vec::new();
        for (key, tensor) in tensors {
            match self.slots.get(&key) {
                Some(slot) => placed.push((slot.part.clone(), tensor)),
                None => difference.unexpected.push(format!("{key} {:?}", tensor.shape)),
            }
        }
        if difference.is_empty() { Ok(placed) } else { Err(difference.into_error(placed.len())) }
    }

    fn add(&mut self, key: &str, part: Part, shape: Vec<usize>, required: bool) {
        self.slots.insert(format!("{PREFIX}{key}"), Slot { part, shape, required });
    }

    fn add_low_rank(&mut self, settings: &PeftSettings, number: usize, target: &Selected) {
        let Selected { module, r, .. } = target;
        let (path, r) = (&module.path, *r);
        let (wide_in, wide_out) = (module.in_features, module.out_features);
        let (a, b) = match module.kind {
            ModuleKind::Embedding => ("lora_embedding_A", "lora_embedding_B"),
            _ => ("lora_A.weight", "lora_B.weight"),
        };
        self.add(&format!("{path}.{a}"), Part::A(number), vec![r, wide_in], true);
        self.add(&format!("{path}.{b}"), Part::B(number), vec![wide_out, r], true);
        if settings.use_dora {
            let key = format!("{path}.lora_magnitude_vector");
            self.add(&key, Part::Magnitude(number), vec![wide_out], true);
        }
        if settings.lora_bias && module.kind != ModuleKind::Embedding {
            let key = format!("{path}.lora_B.bias");
            self.add(&key, Part::BiasOfB(number), vec![wide_out], true);
        }
    }

    /// A base tensor is stored when its module was trained in full, when it is a trained bias, or,
    /// optionally, when it is the embedding's or the head's weight.
    fn add_base(&mut self, settings: &PeftSettings, selected: &[Selected], tensor: TensorSpec) {
        let (path, leaf) = tensor.name.rsplit_once('.').unwrap_or((&tensor.name, "weight"));
        let adapted = selected.iter().any(|target| target.module.path == path);
        let bias = match settings.bias {
            TrainedBias::None => false,
            TrainedBias::LoraOnly => leaf == "bias" && adapted,
            TrainedBias::All => leaf == "bias",
        };
        let in_full = settings.modules_to_save.iter().any(|name| contains(name, path));
        let vocabulary = matches!(tensor.role, TensorRole::Embedding | TensorRole::Head);
        if !(bias || in_full || vocabulary) {
            return;
        }
        let key = if adapted && !in_full {
            format!("{path}.base_layer.{leaf}")
        } else {
            tensor.name.clone()
        };
        let shape = tensor.shape_in_file(false);
        self.add(&key, Part::Base(tensor), shape, bias || in_full);
    }
}

/// Whether a module whose path ends in `name`, be it within a part of it, as PEFT compares, is at `path` or
/// contains it. Source: PEFT `utils/other.py`, `_set_trainable`.
fn contains(name: &str, path: &str) -> bool {
    let mut whole = path;
    loop {
        if whole.ends_with(name) {
            return true;
        }
        match whole.rsplit_once('.') {
            Some((parent, _)) => whole = parent,
            None => return false,
        }
    }
}

/// The model's tensors, with the head also where it is tied to the embedding.
fn base_tensors(spec: &ModelSpec) -> Vec<TensorSpec> {
    let mut tensors = spec.inventory();
    if spec.tie_word_embeddings {
        tensors.push(spec.head_tensor());
    }
    tensors
}

/// How a file differs from what the settings and the model imply.
#[derive(Debug, Default)]
struct Difference {
    missing: Vec<String>,
    unexpected: Vec<String>,
    shape: Vec<String>,
}

impl Difference {
    fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.shape.is_empty()
    }

    fn into_error(self, placed: usize) -> Error {
        if self.unexpected.iter().any(|key| key.contains("language_model.")) {
            let what = format_args!("adapter for a model of text and images{self}");
            return Error::input(what).hint("of such a model, only the text model is read here");
        }
        if placed == 0 || !self.shape.is_empty() {
            Error::input(format_args!("adapter for another model{self}"))
        } else {
            Error::input(format_args!("tensors do not fit the settings and this model{self}"))
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 4;
        let kinds =
            [("missing", &self.missing), ("unexpected", &self.unexpected), ("shape", &self.shape)];
        for (kind, entries) in kinds {
            for entry in entries.iter().take(SHOWN) {
                write!(f, "\n  {kind:<11}{entry}")?;
            }
            if entries.len() > SHOWN {
                write!(f, "\n  {kind:<11}and {} more", entries.len() - SHOWN)?;
            }
        }
        Ok(())
    }
}
