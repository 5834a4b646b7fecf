//! The fastest way to run within the memory that may be used: which layers keep their activations,
//! what the others do with theirs, where weights are, and the sizes of pieces.

mod shortfall;

use clap::ValueEnum;

use crate::byte_size::ByteSize;
use crate::error::{Error, Result};
use crate::kernels::cuda::{staged_bytes, waiting_bytes};
use crate::model::spec::ModelSpec;
use crate::plan::cost::Pace;
use crate::plan::embedding::{EmbeddingPlace, OnHost};
use crate::plan::outside::{Outside, WeightParts};
use crate::plan::region::MemoryPlan;
use crate::plan::settings::{Pieces, Policy, Settings, SumOrder};
use crate::plan::strategy::Strategy;
use crate::plan::weights::{Place, WeightBytes};

/// Share of the free memory that is planned with where no budget is given.
const USABLE_SHARE: f64 = 0.9;

/// Weights stay dequantized by themselves where a step then takes less than this of its time: for next to
/// nothing no memory is taken from others.
const WORTH_MEMORY: f64 = 0.99;

/// What happens to activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Activations {
    /// The fastest mix that fits: as many blocks as possible keep theirs
    Auto,
    /// Every block keeps all of them
    Keep,
    /// Every block keeps its input and the output of attention, and recomputes the rest
    Attention,
    /// Every block keeps its input and recomputes the rest
    Checkpoint,
    /// As `checkpoint`, with the inputs offloaded: to pinned host memory beside a GPU, to a file on the CPU
    Offload,
    /// As `attention`, with both offloaded
    OffloadAttention,
}

impl Activations {
    /// Those by which all blocks do the same, and what they do.
    pub(super) const UNIFORM: [(Activations, Policy); 5] = [
        (Activations::Keep, Policy::Keep),
        (Activations::Attention, Policy::Attention),
        (Activations::OffloadAttention, Policy::OffloadAttention),
        (Activations::Checkpoint, Policy::Checkpoint),
        (Activations::Offload, Policy::Offload),
    ];

    /// Its value on the command line.
    pub(super) fn flag(self) -> &'static str {
        match self {
            Activations::Auto => "auto",
            Activations::Keep => "keep",
            Activations::Attention => "attention",
            Activations::Checkpoint => "checkpoint",
            Activations::Offload => "offload",
            Activations::OffloadAttention => "offload-attention",
        }
    }

    /// That of all blocks with one policy; `Auto` where no other value leads to it.
    pub(super) fn of_all(policy: Policy) -> Self {
        let found = Activations::UNIFORM.into_iter().find(|(_, of_all)| *of_all == policy);
        found.map_or(Activations::Auto, |(activations, _)| activations)
    }
}

/// Where the frozen weights of the blocks are between their uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WeightsMode {
    /// In memory, or streamed if that lets more blocks keep their activations
    Auto,
    /// In memory from their first use
    Resident,
    /// In their file: two blocks at a time are in memory, the next one is prefetched
    Stream,
}

/// How much memory there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// The user's.
    Budget(u64),
    /// What is free on this machine.
    Free(u64),
}

impl Limit {
    /// Bytes to plan for, if any plan takes so few: a budget as it was given, or nine tenths of what is
    /// free, as other programs of the machine may want some.
    pub fn usable_bytes(self) -> u64 {
        match self {
            Limit::Budget(bytes) => bytes,
            Limit::Free(bytes) => (bytes as f64 * USABLE_SHARE) as u64,
        }
    }

    /// Bytes above which a plan is refused.
    pub fn most_bytes(self) -> u64 {
        match self {
            Limit::Budget(bytes) | Limit::Free(bytes) => bytes,
        }
    }
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
    /// Bytes of the frozen weights, all of them where the run computes.
    pub weights: WeightBytes,
    /// Where the embedding may be.
    pub embedding: EmbeddingPlace,
    /// Blocks whose weights shall have room in bf16 on a GPU, if it is there; otherwise all that have, where
    /// that is clearly faster.
    pub dequantized_blocks: Option<usize>,
    /// Bytes of the rest outside the arena: program, tokenizer, data.
    pub process_bytes: u64,
    /// Where the run computes.
    pub place: Place,
    /// What may be pinned of the host's memory beside a GPU: what is offloaded, streamed blocks, tables.
    pub pinned_bytes: u64,
    /// That of a run which goes on: it is kept if it fits.
    pub sum_order: Option<SumOrder>,
}

/// What a run does to stay within its memory.
#[derive(Debug, Clone)]
pub struct Choice {
    /// How it runs.
    pub strategy: Strategy,
    /// Its sizes, with the policies of all layers and the sizes of pieces.
    pub settings: Settings,
}

impl Demand<'_> {
    /// The fastest way within `limit` of those that are allowed, by the
    /// arithmetic of `src/plan/cost.rs`; where only the leanest one fits into what is free, that. A run
    /// that goes on keeps its order of sums, which what is free then would not give again, if it can.
    ///
    /// # Errors
    /// `Budget` when nothing fits, with the nearest settings that do; `Usage` when the weights
    /// cannot be streamed and must be.
    pub fn choose(&self, limit: Limit) -> Result<Choice> {
        let candidates = self.candidates()?;
        let chosen = self.choose_of(&candidates, limit);
        chosen.ok_or_else(|| self.shortfall(limit, self.leanest_of(&candidates)))
    }

    fn choose_of(&self, candidates: &[Strategy], limit: Limit) -> Option<Choice> {
        let usable = limit.usable_bytes();
        let as_before = self.in_order(candidates).and_then(|same| self.fitting(&same, usable));
        as_before.or_else(|| self.fitting(candidates, usable)).or_else(|| {
            let leanest = self.leanest_of(candidates);
            self.fits(leanest, limit.most_bytes()).then(|| self.choice(leanest))
        })
    }

    /// What [`choose`](Demand::choose) would, if anything.
    fn chosen(&self, limit: Limit) -> Option<Choice> {
        self.choose_of(&self.candidates().ok()?, limit)
    }

    /// Those that add up as the run did before; `None` for one that begins.
    fn in_order(&self, candidates: &[Strategy]) -> Option<Vec<Strategy>> {
        let order = self.sum_order?;
        let same = |c: &&Strategy| self.settings_of(**c).sum_order() == order;
        Some(candidates.iter().filter(same).copied().collect())
    }

    /// The way that takes the least of those that are allowed.
    ///
    /// # Errors
    /// `Usage` when the weights cannot be streamed and must be.
    pub fn leanest(&self) -> Result<Choice> {
        Ok(self.choice(self.leanest_of(&self.candidates()?)))
    }

    /// What the host has no room for is no way out: of plans like that, the one that lacks the least.
    fn leanest_of(&self, candidates: &[Strategy]) -> Strategy {
        let lacking =
            |candidate: &Strategy| self.pinned_for(*candidate).saturating_sub(self.pinned_bytes);
        let least = candidates.iter().map(lacking).min();
        let possible: Vec<Strategy> = candidates
            .iter()
            .filter(|candidate| Some(lacking(candidate)) == least)
            .copied()
            .collect();
        let ends = ways(&possible).flat_map(|kept| [kept.first(), kept.last()]).flatten().copied();
        let bytes = |candidate: &Strategy| self.total_bytes(*candidate);
        ends.min_by_key(bytes).expect("one mode and one policy are allowed")
    }

    /// The fastest way that is allowed and takes at most `bytes`.
    pub(super) fn within(&self, bytes: u64) -> Option<Choice> {
        self.fitting(&self.candidates().ok()?, bytes)
    }

    /// Whether a way takes at most `bytes`, and what it pins of the host's memory can be had.
    pub(super) fn fits(&self, candidate: Strategy, bytes: u64) -> bool {
        self.can_be_pinned(&candidate) && self.total_bytes(candidate) <= bytes
    }

    fn can_be_pinned(&self, candidate: &Strategy) -> bool {
        self.pinned_for(*candidate) <= self.pinned_bytes
    }

    /// The fastest of `candidates` that takes at most `bytes`, or another one that is clearly faster with what it
    /// leaves of them put to use.
    fn fitting(&self, candidates: &[Strategy], bytes: u64) -> Option<Choice> {
        let ways = self.most_kept(candidates, bytes);
        let (seconds, fastest) = self.fastest_of(ways.iter().copied())?;
        if let Some(asked) = self.dequantized_blocks {
            return Some(self.choice(self.with_weights(fastest, asked, bytes)));
        }
        // Not in smaller pieces for it: these change the order of sums.
        let ways = ways.into_iter().filter(|way| way.pieces == fastest.pieces);
        let filled = self.fastest_of(ways.map(|way| self.with_weights(way, usize::MAX, bytes)));
        let filled = filled.filter(|(filled, _)| *filled < WORTH_MEMORY * seconds);
        Some(self.choice(filled.map_or(fastest, |(_, filled)| filled)))
    }

    /// The fastest of some ways, of equally fast ones the first, and what it takes for a token.
    fn fastest_of(&self, ways: impl Iterator<Item = Strategy>) -> Option<(f64, Strategy)> {
        let pace = Pace::new(self);
        let timed = ways.map(|way| (pace.seconds_per_token(&self.choice(way)), way));
        timed.min_by(|a, b| a.0.total_cmp(&b.0))
    }

    /// Of each way the candidate that keeps most and takes at most `bytes`.
    fn most_kept(&self, candidates: &[Strategy], bytes: u64) -> Vec<Strategy> {
        let fits = |candidate: &Strategy| self.fits(*candidate, bytes);
        // Blocks that do not keep may pin more.
        let candidates: Vec<Strategy> =
            candidates.iter().filter(|candidate| self.can_be_pinned(candidate)).copied().collect();
        // Of each group the first one that fits is found by bisection. That in which all keep is tried
        // apart: it needs no buffers to recompute in, and may take less than the next.
        let most = ways(&candidates).filter_map(|kept| {
            let (all, fewer) = kept.split_first()?;
            let first = || fewer.get(fewer.partition_point(|candidate| !fits(candidate)));
            // Most ways do not fit at all where memory is short.
            let any = || fewer.last().is_some_and(fits);
            if fits(all) { Some(all) } else { any().then(first).flatten() }
        });
        most.copied().collect()
    }

    /// Blocks whose weights it is of use to have room for in bf16: streamed ones leave.
    pub(super) fn most_dequantized(&self, strategy: Strategy) -> usize {
        match (self.place, strategy.stream) {
            _ if strategy.pieces.one_buffer => 0,
            (Place::Gpu, true) => 1,
            (Place::Gpu, false) if self.weights.resident.codes > 0 => self.spec.num_layers,
            _ => 0,
        }
    }

    /// A way that fits into `bytes`, with room in bf16 for the weights of as many blocks as do, up to `most`.
    fn with_weights(&self, way: Strategy, most: usize, bytes: u64) -> Strategy {
        let most = most.min(self.most_dequantized(way));
        if most == 0 {
            return way;
        }
        let with = |dequantized_blocks| Strategy { dequantized_blocks, ..way };
        let [none, one] = [0, 1].map(|blocks| self.total_bytes(with(blocks)));
        let fitting = bytes.saturating_sub(none) / (one - none).max(1);
        with(most.min(fitting as usize))
    }

    /// Bytes of the host's memory beside a GPU that hold what a run offloads, its embedding and head, and
    /// streamed blocks on their way.
    pub(super) fn pinned_for(&self, strategy: Strategy) -> u64 {
        if self.place == Place::Cpu {
            return 0;
        }
        let waiting =
            |layers: usize, policy| layers * waiting_bytes(self.spec, self.settings, policy);
        let (others, inputs) = (self.spec.num_layers - strategy.kept, strategy.remaking_attention);
        let offloaded =
            waiting(inputs, Policy::Offload) + waiting(others - inputs, strategy.others);
        let streamed = self.weights.streamed.filter(|_| strategy.stream);
        let blocks = streamed.map_or(0, |streamed| streamed.blocks * streamed.block);
        offloaded as u64 + blocks + self.weights.on_host(strategy.on_host)
    }

    /// All that a choice pins of the host's memory beside a GPU, with what is staged for uploads.
    pub(super) fn pinned(&self, choice: &Choice) -> u64 {
        match self.place {
            Place::Cpu => 0,
            Place::Gpu => {
                let staged = staged_bytes(&self.plan(&choice.settings)) as u64;
                self.pinned_for(choice.strategy) + staged
            }
        }
    }

    /// What may be in the host's memory beside a GPU.
    pub(super) fn embedding_places(&self) -> &'static [OnHost] {
        use OnHost::{All, Input, Nothing};
        match (self.place, self.embedding) {
            (Place::Cpu, _) | (_, EmbeddingPlace::Gpu) => &[Nothing],
            (_, EmbeddingPlace::HostInput) => &[Input],
            (_, EmbeddingPlace::Host) => &[All],
            (_, EmbeddingPlace::Auto) if self.weights.embedding == 0 => &[Nothing, All],
            (_, EmbeddingPlace::Auto) => &[Nothing, Input, All],
        }
    }

    /// All ways that are allowed; of two that take as long, the simpler one comes first.
    fn candidates(&self) -> Result<Vec<Strategy>> {
        let layers = self.spec.num_layers;
        let streams: &[bool] = match (self.mode, self.weights.streamed) {
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
        use Policy::{Attention, Checkpoint, Keep, Offload, OffloadAttention};
        const OTHERS: &[Policy] = &[Checkpoint, Attention, OffloadAttention, Offload];
        let (kept, others): (Vec<usize>, &[Policy]) = match self.activations {
            Activations::Auto => ((0..=layers).rev().collect(), OTHERS),
            Activations::Attention => (vec![0], &[Attention]),
            Activations::Keep => (vec![layers], &[Keep]),
            Activations::Checkpoint => (vec![0], &[Checkpoint]),
            Activations::Offload => (vec![0], &[Offload]),
            Activations::OffloadAttention => (vec![0], &[OffloadAttention]),
        };
        let mut candidates = Vec::new();
        for pieces in Pieces::ways(self.place == Place::Gpu) {
            for &on_host in self.embedding_places() {
                for (&stream, &others) in
                    streams.iter().flat_map(|s| others.iter().map(move |o| (s, o)))
                {
                    let uniform = Strategy::uniform(layers, others, stream);
                    let with =
                        |&kept: &usize| Strategy { kept, others, on_host, pieces, ..uniform };
                    let auto = self.activations == Activations::Auto;
                    candidates.extend(kept.iter().map(with).filter_map(|way| match others {
                        OffloadAttention if auto => self.as_far_as_pinned(way),
                        _ => Some(way),
                    }));
                    if auto && others == Offload {
                        let with = |attended| Strategy { attended, ..with(&0) };
                        candidates.extend((1..=layers).rev().map(with));
                    }
                }
            }
        }
        Ok(candidates)
    }

    /// The same, with attention offloaded of as many blocks as the host has room for; `None` where that is
    /// none of those that do not keep theirs.
    fn as_far_as_pinned(&self, way: Strategy) -> Option<Strategy> {
        let others = self.spec.num_layers - way.kept;
        if others == 0 {
            return Some(way);
        }
        let with = |remaking_attention| Strategy { remaking_attention, ..way };
        let [all, fewer] = [0, 1].map(|blocks| self.pinned_for(with(blocks)));
        let lacking = all.saturating_sub(self.pinned_bytes);
        let remaking = lacking.div_ceil((all - fewer).max(1)) as usize;
        (remaking < others).then(|| with(remaking))
    }

    pub(super) fn choice(&self, strategy: Strategy) -> Choice {
        let others = match strategy.kept == self.spec.num_layers {
            // There are none.
            true => Policy::Keep,
            false => strategy.others,
        };
        Choice { settings: self.settings_of(strategy), strategy: Strategy { others, ..strategy } }
    }

    fn settings_of(&self, strategy: Strategy) -> Settings {
        strategy.applied_to(self.settings, self.spec.num_layers)
    }

    /// The same demand at other sizes.
    pub(super) fn at<'b>(&'b self, settings: &'b Settings) -> Demand<'b> {
        Demand { settings, ..self.clone() }
    }

    /// The frozen weights, where the run computes.
    fn weight_parts(&self, strategy: Strategy) -> WeightParts {
        let weights = self.weights.without(strategy.on_host);
        let streamed = weights.streamed.filter(|_| strategy.stream);
        streamed.map_or(weights.resident, |streamed| streamed.of_pass(self.settings.tokens))
    }

    /// What a run has beside its arena.
    pub fn outside(&self, choice: &Choice) -> Outside {
        let weights = self.weight_parts(choice.strategy);
        let Demand { place, process_bytes, .. } = *self;
        Outside { place, process_bytes, weights, pinned_bytes: self.pinned(choice) }
    }

    /// The buffers of a choice.
    pub fn plan(&self, settings: &Settings) -> MemoryPlan {
        (self.layout)(self.spec, settings)
    }

    /// Bytes of everything.
    pub fn total_bytes(&self, strategy: Strategy) -> u64 {
        let plan = self.plan(&self.settings_of(strategy));
        plan.arena_bytes() as u64 + self.weight_parts(strategy).total() + self.process_bytes
    }

    /// What a choice does to stay within its memory, for people: the first says what blocks keep.
    pub fn facts(&self, choice: &Choice) -> Vec<String> {
        let Strategy { stream, on_host, pieces, dequantized_blocks, .. } = choice.strategy;
        let settings = &choice.settings;
        let bytes = ByteSize(self.plan(settings).offloaded_bytes() as u64);
        let to = if self.place == Place::Gpu { "pinned memory" } else { "a file" };
        let offloaded = settings.offloaded_in_words();
        let facts = [
            Some(settings.kept_in_words()),
            offloaded.map(|what| format!("{bytes} of {what} offloaded to {to}")),
            stream.then(|| "weights streamed from their file".into()),
            on_host.in_words().map(Into::into),
            (dequantized_blocks > 0).then(|| {
                let layers = self.spec.num_layers;
                format!("weights of {dequantized_blocks} of {layers} blocks stay dequantized")
            }),
            settings.tiled().then(|| format!("MLP in tiles of {} tokens", settings.mlp_tile())),
            pieces.logits.then(|| "a quarter of the logits at a time".into()),
            pieces.one_buffer.then(|| "one buffer for dequantized weights".into()),
        ];
        facts.into_iter().flatten().collect()
    }
}

/// Groups of candidates that differ only in how many blocks keep their activations, or the output of
/// attention, most first: each block that keeps is faster and takes more memory.
fn ways(candidates: &[Strategy]) -> impl Iterator<Item = &[Strategy]> {
    let way = |c: &Strategy| (c.others, c.stream, c.on_host, c.pieces, c.attended > 0);
    candidates.chunk_by(move |a, b| way(a) == way(b))
}

#[cfg(test)]
mod tests;
