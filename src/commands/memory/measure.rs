//! `nibble memory --measure`: the plan beside a trial of it.

use super::{PlannedRun, row_length};
use crate::byte_size::ByteSize;
use crate::cli::memory::MemoryArgs;
use crate::error::{Error, Result};
use crate::ledger::rows::Account;
use crate::train::backend::TrainingKernels;
use crate::train::base::FrozenBase;
use crate::train::progress::Progress;
use crate::train::trial::Trial;

/// Makes `steps` optimizer steps of the planned run, and adds what they took to its account.
pub(super) fn measure<K: TrainingKernels>(
    args: &MemoryArgs,
    run: &PlannedRun,
    kernels: K,
    steps: usize,
) -> Result<Account> {
    let Some(checkpoint) = &run.model.checkpoint else {
        return Err(Error::usage(
            "`--measure` needs a model with weights, this is only its config",
        )
        .hint("give the model folder or .gguf file as `--model`"));
    };
    let trial = Trial {
        base: FrozenBase {
            checkpoint,
            spec: &run.model.spec,
            format: args.base.block_format(),
            stream: run.strategy.stream,
        },
        settings: &run.settings,
        lora: run.lora.clone(),
        dtype: args.lora.adapter_dtype.into(),
        rows: args.per_device_train_batch_size.get(),
        length: row_length(args, &run.model.spec),
    };
    let progress = Progress::stderr();
    let measured = trial.run(kernels, steps, |step| {
        let (number, loss, rate) = (step.number, step.loss, step.tokens_per_second);
        let used = ByteSize(step.used_bytes);
        progress
            .note(&format!("step {number}/{steps}  loss {loss:.4}  {rate:.1} tokens/s  {used}"));
    })?;
    Ok(run.account.clone().measured(&run.plan, measured))
}
