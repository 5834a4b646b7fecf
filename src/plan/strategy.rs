//! One way to run: what blocks keep, where weights are, and what is made in smaller pieces.

use clap::ValueEnum;
use serde::Serialize;

use super::activations::Activations;
use super::embedding::{EmbeddingPlace, OnHost};
use super::settings::{Pieces, Policy, Settings};
use super::weights::WeightsMode;

/// A way to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Strategy {
    /// Blocks that keep their activations: the last ones, which the backward pass meets first.
    pub kept: usize,
    /// What all other blocks do with their activations; *keep* in a choice that has no other blocks.
    pub others: Policy,
    /// Blocks among the others, the last ones, that keep the output of attention though their input is
    /// offloaded.
    pub attended: usize,
    /// Blocks among the others, the first ones, that only offload their input though the rest offloads what
    /// attention makes, too: the host has no room for more.
    pub remaking_attention: usize,
    /// Whether the blocks' weights are streamed from their file.
    pub stream: bool,
    /// What of embedding and head is in the host's memory beside a GPU.
    #[serde(rename = "embedding")]
    pub on_host: OnHost,
    /// Blocks whose weights have room in bf16 on a GPU, too.
    pub dequantized_blocks: usize,
    /// What is made in smaller pieces than usual.
    #[serde(skip)]
    pub pieces: Pieces,
}

impl Strategy {
    /// One `policy` for all of `layers` blocks, with everything else as usual.
    pub(super) fn uniform(layers: usize, policy: Policy, stream: bool) -> Self {
        Strategy {
            kept: if policy == Policy::Keep { layers } else { 0 },
            others: policy,
            attended: 0,
            remaking_attention: 0,
            stream,
            on_host: OnHost::Nothing,
            dequantized_blocks: 0,
            pieces: Pieces::NONE,
        }
    }

    /// The policy of every block. The last ones keep what they can: the backward pass meets them first.
    pub(super) fn policies(self, layers: usize) -> Vec<Policy> {
        let policy = |behind: usize| match self.others {
            _ if behind <= self.kept => Policy::Keep,
            Policy::OffloadAttention if behind > layers - self.remaking_attention => {
                Policy::Offload
            }
            Policy::Offload if behind <= self.kept + self.attended => Policy::AttentionOffloadInput,
            others => others,
        };
        (1..=layers).rev().map(policy).collect()
    }

    /// `settings` with its policies and pieces, of a model with so many `layers`.
    pub(super) fn applied_to(self, settings: &Settings, layers: usize) -> Settings {
        let settings = Settings {
            policies: self.policies(layers),
            head_on_host: self.on_host == OnHost::All,
            dequantized_blocks: self.dequantized_blocks,
            ..settings.clone()
        };
        settings.in_pieces(self.pieces)
    }

    /// The values of `--activations`, `--weights` and `--embedding` that lead to it.
    pub(super) fn flags(self, layers: usize) -> (Activations, WeightsMode, EmbeddingPlace) {
        let activations = match self.kept {
            _ if self.attended + self.remaking_attention > 0 => Activations::Auto,
            kept if kept == layers => Activations::Keep,
            0 => Activations::of_all(self.others),
            _ => Activations::Auto,
        };
        (activations, WeightsMode::of(self.stream), self.on_host.asked_by())
    }
}

/// A value as the command line takes it.
pub(super) fn typed(value: impl ValueEnum) -> String {
    let value = value.to_possible_value().expect("no value is skipped");
    value.get_name().to_string()
}
