//! Real training steps on random tokens, watched.

use std::time::Instant;

use nibble_quant::FloatType;

use super::PlannedRun;
use crate::adapter::Adapter;
use crate::cli::lora::AdapterDtype;
use crate::cli::memory::MemoryArgs;
use crate::cli::size::ByteSize;
use crate::data::{Batch, Document};
use crate::error::{Error, Result};
use crate::kernels::cpu::Cpu;
use crate::ledger::rows::Account;
use crate::ledger::{self, Phase, Watch};
use crate::model::Model;
use crate::model::spec::ModelSpec;
use crate::model::streaming::Streaming;
use crate::model::weights::Weights;
use crate::random::Stream;
use crate::train::adamw::AdamW;
use crate::train::backend::{TrainingKernels, Update};
use crate::train::progress::Progress;
use crate::train::{clip, step};

/// Loads the model, makes `steps` optimizer steps, one evaluation and one checkpoint of the adapter.
pub(super) fn measure(args: &MemoryArgs, run: &PlannedRun, steps: usize) -> Result<Account> {
    let Some(checkpoint) = &run.model.checkpoint else {
        return Err(Error::usage(
            "`--measure` needs a model with weights, this is only its config",
        )
        .hint("give the model folder or .gguf file as `--model`"));
    };
    let progress = Progress::stderr();
    let spec = &run.model.spec;
    let mut watch = Watch::begin();
    let format = args.base.block_format();
    let mut weights = Weights::load(checkpoint, spec, format.as_ref(), None)?;
    if run.stream {
        weights = weights.upload_streamed(&Cpu, Streaming::new(checkpoint, spec))?;
    }
    watch.loaded();
    let config = args.lora.config()?;
    let dropout = (config.lora_dropout > 0.0).then_some((config.lora_dropout as f32, 0));
    let mut adapter = Adapter::init(config, spec, 0)?;
    let mut model = Model::new(spec.clone(), weights, run.settings.clone(), dropout)?;
    model.parameters_mut().load(&adapter);
    adapter.tensors = Vec::new();
    let batch = random_batch(args, spec);
    for number in 1..=steps {
        let start = Instant::now();
        let loss = train_step(&mut model, &batch, number as u64)?;
        let rate = batch.tokens() as f64 / start.elapsed().as_secs_f64();
        let resident = ByteSize(watch.look().resident_bytes);
        progress.note(&format!(
            "step {number}/{steps}  loss {loss:.4}  {rate:.1} tokens/s  {resident}"
        ));
    }
    ledger::enter(Phase::Eval);
    model.evaluate(&batch)?;
    ledger::enter(Phase::Save);
    save(args, &model, &adapter)?;
    let measured = watch.measured(model.region_bytes());
    Ok(run.account.clone().measured(&run.plan, measured))
}

/// Rows of the longest length, every token trained.
fn random_batch(args: &MemoryArgs, spec: &ModelSpec) -> Batch {
    let (rows, length) = (args.per_device_train_batch_size.get(), args.max_length.get());
    let stream = Stream::new(0, "measure");
    let id = |index: usize| stream.below(index as u64, spec.vocab_size as u64) as u32;
    let document = |row: usize| {
        let input_ids: Vec<u32> = (row * length..(row + 1) * length).map(id).collect();
        let labels = input_ids.iter().map(|&id| id as i32).collect();
        Document { input_ids, labels, line: row + 1 }
    };
    Batch::from_documents(&(0..rows).map(document).collect::<Vec<_>>())
}

fn train_step(model: &mut Model, batch: &Batch, number: u64) -> Result<f64> {
    const LEARNING_RATE: f64 = 1e-4;
    ledger::enter(Phase::Forward);
    model.parameters_mut().zero_gradients();
    let targets = batch.num_targets.max(1);
    let loss = model.forward_backward(batch, 1.0 / targets as f32, number)?;
    ledger::enter(Phase::Optimizer);
    let groups = step::rate_groups(model.parameters().tensors(), Default::default());
    let norm = clip::global_norm(model.parameters().gradients());
    let optimizer = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };
    let update = Update {
        optimizer: &optimizer,
        groups: &groups,
        step: number,
        learning_rate: LEARNING_RATE,
        gradient_scale: clip::gradient_scale(norm, 1.0),
    };
    Cpu.update(model.parameters_mut(), &update);
    Ok(loss / targets as f64)
}

/// Writes the adapter where it is deleted again.
fn save(args: &MemoryArgs, model: &Model, adapter: &Adapter) -> Result<()> {
    let folder = tempfile::tempdir().map_err(|e| Error::io("create", &std::env::temp_dir(), e))?;
    let dtype = match args.lora.adapter_dtype {
        AdapterDtype::Bf16 => FloatType::Bf16,
        AdapterDtype::F32 => FloatType::F32,
    };
    model.parameters().save(adapter, folder.path(), dtype)
}
