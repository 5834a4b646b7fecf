//! The plan's rows beside what was measured.

use serde::{Deserialize, Serialize};

use super::{Phase, Record};
use crate::cli::size::ByteSize;
use crate::plan::{Component, MemoryPlan, Region};

/// One part of a run's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// What it is.
    pub name: String,
    /// Bytes as planned.
    pub planned_bytes: u64,
    /// Bytes as measured, where a run was made.
    pub measured_bytes: Option<u64>,
}

/// A phase's highest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseRow {
    /// Which one.
    pub phase: Phase,
    /// Bytes of every part that was used by then, in the order of the rows.
    pub planned_bytes: Vec<u64>,
    /// Highest resident bytes, where a run was made.
    pub measured_bytes: Option<u64>,
}

/// A plan, and the same run as it was measured.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Account {
    /// Program and weights, then the arena's components, largest first.
    pub rows: Vec<Row>,
    /// What was in use in each phase of the first step.
    pub phases: Vec<PhaseRow>,
    /// The highest resident bytes of the process.
    pub peak_bytes: Option<u64>,
    /// The run over time.
    pub record: Record,
}

/// Name of the row of what is neither weights nor arena.
pub const PROCESS: &str = "program, tokenizer, data";
/// Name of the row of the frozen weights.
pub const WEIGHTS: &str = "frozen weights";

/// What was measured of a run.
pub struct Measured {
    /// Bytes of the frozen weights: of their files' pages and of what was copied.
    pub weight_bytes: u64,
    /// Bytes of each region of the plan that are in memory.
    pub region_bytes: Vec<u64>,
    /// The highest resident bytes of the process.
    pub peak_bytes: u64,
    /// The run over time.
    pub record: Record,
}

impl Account {
    /// The prediction.
    pub fn planned(process_bytes: u64, weight_bytes: u64, plan: &MemoryPlan) -> Self {
        let row = |name: &str, planned_bytes| Row {
            name: name.to_string(),
            planned_bytes,
            measured_bytes: None,
        };
        let components = plan.by_component();
        let arena = components.iter().map(|(part, bytes)| row(part.label(), *bytes as u64));
        let outside = [row(PROCESS, process_bytes), row(WEIGHTS, weight_bytes)];
        let rows: Vec<Row> = outside.into_iter().chain(arena).collect();
        let parts: Vec<Component> = components.into_iter().map(|(part, _)| part).collect();
        let phases = Phase::ALL.map(|phase| {
            let used = |part: &Component| {
                let by_then =
                    |region: &&Region| region.component == *part && first_use(region) <= phase;
                plan.regions.iter().filter(by_then).map(|region| region.bytes() as u64).sum()
            };
            let planned_bytes =
                [process_bytes, weight_bytes].into_iter().chain(parts.iter().map(used)).collect();
            PhaseRow { phase, planned_bytes, measured_bytes: None }
        });
        Account { rows, phases: phases.to_vec(), ..Account::default() }
    }

    /// Puts another plan in the place of the old one: program and weights stay.
    pub fn replan(&mut self, plan: &MemoryPlan) {
        let bytes = |name: &str| {
            let row = self.rows.iter().find(|row| row.name == name);
            row.map_or(0, |row| row.planned_bytes)
        };
        *self = Account::planned(bytes(PROCESS), bytes(WEIGHTS), plan);
    }

    /// Adds what was measured. What is neither weights nor arena is the rest of the peak, so that
    /// the rows add up to it.
    pub fn measured(mut self, plan: &MemoryPlan, measured: Measured) -> Self {
        let arena: u64 = measured.region_bytes.iter().sum();
        let rest = measured.peak_bytes.saturating_sub(arena + measured.weight_bytes);
        for row in &mut self.rows {
            let bytes = match row.name.as_str() {
                PROCESS => rest,
                WEIGHTS => measured.weight_bytes,
                name => plan
                    .regions
                    .iter()
                    .zip(&measured.region_bytes)
                    .filter(|(region, _)| region.component.label() == name)
                    .map(|(_, bytes)| bytes)
                    .sum(),
            };
            row.measured_bytes = Some(bytes);
        }
        for row in &mut self.phases {
            row.measured_bytes = measured.record.peak_of(row.phase);
        }
        self.peak_bytes = Some(measured.peak_bytes);
        self.record = measured.record;
        self
    }

    /// By how much the measured peak is above `budget` bytes, and the part that is most above its
    /// plan; none where it is not.
    pub fn excess(&self, budget: u64) -> Option<String> {
        let peak = self.peak_bytes.filter(|&peak| peak > budget)?;
        let above = |row: &&Row| row.measured_bytes.unwrap_or(0).saturating_sub(row.planned_bytes);
        let row = self.rows.iter().max_by_key(above)?;
        let [peak, budget, planned, measured] =
            [peak, budget, row.planned_bytes, row.measured_bytes.unwrap_or(0)].map(ByteSize);
        Some(format!(
            "the run took {peak}, more than the {budget} that are allowed; most of what was not \
             planned is in `{}`: {measured} instead of {planned}",
            row.name
        ))
    }

    /// All rows together.
    pub fn planned_bytes(&self) -> u64 {
        self.rows.iter().map(|row| row.planned_bytes).sum()
    }
}

/// When a step first touches a region: the system gives a page only then. The arena's memory stays.
fn first_use(region: &Region) -> Phase {
    match region.component {
        Component::AdapterWorking | Component::AdapterMaster => Phase::Load,
        // Zeroed before the first micro-batch.
        Component::AdapterGradients => Phase::Forward,
        Component::OptimizerMoments | Component::PackedMoments => Phase::Optimizer,
        Component::LogitsChunk => Phase::Loss,
        Component::KvCache => Phase::Eval,
        Component::BlockWorkspace if region.name.ends_with("_gradient") => Phase::Backward,
        // Zeroed before the loss, which fills it.
        Component::BlockWorkspace if region.name == "work.gradient" => Phase::Loss,
        _ => Phase::Forward,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::RegionType;

    fn plan() -> MemoryPlan {
        let region = |name: &str, component, elements| Region {
            name: name.into(),
            component,
            dtype: RegionType::F32,
            elements,
            pitch: None,
        };
        MemoryPlan {
            regions: vec![
                region("layer.0.input", Component::BlockInputs, 1600),
                region("head.logits", Component::LogitsChunk, 800),
                region("adapter.first_moment", Component::OptimizerMoments, 32),
                region("adapter.second_moment", Component::OptimizerMoments, 32),
            ],
            offloaded: Vec::new(),
        }
    }

    #[test]
    fn parts_are_used_from_the_phase_that_touches_them() {
        let account = Account::planned(1000, 500, &plan());
        let names: Vec<&str> = account.rows.iter().map(|row| row.name.as_str()).collect();
        let moments = Component::OptimizerMoments.label();
        assert_eq!(names, [PROCESS, WEIGHTS, "block inputs", "logits chunk", moments]);
        assert_eq!(account.planned_bytes(), 1500 + 6400 + 3200 + 256);
        let phase = |phase: Phase| {
            account.phases.iter().find(|row| row.phase == phase).unwrap().planned_bytes.clone()
        };
        assert_eq!(phase(Phase::Load), [1000, 500, 0, 0, 0]);
        assert_eq!(phase(Phase::Forward), [1000, 500, 6400, 0, 0]);
        assert_eq!(phase(Phase::Backward), [1000, 500, 6400, 3200, 0]);
        assert_eq!(phase(Phase::Optimizer), [1000, 500, 6400, 3200, 256]);
    }

    #[test]
    fn what_is_above_the_budget_is_told_with_the_part_at_fault() {
        let measured = Measured {
            weight_bytes: 900,
            region_bytes: vec![6400, 3200, 128, 128],
            peak_bytes: 1050 + 900 + 9856,
            record: Record::default(),
        };
        let account = Account::planned(1000, 500, &plan());
        assert_eq!(account.excess(1), None, "nothing was measured");
        let account = account.measured(&plan(), measured);
        assert_eq!(account.excess(1050 + 900 + 9856), None);
        let text = account.excess(11_500).unwrap();
        assert!(text.contains("in `frozen weights`: 900 B instead of 500 B"), "{text}");
    }

    #[test]
    fn measured_rows_add_up_to_the_peak() {
        let measured = Measured {
            weight_bytes: 480,
            region_bytes: vec![6400, 3000, 128, 128],
            peak_bytes: 12_000,
            record: Record::default(),
        };
        let account = Account::planned(1000, 500, &plan()).measured(&plan(), measured);
        let bytes: Vec<u64> = account.rows.iter().filter_map(|row| row.measured_bytes).collect();
        assert_eq!(bytes, [12_000 - 480 - 9656, 480, 6400, 3000, 256]);
        assert_eq!(bytes.iter().sum::<u64>(), account.peak_bytes.unwrap());
    }
}
