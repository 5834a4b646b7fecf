//! From flags and data to the sizes of the planned buffers.

use super::Base;
use super::data::Prepared;
use crate::adapter::Adapter;
use crate::cli::lora::AdapterDtype;
use crate::cli::train::{Activations, TrainArgs};
use crate::error::Result;
use crate::plan::{Policy, Settings};

/// Logits that exist at a time, in bytes of f32.
const LOGITS_CHUNK_BYTES: usize = 64 << 20;
const MIN_LOGIT_ROWS: usize = 64;

/// What the memory plan depends on.
pub fn settings(
    args: &TrainArgs,
    base: &Base,
    adapter: &Adapter,
    data: &Prepared,
) -> Result<Settings> {
    let row_bytes = base.spec.vocab_size * size_of::<f32>();
    let logit_rows = (LOGITS_CHUNK_BYTES / row_bytes).max(MIN_LOGIT_ROWS);
    let cache_tokens = base.preview.context_tokens(&args.evaluation.sample_prompt)?;
    let policy = match args.resources.activations {
        Activations::Auto | Activations::Keep => Policy::Keep,
        Activations::Checkpoint => Policy::Checkpoint,
    };
    Ok(Settings {
        tokens: data.largest_batch_tokens,
        longest_document: data.longest_document_tokens,
        logit_rows: logit_rows.min(data.largest_batch_tokens),
        policies: vec![policy; base.spec.num_layers],
        targets: adapter.targets.clone(),
        lora_dropout: adapter.config.lora_dropout > 0.0,
        bf16_working: args.lora.adapter_dtype == AdapterDtype::Bf16,
        threads: rayon::current_num_threads(),
        cache_tokens,
    })
}
