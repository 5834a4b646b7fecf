//! From flags and data to the sizes of the planned buffers.

use std::num::NonZeroUsize;

use nibble_quant::FloatType;

use super::Base;
use super::data::Prepared;
use crate::adapter::Adapter;
use crate::byte_size::ByteSize;
use crate::cli::lora::AdapterDtype;
use crate::cli::train::TrainArgs;
use crate::error::Result;
use crate::ledger::resident;
use crate::ledger::rows::Account;
use crate::model::spec::ModelSpec;
use crate::plan::{
    Choice, Demand, Limit, Machine, Processor, Settings, Strategy, SumOrder, WeightBytes, Wishes,
    layout, logit_rows,
};
use crate::system::allocator;
use crate::train::backend::{Surroundings, TrainingKernels};

/// The memory of a run, as planned.
pub struct Memory {
    /// How it runs.
    pub strategy: Strategy,
    /// What the model allocates.
    pub settings: Settings,
    /// Every part of it.
    pub account: Account,
    /// What it takes, and how, for people.
    pub words: String,
}

/// Chooses the layers' policies within the budget, before a weight is read; `before` is the order of sums
/// of a run that goes on.
pub fn plan(
    args: &TrainArgs,
    base: &Base,
    adapter: &Adapter,
    data: &Prepared,
    kernels: &impl TrainingKernels,
    before: Option<SumOrder>,
) -> Result<Memory> {
    // Pages of the weights' files that were looked at are not the program's.
    base.checkpoint.release_all();
    allocator::give_back();
    let around = kernels.surroundings()?;
    let settings = sizes(args, base, adapter, data, around.processor)?;
    let settings = match before {
        Some(order) => settings.as_short_as(order),
        None => settings,
    };
    let machine = Machine {
        processor: around.processor,
        layout: &|spec, settings| kernels.plan(spec, settings),
        process_bytes: process_bytes(&around, adapter),
        pinned_bytes: resident::pinnable_bytes(),
    };
    let (weights, wishes) = (weights(args, base, around.processor), wishes(args, adapter, before));
    let demand = Demand { spec: &base.spec, weights, settings: &settings, machine, wishes };
    let choice = demand.choose(limit(args, &around))?;
    let plan = demand.plan(&choice.settings);
    let account = Account::planned(demand.outside(&choice), &plan);
    let (total, tokens) = (ByteSize(account.planned_bytes()), choice.settings.tokens);
    let facts = demand.facts(&choice).join(", ");
    let words = format!("{total} for {tokens} tokens in a forward pass; {facts}");
    let Choice { strategy, settings } = choice;
    Ok(Memory { strategy, settings, account, words })
}

/// Bytes of a run beside weights and plan.
fn process_bytes(around: &Surroundings, adapter: &Adapter) -> u64 {
    match around.processor {
        Processor::Cpu => {
            // The adapter's tensors are gone before the first step.
            let used_bytes = around.used_bytes.saturating_sub(bytes_in_memory(adapter));
            used_bytes + around.products_bytes
        }
        Processor::Gpu => around.used_bytes,
    }
}

/// What an adapter's tensors take; zeros that were never touched take nothing.
fn bytes_in_memory(adapter: &Adapter) -> u64 {
    let tensors = adapter.tensors.iter().flat_map(|tensors| [&tensors.a, &tensors.b]);
    let bytes = tensors.map(|values| resident::present_bytes(bytemuck::cast_slice(values)));
    bytes.map(Option::unwrap_or_default).sum()
}

/// Bytes of the frozen weights; the pages that this looks at are given back.
fn weights(args: &TrainArgs, base: &Base, processor: Processor) -> WeightBytes {
    let format = args.model.block_format();
    let Base { checkpoint, spec, .. } = base;
    let weights = WeightBytes::of_checkpoint(checkpoint, spec, format.as_ref(), processor);
    checkpoint.release_all();
    weights
}

fn limit(args: &TrainArgs, around: &Surroundings) -> Limit {
    match args.resources.memory_budget {
        Some(budget) => Limit::Budget(budget.0),
        None => Limit::Free(around.usable_bytes),
    }
}

fn wishes(args: &TrainArgs, adapter: &Adapter, before: Option<SumOrder>) -> Wishes {
    Wishes {
        activations: args.resources.activations,
        weights: args.resources.weights,
        embedding: args.device.embedding,
        dequantized_blocks: args.resources.dequantized_blocks,
        lora_r: args.lora.init_adapter.is_none().then_some(adapter.config.r),
        logit_rows_given: args.resources.logits_chunk_length.is_some(),
        sum_order: before,
    }
}

impl Memory {
    /// Bytes of the file in the run's folder that a CPU offloads to.
    pub fn offload_file_bytes(&self, spec: &ModelSpec) -> u64 {
        match self.account.outside.processor {
            Processor::Cpu => layout(spec, &self.settings).offloaded_bytes() as u64,
            Processor::Gpu => 0,
        }
    }

    /// Bytes of a checkpoint, about: the adapter as it is stored, the master copy and the moments.
    pub fn checkpoint_bytes(&self, adapter: &Adapter, args: &TrainArgs) -> u64 {
        let stored = FloatType::from(args.lora.adapter_dtype).size();
        let moments = self.settings.moments();
        let packed = moments.code_words() + moments.blocks;
        ((stored + 4) * adapter.parameters() + 8 * (moments.float_elements + packed)) as u64
    }
}

/// What the plan depends on, but for the policies.
fn sizes(
    args: &TrainArgs,
    base: &Base,
    adapter: &Adapter,
    data: &Prepared,
    processor: Processor,
) -> Result<Settings> {
    let (tokens, most) = (data.largest_batch_tokens, args.resources.logits_chunk_length);
    let logit_rows = logit_rows(&base.spec, tokens, most, processor);
    Ok(Settings {
        longest_document: data.longest_document_tokens,
        trained_tokens: data.most_batch_targets,
        targets: adapter.targets.clone(),
        lora_dropout: adapter.config.dropout().is_some(),
        bf16_working: args.lora.adapter_dtype == AdapterDtype::Bf16,
        optim: args.optimization.optim,
        cache_tokens: base.preview.context_tokens(&args.evaluation.sample_prompt)?,
        mlp_tile_length: args.resources.mlp_tile_length.map(NonZeroUsize::get),
        scratch_folder: Some(args.output.out.clone()),
        ..Settings::of_pass(data.largest_batch_tokens, logit_rows)
    })
}
