//! The plan's rows beside what was measured.

use serde::{Deserialize, Serialize};

use super::{Phase, Record};
use crate::byte_size::{ByteSize, sum_of_bytes};
use crate::plan::{
    AdapterRegion, Component, CudaRegion, MemoryPlan, Outside, Processor, Region, RegionId,
    WeightParts, WorkRegion,
};

/// One part of a run's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// The part's name.
    pub name: String,
    /// Bytes as planned.
    pub planned_bytes: u64,
    /// Bytes as measured, where a run was made.
    pub measured_bytes: Option<u64>,
}

/// A phase's highest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseRow {
    /// Which phase it is.
    pub phase: Phase,
    /// Bytes of every part that was used by then, in the order of the rows.
    pub planned_bytes: Vec<u64>,
    /// Highest resident bytes, where a run was made.
    pub measured_bytes: Option<u64>,
}

/// The host's memory beside a GPU, once all of a run is allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HostMemory {
    /// Bytes of the process.
    pub resident_bytes: u64,
    /// Bytes of pages of files among these: program, libraries, weights that are streamed.
    pub mapped_bytes: u64,
    /// Bytes that are pinned for the run; the system may or may not count them to the process.
    pub pinned_bytes: u64,
}

/// A plan, and the same run as it was measured.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Account {
    /// What is planned beside the arena.
    pub outside: Outside,
    /// Program and weights, then the arena's components, largest first.
    pub rows: Vec<Row>,
    /// What was in use in each phase of the first step.
    pub phases: Vec<PhaseRow>,
    /// The highest resident bytes of the process.
    pub peak_bytes: Option<u64>,
    /// The host's memory beside a GPU, where a run was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostMemory>,
    /// The run over time.
    pub record: Record,
}

/// Row of what is neither weights nor arena of the process.
pub(crate) const PROCESS: &str = "program, tokenizer, data";
/// Row of what is neither weights nor arena of a GPU.
pub(crate) const CONTEXT: &str = "CUDA context";
/// Row of what the process' allocator has free, in pieces, and did not give back to the system.
pub(crate) const FREE_HEAP: &str = "heap fragmentation";
/// Row of what a GPU's memory loses between allocations.
pub(crate) const ROUNDING: &str = "rounding of allocations";

/// What was measured of a run.
pub struct Measured {
    /// Bytes of a GPU that were in use before the run; for a process they are what is left of the peak.
    pub before_bytes: Option<u64>,
    /// Frozen weights in memory.
    pub weights: WeightParts,
    /// Bytes of the process' heap that are free and not given back to the system.
    pub free_heap_bytes: u64,
    /// Bytes of each region of the plan that are in memory.
    pub region_bytes: Vec<u64>,
    /// The highest resident bytes of the process.
    pub peak_bytes: u64,
    /// The host's memory beside a GPU.
    pub host: Option<HostMemory>,
    /// The run over time.
    pub record: Record,
}

impl Account {
    /// The account of a plan, before anything is measured.
    pub fn planned(outside: Outside, plan: &MemoryPlan) -> Self {
        let Outside { processor, process_bytes, weights, .. } = outside;
        let (around, lost) = match processor {
            Processor::Cpu => (PROCESS, FREE_HEAP),
            Processor::Gpu => (CONTEXT, ROUNDING),
        };
        let weights = weights.rows().into_iter().filter(|(_, bytes)| *bytes > 0);
        let before: Vec<_> = [(around, process_bytes)].into_iter().chain(weights).collect();
        let components = plan.by_component();
        let arena = components.iter().map(|(part, bytes)| (part.label(), *bytes as u64));
        let rows = before.iter().copied().chain(arena).chain([(lost, 0)]);
        let row = |(name, planned_bytes): (&str, u64)| Row {
            name: name.to_string(),
            planned_bytes,
            measured_bytes: None,
        };
        let phases = Phase::ALL.map(|phase| {
            let used = |(part, _): &(Component, usize)| {
                // A GPU gives all at once, the system a page when it is touched.
                let by_then = |region: &&Region| {
                    let there = processor == Processor::Gpu || first_use(region) <= phase;
                    region.id.component() == *part && there
                };
                let regions = plan.regions.iter().filter(by_then);
                sum_of_bytes(regions.map(|region| region.bytes() as u64))
            };
            let outside = before.iter().map(|(_, bytes)| *bytes);
            let planned_bytes = outside.chain(components.iter().map(used)).chain([0]);
            PhaseRow { phase, planned_bytes: planned_bytes.collect(), measured_bytes: None }
        });
        let (rows, phases) = (rows.map(row).collect(), phases.to_vec());
        Account { outside, rows, phases, ..Account::default() }
    }

    /// Puts another plan in the place of the old one: program and weights stay.
    pub fn replan(&mut self, plan: &MemoryPlan) {
        *self = Account::planned(self.outside, plan);
    }

    /// Adds what was measured. What has no row of its own is the program's, or what a GPU lost by
    /// rounding, so that the rows add up to the peak. Nobody plans to lose memory.
    pub fn measured(mut self, plan: &MemoryPlan, measured: Measured) -> Self {
        let arena: u64 = measured.region_bytes.iter().sum();
        let accounted = arena + measured.weights.total() + measured.before_bytes.unwrap_or(0);
        let rest = measured.peak_bytes.saturating_sub(accounted);
        let free_heap = measured.free_heap_bytes.min(rest);
        let around = match self.outside.processor {
            Processor::Cpu => [(PROCESS, rest - free_heap), (FREE_HEAP, free_heap)],
            Processor::Gpu => [(CONTEXT, measured.before_bytes.unwrap_or(0)), (ROUNDING, rest)],
        };
        let label = |region: &Region| region.id.component().label();
        let regions = plan.regions.iter().map(label).zip(measured.region_bytes);
        // `report::memory_page` tests that no two parts of a run have the same name.
        let parts: Vec<(&str, u64)> =
            around.into_iter().chain(measured.weights.rows()).chain(regions).collect();
        for row in &mut self.rows {
            let of_row = parts.iter().filter(|(name, _)| *name == row.name);
            row.measured_bytes = Some(of_row.map(|(_, bytes)| bytes).sum());
        }
        for row in &mut self.phases {
            row.measured_bytes = measured.record.peak_of(row.phase);
        }
        self.peak_bytes = Some(measured.peak_bytes);
        self.host = measured.host;
        self.record = measured.record;
        self
    }

    /// By how much the measured peak is above `budget` bytes, and the part that is most above its
    /// plan; none where it is not.
    pub fn excess(&self, budget: u64) -> Option<String> {
        let peak = self.peak_bytes.filter(|&peak| peak > budget)?;
        let above = |row: &&Row| row.measured_bytes.unwrap_or(0).saturating_sub(row.planned_bytes);
        let row = self.rows.iter().max_by_key(above)?;
        let (more, measured) = (peak - budget, row.measured_bytes.unwrap_or(0));
        let [peak, more, budget, planned, measured] =
            [peak, more, budget, row.planned_bytes, measured].map(ByteSize);
        Some(format!(
            "the run took {peak}, {more} more than the {budget} that are allowed; most of what was not \
             planned is in `{}`: {measured} instead of {planned}",
            row.name
        ))
    }

    /// Bytes of all rows together, as planned.
    pub fn planned_bytes(&self) -> u64 {
        sum_of_bytes(self.rows.iter().map(|row| row.planned_bytes))
    }
}

/// When a step first touches a region: the system gives a page only then. The arena's memory stays.
fn first_use(region: &Region) -> Phase {
    use WorkRegion::*;
    match region.id {
        RegionId::Adapter(AdapterRegion::Working | AdapterRegion::Master) => Phase::Load,
        // Zeroed before the first micro-batch.
        RegionId::Adapter(AdapterRegion::Gradients) => Phase::Forward,
        RegionId::Adapter(_) => Phase::Optimizer,
        RegionId::Head(_) | RegionId::Cuda(CudaRegion::Loss | CudaRegion::MlpSums) => Phase::Loss,
        RegionId::Cache(_) => Phase::Eval,
        // Zeroed before the loss, which fills it.
        RegionId::Work(Gradient) => Phase::Loss,
        RegionId::Work(
            MlpGradient | NormGradient | ProjectedGradient | QkvGradient | LoraGradient
            | TileGradient,
        )
        | RegionId::Cuda(CudaRegion::StackedGradient) => Phase::Backward,
        RegionId::Work(
            Norm | NormStats | NormedQkv | Mlp | LoraPair | Dropped | TileMiddle | Attention,
        )
        | RegionId::Block(..)
        | RegionId::Rotary(..)
        | RegionId::QueryScale
        | RegionId::Cuda(_)
        | RegionId::DequantizedBlocks(_) => Phase::Forward,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{BlockRegion, HeadRegion, Owner, RegionType};

    fn plan() -> MemoryPlan {
        let region = |id, elements| Region::new(id, RegionType::F32, elements);
        MemoryPlan {
            regions: vec![
                region(RegionId::Block(Owner::Layer(0), BlockRegion::Input), 1600),
                region(RegionId::Head(HeadRegion::Logits), 832),
                region(RegionId::Adapter(AdapterRegion::FirstMoment), 64),
                region(RegionId::Adapter(AdapterRegion::SecondMoment), 64),
            ],
            offloaded: Vec::new(),
        }
    }

    /// 500 bytes of weights beside 1000 of other things.
    fn outside(processor: Processor) -> Outside {
        let weights = WeightParts { codes: 400, vectors: 100, ..WeightParts::default() };
        Outside { processor, process_bytes: 1000, weights, pinned_bytes: 0 }
    }

    fn measured(weights: u64, region_bytes: [u64; 4], peak_bytes: u64) -> Measured {
        let weights = WeightParts { codes: weights - 100, ..outside(Processor::Cpu).weights };
        let (region_bytes, record) = (region_bytes.to_vec(), Record::default());
        let free_heap_bytes = 20;
        let (before_bytes, host) = (None, None);
        Measured { before_bytes, weights, free_heap_bytes, region_bytes, peak_bytes, host, record }
    }

    fn names(account: &Account) -> Vec<&str> {
        account.rows.iter().map(|row| row.name.as_str()).collect()
    }

    #[test]
    fn parts_are_used_from_the_phase_that_touches_them() {
        let account = Account::planned(outside(Processor::Cpu), &plan());
        let [codes, vectors] = ["4-bit codes", "norms and biases"];
        let moments = Component::OptimizerMoments.label();
        let arena = ["block inputs", "logits chunk", moments];
        let expected = [&[PROCESS, codes, vectors], &arena[..], &[FREE_HEAP]].concat();
        assert_eq!(names(&account), expected);
        assert_eq!(account.planned_bytes(), 1500 + 6400 + 3328 + 512);
        let phase = |account: &Account, phase: Phase| {
            account.phases.iter().find(|row| row.phase == phase).unwrap().planned_bytes.clone()
        };
        assert_eq!(phase(&account, Phase::Load), [1000, 400, 100, 0, 0, 0, 0]);
        assert_eq!(phase(&account, Phase::Forward), [1000, 400, 100, 6400, 0, 0, 0]);
        assert_eq!(phase(&account, Phase::Backward), [1000, 400, 100, 6400, 3328, 0, 0]);
        let all = [1000, 400, 100, 6400, 3328, 512, 0];
        assert_eq!(phase(&account, Phase::Optimizer), all);
        let account = Account::planned(outside(Processor::Gpu), &plan());
        assert_eq!(phase(&account, Phase::Load), all);
    }

    #[test]
    fn what_is_above_the_budget_is_told_with_the_part_at_fault() {
        let account = Account::planned(outside(Processor::Cpu), &plan());
        assert_eq!(account.excess(1), None, "nothing was measured");
        let peak = 1050 + 900 + 10_240;
        let account = account.measured(&plan(), measured(900, [6400, 3328, 256, 256], peak));
        assert_eq!(account.excess(peak), None);
        let text = account.excess(11_900).unwrap();
        assert!(text.contains("in `4-bit codes`: 800 B instead of 400 B"), "{text}");
    }

    #[test]
    fn measured_rows_add_up_to_the_peak() {
        let account = Account::planned(outside(Processor::Cpu), &plan());
        let account = account.measured(&plan(), measured(480, [6400, 3000, 256, 256], 12_000));
        let bytes = |account: &Account| -> Vec<u64> {
            account.rows.iter().filter_map(|row| row.measured_bytes).collect()
        };
        let rest = 12_000 - 480 - 9912;
        assert_eq!(bytes(&account), [rest - 20, 380, 100, 6400, 3000, 512, 20]);
        let gpu = Account::planned(outside(Processor::Gpu), &plan());
        let seen = measured(500, [6400, 3328, 256, 256], 12_000);
        let seen = Measured { before_bytes: Some(1100), ..seen };
        let gpu = gpu.measured(&plan(), seen);
        assert_eq!((names(&gpu)[0], names(&gpu)[6]), (CONTEXT, ROUNDING));
        assert_eq!(bytes(&gpu), [1100, 400, 100, 6400, 3328, 512, 12_000 - 1100 - 500 - 10_240]);
        for account in [account, gpu] {
            assert_eq!(bytes(&account).iter().sum::<u64>(), account.peak_bytes.unwrap());
        }
    }
}
