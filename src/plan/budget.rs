//! Which layers keep their activations, so that a run fits the memory that it may use.

use clap::ValueEnum;
use nibble_quant::{BlockFormat, FloatType};

use super::layout::{MemoryPlan, Policy, Settings, layout};
use crate::checkpoint::{Checkpoint, StoredType};
use crate::error::{Error, Result};
use crate::model::spec::{ModelSpec, TensorRole, TensorSpec};

/// Share of the free memory that `auto` uses where no budget is given.
const USABLE_SHARE: f64 = 0.9;
/// Suggested lengths are multiples of this many tokens.
const LENGTH_STEP: usize = 64;

/// What happens to activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Activations {
    /// As many blocks as fit the budget keep theirs
    Auto,
    /// All blocks keep everything
    Keep,
    /// All blocks keep their input and recompute the rest
    Checkpoint,
}

/// How much memory there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// The user's: a plan above it is refused.
    Budget(u64),
    /// What is free on this machine: `auto` tries to stay below.
    Free(u64),
}

/// A run's demand for memory, before its policies are chosen.
#[derive(Debug, Clone)]
pub struct Demand<'a> {
    /// The model.
    pub spec: &'a ModelSpec,
    /// Sizes; the policies are not looked at.
    pub settings: &'a Settings,
    /// What the user wants.
    pub activations: Activations,
    /// Bytes outside the arena: frozen weights, tokenizer, data.
    pub other_bytes: u64,
}

impl Demand<'_> {
    /// The policies of all layers: of those that are allowed, the ones that recompute least within
    /// `limit`.
    ///
    /// # Errors
    /// `Budget` when nothing fits, with the nearest settings that do.
    pub fn policies(&self, limit: Limit) -> Result<Vec<Policy>> {
        let layers = self.spec.num_layers;
        let kept: Vec<usize> = match self.activations {
            Activations::Auto => (0..=layers).rev().collect(),
            Activations::Keep => vec![layers],
            Activations::Checkpoint => vec![0],
        };
        let bytes = match limit {
            Limit::Budget(bytes) => bytes,
            Limit::Free(bytes) => (bytes as f64 * USABLE_SHARE) as u64,
        };
        let fitting = kept.iter().find(|&&kept| self.total_bytes(self.settings, kept) <= bytes);
        match (fitting, limit, kept.last()) {
            (Some(&kept), ..) => Ok(policies(layers, kept)),
            (None, Limit::Free(_), Some(&least)) => Ok(policies(layers, least)),
            (None, ..) => Err(self.shortfall(bytes, kept.last().copied().unwrap_or(0))),
        }
    }

    /// The buffers with `policies`.
    pub fn plan(&self, policies: Vec<Policy>) -> MemoryPlan {
        layout(self.spec, &Settings { policies, ..self.settings.clone() })
    }

    /// Bytes of everything if the last `kept` layers keep their activations.
    fn total_bytes(&self, settings: &Settings, kept: usize) -> u64 {
        let policies = policies(self.spec.num_layers, kept);
        let plan = layout(self.spec, &Settings { policies, ..settings.clone() });
        plan.arena_bytes() as u64 + self.other_bytes
    }

    fn shortfall(&self, budget: u64, kept: usize) -> Error {
        let need = self.total_bytes(self.settings, kept);
        let error = Error::budget(format_args!(
            "plan needs {}, budget is {}",
            gibibytes(need),
            gibibytes(budget)
        ));
        let recomputing = self.total_bytes(self.settings, 0);
        if recomputing <= budget {
            let with = gibibytes(recomputing);
            return error.hint(format_args!("`--activations checkpoint` would need {with}"));
        }
        match self.longest_fit(budget) {
            Some((tokens, bytes)) => error.hint(format_args!(
                "`--activations checkpoint` with {tokens} tokens in a forward pass would need {}: \
                 lower `--max-length` or `--per-device-train-batch-size`",
                gibibytes(bytes)
            )),
            None => {
                let least = gibibytes(self.other_bytes);
                error.hint(format_args!("the frozen weights and data alone take {least}"))
            }
        }
    }

    /// The largest forward pass that fits with recomputation, and what it needs.
    fn longest_fit(&self, budget: u64) -> Option<(usize, u64)> {
        let steps = self.settings.tokens / LENGTH_STEP;
        let need = |tokens: usize| {
            let longest_document = self.settings.longest_document.min(tokens);
            let logit_rows = self.settings.logit_rows.min(tokens);
            let smaller =
                Settings { tokens, longest_document, logit_rows, ..self.settings.clone() };
            self.total_bytes(&smaller, 0)
        };
        let lengths = (1..=steps).rev().map(|step| step * LENGTH_STEP);
        lengths.map(|tokens| (tokens, need(tokens))).find(|(_, bytes)| *bytes <= budget)
    }
}

fn policies(layers: usize, kept: usize) -> Vec<Policy> {
    let policy = |layer| if layer + kept >= layers { Policy::Keep } else { Policy::Checkpoint };
    (0..layers).map(policy).collect()
}

fn gibibytes(bytes: u64) -> String {
    const GIB: f64 = (1u64 << 30) as f64;
    format!("{:.2} GiB", bytes as f64 / GIB)
}

/// Bytes that the frozen weights take in memory once they are read; `format` packs dense linears.
pub fn weight_bytes(
    checkpoint: &Checkpoint,
    spec: &ModelSpec,
    format: Option<&BlockFormat>,
) -> u64 {
    let stored = |tensor: &TensorSpec| {
        let short = tensor.name.strip_prefix("transformer.");
        let infos = checkpoint.tensors().iter();
        let mut named = infos.filter(|info| info.name == tensor.name || short == Some(&info.name));
        named.next()
    };
    let bytes = |tensor: &TensorSpec| {
        let elements: usize = tensor.shape.iter().product();
        match stored(tensor).map(|info| (info.stored, info.bytes)) {
            Some((StoredType::Packed, bytes)) => bytes,
            Some((StoredType::Dense(dtype), _)) => dense_bytes(tensor, dtype, elements, format),
            None => 0,
        }
    };
    spec.inventory().iter().map(|tensor| bytes(tensor) as u64).sum()
}

/// [`weight_bytes`] of a model of which only the config is known, stored in `dtype`.
pub fn config_weight_bytes(
    spec: &ModelSpec,
    dtype: FloatType,
    format: Option<&BlockFormat>,
) -> u64 {
    let bytes = |tensor: &TensorSpec| {
        dense_bytes(tensor, dtype, tensor.shape.iter().product(), format) as u64
    };
    spec.inventory().iter().map(bytes).sum()
}

fn dense_bytes(
    tensor: &TensorSpec,
    dtype: FloatType,
    elements: usize,
    format: Option<&BlockFormat>,
) -> usize {
    match (tensor.role, format) {
        (TensorRole::Linear(_), Some(format)) => format.packed_bytes(elements),
        (TensorRole::Norm | TensorRole::Bias, _) => elements * size_of::<f32>(),
        // Products read bf16 and f32; f16 is widened.
        _ if dtype == FloatType::Bf16 => elements * FloatType::Bf16.size(),
        _ => elements * size_of::<f32>(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::LoraConfig;
    use crate::model::families::spec_from_config;
    use crate::model::weights::Weights;

    fn golden() -> (Checkpoint, ModelSpec) {
        let root = env!("CARGO_MANIFEST_DIR");
        let path = std::path::PathBuf::from(root).join("tests/data/models/llama_s0");
        let checkpoint = Checkpoint::open(&path).unwrap();
        let spec = spec_from_config(checkpoint.config()).unwrap();
        (checkpoint, spec)
    }

    fn settings(spec: &ModelSpec) -> Settings {
        Settings {
            tokens: 1024,
            longest_document: 512,
            logit_rows: 64,
            policies: Vec::new(),
            targets: LoraConfig::default().resolve(spec).unwrap(),
            lora_dropout: false,
            bf16_working: true,
            threads: 2,
            cache_tokens: 0,
        }
    }

    #[test]
    fn weights_take_what_was_predicted() {
        let (checkpoint, spec) = golden();
        for format in [None, Some(BlockFormat::default())] {
            let weights = Weights::load(&checkpoint, &spec, format.as_ref(), None).unwrap();
            let linears = weights.blocks.iter().flat_map(|block| &block.linears);
            let norms = (2 * spec.num_layers + 1) * spec.hidden_size * 4;
            let bytes = linears.map(|linear| linear.weight.bytes()).sum::<usize>()
                + weights.embedding.bytes()
                + weights.head.as_ref().map_or(0, |head| head.bytes())
                + norms;
            assert_eq!(weight_bytes(&checkpoint, &spec, format.as_ref()), bytes as u64);
        }
    }

    #[test]
    fn auto_keeps_as_many_layers_as_fit() {
        let (_, mut spec) = golden();
        spec.num_layers = 6;
        spec.windows = vec![None; 6];
        let settings = settings(&spec);
        let demand = Demand {
            spec: &spec,
            settings: &settings,
            activations: Activations::Auto,
            other_bytes: 1000,
        };
        let need = |kept: usize| demand.total_bytes(&settings, kept);
        // One byte less than all six: a buffer to recompute in takes the place of a kept layer.
        for (kept, next) in [(0, None), (3, Some(2)), (6, Some(4))] {
            let chosen = demand.policies(Limit::Budget(need(kept))).unwrap();
            assert_eq!(chosen, policies(6, kept), "{kept}");
            assert_eq!(demand.plan(chosen).arena_bytes() as u64 + 1000, need(kept));
            let below = demand.policies(Limit::Budget(need(kept) - 1)).ok();
            assert_eq!(below, next.map(|next| policies(6, next)));
        }
        assert_eq!(demand.policies(Limit::Free(0)).unwrap(), policies(6, 0), "tries all the same");
    }

    #[test]
    fn a_plan_over_budget_says_what_would_fit() {
        let (_, spec) = golden();
        let settings = settings(&spec);
        let demand = |activations| Demand {
            spec: &spec,
            settings: &settings,
            activations,
            other_bytes: 1 << 20,
        };
        let keep = demand(Activations::Keep);
        let (all, none) = (keep.total_bytes(&settings, 2), keep.total_bytes(&settings, 0));
        let text = keep.policies(Limit::Budget(all - 1)).unwrap_err().to_string();
        assert!(text.contains("`--activations checkpoint` would need"), "{text}");
        let text = demand(Activations::Auto).policies(Limit::Budget(none - 1)).unwrap_err();
        assert!(text.to_string().contains("with 960 tokens in a forward pass"), "{text}");
        let text = demand(Activations::Auto).policies(Limit::Budget(1000)).unwrap_err();
        assert!(text.to_string().contains("alone take"), "{text}");
    }
}
