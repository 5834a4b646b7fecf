//! What fits a memory budget: the longest context, the largest micro-batch, and what each setting
//! would change. All of it is the plan's own arithmetic, tried at other sizes.

use serde::Serialize;

use super::budget::{Activations, Demand, WeightsMode};
use super::moments::Optim;
use super::settings::{Settings, logit_rows};
use super::work::Work;
use crate::error::Result;

/// Lengths are multiples of this many tokens.
const LENGTH_STEP: usize = 64;
/// Nothing longer is tried.
const MOST_TOKENS: usize = 1 << 24;

/// A way to run: which activations are kept, and where the weights are.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Way {
    /// All blocks keep their activations; else all recompute them.
    pub keep: bool,
    /// Weights are streamed from their file.
    pub stream: bool,
    /// Multiply-adds of a step over those of one that recomputes nothing.
    pub work: f64,
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
    /// Multiply-adds over those of the plan, where they change.
    pub work: f64,
}

/// The answer to "does it fit, and what would".
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fit {
    /// Bytes that may be used.
    pub budget_bytes: u64,
    /// Keeping and recomputing, resident and streamed.
    pub ways: Vec<Way>,
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

impl Fit {
    /// Tries `demand` in every way within `budget_bytes`. `kept` and `stream` are what the plan has.
    ///
    /// # Errors
    /// Those of resolving the adapter with another rank.
    pub fn new(
        demand: &Demand,
        asked: Asked,
        budget_bytes: u64,
        (kept, stream): (usize, bool),
    ) -> Result<Self> {
        let layers = demand.spec.num_layers;
        let streams = [false, true].into_iter().filter(|s| !s || demand.weights.streamed.is_some());
        let ways = streams.flat_map(|stream| [true, false].map(|keep| (keep, stream)));
        let ways = ways.map(|(keep, stream)| {
            let candidate = (if keep { layers } else { 0 }, stream);
            let fits = |batch: usize, length: usize| {
                let settings = sized(demand, batch, length);
                demand.total_bytes(&settings, candidate) <= budget_bytes
            };
            let step = LENGTH_STEP;
            Way {
                keep,
                stream,
                work: work(demand, asked.length, candidate.0),
                bytes: demand.total_bytes(demand.settings, candidate),
                longest_document: step * largest(MOST_TOKENS / step, |n| fits(1, n * step)),
                largest_batch: largest(MOST_TOKENS / asked.length, |n| fits(n, asked.length)),
            }
        });
        let knobs = knobs(demand, asked, (kept, stream));
        Ok(Fit { budget_bytes, ways: ways.collect(), knobs })
    }

    /// The way with the least work in which the asked sizes fit.
    pub fn fastest(&self) -> Option<&Way> {
        let fitting = self.ways.iter().filter(|way| way.bytes <= self.budget_bytes);
        fitting.min_by(|a, b| a.work.total_cmp(&b.work).then(a.stream.cmp(&b.stream)))
    }
}

/// The settings of `demand` with other sizes.
fn sized(demand: &Demand, batch: usize, length: usize) -> Settings {
    let tokens = batch * length;
    let logit_rows = logit_rows(demand.spec, tokens);
    Settings { tokens, longest_document: length, logit_rows, ..demand.settings.clone() }
}

/// The largest `n` up to `most` that fits; what fits with more fits with less.
fn largest(most: usize, fits: impl Fn(usize) -> bool) -> usize {
    let (mut good, mut bad) = (0, most + 1);
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        if fits(middle) { good = middle } else { bad = middle }
    }
    good
}

/// Multiply-adds of a step with rows of `length` over those without recomputation.
fn work(demand: &Demand, length: usize, kept: usize) -> f64 {
    let (work, layers) = (Work::of_token(demand.spec, length), demand.spec.num_layers);
    work.of_step((layers - kept) as f64 / layers as f64) / work.of_step(0.0)
}

/// A quarter of the tile, where it is long enough to be cut.
fn smaller_tile(settings: &Settings) -> Option<usize> {
    const LEAST_TILE_TOKENS: usize = 256;
    let quarter = settings.mlp_tile() / 4;
    (quarter >= LEAST_TILE_TOKENS).then_some(quarter)
}

fn knobs(demand: &Demand, asked: Asked, (kept, stream): (usize, bool)) -> Vec<Knob> {
    let layers = demand.spec.num_layers;
    let plan_work = work(demand, asked.length, kept);
    let knob = |flags: String, settings: &Settings, kept: usize, stream: bool| Knob {
        flags,
        bytes: demand.total_bytes(settings, (kept, stream)),
        work: work(demand, asked.length, kept) / plan_work,
    };
    let same = demand.settings;
    let mut knobs = Vec::new();
    if kept > 0 && demand.activations != Activations::Keep {
        knobs.push(knob("--activations checkpoint".into(), same, 0, stream));
    }
    if kept == 0 && demand.activations != Activations::Offload {
        let bytes = demand.offloading().total_bytes(same, (0, stream));
        knobs.push(Knob { flags: "--activations offload".into(), bytes, work: 1.0 });
    }
    if kept < layers {
        knobs.push(knob("--activations keep".into(), same, layers, stream));
    }
    if demand.weights.streamed.is_some() && demand.mode != WeightsMode::Resident {
        let mode = if stream { "resident" } else { "stream" };
        knobs.push(knob(format!("--weights {mode}"), same, kept, !stream));
    }
    if asked.batch > 1 {
        let settings = sized(demand, asked.batch / 2, asked.length);
        let flags = format!("--per-device-train-batch-size {}", asked.batch / 2);
        knobs.push(knob(flags, &settings, kept, stream));
    }
    if asked.length >= 2 * LENGTH_STEP {
        let settings = sized(demand, asked.batch, asked.length / 2);
        knobs.push(knob(format!("--max-length {}", asked.length / 2), &settings, kept, stream));
    }
    if let Some(length) = smaller_tile(same) {
        let settings = Settings { mlp_tile_length: Some(length), ..same.clone() };
        knobs.push(knob(format!("--mlp-tile-length {length}"), &settings, kept, stream));
    }
    let packed = Settings { optim: Optim::Adamw8bit, ..same.clone() };
    if same.optim != packed.optim && packed.moments().blocks > 0 {
        knobs.push(knob("--optim adamw_8bit".into(), &packed, kept, stream));
    }
    if same.bf16_working {
        let settings = Settings { bf16_working: false, ..same.clone() };
        knobs.push(knob("--adapter-dtype f32".into(), &settings, kept, stream));
    }
    if same.targets.iter().all(|target| target.r >= 2) && !same.targets.is_empty() {
        let mut settings = same.clone();
        settings.targets.iter_mut().for_each(|target| target.r /= 2);
        knobs.push(knob("--lora-r, halved".into(), &settings, kept, stream));
    }
    knobs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::LoraConfig;
    use crate::model::families::spec_from_config;
    use crate::plan::{StreamedBytes, WeightBytes};

    fn with_demand<R>(test: impl FnOnce(&Demand) -> R) -> R {
        let text = include_str!("../../tests/data/models/llama_s0/config.json");
        let spec = spec_from_config(&serde_json::from_str(text).unwrap()).unwrap();
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
                resident: 9 << 20,
                streamed: Some(StreamedBytes::of_outside(2 << 20)),
            },
            process_bytes: 1 << 20,
        })
    }

    const ASKED: Asked = Asked { batch: 2, length: 512 };

    #[test]
    fn the_limits_are_the_last_sizes_that_fit() {
        with_demand(|demand| {
            let budget = demand.total_bytes(demand.settings, (2, false)) + 1000;
            let fit = Fit::new(demand, ASKED, budget, (2, false)).unwrap();
            assert_eq!(fit.ways.len(), 4);
            for way in &fit.ways {
                let candidate = (if way.keep { 2 } else { 0 }, way.stream);
                let bytes =
                    |batch, length| demand.total_bytes(&sized(demand, batch, length), candidate);
                assert!(bytes(1, way.longest_document) <= budget);
                assert!(bytes(1, way.longest_document + LENGTH_STEP) > budget);
                assert!(bytes(way.largest_batch, 512) <= budget);
                assert!(bytes(way.largest_batch + 1, 512) > budget);
                assert_eq!(way.bytes, demand.total_bytes(demand.settings, candidate));
            }
            let fastest = fit.fastest().unwrap();
            assert!(fastest.keep && !fastest.stream && fastest.work == 1.0);
            let leanest = fit.ways.last().unwrap();
            assert!(leanest.stream && !leanest.keep && leanest.work > 1.2 && leanest.work < 1.5);
            assert!(leanest.longest_document > fit.ways[0].longest_document);
        });
    }

    #[test]
    fn every_knob_says_what_it_changes() {
        with_demand(|demand| {
            let plan = demand.total_bytes(demand.settings, (2, false));
            let fit = Fit::new(demand, ASKED, plan, (2, false)).unwrap();
            let flags: Vec<&str> = fit.knobs.iter().map(|knob| knob.flags.as_str()).collect();
            let expected = [
                "--activations checkpoint",
                "--weights stream",
                "--per-device-train-batch-size 1",
                "--max-length 256",
                "--mlp-tile-length 256",
                "--optim adamw_8bit",
                "--adapter-dtype f32",
                "--lora-r, halved",
            ];
            assert_eq!(flags, expected);
            assert!(fit.knobs.iter().all(|knob| knob.bytes < plan), "{:?}", fit.knobs);
            assert!(Fit::new(demand, ASKED, plan / 100, (0, true)).unwrap().fastest().is_none());
        });
    }
}
