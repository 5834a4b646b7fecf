//! How a run stays within the memory that may be used: which layers keep their activations, what the
//! others do with theirs, where weights are, and the sizes of pieces; what each way takes, and the
//! fastest one that fits.

mod search;
mod shortfall;

use crate::byte_size::{ByteSize, sum_of_bytes};
use crate::kernels::cuda::{staged_bytes, waiting_bytes};
use crate::model::spec::ModelSpec;
use crate::plan::activations::Activations;
use crate::plan::embedding::{EmbeddingPlace, OnHost};
use crate::plan::outside::{Outside, WeightParts};
use crate::plan::processor::Processor;
use crate::plan::region::MemoryPlan;
use crate::plan::settings::{Pieces, Policy, Settings, SumOrder};
use crate::plan::strategy::Strategy;
use crate::plan::weights::{WeightBytes, WeightsMode};

/// Share of the free memory that is planned with where no budget is given.
const USABLE_SHARE: f64 = 0.9;

/// How much memory there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// A budget of the user's.
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

/// How a backend lays out the buffers of a run.
pub type Layout<'a> = &'a dyn Fn(&ModelSpec, &Settings) -> MemoryPlan;

/// What a run computes on, and what else is in memory there.
#[derive(Clone, Copy)]
pub struct Machine<'a> {
    /// What the run computes on.
    pub processor: Processor,
    /// The backend's buffers for some settings.
    pub layout: Layout<'a>,
    /// Bytes outside of arena and weights: program, tokenizer, data.
    pub process_bytes: u64,
    /// What may be pinned of the host's memory beside a GPU: what is offloaded, streamed blocks, tables.
    pub pinned_bytes: u64,
}

/// What the user asks for; by default a plan may choose all of it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wishes {
    /// What blocks do with their activations.
    pub activations: Activations,
    /// Whether weights may be streamed.
    pub weights: WeightsMode,
    /// Where the embedding may be.
    pub embedding: EmbeddingPlace,
    /// Blocks whose weights shall stay dequantized on a GPU, if they fit; `None`: all that do, where that is
    /// clearly faster.
    pub dequantized_blocks: Option<usize>,
    /// What `--lora-r` asks for; `None` where that is an adapter's to say.
    pub lora_r: Option<usize>,
    /// Whether the rows of logits are what the user asked for: then no plan takes fewer.
    pub logit_rows_given: bool,
    /// The order of sums of a run which goes on: it is kept if it fits.
    pub sum_order: Option<SumOrder>,
}

/// A run's demand for memory, before its policies are chosen.
#[derive(Clone)]
pub struct Demand<'a> {
    /// The model.
    pub spec: &'a ModelSpec,
    /// Bytes of the frozen weights, all of them where the run computes.
    pub weights: WeightBytes,
    /// The run's sizes; the policies are not looked at.
    pub settings: &'a Settings,
    /// What the run computes on, and what else is there.
    pub machine: Machine<'a>,
    /// What the user asks for.
    pub wishes: Wishes,
}

/// What a run does to stay within its memory.
#[derive(Debug, Clone)]
pub struct Choice {
    /// How the run goes.
    pub strategy: Strategy,
    /// The run's sizes, with the policies of all layers and the sizes of pieces.
    pub settings: Settings,
}

impl Demand<'_> {
    /// Whether a way takes at most `bytes`, and what it pins of the host's memory can be had.
    pub(super) fn fits(&self, candidate: Strategy, bytes: u64) -> bool {
        self.can_be_pinned(&candidate) && self.total_bytes(candidate) <= bytes
    }

    fn can_be_pinned(&self, candidate: &Strategy) -> bool {
        self.pinned_for(*candidate) <= self.machine.pinned_bytes
    }

    /// Bytes of the host's memory beside a GPU that hold what a run offloads, its embedding and head, and
    /// streamed blocks on their way.
    pub(super) fn pinned_for(&self, strategy: Strategy) -> u64 {
        if self.machine.processor == Processor::Cpu {
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

    /// Bytes of all that a choice pins of the host's memory beside a GPU, with what is staged for uploads.
    pub(super) fn pinned(&self, choice: &Choice) -> u64 {
        match self.machine.processor {
            Processor::Cpu => 0,
            Processor::Gpu => {
                let staged = staged_bytes(&self.plan(&choice.settings)) as u64;
                self.pinned_for(choice.strategy) + staged
            }
        }
    }

    /// What may be made in smaller pieces, the fewest first.
    pub(in crate::plan) fn pieces(&self) -> impl Iterator<Item = Pieces> {
        let given = self.wishes.logit_rows_given;
        let tiled_head = self.embedding_places().contains(&OnHost::All);
        let buffers =
            self.machine.processor == Processor::Gpu && (self.weights.packs_any || tiled_head);
        Pieces::ways(buffers).filter(move |pieces| !(given && pieces.logits))
    }

    /// What of embedding and head may be in the host's memory beside a GPU.
    pub(super) fn embedding_places(&self) -> &'static [OnHost] {
        use OnHost::{All, Input, Nothing};
        match (self.machine.processor, self.wishes.embedding) {
            (Processor::Cpu, _) | (_, EmbeddingPlace::Gpu) => &[Nothing],
            (_, EmbeddingPlace::HostInput) => &[Input],
            (_, EmbeddingPlace::Host) => &[All],
            (_, EmbeddingPlace::Auto) if self.weights.embedding == 0 => &[Nothing, All],
            (_, EmbeddingPlace::Auto) => &[Nothing, Input, All],
        }
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
        let packed_base = self.weights.packs_any;
        Settings { packed_base, ..strategy.applied_to(self.settings, self.spec.num_layers) }
    }

    /// The same demand at other sizes.
    pub(super) fn at<'b>(&'b self, settings: &'b Settings) -> Demand<'b> {
        Demand { settings, ..self.clone() }
    }

    /// The same demand with wishes that `change` changes.
    pub fn wishing(&self, change: impl FnOnce(&mut Wishes)) -> Self {
        let mut demand = self.clone();
        change(&mut demand.wishes);
        demand
    }

    /// Bytes of the frozen weights, where the run computes.
    fn weight_parts(&self, strategy: Strategy) -> WeightParts {
        let weights = self.weights.without(strategy.on_host);
        let streamed = weights.streamed.filter(|_| strategy.stream);
        streamed.map_or(weights.resident, |streamed| streamed.of_pass(self.settings.tokens))
    }

    /// What a run has beside its arena.
    pub fn outside(&self, choice: &Choice) -> Outside {
        let weights = self.weight_parts(choice.strategy);
        let Machine { processor, process_bytes, .. } = self.machine;
        Outside { processor, process_bytes, weights, pinned_bytes: self.pinned(choice) }
    }

    /// The buffers of a choice.
    pub fn plan(&self, settings: &Settings) -> MemoryPlan {
        (self.machine.layout)(self.spec, settings)
    }

    /// Bytes of everything that a strategy takes where the run computes.
    pub fn total_bytes(&self, strategy: Strategy) -> u64 {
        let plan = self.plan(&self.settings_of(strategy));
        let weights = self.weight_parts(strategy).total();
        sum_of_bytes([plan.arena_bytes() as u64, weights, self.machine.process_bytes])
    }

    /// What a choice does to stay within its memory, for people: the first says what blocks keep.
    pub fn facts(&self, choice: &Choice) -> Vec<String> {
        let Strategy { stream, on_host, pieces, dequantized_blocks, .. } = choice.strategy;
        let settings = &choice.settings;
        let bytes = ByteSize(self.plan(settings).offloaded_bytes() as u64);
        let to = if self.machine.processor == Processor::Gpu { "pinned memory" } else { "a file" };
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

#[cfg(test)]
mod tests;
