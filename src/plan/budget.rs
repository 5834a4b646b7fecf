//! Which layers keep their activations, so that a run fits the memory that it may use.

use clap::ValueEnum;

use super::layout::MemoryPlan;
use super::settings::{Policy, Settings};
use super::weights::WeightBytes;
use crate::cli::size::ByteSize;
use crate::error::{Error, Result};
use crate::model::spec::ModelSpec;

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
    /// As `checkpoint`, and the inputs wait in pinned memory beside a GPU, or in a file
    Offload,
}

/// Where the frozen weights of the blocks are between their uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WeightsMode {
    /// In memory, or streamed where that lets more blocks keep their activations
    Auto,
    /// In memory from the first use on
    Resident,
    /// In their file: two blocks at a time are in memory, the next one is read ahead
    Stream,
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
#[derive(Clone)]
pub struct Demand<'a> {
    /// The model.
    pub spec: &'a ModelSpec,
    /// Sizes; the policies are not looked at.
    pub settings: &'a Settings,
    /// The backend's buffers for some settings.
    pub layout: &'a dyn Fn(&ModelSpec, &Settings) -> MemoryPlan,
    /// What the user wants.
    pub activations: Activations,
    /// Whether weights may be streamed.
    pub mode: WeightsMode,
    /// Bytes of the frozen weights.
    pub weights: WeightBytes,
    /// Bytes of the rest outside the arena: program, tokenizer, data.
    pub process_bytes: u64,
}

/// What a run does to stay within its memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Of all layers.
    pub policies: Vec<Policy>,
    /// Whether the blocks' weights are streamed from their file.
    pub stream: bool,
}

/// Blocks that keep their activations, and whether weights are streamed.
type Candidate = (usize, bool);

impl Demand<'_> {
    /// What recomputes least within `limit`, of what is allowed; weights are streamed where that
    /// saves recomputation.
    ///
    /// # Errors
    /// `Budget` when nothing fits, with the nearest settings that do; `Usage` when the weights
    /// cannot be streamed and must be.
    pub fn choose(&self, limit: Limit) -> Result<Choice> {
        let candidates = self.candidates()?;
        let bytes = match limit {
            Limit::Budget(bytes) => bytes,
            Limit::Free(bytes) => (bytes as f64 * USABLE_SHARE) as u64,
        };
        let fits = |candidate: &&Candidate| self.total_bytes(self.settings, **candidate) <= bytes;
        let leanest = *candidates.last().expect("one mode and one policy are allowed");
        match (candidates.iter().find(fits), limit) {
            (Some(&candidate), _) => Ok(self.choice(candidate)),
            (None, Limit::Free(_)) => Ok(self.choice(leanest)),
            (None, Limit::Budget(_)) => Err(self.shortfall(bytes, leanest)),
        }
    }

    /// Fastest first: recomputing a block costs more than reading its weights again.
    fn candidates(&self) -> Result<Vec<Candidate>> {
        let layers = self.spec.num_layers;
        let modes: &[bool] = match (self.mode, self.weights.streamed) {
            (WeightsMode::Resident, _) | (WeightsMode::Auto, None) => &[false],
            (WeightsMode::Auto, Some(_)) => &[false, true],
            (WeightsMode::Stream, Some(_)) => &[true],
            (WeightsMode::Stream, None) => {
                let what = "`--weights stream`: the weights are quantized into memory, there is no \
                            4-bit file to read them from again";
                return Err(Error::usage(what)
                    .hint("make one with `nibble quantize` and give it as `--model`"));
            }
        };
        let kept: Vec<usize> = match self.activations {
            Activations::Auto => (0..=layers).rev().collect(),
            Activations::Keep => vec![layers],
            Activations::Checkpoint | Activations::Offload => vec![0],
        };
        let with_modes = |&kept: &usize| modes.iter().map(move |&stream| (kept, stream));
        Ok(kept.iter().flat_map(with_modes).collect())
    }

    fn choice(&self, (kept, stream): Candidate) -> Choice {
        Choice { policies: self.policies(kept), stream }
    }

    /// The last `kept` layers keep their activations.
    fn policies(&self, kept: usize) -> Vec<Policy> {
        let recompute = match self.activations {
            Activations::Offload => Policy::Offload,
            _ => Policy::Checkpoint,
        };
        policies(self.spec.num_layers, kept, recompute)
    }

    /// The same with inputs that are offloaded.
    pub(super) fn offloading(&self) -> Self {
        Demand { activations: Activations::Offload, ..self.clone() }
    }

    /// Bytes of the frozen weights, streamed or not.
    pub fn weight_bytes(&self, stream: bool) -> u64 {
        self.weight_bytes_of(self.settings, stream)
    }

    fn weight_bytes_of(&self, settings: &Settings, stream: bool) -> u64 {
        let streamed = self.weights.streamed.filter(|_| stream);
        streamed.map_or(self.weights.resident, |streamed| streamed.of_pass(settings.tokens))
    }

    /// The buffers with `policies`.
    pub fn plan(&self, policies: Vec<Policy>) -> MemoryPlan {
        (self.layout)(self.spec, &Settings { policies, ..self.settings.clone() })
    }

    /// Bytes of everything if the last `kept` layers keep their activations.
    pub(super) fn total_bytes(&self, settings: &Settings, (kept, stream): Candidate) -> u64 {
        let policies = self.policies(kept);
        let plan = (self.layout)(self.spec, &Settings { policies, ..settings.clone() });
        plan.arena_bytes() as u64 + self.weight_bytes_of(settings, stream) + self.process_bytes
    }

    fn shortfall(&self, budget: u64, leanest: Candidate) -> Error {
        let need = self.total_bytes(self.settings, leanest);
        let error = Error::budget(format_args!(
            "plan needs {}, budget is {}",
            ByteSize(need),
            ByteSize(budget)
        ));
        // What is not asked for, but would help: cheapest first.
        let streams = self.weights.streamed.is_some();
        let nearer = [(leanest.0, true), (0, leanest.1), (0, true)];
        for candidate in nearer.into_iter().filter(|candidate| streams || !candidate.1) {
            let bytes = self.total_bytes(self.settings, candidate);
            if bytes <= budget {
                let (flags, need) = (self.flags(candidate), ByteSize(bytes));
                return error.hint(format_args!("{flags} would need {need}"));
            }
        }
        let least = (0, streams);
        let offloading = self.offloading();
        let bytes = offloading.total_bytes(self.settings, least);
        if bytes <= budget && self.activations != Activations::Offload {
            let (flags, need) = (offloading.flags(least), ByteSize(bytes));
            return error.hint(format_args!("{flags} would need {need}"));
        }
        let flags = self.flags(least);
        if let Some((tokens, bytes)) = self.longest_fit(budget, least) {
            return error.hint(format_args!(
                "{flags} with {tokens} tokens in a forward pass would need {}: lower `--max-length` \
                 or `--per-device-train-batch-size`",
                ByteSize(bytes)
            ));
        }
        if let Some((rank, bytes)) = self.highest_rank_fit(budget, least) {
            return error.hint(format_args!(
                "{flags} with {LENGTH_STEP} tokens in a forward pass (`--max-length`) and \
                 `--lora-r {rank}` would need {}",
                ByteSize(bytes)
            ));
        }
        let least = ByteSize(self.weight_bytes(streams) + self.process_bytes);
        error.hint(format_args!("the frozen weights and data alone take {least}"))
    }

    fn flags(&self, (kept, stream): Candidate) -> String {
        let checkpoint = (kept == 0).then_some(match self.activations {
            Activations::Offload => "`--activations offload`",
            _ => "`--activations checkpoint`",
        });
        let stream = stream.then_some("`--weights stream`");
        [checkpoint, stream].into_iter().flatten().collect::<Vec<_>>().join(" with ")
    }

    /// The largest forward pass that fits with recomputation, and what it needs.
    fn longest_fit(&self, budget: u64, candidate: Candidate) -> Option<(usize, u64)> {
        let steps = self.settings.tokens / LENGTH_STEP;
        let lengths = (1..=steps).rev().map(|step| step * LENGTH_STEP);
        let need = |tokens| self.total_bytes(&shorter(self.settings, tokens), candidate);
        lengths.map(|tokens| (tokens, need(tokens))).find(|(_, bytes)| *bytes <= budget)
    }

    /// The highest rank that fits with the shortest forward pass, and what it needs.
    fn highest_rank_fit(&self, budget: u64, candidate: Candidate) -> Option<(usize, u64)> {
        let mut settings = shorter(self.settings, LENGTH_STEP);
        let mut rank = settings.targets.iter().map(|target| target.r).max()? / 2;
        while rank > 0 {
            settings.targets.iter_mut().for_each(|target| target.r = target.r.min(rank));
            let bytes = self.total_bytes(&settings, candidate);
            if bytes <= budget {
                return Some((rank, bytes));
            }
            rank /= 2;
        }
        None
    }
}

/// The same with at most `tokens` in a forward pass.
fn shorter(settings: &Settings, tokens: usize) -> Settings {
    let tokens = settings.tokens.min(tokens);
    let longest_document = settings.longest_document.min(tokens);
    let logit_rows = settings.logit_rows.min(tokens);
    Settings { tokens, longest_document, logit_rows, ..settings.clone() }
}

fn policies(layers: usize, kept: usize, recompute: Policy) -> Vec<Policy> {
    let policy = |layer| if layer + kept >= layers { Policy::Keep } else { recompute };
    (0..layers).map(policy).collect()
}

#[cfg(test)]
mod tests {
    use super::super::layout;
    use super::*;
    use crate::adapter::LoraConfig;
    use crate::checkpoint::Checkpoint;
    use crate::model::families::spec_from_config;
    use crate::plan::StreamedBytes;

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
            optim: crate::plan::Optim::default(),
            threads: 2,
            cache_tokens: 0,
            mlp_tile_length: None,
            scratch_folder: None,
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
            layout: &layout,
            activations: Activations::Auto,
            mode: WeightsMode::Auto,
            weights: WeightBytes { resident: 900, streamed: None },
            process_bytes: 100,
        };
        let need = |kept: usize| demand.total_bytes(&settings, (kept, false));
        // One byte less than all six: a buffer to recompute in takes the place of a kept layer.
        for (kept, next) in [(0, None), (3, Some(2)), (6, Some(4))] {
            let chosen = demand.choose(Limit::Budget(need(kept))).unwrap();
            assert_eq!(
                chosen,
                Choice { policies: policies(6, kept, Policy::Checkpoint), stream: false },
                "{kept}"
            );
            assert_eq!(demand.plan(chosen.policies).arena_bytes() as u64 + 1000, need(kept));
            let below = demand.choose(Limit::Budget(need(kept) - 1)).ok();
            assert_eq!(
                below.map(|choice| choice.policies),
                next.map(|next| policies(6, next, Policy::Checkpoint))
            );
        }
        let free = demand.choose(Limit::Free(0)).unwrap();
        assert_eq!(free.policies, policies(6, 0, Policy::Checkpoint), "tries all the same");
    }

    #[test]
    fn weights_are_streamed_where_that_saves_recomputation() {
        let (_, spec) = golden();
        let settings = settings(&spec);
        let streamed = StreamedBytes::of_outside(1 << 20);
        let weights = WeightBytes { resident: 50 << 20, streamed: Some(streamed) };
        let demand = |mode| Demand {
            spec: &spec,
            settings: &settings,
            layout: &layout,
            activations: Activations::Auto,
            mode,
            weights,
            process_bytes: 0,
        };
        let auto = demand(WeightsMode::Auto);
        let most = auto.total_bytes(&settings, (2, false));
        let all = policies(2, 2, Policy::Checkpoint);
        let choose = |demand: &Demand, bytes| demand.choose(Limit::Budget(bytes)).unwrap();
        assert_eq!(choose(&auto, most), Choice { policies: all.clone(), stream: false });
        assert_eq!(choose(&auto, most - 1), Choice { policies: all.clone(), stream: true });
        assert_eq!(
            choose(&demand(WeightsMode::Stream), most),
            Choice { policies: all, stream: true }
        );
        let resident = demand(WeightsMode::Resident);
        let least = resident.total_bytes(&settings, (0, false));
        let error = resident.choose(Limit::Budget(least - 1)).unwrap_err().to_string();
        assert!(error.contains("`--weights stream` would need"), "{error}");
        let dense = Demand { weights: WeightBytes { streamed: None, ..weights }, ..resident };
        let dense = Demand { mode: WeightsMode::Stream, ..dense };
        let error = dense.choose(Limit::Budget(most)).unwrap_err().to_string();
        assert!(error.contains("nibble quantize"), "{error}");
    }

    #[test]
    fn a_plan_over_budget_says_what_would_fit() {
        let (_, spec) = golden();
        let settings = settings(&spec);
        let demand = |activations| Demand {
            spec: &spec,
            settings: &settings,
            layout: &layout,
            activations,
            mode: WeightsMode::Auto,
            weights: WeightBytes { resident: 1 << 20, streamed: None },
            process_bytes: 0,
        };
        let keep = demand(Activations::Keep);
        let total = |kept| keep.total_bytes(&settings, (kept, false));
        let (all, none) = (total(2), total(0));
        let text = keep.choose(Limit::Budget(all - 1)).unwrap_err().to_string();
        assert!(text.contains("`--activations checkpoint` would need"), "{text}");
        let text = demand(Activations::Auto).choose(Limit::Budget(none - 1)).unwrap_err();
        assert!(text.to_string().contains("with 960 tokens in a forward pass"), "{text}");
        let mut low = shorter(&settings, LENGTH_STEP);
        low.targets.iter_mut().for_each(|target| target.r = 4);
        let fits = demand(Activations::Auto).total_bytes(&low, (0, false));
        for (budget, rank) in [(fits, "`--lora-r 4`"), (fits - 1, "`--lora-r 2`")] {
            let text = demand(Activations::Auto).choose(Limit::Budget(budget)).unwrap_err();
            assert!(text.to_string().contains(rank), "{text}");
        }
        let text = demand(Activations::Auto).choose(Limit::Budget(1000)).unwrap_err();
        assert!(text.to_string().contains("alone take"), "{text}");
    }
}
