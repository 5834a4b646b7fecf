//! The memory that is free here, and whether a plan fits it.

use serde::Serialize;

use crate::byte_size::ByteSize;
use crate::cli::device::Device;
use crate::commands::device;
use crate::error::Result;
use crate::kernels::cpu::Cpu;
use crate::kernels::cuda::Cuda;
use crate::kernels::cuda::library::Gpu;
use crate::ledger::resident;
use crate::plan::{Demand, Limit, Place};
use crate::train::backend::TrainingKernels;

/// What a CUDA context takes with its modules and cuBLAS, about; a run measures it.
pub(super) const ASSUMED_CONTEXT_BYTES: u64 = 460 << 20;

/// What is known of the memory where a run would be.
pub(super) struct Room {
    /// Bytes that a run may use: the program is among them, or a GPU's context and what other
    /// programs have of it. None where the GPU is not here.
    pub free_bytes: Option<u64>,
    /// Of a GPU's, what a run's context and other programs take.
    pub context_bytes: Option<u64>,
    /// What may be pinned of the host's memory beside a GPU.
    pub pinned_bytes: u64,
}

/// Whether a plan fits here.
#[derive(Debug, Serialize)]
pub(super) struct Verdict {
    free_bytes: u64,
    #[serde(skip)]
    place: Place,
    fits: bool,
    /// What `train` would do instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    instead: Option<String>,
}

impl Room {
    /// `gpu` is open where a trial will be made.
    pub fn look(asked: Device, gpu: Option<&Cuda<Gpu>>) -> Result<Self> {
        let (free_bytes, context_bytes) = match (asked, gpu) {
            (_, Some(gpu)) => {
                let around = gpu.surroundings()?;
                (Some(around.free_bytes), Some(around.used_bytes))
            }
            (Device::Cuda(index), None) => match device::surroundings(index) {
                // The context of the question has no modules yet.
                Some(around) => {
                    let context_bytes = around.used_bytes.max(ASSUMED_CONTEXT_BYTES);
                    (Some(around.free_bytes), Some(context_bytes))
                }
                None => (None, None),
            },
            (_, None) => (Some(Cpu::default().surroundings()?.free_bytes), None),
        };
        // Beside a GPU that is not here nothing is known of the host.
        let pinned_bytes = free_bytes.map_or(u64::MAX, |_| resident::pinnable_bytes());
        Ok(Room { free_bytes, context_bytes, pinned_bytes })
    }

    /// Whether `planned_bytes` fit here; if not, what of `demand` does.
    pub fn verdict(&self, demand: &Demand, planned_bytes: u64) -> Option<Verdict> {
        let free_bytes = self.free_bytes?;
        // A budget's plan has the assumed context of some card.
        let process_bytes = self.context_bytes.unwrap_or(demand.process_bytes);
        let fits = planned_bytes - demand.process_bytes + process_bytes <= free_bytes;
        let demand = Demand { process_bytes, ..demand.clone() };
        let instead = || match demand.choose(Limit::Free(free_bytes)) {
            Ok(choice) => {
                let bytes = ByteSize(demand.total_bytes(choice.strategy));
                format!("`train` would take {bytes}: {}", demand.facts(&choice).join(", "))
            }
            Err(refusal) => refusal.message().hint.clone().unwrap_or_default(),
        };
        let (place, instead) = (demand.place, (!fits).then(instead));
        Some(Verdict { free_bytes, place, fits, instead })
    }
}

impl Verdict {
    /// One line.
    pub fn in_words(&self) -> String {
        let (free, place) = (ByteSize(self.free_bytes), place_in_words(self.place));
        match &self.instead {
            None => format!("fits the {free} {place}"),
            Some(instead) => format!("does not fit the {free} {place}; {instead}"),
        }
    }
}

/// Of what the bytes are that a run may use.
pub(super) fn place_in_words(place: Place) -> &'static str {
    match place {
        Place::Gpu => "of this GPU",
        Place::Cpu => "that are free here",
    }
}
