//! What fits a memory budget: the longest context, the largest micro-batch, and what each setting
//! would change. All of it is the plan's own arithmetic, tried at other sizes.

use serde::Serialize;

use super::budget::{Candidate, Choice, Demand, WeightsMode};
use super::cost::Pace;
use super::moments::Optim;
use super::settings::{Policy, Settings, logit_rows};

/// Lengths are multiples of this many tokens.
const LENGTH_STEP: usize = 64;
/// Nothing longer is tried.
const MOST_TOKENS: usize = 1 << 24;
/// No more rows are tried than two to this power.
const MOST_BATCH_DOUBLINGS: usize = 12;

/// A way to run: what happens to activations, and where the weights are.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Way {
    /// What all blocks do with their activations.
    pub policy: Policy,
    /// Weights are streamed from their file.
    pub stream: bool,
    /// Time of a token over that of the first way, by the rates of `src/plan/cost.rs`.
    pub time: f64,
    /// Bytes at the sizes that were asked for.
    pub bytes: u64,
    /// Tokens of the longest document that fits alone; 0 when none does.
    pub longest_document: usize,
    /// Rows of the asked length that fit in one forward pass; 0 when none does.
    pub largest_batch: usize,
}

/// One setting, changed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Knob {
    /// What is changed, as flags.
    pub flags: String,
    /// Bytes with it.
    pub bytes: u64,
    /// Time of a token over that of the plan.
    pub time: f64,
}

/// The fastest plan of any micro-batch.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fastest {
    /// Rows of a forward pass.
    pub batch: usize,
    /// Blocks that keep their activations.
    pub kept: usize,
    /// What the others do.
    pub others: Policy,
    /// Weights are streamed from their file.
    pub stream: bool,
    /// Bytes of everything.
    pub bytes: u64,
    /// Time of a token over that of the plan.
    pub time: f64,
}

/// The answer to "does it fit, and what would".
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fit {
    /// Bytes that may be used.
    pub budget_bytes: u64,
    /// Whether the asked sizes fit in a way that is allowed.
    pub fits: bool,
    /// Of the plan: the fastest one that fits, or the leanest one if none does.
    pub bytes: u64,
    /// Keeping, recomputing and offloading, resident and streamed.
    pub ways: Vec<Way>,
    /// The fastest within the budget, with any number of rows of the asked length.
    pub fastest: Option<Fastest>,
    /// Single changes of the plan.
    pub knobs: Vec<Knob>,
}

/// The sizes that were asked for, as the command line has them.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// Rows of a forward pass.
    pub batch: usize,
    /// Tokens of a row.
    pub length: usize,
}

/// A demand at sizes that may change, within a budget.
struct Search<'a> {
    demand: &'a Demand<'a>,
    asked: Asked,
    budget: u64,
    /// Of the plan at the asked sizes.
    plan: Candidate,
}

impl Fit {
    /// Tries `demand` in every way within `budget` bytes; `plan` is what was chosen of it.
    pub fn new(demand: &Demand, asked: Asked, budget: u64, plan: &Choice) -> Self {
        let plan = plan.candidate;
        let search = Search { demand, asked, budget, plan };
        let bytes = demand.total_bytes(demand.settings, plan);
        let (ways, fastest, knobs) = (search.ways(), search.fastest(), search.knobs());
        Fit { budget_bytes: budget, fits: bytes <= budget, bytes, ways, fastest, knobs }
    }
}

impl Search<'_> {
    fn ways(&self) -> Vec<Way> {
        let (demand, Asked { batch, length }) = (self.demand, self.asked);
        let streams = [false, true].into_iter().filter(|s| !s || demand.weights.streamed.is_some());
        let policies = [Policy::Keep, Policy::Checkpoint, Policy::Offload];
        let ways =
            streams.flat_map(|stream| policies.map(|policy| uniform(demand, policy, stream)));
        let mut ways: Vec<Way> = ways
            .map(|candidate| {
                let fits = |batch: usize, length: usize| {
                    let settings = sized(demand, batch, length);
                    demand.total_bytes(&settings, candidate) <= self.budget
                };
                Way {
                    policy: if candidate.kept > 0 { Policy::Keep } else { candidate.others },
                    stream: candidate.stream,
                    time: self.seconds(demand.settings, candidate),
                    bytes: demand.total_bytes(&sized(demand, batch, length), candidate),
                    longest_document: LENGTH_STEP
                        * largest(MOST_TOKENS / LENGTH_STEP, |n| fits(1, n * LENGTH_STEP)),
                    largest_batch: largest(MOST_TOKENS / length, |n| fits(n, length)),
                }
            })
            .collect();
        let first = ways.first().map_or(1.0, |way| way.time);
        ways.iter_mut().for_each(|way| way.time /= first);
        ways
    }

    /// Of one, two, four… rows.
    fn fastest(&self) -> Option<Fastest> {
        let demand = self.demand;
        let plan_seconds = self.seconds(demand.settings, self.plan);
        let batches = (0..).map(|power| 1 << power).map_while(|batch| {
            let settings = sized(demand, batch, self.asked.length);
            let demand = Demand { settings: &settings, ..demand.clone() };
            let choice = demand.within(self.budget)?;
            let Candidate { kept, others, stream, .. } = choice.candidate;
            let bytes = demand.total_bytes(&settings, choice.candidate);
            let seconds = Pace::new(&demand, &settings).seconds_per_token(&choice.settings, stream);
            let time = seconds / plan_seconds;
            Some(Fastest { batch, kept, others, stream, bytes, time })
        });
        // Fewer rows do not lose to more that are as fast.
        let batches: Vec<Fastest> = batches.take(MOST_BATCH_DOUBLINGS).collect();
        batches
            .into_iter()
            .reduce(|best, next| if next.time < 0.99 * best.time { next } else { best })
    }

    fn seconds(&self, settings: &Settings, candidate: Candidate) -> f64 {
        let chosen = self.demand.with(settings, candidate);
        Pace::new(self.demand, settings).seconds_per_token(&chosen, candidate.stream)
    }

    fn knobs(&self) -> Vec<Knob> {
        let (demand, plan) = (self.demand, self.plan);
        let plan_seconds = self.seconds(demand.settings, plan);
        let knob = |flags: String, settings: &Settings, candidate: Candidate| Knob {
            flags,
            bytes: demand.total_bytes(settings, candidate),
            time: self.seconds(settings, candidate) / plan_seconds,
        };
        let same = demand.settings;
        let mut knobs: Vec<Knob> = self.other_policies(knob);
        if demand.weights.streamed.is_some() && demand.mode != WeightsMode::Resident {
            let mode = if plan.stream { "resident" } else { "stream" };
            let candidate = Candidate { stream: !plan.stream, ..plan };
            knobs.push(knob(format!("--weights {mode}"), same, candidate));
        }
        let mut with = |flags: String, settings: Settings| knobs.push(knob(flags, &settings, plan));
        let Asked { batch, length } = self.asked;
        if batch > 1 {
            let flags = format!("--per-device-train-batch-size {}", batch / 2);
            with(flags, sized(demand, batch / 2, length));
        }
        if length >= 2 * LENGTH_STEP {
            with(format!("--max-length {}", length / 2), sized(demand, batch, length / 2));
        }
        if let Some(length) = smaller_tile(same).filter(|_| !plan.pieces) {
            let settings = Settings { mlp_tile_length: Some(length), ..same.clone() };
            with(format!("--mlp-tile-length {length}"), settings);
        }
        let packed = Settings { optim: Optim::Adamw8bit, ..same.clone() };
        if same.optim != packed.optim && packed.moments().blocks > 0 {
            with("--optim adamw_8bit".into(), packed);
        }
        if same.bf16_working {
            with("--adapter-dtype f32".into(), Settings { bf16_working: false, ..same.clone() });
        }
        if same.targets.iter().all(|target| target.r >= 2) && !same.targets.is_empty() {
            let mut settings = same.clone();
            settings.targets.iter_mut().for_each(|target| target.r /= 2);
            with("--lora-r, halved".into(), settings);
        }
        knobs
    }

    /// All blocks keeping, recomputing or offloading, where the plan does not.
    fn other_policies(&self, knob: impl Fn(String, &Settings, Candidate) -> Knob) -> Vec<Knob> {
        let (demand, plan) = (self.demand, self.plan);
        let names = [
            ("keep", Policy::Keep, plan.kept == demand.spec.num_layers),
            ("checkpoint", Policy::Checkpoint, plan.kept == 0 && plan.others == Policy::Checkpoint),
            ("offload", Policy::Offload, plan.kept == 0 && plan.others == Policy::Offload),
        ];
        let others = names.into_iter().filter(|(_, _, planned)| !planned);
        others
            .map(|(name, policy, _)| {
                let candidate = uniform(demand, policy, plan.stream);
                let candidate = Candidate { pieces: plan.pieces, ..candidate };
                knob(format!("--activations {name}"), demand.settings, candidate)
            })
            .collect()
    }
}

/// The same policy for all blocks.
fn uniform(demand: &Demand, policy: Policy, stream: bool) -> Candidate {
    let (kept, others) = match policy {
        Policy::Keep => (demand.spec.num_layers, Policy::Checkpoint),
        others => (0, others),
    };
    Candidate { kept, others, stream, pieces: false }
}

/// The settings of `demand` with other sizes.
fn sized(demand: &Demand, batch: usize, length: usize) -> Settings {
    let tokens = batch * length;
    let logit_rows = logit_rows(demand.spec, tokens);
    Settings { tokens, longest_document: length, logit_rows, ..demand.settings.clone() }
}

/// The largest `n` up to `most` that fits; what fits with more fits with less.
pub(super) fn largest(most: usize, fits: impl Fn(usize) -> bool) -> usize {
    let (mut good, mut bad) = (0, most + 1);
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        if fits(middle) { good = middle } else { bad = middle }
    }
    good
}

/// A quarter of the tile, where it is long enough to be cut.
fn smaller_tile(settings: &Settings) -> Option<usize> {
    const LEAST_TILE_TOKENS: usize = 256;
    let quarter = settings.mlp_tile() / 4;
    (quarter >= LEAST_TILE_TOKENS).then_some(quarter)
}

#[cfg(test)]
mod tests {
    use super::super::budget::{Activations, Limit};
    use super::*;
    use crate::adapter::LoraConfig;
    use crate::model::families::spec_from_config;
    use crate::plan::{Place, StreamedBytes, WeightBytes, WeightParts};

    fn with_demand<R>(test: impl FnOnce(&Demand) -> R) -> R {
        let text = include_str!("../../tests/data/models/llama_s0/config.json");
        let mut spec = spec_from_config(&serde_json::from_str(text).unwrap()).unwrap();
        spec.num_layers = 6;
        spec.windows = vec![None; 6];
        let settings = Settings {
            tokens: 1024,
            longest_document: 512,
            logit_rows: logit_rows(&spec, 1024),
            policies: Vec::new(),
            targets: LoraConfig { r: 64, ..LoraConfig::default() }.resolve(&spec).unwrap(),
            lora_dropout: false,
            bf16_working: true,
            optim: Optim::default(),
            threads: 2,
            cache_tokens: 0,
            mlp_tile_length: None,
            scratch_folder: None,
        };
        test(&Demand {
            spec: &spec,
            settings: &settings,
            layout: &crate::plan::layout,
            activations: Activations::Auto,
            mode: WeightsMode::Auto,
            weights: WeightBytes {
                resident: WeightParts { codes: 9 << 20, ..WeightParts::default() },
                streamed: Some(StreamedBytes::of_vectors(2 << 20)),
            },
            process_bytes: 1 << 20,
            place: Place::Host,
            pinned_bytes: u64::MAX,
        })
    }

    const ASKED: Asked = Asked { batch: 2, length: 512 };

    #[test]
    fn the_limits_are_the_last_sizes_that_fit() {
        with_demand(|demand| {
            let keep = uniform(demand, Policy::Keep, false);
            let budget = demand.total_bytes(demand.settings, keep) + 1000;
            let plan = demand.choose(Limit::Budget(budget)).unwrap();
            let fit = Fit::new(demand, ASKED, budget, &plan);
            assert!(fit.fits && fit.bytes == budget - 1000);
            assert_eq!(fit.ways.len(), 6);
            for way in &fit.ways {
                let candidate = uniform(demand, way.policy, way.stream);
                let bytes =
                    |batch, length| demand.total_bytes(&sized(demand, batch, length), candidate);
                assert!(bytes(1, way.longest_document) <= budget);
                assert!(bytes(1, way.longest_document + LENGTH_STEP) > budget);
                assert!(bytes(way.largest_batch, 512) <= budget);
                assert!(bytes(way.largest_batch + 1, 512) > budget);
                assert_eq!(way.bytes, demand.total_bytes(demand.settings, candidate));
            }
            let [first, recomputed, offloaded] = [0, 1, 2].map(|way| &fit.ways[way]);
            assert!(first.policy == Policy::Keep && !first.stream && first.time == 1.0);
            assert!(recomputed.time > 1.15 && recomputed.time < 1.5, "{recomputed:?}");
            assert!(offloaded.time > recomputed.time, "to a drive");
            assert!(offloaded.bytes < recomputed.bytes && recomputed.bytes < first.bytes);
            assert!(recomputed.longest_document > first.longest_document);
        });
    }

    /// 8B on a card of 24 GiB, rows of 256 tokens: widening the weights for few tokens does not pay.
    #[test]
    fn the_fastest_micro_batch_fits_and_no_other_one_is_faster() {
        let text = include_str!("../../tests/data/configs/llama-3.1-8b.json");
        let spec = spec_from_config(&serde_json::from_str(text).unwrap()).unwrap();
        let format = Some(nibble_quant::BlockFormat::default());
        let bf16 = nibble_quant::FloatType::Bf16;
        let weights = WeightBytes::of_config(&spec, bf16, format.as_ref(), Place::Gpu);
        with_demand(|demand| {
            let targets = LoraConfig::default().resolve(&spec).unwrap();
            let settings = Settings { targets, ..demand.settings.clone() };
            let demand = Demand {
                spec: &spec,
                layout: &crate::kernels::cuda::cuda_layout,
                weights,
                place: Place::Gpu,
                ..demand.clone()
            };
            let asked = Asked { batch: 1, length: 256 };
            let demand = Demand { settings: &settings, ..demand };
            let settings = sized(&demand, 1, 256);
            let demand = Demand { settings: &settings, ..demand };
            let budget = 24 << 30;
            let plan = demand.choose(Limit::Budget(budget)).unwrap();
            let fastest = Fit::new(&demand, asked, budget, &plan).fastest.unwrap();
            assert!(fastest.bytes <= budget && fastest.time < 0.9, "{fastest:?}");
            assert!(fastest.batch > 4 && fastest.kept > 24, "{fastest:?}");
            assert_eq!(Fit::new(&demand, asked, 100, &plan).fastest, None);
        });
    }

    #[test]
    fn every_knob_says_what_it_changes() {
        with_demand(|demand| {
            let plan = demand.choose(Limit::Free(u64::MAX)).unwrap();
            let bytes = demand.total_bytes(demand.settings, plan.candidate);
            let fit = Fit::new(demand, ASKED, bytes, &plan);
            let flags: Vec<&str> = fit.knobs.iter().map(|knob| knob.flags.as_str()).collect();
            let expected = [
                "--activations checkpoint",
                "--activations offload",
                "--weights stream",
                "--per-device-train-batch-size 1",
                "--max-length 256",
                "--mlp-tile-length 256",
                "--optim adamw_8bit",
                "--adapter-dtype f32",
                "--lora-r, halved",
            ];
            assert_eq!(flags, expected);
            assert!(fit.knobs.iter().all(|knob| knob.bytes < bytes), "{:?}", fit.knobs);
            let time = |flags: &str| fit.knobs.iter().find(|k| k.flags == flags).unwrap().time;
            assert!(time("--activations checkpoint") > 1.15);
            assert!(time("--activations offload") > time("--activations checkpoint"));
            assert_eq!(time("--adapter-dtype f32"), 1.0);
        });
    }
}
