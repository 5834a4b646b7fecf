//! What a run really takes, of the process' memory or of a GPU's.

use std::time::Instant;

use super::backend::TrainingKernels;
use crate::error::Result;
use crate::ledger::rows::{HostMemory, Measured};
use crate::ledger::{Record, Watch, pinned, resident};
use crate::model::Model;
use crate::plan::Processor;
use crate::system::allocator;

/// Measures a run from before its weights are read.
pub enum Meter {
    /// The process, over time.
    Process(Watch),
    /// A GPU: everything is allocated before the first step, so that what is in use at the end is
    /// the most. Other programs on it must hold still to be left out.
    Device {
        /// Bytes in use before the weights were there: the driver's context and others' memory.
        before_bytes: u64,
        /// Bytes of the host that were pinned before.
        pinned_before: u64,
        /// What was in use whenever somebody looked.
        record: Record,
        /// When measuring began.
        start: Instant,
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
        Ok(match around.processor {
            Processor::Cpu => Meter::Process(Watch::begin()),
            Processor::Gpu => {
                let (record, start) = (Record::default(), Instant::now());
                let pinned_before = pinned::bytes();
                let mut meter = Meter::Device { before_bytes, pinned_before, record, start };
                meter.look(kernels)?;
                meter
            }
        })
    }

    /// After weights were read, before anything else is allocated.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn loaded<K: TrainingKernels>(&mut self, kernels: &K) -> Result<()> {
        allocator::give_back();
        match self {
            Meter::Process(watch) => watch.loaded(),
            Meter::Device { .. } => {
                self.look(kernels)?;
            }
        }
        Ok(())
    }

    /// Bytes in use now. A process is also watched in between, a GPU is not.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn look<K: TrainingKernels>(&mut self, kernels: &K) -> Result<u64> {
        match self {
            Meter::Process(watch) => Ok(watch.look().resident_bytes),
            Meter::Device { record, start, .. } => {
                let used_bytes = kernels.surroundings()?.used_bytes;
                record.add_now(*start, used_bytes);
                Ok(used_bytes)
            }
        }
    }

    /// What was measured of `model` so far.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn measured<K: TrainingKernels>(&self, model: &Model<K>) -> Result<Measured> {
        let (weights, region_bytes) = (model.weight_bytes(), model.region_bytes());
        Ok(match self {
            Meter::Process(watch) => {
                let mut measured = watch.measured(weights, region_bytes);
                if model.weights().streaming.is_some() {
                    // Gone again by now: what there was at most of all weights, but for what stays.
                    measured.weights.streamed =
                        watch.most_weight_bytes().saturating_sub(weights.total());
                }
                measured
            }
            Meter::Device { before_bytes, pinned_before, record, start } => {
                let peak_bytes = model.parameters().kernels().surroundings()?.used_bytes;
                let mut record = record.clone();
                record.add_now(*start, peak_bytes);
                let before_bytes = Some(*before_bytes);
                let (resident_bytes, mapped_bytes) = resident::now_and_files();
                let pinned_bytes = pinned::bytes().saturating_sub(*pinned_before);
                let host = Some(HostMemory { resident_bytes, mapped_bytes, pinned_bytes });
                Measured {
                    before_bytes,
                    weights,
                    free_heap_bytes: 0,
                    region_bytes,
                    peak_bytes,
                    host,
                    record,
                }
            }
        })
    }
}
