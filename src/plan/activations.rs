//! `--activations`: what the blocks do with theirs.

use clap::ValueEnum;

use super::settings::Policy;

/// What happens to activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Activations {
    /// The fastest mix that fits: as many blocks as possible keep theirs
    #[default]
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
    /// Values by which all blocks do the same, and what they do.
    pub(super) const UNIFORM: [(Activations, Policy); 5] = [
        (Activations::Keep, Policy::Keep),
        (Activations::Attention, Policy::Attention),
        (Activations::OffloadAttention, Policy::OffloadAttention),
        (Activations::Checkpoint, Policy::Checkpoint),
        (Activations::Offload, Policy::Offload),
    ];

    /// The policy of every block; `None` where blocks may differ.
    pub(super) fn of_every_block(self) -> Option<Policy> {
        let found = Activations::UNIFORM.into_iter().find(|(activations, _)| *activations == self);
        found.map(|(_, policy)| policy)
    }

    /// The value by which all blocks have `policy`; `Auto` where no other one leads to it.
    pub(super) fn of_all(policy: Policy) -> Self {
        let found = Activations::UNIFORM.into_iter().find(|(_, of_all)| *of_all == policy);
        found.map_or(Activations::Auto, |(activations, _)| activations)
    }
}
