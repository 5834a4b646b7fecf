//! What a run really takes, of the process' memory or of a GPU's.

use super::backend::TrainingKernels;
use crate::error::Result;
use crate::ledger::rows::Measured;
use crate::ledger::{Record, Watch};

/// Measures a run from before its weights are read.
pub enum Meter {
    /// The process, over time.
    Process(Watch),
    /// A GPU: everything is allocated before the first step, so that what is in use at the end is
    /// the most. Other programs on it must hold still to be left out.
    Device {
        /// Bytes in use before the weights were there: the driver's context and others' memory.
        before_bytes: u64,
        /// Bytes in use with them.
        loaded_bytes: u64,
    },
}

impl Meter {
    /// Before weights are read.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn begin<K: TrainingKernels>(kernels: &K) -> Result<Self> {
        let around = kernels.surroundings()?;
        let before_bytes = around.used_bytes;
        Ok(match around.in_process {
            true => Meter::Process(Watch::begin()),
            false => Meter::Device { before_bytes, loaded_bytes: before_bytes },
        })
    }

    /// After weights were read, before anything else is allocated.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn loaded<K: TrainingKernels>(&mut self, kernels: &K) -> Result<()> {
        match self {
            Meter::Process(watch) => watch.loaded(),
            Meter::Device { loaded_bytes, .. } => {
                *loaded_bytes = kernels.surroundings()?.used_bytes;
            }
        }
        Ok(())
    }

    /// What was measured so far; `region_bytes` is the arena's account of itself.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn measured<K: TrainingKernels>(
        &self,
        kernels: &K,
        region_bytes: Vec<u64>,
    ) -> Result<Measured> {
        Ok(match self {
            Meter::Process(watch) => watch.measured(region_bytes),
            Meter::Device { before_bytes, loaded_bytes } => Measured {
                weight_bytes: loaded_bytes.saturating_sub(*before_bytes),
                region_bytes,
                peak_bytes: kernels.surroundings()?.used_bytes,
                record: Record::default(),
            },
        })
    }
}
