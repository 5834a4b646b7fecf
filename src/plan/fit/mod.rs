//! What fits a memory budget: the longest context, the largest micro-batch, and what each setting
//! would change. All of it is the plan's own arithmetic, tried at other sizes.

mod sizes;

use std::num::NonZeroUsize;

use serde::Serialize;

use crate::byte_size::ByteSize;
use crate::plan::activations::Activations;
use crate::plan::budget::{Choice, Demand, Limit};
use crate::plan::cost::Pace;
use crate::plan::embedding::{EmbeddingPlace, OnHost};
use crate::plan::moments::Optim;
use crate::plan::settings::{Pieces, Policy, Settings, logit_rows};
use crate::plan::strategy::{Strategy, typed};
use crate::plan::weights::WeightsMode;
pub(super) use sizes::{LENGTH_STEP, largest, smallest_pieces};
use sizes::{MOST_TOKENS, longest_document, smaller_chunk, smaller_tile};

/// Share of a token's time below which another micro-batch is told of: more is within what the arithmetic
/// cannot know.
const CLEARLY_FASTER: f64 = 0.97;
/// Multiple of the least time up to which fewer rows are as good.
const AS_FAST: f64 = 1.01;

/// A way to run, and what fits with it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Row {
    /// How the run goes.
    #[serde(flatten)]
    pub strategy: Strategy,
    /// Time of a token over that of the first row, by the rates of `src/plan/cost.rs`.
    pub time: f64,
    /// Bytes at the sizes that were asked for.
    pub bytes: u64,
    /// Tokens of the longest document that fits alone, in whole steps of 64 unless it is the one that was
    /// asked for; 0 when none does.
    pub longest_document: usize,
    /// Bytes of the host's memory that this document pins beside a GPU.
    pub pinned_bytes: u64,
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

/// A plan in numbers, and what to type for it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlanSummary {
    /// Flags of `train` and `memory` that lead to it, the limit included: within that `auto` finds the
    /// mix, and the sizes of pieces, again.
    pub flags: String,
    /// What the plan does, for people.
    pub words: String,
    /// How the run goes.
    #[serde(flatten)]
    pub strategy: Strategy,
    /// Tokens that the MLP works on at a time.
    pub mlp_tile_tokens: usize,
    /// Tokens whose logits exist at a time, of a head on the GPU.
    pub logit_rows: usize,
    /// Bytes of everything.
    pub bytes: u64,
    /// Bytes of the host's memory that are pinned beside a GPU.
    pub pinned_bytes: u64,
}

/// The fastest plan of any micro-batch that divides the effective batch.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fastest {
    /// Rows of a forward pass.
    pub batch: usize,
    /// Forward passes of a step, for as many rows a step as were asked for.
    pub accumulation: usize,
    /// How the micro-batch runs.
    #[serde(flatten)]
    pub plan: PlanSummary,
    /// Time of a token over that of the plan that was asked for.
    pub time: f64,
}

/// The answer to "does it fit, and what would".
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fit {
    /// Bytes that are planned within.
    pub budget_bytes: u64,
    /// Whether the asked sizes fit in a way that is allowed.
    pub fits: bool,
    /// Bytes of the plan: the fastest one that fits, or the leanest one if none does.
    pub bytes: u64,
    /// The plan that takes these bytes.
    pub plan: PlanSummary,
    /// Ways to run: keeping all or attention, recomputing and offloading, resident and streamed; the plan,
    /// if it is a mix of them. No weights stay dequantized in any.
    pub ways: Vec<Row>,
    /// The fastest micro-batch within the budget, where it is clearly faster than the one that was
    /// asked for or that one does not fit.
    pub fastest: Option<Fastest>,
    /// Single changes of the plan.
    pub knobs: Vec<Knob>,
}

/// The sizes that were asked for, as the command line has them.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// Rows of a forward pass.
    pub batch: usize,
    /// Forward passes of a step.
    pub accumulation: usize,
    /// Tokens of a row.
    pub length: usize,
    /// Tokens whose logits exist at a time, at most.
    pub logits_chunk: Option<NonZeroUsize>,
}

impl Asked {
    /// The settings of `demand` with other sizes.
    fn sized(&self, demand: &Demand, batch: usize, length: usize) -> Settings {
        let tokens = batch * length;
        let logit_rows =
            logit_rows(demand.spec, tokens, self.logits_chunk, demand.machine.processor);
        Settings {
            tokens,
            longest_document: length,
            trained_tokens: tokens,
            logit_rows,
            ..demand.settings.clone()
        }
    }
}

/// A demand at sizes that may change, within a budget.
struct Search<'a> {
    demand: &'a Demand<'a>,
    asked: Asked,
    limit: Limit,
    budget: u64,
    /// The strategy of the plan at the asked sizes.
    plan: Strategy,
}

impl Fit {
    /// Tries `demand` in every way within `limit`; `plan` is what was chosen of it.
    pub fn new(demand: &Demand, asked: Asked, limit: Limit, plan: &Choice) -> Self {
        let budget = limit.usable_bytes();
        let search = Search { demand, asked, limit, budget, plan: plan.strategy };
        let plan = search.describe(demand, plan);
        let (bytes, fits) = (plan.bytes, demand.fits(search.plan, limit.most_bytes()));
        let (ways, knobs) = (search.ways(), search.knobs());
        let fastest = search.fastest(fits);
        Fit { budget_bytes: budget, fits, bytes, plan, ways, fastest, knobs }
    }

    /// Whether weights are streamed in the plan, or in the one that is advised.
    pub fn streams(&self) -> bool {
        let advised = self.fastest.as_ref().map(|fastest| &fastest.plan);
        [Some(&self.plan), advised].into_iter().flatten().any(|plan| plan.strategy.stream)
    }
}

impl Search<'_> {
    fn describe(&self, demand: &Demand, choice: &Choice) -> PlanSummary {
        let (activations, weights, place) = choice.strategy.flags(demand.spec.num_layers);
        let mut flags =
            format!("--activations {} --weights {}", typed(activations), typed(weights));
        if demand.places_embedding() {
            flags += &format!(" --embedding {}", typed(place));
        }
        if demand.most_dequantized(choice.strategy) > 0 {
            flags += &format!(" --dequantized-blocks {}", choice.strategy.dequantized_blocks);
        }
        if let Limit::Budget(bytes) = self.limit {
            flags += &format!(" --memory-budget {}", ByteSize(bytes).exact());
        }
        PlanSummary {
            flags,
            words: demand.facts(choice).join(", "),
            strategy: choice.strategy,
            mlp_tile_tokens: choice.settings.mlp_tile(),
            logit_rows: choice.settings.logit_rows,
            bytes: demand.total_bytes(choice.strategy),
            pinned_bytes: demand.pinned(choice),
        }
    }

    fn ways(&self) -> Vec<Row> {
        let (demand, layers) = (self.demand, self.demand.spec.num_layers);
        let streams = [false, true].into_iter().filter(|s| !s || demand.weights.streamed.is_some());
        let policies = Activations::UNIFORM.map(|(_, policy)| policy);
        let uniform = streams
            .flat_map(|stream| policies.map(|policy| Strategy::uniform(layers, policy, stream)));
        let Strategy { kept, attended, remaking_attention, .. } = self.plan;
        let mixed = (1..layers).contains(&kept) || attended + remaking_attention > 0;
        let whole = Strategy {
            on_host: OnHost::Nothing,
            dequantized_blocks: 0,
            pieces: Pieces::NONE,
            ..self.plan
        };
        let mut ways: Vec<Row> =
            uniform.chain(mixed.then_some(whole)).map(|whole| self.row(whole)).collect();
        let first = ways.first().map_or(1.0, |way| way.time);
        ways.iter_mut().for_each(|way| way.time /= first);
        ways
    }

    /// The row of a way, in the pieces, and with the tables on the host, that are fastest where not all fits
    /// as it is.
    fn row(&self, whole: Strategy) -> Row {
        let (demand, Asked { batch, length, .. }) = (self.demand, self.asked);
        let places = demand.embedding_places();
        let all: Vec<Strategy> = demand
            .pieces()
            .flat_map(|pieces| {
                places.iter().map(move |&on_host| Strategy { pieces, on_host, ..whole })
            })
            .collect();
        let fastest = |batch, length| {
            let settings = self.asked.sized(demand, batch, length);
            let demand = demand.at(&settings);
            let fitting = all.iter().filter(|strategy| demand.fits(**strategy, self.budget));
            let (_, strategy) = demand.fastest_of(fitting.copied())?;
            Some((strategy, demand.pinned(&demand.choice(strategy))))
        };
        let strategy = fastest(batch, length).map_or(all[0], |(strategy, _)| strategy);
        // What takes the least comes last, and most sizes that are tried fit in it or in none.
        let fits = |batch, length| {
            let settings = self.asked.sized(demand, batch, length);
            let demand = demand.at(&settings);
            all.iter().rev().any(|strategy| demand.fits(*strategy, self.budget))
        };
        let longest_document = longest_document(demand, length, |length| fits(1, length));
        Row {
            strategy,
            time: seconds(demand, strategy),
            bytes: demand.total_bytes(strategy),
            longest_document,
            pinned_bytes: fastest(1, longest_document.max(1)).map_or(0, |(_, pinned)| pinned),
            largest_batch: largest((MOST_TOKENS / length).max(batch), |n| fits(n, length)),
        }
    }

    /// The fastest of all numbers of rows that divide those of a step, up to the first that does not fit.
    fn fastest(&self, asked_fits: bool) -> Option<Fastest> {
        let plan_seconds = seconds(self.demand, self.plan);
        let rows = self.asked.batch * self.asked.accumulation;
        let divisors = (1..=rows).filter(|batch| rows.is_multiple_of(*batch));
        let batches: Vec<Fastest> = divisors
            .map_while(|batch| {
                let settings = self.asked.sized(self.demand, batch, self.asked.length);
                let demand = self.demand.at(&settings);
                let choice = demand.within(self.budget)?;
                let seconds = Pace::new(&demand).seconds_per_token(&choice);
                let (time, accumulation) = (seconds / plan_seconds, rows / batch);
                let mut plan = self.describe(&demand, &choice);
                plan.flags = format!(
                    "--per-device-train-batch-size {batch} --gradient-accumulation-steps \
                     {accumulation} {}",
                    plan.flags
                );
                Some(Fastest { batch, accumulation, plan, time })
            })
            .collect();
        let least = batches.iter().map(|fastest| fastest.time).min_by(f64::total_cmp)?;
        let asked = |fastest: &Fastest| fastest.batch == self.asked.batch;
        let best = batches.into_iter().find(|fastest| fastest.time <= AS_FAST * least)?;
        (!asked(&best) && (!asked_fits || best.time < CLEARLY_FASTER)).then_some(best)
    }

    fn knobs(&self) -> Vec<Knob> {
        let (demand, plan) = (self.demand, self.plan);
        let plan_seconds = seconds(demand, plan);
        let knob = |flags: String, settings: &Settings, strategy: Strategy| {
            let demand = demand.at(settings);
            let time = seconds(&demand, strategy) / plan_seconds;
            Knob { flags, bytes: demand.total_bytes(strategy), time }
        };
        let ways = self.other_policies().into_iter().chain(self.other_places());
        let ways = ways.map(|(flags, strategy)| knob(flags, demand.settings, strategy));
        let settings = self.smaller_sizes().into_iter().chain(self.smaller_state());
        let settings = settings.map(|(flags, settings)| knob(flags, &settings, plan));
        ways.chain(settings).collect()
    }

    /// All blocks with one policy, where the plan has another.
    fn other_policies(&self) -> Vec<(String, Strategy)> {
        let (layers, plan) = (self.demand.spec.num_layers, self.plan);
        let planned = |policy| match policy {
            Policy::Keep => plan.kept == layers,
            policy => {
                let uniform = plan.kept + plan.attended + plan.remaking_attention == 0;
                uniform && plan.others == policy
            }
        };
        let others = Activations::UNIFORM.into_iter().filter(|(_, policy)| !planned(*policy));
        others
            .map(|(activations, policy)| {
                let uniform = Strategy::uniform(layers, policy, plan.stream);
                let Strategy { on_host, dequantized_blocks, pieces, .. } = plan;
                let strategy = Strategy { on_host, dequantized_blocks, pieces, ..uniform };
                (format!("--activations {}", typed(activations)), strategy)
            })
            .collect()
    }

    /// Weights, embedding and head elsewhere than in the plan.
    fn other_places(&self) -> Vec<(String, Strategy)> {
        let (demand, plan) = (self.demand, self.plan);
        let mut places = Vec::new();
        if demand.weights.streamed.is_some() {
            let mode = typed(WeightsMode::of(!plan.stream));
            let other = Strategy { stream: !plan.stream, ..plan };
            let dequantized_blocks = plan.dequantized_blocks.min(demand.most_dequantized(other));
            places.push((format!("--weights {mode}"), Strategy { dequantized_blocks, ..other }));
        }
        let anywhere = demand.wishing(|wishes| wishes.embedding = EmbeddingPlace::Auto);
        for &on_host in anywhere.embedding_places().iter().filter(|place| **place != plan.on_host) {
            let flags = format!("--embedding {}", typed(on_host.asked_by()));
            places.push((flags, Strategy { on_host, ..plan }));
        }
        if plan.dequantized_blocks > 0 {
            let strategy = Strategy { dequantized_blocks: 0, ..plan };
            places.push(("--dequantized-blocks 0".into(), strategy));
        }
        places
    }

    /// Fewer tokens at a time: in a pass, in a row, in a tile and in a chunk of logits.
    fn smaller_sizes(&self) -> Vec<(String, Settings)> {
        let (demand, plan, same) = (self.demand, self.plan, self.demand.settings);
        let Asked { batch, length, .. } = self.asked;
        let mut sizes = Vec::new();
        if batch > 1 {
            let flags = format!("--per-device-train-batch-size {}", batch / 2);
            sizes.push((flags, self.asked.sized(demand, batch / 2, length)));
        }
        if length >= 2 * LENGTH_STEP {
            let flags = format!("--max-length {}", length / 2);
            sizes.push((flags, self.asked.sized(demand, batch, length / 2)));
        }
        if let Some(length) = smaller_tile(same).filter(|_| !plan.pieces.tiles) {
            let settings = Settings { mlp_tile_length: Some(length), ..same.clone() };
            sizes.push((format!("--mlp-tile-length {length}"), settings));
        }
        if let Some(logit_rows) = smaller_chunk(same).filter(|_| !plan.pieces.logits) {
            let settings = Settings { logit_rows, ..same.clone() };
            sizes.push((format!("--logits-chunk-length {logit_rows}"), settings));
        }
        sizes
    }

    /// Less of what is trained: moments in 8 bits, no copies in bf16, half the rank.
    fn smaller_state(&self) -> Vec<(String, Settings)> {
        let (demand, same) = (self.demand, self.demand.settings);
        let mut states = Vec::new();
        let packed = Settings { optim: Optim::Adamw8bit, ..same.clone() };
        if same.optim != packed.optim && packed.moments().blocks > 0 {
            states.push(("--optim adamw_8bit".into(), packed));
        }
        if same.bf16_working {
            let settings = Settings { bf16_working: false, ..same.clone() };
            states.push(("--adapter-dtype f32".into(), settings));
        }
        if let Some(rank) = demand.wishes.lora_r.map(|rank| rank / 2).filter(|rank| *rank > 0) {
            states.push((format!("--lora-r {rank}"), demand.with_rank(same, rank)));
        }
        states
    }
}

/// Seconds of a token of a step, about.
fn seconds(demand: &Demand, strategy: Strategy) -> f64 {
    Pace::new(demand).seconds_per_token(&demand.choice(strategy))
}

#[cfg(test)]
mod tests;
