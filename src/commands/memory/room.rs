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
use crate::plan::{Choice, Demand, Limit, Machine, Processor};
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

/// Whether `train` would take a plan here.
#[derive(Debug, Serialize)]
pub(super) struct Verdict {
    free_bytes: u64,
    #[serde(skip)]
    processor: Processor,
    pub fits: bool,
    /// What is wrong with it, up to the free memory's name.
    #[serde(skip)]
    fault: &'static str,
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
                (Some(around.usable_bytes), Some(around.used_bytes))
            }
            (Device::Cuda(index), None) => match device::surroundings(index) {
                // The context of the question has no modules yet.
                Some(around) => {
                    let context_bytes = around.used_bytes.max(ASSUMED_CONTEXT_BYTES);
                    (Some(around.usable_bytes), Some(context_bytes))
                }
                None => (None, None),
            },
            (_, None) => (Some(Cpu::default().surroundings()?.usable_bytes), None),
        };
        // Beside a GPU that is not here nothing is known of the host.
        let pinned_bytes = free_bytes.map_or(u64::MAX, |_| resident::pinnable_bytes());
        Ok(Room { free_bytes, context_bytes, pinned_bytes })
    }

    /// Whether `planned` is what `train` would take here by itself, or within a budget at all; if not, what
    /// of `demand` it would take.
    pub fn verdict(&self, demand: &Demand, planned: &Choice, has_budget: bool) -> Option<Verdict> {
        let free_bytes = self.free_bytes?;
        // A budget's plan has the assumed context of some card.
        let process_bytes = self.context_bytes.unwrap_or(demand.machine.process_bytes);
        let machine = Machine { process_bytes, ..demand.machine };
        let (demand, limit) = (Demand { machine, ..demand.clone() }, Limit::Free(free_bytes));
        let bytes = demand.total_bytes(planned.strategy);
        let fits =
            if has_budget { bytes <= free_bytes } else { is_chosen(&demand, planned, limit) };
        let instead = || match demand.choose(limit) {
            Ok(choice) => {
                let bytes = ByteSize(demand.total_bytes(choice.strategy));
                format!("`train` would take {bytes}: {}", demand.facts(&choice).join(", "))
            }
            Err(refusal) => refusal.message().hint.clone().unwrap_or_default(),
        };
        let fault = match bytes {
            bytes if bytes > free_bytes => "does not fit the",
            bytes if bytes > limit.usable_bytes() => "takes more than nine tenths of the",
            _ => "pins more of the host's memory than can be had, beside the",
        };
        let (processor, instead) = (demand.machine.processor, (!fits).then(instead));
        Some(Verdict { free_bytes, processor, fits, fault, instead })
    }
}

/// Whether a run within `limit` goes as `planned`. Weights that stay dequantized in what it leaves are no
/// other plan.
fn is_chosen(demand: &Demand, planned: &Choice, limit: Limit) -> bool {
    let dequantized_blocks = Some(planned.strategy.dequantized_blocks);
    let demand = demand.wishing(|wishes| wishes.dequantized_blocks = dequantized_blocks);
    let chosen = demand.choose(limit);
    chosen.is_ok_and(|chosen| chosen.strategy == planned.strategy)
}

impl Verdict {
    /// One line.
    pub fn in_words(&self) -> String {
        let (free, place) = (ByteSize(self.free_bytes), place_in_words(self.processor));
        match &self.instead {
            None => format!("fits the {free} {place}"),
            Some(instead) => format!("{} {free} {place}; {instead}", self.fault),
        }
    }
}

/// Where the bytes are that a run may use, for people.
pub(super) fn place_in_words(processor: Processor) -> &'static str {
    match processor {
        Processor::Gpu => "of this GPU",
        Processor::Cpu => "that are free here",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::LoraConfig;
    use crate::model::families::spec_from_config;
    use crate::plan::{Settings, WeightBytes, Wishes, layout, logit_rows};

    /// Of what is free `train` leaves a tenth, unless its leanest plan needs it.
    #[test]
    fn a_plan_fits_where_train_would_take_it() {
        let text = include_str!("../../../tests/data/models/llama_s0/config.json");
        let spec = spec_from_config(&serde_json::from_str(text).unwrap()).unwrap();
        let logit_rows = logit_rows(&spec, 4096, None, Processor::Cpu);
        let settings = Settings {
            targets: LoraConfig::default().resolve(&spec).unwrap(),
            threads: 2,
            ..Settings::of_pass(4096, logit_rows)
        };
        let bf16 = nibble_quant::FloatType::Bf16;
        let demand = Demand {
            spec: &spec,
            weights: WeightBytes::of_config(&spec, bf16, None, Processor::Cpu),
            settings: &settings,
            machine: Machine {
                processor: Processor::Cpu,
                layout: &layout,
                process_bytes: 1 << 20,
                pinned_bytes: u64::MAX,
            },
            wishes: Wishes { lora_r: Some(16), ..Wishes::default() },
        };
        let all = demand.choose(Limit::Free(u64::MAX)).unwrap();
        let least = demand.leanest().unwrap();
        let says = |planned: &Choice, free_bytes: u64, has_budget: bool| {
            let room =
                Room { free_bytes: Some(free_bytes), context_bytes: None, pinned_bytes: u64::MAX };
            let verdict = room.verdict(&demand, planned, has_budget).unwrap();
            (verdict.fits, verdict.in_words())
        };
        let [most, few] = [&all, &least].map(|choice| demand.total_bytes(choice.strategy));
        let (fits, text) = says(&all, most * 10 / 9 + 10, false);
        assert!(fits && text.starts_with("fits the "), "{text}");
        let (fits, text) = says(&all, most, false);
        let instead = " that are free here; `train` would take ";
        assert!(!fits && text.starts_with("takes more than nine tenths of the "), "{text}");
        assert!(text.contains(instead) && !text.contains("fits"), "{text}");
        let (fits, text) = says(&all, most - 1, false);
        assert!(!fits && text.starts_with("does not fit the ") && text.contains(instead), "{text}");
        assert!(says(&least, few, false).0, "there is no leaner one");
        // A budget is all that a run with one looks at.
        assert!(says(&all, most, true).0 && !says(&all, most - 1, true).0);
        let nowhere = Room { free_bytes: None, context_bytes: None, pinned_bytes: 0 };
        assert!(nowhere.verdict(&demand, &all, false).is_none());
    }
}
