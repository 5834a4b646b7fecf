//! What a run takes of a GPU, by the driver's account, beside the plan.

use std::path::Path;

use nibble::adapter::LoraConfig;
use nibble::checkpoint::Checkpoint;
use nibble::kernels::Storage;
use nibble::ledger::rows::Account;
use nibble::model::Model;
use nibble::model::families::spec_from_config;
use nibble::model::weights::Weights;
use nibble::plan::{Outside, Policy, Processor, Settings, WeightBytes};
use nibble::train::backend::TrainingKernels;
use nibble::train::base::FrozenBase;
use nibble::train::meter::Meter;
use nibble::train::trial::Trial;
use nibble_quant::FloatType;

use super::device::Device;
use super::golden::{CASES, Case};
use super::{gpu, nf4, settings};

#[test]
fn the_rows_of_a_gpu_are_measured_by_its_driver() {
    let Some(gpu) = gpu() else { return };
    if Device::skips_on_a_card("the memory of a card that others use, too") {
        return;
    }
    let case = Case::open("mistral_s0");
    let plan = settings(&case, Some("adapter_init"), &[Policy::Keep, Policy::Checkpoint], true);
    let before = gpu.surroundings().unwrap();
    assert!(before.used_bytes > 0 && before.processor == Processor::Gpu, "tables of the backend");
    let mut meter = Meter::begin(&gpu).unwrap();
    let (spec, checkpoint) = (case.spec(), Checkpoint::open(&case.path).unwrap());
    let weights = Weights::load(&checkpoint, &spec, Some(&nf4(true)), None).unwrap();
    let allocated = || gpu.driver().counts().allocated_bytes as u64;
    let without = allocated();
    let weights = weights.upload(&gpu).unwrap();
    let weight_bytes = allocated() - without;
    meter.loaded(&gpu).unwrap();
    let model = Model::with_kernels(gpu.clone(), spec, weights, plan).unwrap();
    let measured = meter.measured(&model).unwrap();
    assert_eq!(measured.weights.total(), weight_bytes);
    let arena_bytes = model.arena_bytes() as u64;
    assert_eq!(measured.region_bytes.iter().sum::<u64>(), arena_bytes);
    assert_eq!(measured.peak_bytes, before.used_bytes + weight_bytes + arena_bytes);
    let checkpoint = Checkpoint::open(&case.path).unwrap();
    let planned =
        WeightBytes::of_checkpoint(&checkpoint, &case.spec(), Some(&nf4(true)), Processor::Gpu);
    let outside = Outside {
        processor: Processor::Gpu,
        process_bytes: before.used_bytes,
        weights: planned.resident,
        ..Outside::default()
    };
    let account = Account::planned(outside, model.plan());
    let account = account.measured(model.plan(), measured);
    for row in &account.rows {
        assert_eq!(row.measured_bytes, Some(row.planned_bytes), "{}", row.name);
    }
    assert_eq!(account.peak_bytes, Some(account.planned_bytes()));
}

/// `nibble memory --measure` on a GPU: steps, an evaluation and a checkpoint, with the blocks in
/// memory and streamed.
#[test]
fn a_trial_takes_what_was_planned() {
    if Device::skips_on_a_card("the memory of a card that others use, too") {
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/bnb4bit");
    let checkpoint = Checkpoint::open(&root.join("llama_s0.bf16.dq.storage_bf16")).unwrap();
    let spec = spec_from_config(checkpoint.config()).unwrap();
    let (rows, length) = (2, 12);
    for (stream, policy) in [(false, Policy::Keep), (true, Policy::Checkpoint)] {
        let Some(gpu) = gpu() else { return };
        let lora = LoraConfig { r: 4, ..LoraConfig::default() };
        let settings = Settings {
            tokens: rows * length,
            longest_document: length,
            targets: lora.resolve(&spec).unwrap(),
            policies: vec![policy; spec.num_layers],
            cache_tokens: 0,
            ..settings(&Case::open("llama_s0"), None, &[policy], true)
        };
        let trial = Trial {
            base: FrozenBase { checkpoint: &checkpoint, spec: &spec, format: None, stream },
            settings: &settings,
            lora,
            dtype: FloatType::Bf16,
            rows,
            length,
        };
        let before = gpu.surroundings().unwrap().used_bytes;
        let weights = WeightBytes::of_checkpoint(&checkpoint, &spec, None, Processor::Gpu);
        let streamed = weights.streamed.filter(|_| stream);
        let weights = streamed.map_or(weights.resident, |weights| weights.of_pass(rows * length));
        let bytes = weights.total();
        let plan = gpu.plan(&spec, &settings);
        let mut losses = Vec::new();
        let measured = trial.run(gpu.clone(), 3, |step| losses.push(step.loss)).unwrap();
        assert!(losses.len() == 3 && losses[2] < losses[0], "{losses:?}");
        let outside = Outside {
            processor: Processor::Gpu,
            process_bytes: before,
            weights,
            ..Outside::default()
        };
        let account = Account::planned(outside, &plan).measured(&plan, measured);
        for row in &account.rows {
            assert_eq!(row.measured_bytes, Some(row.planned_bytes), "{} {stream}", row.name);
        }
        let seen: Vec<u64> = account.record.samples.iter().map(|m| m.resident_bytes).collect();
        assert_eq!(seen[..2], [before, before + bytes]);
        // After each step, the evaluation and the checkpoint.
        assert_eq!(seen[2..], [account.planned_bytes(); 5]);
    }
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
        let planned = WeightBytes::of_checkpoint(&checkpoint, &spec, format, Processor::Gpu);
        let weights = Weights::load(&checkpoint, &spec, format, None).unwrap();
        let allocated = || gpu.driver().counts().allocated_bytes as u64;
        let without = allocated();
        let weights = weights.upload(&gpu).unwrap();
        assert_eq!(planned.resident.total(), allocated() - without, "{name} {format:?}");
        drop(weights);
    }
}
