//! The fastest way to run within the memory that may be used: which layers keep their activations,
//! what the others do with theirs, where weights are, and the sizes of pieces.

mod shortfall;

use clap::ValueEnum;

use crate::error::{Error, Result};
use crate::kernels::cuda::{staged_bytes, waiting_bytes};
use crate::model::spec::ModelSpec;
use crate::plan::cost::Pace;
use crate::plan::embedding::{EmbeddingPlace, OnHost};
use crate::plan::outside::{Outside, WeightParts};
use crate::plan::region::MemoryPlan;
use crate::plan::settings::{Pieces, Policy, Settings, SumOrder};
use crate::plan::weights::{Place, WeightBytes};

/// Share of the free memory that is planned with where no budget is given.
const USABLE_SHARE: f64 = 0.9;

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
    /// With the policies of all layers, and the sizes of pieces.
    pub settings: Settings,
    /// Whether the blocks' weights are streamed from their file.
    pub stream: bool,
    /// What is in the host's memory beside a GPU.
    pub on_host: OnHost,
    /// Where all of it comes from.
    pub(super) candidate: Candidate,
}

impl Choice {
    /// What it does, for people.
    pub fn in_words(&self) -> String {
        let Candidate { stream, on_host, pieces, .. } = self.candidate;
        let whose = if self.candidate.kept == 0 { "all" } else { "the others" };
        let offloads = self.settings.offloaded_in_words();
        let parts = [
            Some(self.settings.kept_in_words()),
            offloads.map(|what| format!("{what} of {whose} offloaded")),
            stream.then(|| "weights streamed".into()),
            on_host.in_words().map(Into::into),
            pieces.tiles.then(|| format!("MLP in tiles of {} tokens", self.settings.mlp_tile())),
            pieces.logits.then(|| "a quarter of the logits at a time".into()),
            pieces.one_buffer.then(|| "one buffer for dequantized weights".into()),
        ];
        parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

/// A way to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Candidate {
    /// Blocks that keep their activations: the last ones, which the backward pass meets first.
    pub kept: usize,
    /// What all others do.
    pub others: Policy,
    /// Those of them, the last ones, that keep the output of attention though their input is offloaded.
    pub attended: usize,
    /// Whether the blocks' weights are streamed.
    pub stream: bool,
    /// What is in the host's memory beside a GPU.
    pub on_host: OnHost,
    /// What is made in smaller pieces than usual.
    pub pieces: Pieces,
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

    fn choose_of(&self, candidates: &[Candidate], limit: Limit) -> Option<Choice> {
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
    fn in_order(&self, candidates: &[Candidate]) -> Option<Vec<Candidate>> {
        let order = self.sum_order?;
        let same = |c: &&Candidate| self.with(self.settings, **c).sum_order() == order;
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
    fn leanest_of(&self, candidates: &[Candidate]) -> Candidate {
        let lacking = |candidate: &Candidate| {
            self.pinned_for(self.settings, *candidate).saturating_sub(self.pinned_bytes)
        };
        let least = candidates.iter().map(lacking).min();
        let possible: Vec<Candidate> = candidates
            .iter()
            .filter(|candidate| Some(lacking(candidate)) == least)
            .copied()
            .collect();
        let ends = ways(&possible).flat_map(|kept| [kept.first(), kept.last()]).flatten().copied();
        let bytes = |candidate: &Candidate| self.total_bytes(self.settings, *candidate);
        ends.min_by_key(bytes).expect("one mode and one policy are allowed")
    }

    /// The fastest way that is allowed and takes at most `bytes`.
    pub(super) fn within(&self, bytes: u64) -> Option<Choice> {
        self.fitting(&self.candidates().ok()?, bytes)
    }

    /// Whether a way takes at most `bytes`, and what it pins of the host's memory can be had.
    pub(super) fn fits(&self, candidate: Candidate, bytes: u64) -> bool {
        self.can_be_pinned(&candidate) && self.total_bytes(self.settings, candidate) <= bytes
    }

    fn can_be_pinned(&self, candidate: &Candidate) -> bool {
        self.pinned_for(self.settings, *candidate) <= self.pinned_bytes
    }

    fn fitting(&self, candidates: &[Candidate], bytes: u64) -> Option<Choice> {
        self.fastest(candidates, bytes).map(|candidate| self.choice(candidate))
    }

    /// The fastest of `candidates` that takes at most `bytes`; of equally fast ones the first.
    fn fastest(&self, candidates: &[Candidate], bytes: u64) -> Option<Candidate> {
        let pace = Pace::new(self, self.settings);
        let seconds = |candidate: &Candidate| {
            pace.seconds_per_token(&self.with(self.settings, *candidate), *candidate)
        };
        let fits = |candidate: &Candidate| self.fits(*candidate, bytes);
        // Blocks that do not keep may pin more.
        let candidates: Vec<Candidate> =
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
        most.copied().min_by(|a, b| seconds(a).total_cmp(&seconds(b)))
    }

    /// Bytes of the host's memory beside a GPU that hold what a run offloads, its embedding and head, and
    /// streamed blocks on their way.
    pub(super) fn pinned_for(&self, settings: &Settings, candidate: Candidate) -> u64 {
        if self.place == Place::Host {
            return 0;
        }
        let layers = self.spec.num_layers - candidate.kept;
        let offloaded = layers * waiting_bytes(self.spec, settings, candidate.others);
        let streamed = self.weights.streamed.filter(|_| candidate.stream);
        let blocks = streamed.map_or(0, |streamed| streamed.blocks * streamed.block);
        offloaded as u64 + blocks + self.weights.on_host(candidate.on_host)
    }

    /// All that a way pins of the host's memory beside a GPU, with what is staged for uploads.
    pub(super) fn pinned(&self, candidate: Candidate) -> u64 {
        match self.place {
            Place::Host => 0,
            Place::Gpu => {
                let plan = self.plan(&self.with(self.settings, candidate));
                self.pinned_for(self.settings, candidate) + staged_bytes(&plan) as u64
            }
        }
    }

    /// What may be in the host's memory beside a GPU.
    pub(super) fn embedding_places(&self) -> &'static [OnHost] {
        use OnHost::{All, Input, Nothing};
        match (self.place, self.embedding) {
            (Place::Host, _) | (_, EmbeddingPlace::Gpu) => &[Nothing],
            (_, EmbeddingPlace::HostInput) => &[Input],
            (_, EmbeddingPlace::Host) => &[All],
            (_, EmbeddingPlace::Auto) if self.weights.embedding == 0 => &[Nothing, All],
            (_, EmbeddingPlace::Auto) => &[Nothing, Input, All],
        }
    }

    /// All ways that are allowed; of two that take as long, the simpler one comes first.
    fn candidates(&self) -> Result<Vec<Candidate>> {
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
        use Policy::{Attention, Checkpoint, Offload, OffloadAttention};
        const OTHERS: &[Policy] = &[Checkpoint, Attention, OffloadAttention, Offload];
        let (kept, others): (Vec<usize>, &[Policy]) = match self.activations {
            Activations::Auto => ((0..=layers).rev().collect(), OTHERS),
            Activations::Attention => (vec![0], &[Attention]),
            Activations::Keep => (vec![layers], &[Checkpoint]),
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
                    let attended = 0;
                    let with = |&kept: &usize| Candidate {
                        kept,
                        others,
                        attended,
                        stream,
                        on_host,
                        pieces,
                    };
                    candidates.extend(kept.iter().map(with));
                    if self.activations == Activations::Auto && others == Offload {
                        let with = |attended| Candidate { attended, ..with(&0) };
                        candidates.extend((1..=layers).rev().map(with));
                    }
                }
            }
        }
        Ok(candidates)
    }

    fn choice(&self, candidate: Candidate) -> Choice {
        let settings = self.with(self.settings, candidate);
        let Candidate { stream, on_host, .. } = candidate;
        Choice { settings, stream, on_host, candidate }
    }

    /// `settings` with the policies and pieces of a candidate.
    pub(super) fn with(&self, settings: &Settings, candidate: Candidate) -> Settings {
        let policies = policies(self.spec.num_layers, candidate);
        let head_on_host = candidate.on_host == OnHost::All;
        let settings = Settings { policies, head_on_host, ..settings.clone() };
        settings.in_pieces(candidate.pieces)
    }

    /// The frozen weights of a run with `settings`, where the run computes.
    fn weight_parts(&self, settings: &Settings, candidate: Candidate) -> WeightParts {
        let weights = self.weights.without(candidate.on_host);
        let streamed = weights.streamed.filter(|_| candidate.stream);
        streamed.map_or(weights.resident, |streamed| streamed.of_pass(settings.tokens))
    }

    /// What a run has beside its arena.
    pub fn outside(&self, choice: &Choice) -> Outside {
        self.outside_of(choice.candidate)
    }

    fn outside_of(&self, candidate: Candidate) -> Outside {
        let weights = self.weight_parts(self.settings, candidate);
        let Demand { place, process_bytes, .. } = *self;
        Outside { place, process_bytes, weights, pinned_bytes: self.pinned(candidate) }
    }

    /// The buffers of a choice.
    pub fn plan(&self, settings: &Settings) -> MemoryPlan {
        (self.layout)(self.spec, settings)
    }

    /// Bytes of everything.
    pub(super) fn total_bytes(&self, settings: &Settings, candidate: Candidate) -> u64 {
        let plan = self.plan(&self.with(settings, candidate));
        let weights = self.weight_parts(settings, candidate).total();
        plan.arena_bytes() as u64 + weights + self.process_bytes
    }
}

/// Groups of candidates that differ only in how many blocks keep their activations, or the output of
/// attention, most first: each block that keeps is faster and takes more memory.
fn ways(candidates: &[Candidate]) -> impl Iterator<Item = &[Candidate]> {
    let way = |c: &Candidate| (c.others, c.stream, c.on_host, c.pieces, c.attended > 0);
    candidates.chunk_by(move |a, b| way(a) == way(b))
}

/// The last blocks keep what they can: the backward pass meets them first.
fn policies(layers: usize, candidate: Candidate) -> Vec<Policy> {
    let Candidate { kept, others, attended, .. } = candidate;
    let policy = |behind: usize| match others {
        _ if behind <= kept => Policy::Keep,
        Policy::Offload if behind <= kept + attended => Policy::OffloadInput,
        others => others,
    };
    (1..=layers).rev().map(policy).collect()
}

#[cfg(test)]
mod tests;
