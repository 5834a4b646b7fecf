//! What a run takes of a GPU, by the driver's account, beside the plan.

use nibble::checkpoint::Checkpoint;
use nibble::ledger::rows::Account;
use nibble::model::Model;
use nibble::model::weights::Weights;
use nibble::plan::Policy;
use nibble::train::backend::TrainingKernels;
use nibble::train::meter::Meter;

use super::golden::Case;
use super::{gpu, nf4, settings};

#[test]
fn the_rows_of_a_gpu_are_measured_by_its_driver() {
    let Some(gpu) = gpu() else { return };
    // Others work on a real card.
    if std::env::var_os("NIBBLE_TEST_DEVICE").is_some() {
        return;
    }
    let case = Case::open("mistral_s0");
    let plan = settings(&case, Some("adapter_init"), &[Policy::Keep, Policy::Checkpoint], true);
    let before = gpu.surroundings().unwrap();
    assert!(before.used_bytes > 0 && !before.in_process, "tables of the backend");
    let mut meter = Meter::begin(&gpu).unwrap();
    let (spec, checkpoint) = (case.spec(), Checkpoint::open(&case.path).unwrap());
    let weights = Weights::load(&checkpoint, &spec, Some(&nf4(true)), None).unwrap();
    let allocated = || gpu.driver().counts().allocated_bytes as u64;
    let without = allocated();
    let weights = weights.upload(&gpu).unwrap();
    let weight_bytes = allocated() - without;
    meter.loaded(&gpu).unwrap();
    let model = Model::on(gpu.clone(), spec, weights, plan, None).unwrap();
    let measured = meter.measured(&gpu, model.region_bytes()).unwrap();
    assert_eq!(measured.weight_bytes, weight_bytes);
    let arena_bytes = model.arena_bytes() as u64;
    assert_eq!(measured.region_bytes.iter().sum::<u64>(), arena_bytes);
    assert_eq!(measured.peak_bytes, before.used_bytes + weight_bytes + arena_bytes);
    let account = Account::planned(before.used_bytes, weight_bytes, model.plan());
    let account = account.measured(model.plan(), measured);
    for row in &account.rows {
        assert_eq!(row.measured_bytes, Some(row.planned_bytes), "{}", row.name);
    }
    assert_eq!(account.peak_bytes, Some(account.planned_bytes()));
}
