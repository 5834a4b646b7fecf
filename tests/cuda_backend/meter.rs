//! What a run takes of a GPU, by the driver's account, beside the plan.

use std::path::Path;

use nibble::checkpoint::Checkpoint;
use nibble::ledger::rows::Account;
use nibble::model::Model;
use nibble::model::families::spec_from_config;
use nibble::model::weights::Weights;
use nibble::plan::{Place, Policy, WeightBytes};
use nibble::train::backend::TrainingKernels;
use nibble::train::meter::Meter;

use super::golden::{CASES, Case};
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

/// What the driver is asked for: dense files packed on the way and as they are, and 4-bit files
/// with embeddings in each float type.
#[test]
fn weights_take_what_was_predicted_of_a_gpu() {
    let Some(gpu) = gpu() else { return };
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let dense = CASES.iter().flat_map(|name| {
        [None, Some(nf4(true)), Some(nf4(false))].map(|format| (format!("models/{name}"), format))
    });
    let names = ["gpt2_s0.f32.dq", "llama_s0.bf16.dq.storage_bf16", "llama_s0.f32.plain"];
    let packed = names.iter().chain(&["qwen2_s0.f16.dq"]);
    let packed = packed.map(|name| (format!("bnb4bit/{name}"), Some(nf4(true))));
    for (name, format) in dense.chain(packed) {
        let checkpoint = Checkpoint::open(&data.join(&name)).unwrap();
        let spec = spec_from_config(checkpoint.config()).unwrap();
        let format = format.as_ref();
        let planned = WeightBytes::of_checkpoint(&checkpoint, &spec, format, Place::Gpu);
        let weights = Weights::load(&checkpoint, &spec, format, None).unwrap();
        let allocated = || gpu.driver().counts().allocated_bytes as u64;
        let without = allocated();
        let weights = weights.upload(&gpu).unwrap();
        assert_eq!(planned.resident, allocated() - without, "{name} {format:?}");
        drop(weights);
    }
}
