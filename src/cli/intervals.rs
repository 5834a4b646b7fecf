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
    /// How often that is, whatever interval is given; none where that decides.
    pub(super) fn every(chosen: Option<Self>) -> Option<Every> {
        match chosen {
            Some(IntervalStrategy::No) => Some(Every::Run),
            Some(IntervalStrategy::Epoch) => Some(Every::Epoch),
            Some(IntervalStrategy::Steps) | None => None,
        }
    }
}
