//! How often something is done in a run.

use clap::ValueEnum;

use crate::train::recipe::Every;

/// When something is done, as transformers' `IntervalStrategy` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum IntervalStrategy {
    /// At the end alone
    No,
    /// After so many steps
    Steps,
    /// After each pass over the data
    Epoch,
}

impl IntervalStrategy {
    /// How often that is, where `steps` is the interval that was given.
    pub(super) fn every(chosen: Option<Self>, steps: Every) -> Every {
        match chosen {
            Some(IntervalStrategy::No) => Every::Run,
            Some(IntervalStrategy::Epoch) => Every::Epoch,
            Some(IntervalStrategy::Steps) | None => steps,
        }
    }
}
