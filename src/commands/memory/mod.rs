//! `nibble memory`: the plan of a run, from a model or a bare `config.json`, and what was measured.

mod fit;
mod full;
mod measure;
mod model;
mod print;
mod room;

use std::io::Read;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::adapter::{Adapter, LoraConfig};
use crate::checkpoint::atomic::write_file;
use crate::checkpoint::{Checkpoint, PageCache};
use crate::cli::device::{Device, DeviceArgs};
use crate::cli::lora::AdapterDtype;
use crate::cli::memory::MemoryArgs;
use crate::commands::device;
use crate::error::{Error, Result};
use crate::figures::thousands;
use crate::kernels::Storage;
use crate::kernels::cuda::library::Gpu;
use crate::kernels::cuda::{Cuda, cuda_layout};
use crate::ledger::rows::Account;
use crate::model::spec::ModelSpec;
use crate::plan::weights::STREAMED_BLOCKS;
use crate::plan::work::{Transfer, Work};
use crate::plan::{
    Choice, Demand, Layout, Limit, Machine, MemoryPlan, Processor, Settings, Strategy, Wishes,
    layout, logit_rows,
};
use crate::plural::counted;
use crate::report::memory_page::{self, Heading};
use full::FullFineTuning;
use model::PlannedModel;
use room::{ASSUMED_CONTEXT_BYTES, Room};

/// Runs the command.
///
/// # Errors
/// `Input` for an unsupported model, `Budget` with the nearest plan that fits, `Usage` for
/// `--measure` without weights or beside `--fit`, `Gpu` for `--measure` without the GPU.
pub fn run(args: &MemoryArgs) -> Result<()> {
    check(args)?;
    super::packing::check(&args.base)?;
    super::threads::set(args.threads)?;
    let device = DeviceArgs { device: device::resolve(&args.device)?, ..args.device.clone() };
    let args = &MemoryArgs { device, ..args.clone() };
    let processor = processor(args)?;
    let model = PlannedModel::open(args, processor)?;
    // Plans need no GPU, measuring does.
    let gpu = args.measure.map_or(Ok(None), |_| device::open(&args.device))?;
    let room = Room::look(args.device.device, gpu.as_ref())?;
    if processor == Processor::Gpu {
        args.device.embedding.on_host().check(&model.spec)?;
    }
    note_positions(args, &model.spec);
    let lora = lora(args, &model.spec)?;
    let settings = settings(args, &lora, &model.spec, processor)?;
    let attention = args.device.attn_implementation;
    attention.check(model.spec.head_dim)?;
    let on_gpu = |spec: &ModelSpec, settings: &Settings| cuda_layout(spec, settings, attention);
    let (layout, process_bytes): (Layout, u64) = match processor {
        Processor::Cpu => (&layout, model.process_bytes),
        Processor::Gpu => (&on_gpu, context_bytes(args, &room)),
    };
    let demand = Demand {
        spec: &model.spec,
        weights: model.weights,
        settings: &settings,
        machine: Machine { processor, layout, process_bytes, pinned_bytes: room.pinned_bytes },
        wishes: wishes(args, &lora),
    };
    if args.fit {
        return fit::run(args, &demand, &room, model.assumes_packing);
    }
    let choice = choose(args, &demand, &room)?;
    let mut run = PlannedRun::new(args, (&model, lora), &demand, &room, choice);
    if let Some(steps) = args.measure {
        run.measure(args, gpu, steps.get())?;
    }
    show(args, &run)
}

/// What the run computes on, if it can do what is asked for.
fn processor(args: &MemoryArgs) -> Result<Processor> {
    let on_gpu = matches!(args.device.device, Device::Cuda(_));
    device::check_dequantized_blocks(args.dequantized_blocks, on_gpu)?;
    Ok(if on_gpu { Processor::Gpu } else { Processor::Cpu })
}

/// What a GPU's context takes of it, and other programs; a budget may be that of another card.
fn context_bytes(args: &MemoryArgs, room: &Room) -> u64 {
    let here = room.context_bytes.filter(|_| args.measure.is_some() || args.budget.is_none());
    here.unwrap_or(ASSUMED_CONTEXT_BYTES)
}

/// A plan within the budget; that there is none is said to programs, too.
fn choose(args: &MemoryArgs, demand: &Demand, room: &Room) -> Result<Choice> {
    let choice = demand.choose(limit_of_a_plan(args, room));
    if let (true, Err(error @ Error::Budget(_))) = (args.json, &choice) {
        println!("{:#}", json!({"fits": false, "refusal": fit::refusal(error)}));
    }
    choice
}

fn show(args: &MemoryArgs, run: &PlannedRun) -> Result<()> {
    if let Some(path) = &args.html {
        write_file(path, memory_page::render(&run.heading(args), &run.account).as_bytes())?;
    }
    if args.json {
        print::json(args, run);
    } else {
        print::table(args, run);
    }
    Ok(())
}

fn check(args: &MemoryArgs) -> Result<()> {
    if let Some(page) = &args.html {
        check_page(page)?;
    }
    let other = [("--measure", args.measure.is_some()), ("--html", args.html.is_some())];
    match other.into_iter().find(|(_, given)| args.fit && *given) {
        None => Ok(()),
        Some((flag, _)) => Err(Error::usage(format_args!(
            "`--fit` compares plans, `{flag}` is about one"
        ))
        .hint(format_args!("leave out `--fit`, and give `{flag}` the flags that it printed"))),
    }
}

/// Pages of this command are written over, other files, a run's report among them, are somebody's.
fn check_page(path: &Path) -> Result<()> {
    let Ok(file) = std::fs::File::open(path) else { return Ok(()) };
    let mut head = Vec::new();
    let read = file.take(memory_page::MARK_WITHIN as u64).read_to_end(&mut head).is_ok();
    let is_page = read && String::from_utf8_lossy(&head).contains(memory_page::MARK);
    if is_page || path.is_dir() {
        return Ok(());
    }
    let what =
        format_args!("--html {} is there already, and no page of `nibble memory`", path.display());
    Err(Error::usage(what).hint("choose another name"))
}

/// A plan alone may be for another machine, a trial is made on this one.
fn limit_of_a_plan(args: &MemoryArgs, room: &Room) -> Limit {
    let here = args.measure.and(room.free_bytes).unwrap_or(u64::MAX);
    args.budget.map_or(Limit::Free(here), |budget| Limit::Budget(budget.0))
}

fn wishes(args: &MemoryArgs, lora: &LoraConfig) -> Wishes {
    Wishes {
        activations: args.activations,
        weights: args.weights,
        embedding: args.device.embedding,
        dequantized_blocks: dequantized_blocks(args),
        lora_r: args.lora.init_adapter.is_none().then_some(lora.r),
        logit_rows_given: args.logits_chunk_length.is_some(),
        sum_order: None,
    }
}

/// Where there is no limit none by themselves: there would be room for all, whatever the card.
fn dequantized_blocks(args: &MemoryArgs) -> Option<usize> {
    let limited = args.fit || args.budget.is_some() || args.measure.is_some();
    args.dequantized_blocks.or(if limited { None } else { Some(0) })
}

/// A run that could be made.
struct PlannedRun<'a> {
    model: &'a PlannedModel,
    /// The adapter that is planned.
    lora: LoraConfig,
    strategy: Strategy,
    settings: Settings,
    /// What it does to stay within its memory, for people.
    facts: Vec<String>,
    plan: MemoryPlan,
    account: Account,
    /// What the system keeps of the model's files after a run, where one was made.
    page_cache: Option<PageCache>,
    /// Whether it fits what is free here, where that is known.
    verdict: Option<room::Verdict>,
}

impl<'a> PlannedRun<'a> {
    fn new(
        args: &MemoryArgs,
        (model, lora): (&'a PlannedModel, LoraConfig),
        demand: &Demand,
        room: &Room,
        choice: Choice,
    ) -> Self {
        let plan = demand.plan(&choice.settings);
        let account = Account::planned(demand.outside(&choice), &plan);
        // What `train` would do knows its limit.
        let in_training =
            demand.wishing(|wishes| wishes.dequantized_blocks = args.dequantized_blocks);
        let verdict = room.verdict(&in_training, &choice, args.budget.is_some());
        let facts = demand.facts(&choice);
        let Choice { strategy, settings } = choice;
        let page_cache = None;
        PlannedRun { model, lora, strategy, settings, facts, plan, account, page_cache, verdict }
    }

    /// Makes `steps` steps of it, and adds what they took to the account.
    fn measure(&mut self, args: &MemoryArgs, gpu: Option<Cuda<Gpu>>, steps: usize) -> Result<()> {
        self.account = match gpu {
            Some(gpu) => {
                let gpu = gpu.with_on_host(self.strategy.on_host);
                measure::measure(args, self, gpu, steps)?
            }
            None => measure::measure(args, self, device::cpu(&args.device), steps)?,
        };
        self.page_cache = self.model.checkpoint.as_ref().and_then(Checkpoint::page_cache);
        Ok(())
    }

    /// What training all weights would take instead.
    fn full_fine_tuning(&self) -> FullFineTuning {
        FullFineTuning::of(&self.model.spec, &self.account, &self.plan)
    }

    /// Copies against computation, where weights are streamed to a GPU.
    fn transfer(&self) -> Option<Transfer> {
        let on_gpu = self.account.outside.processor == Processor::Gpu;
        let streamed = self.model.weights.streamed.filter(|_| self.strategy.stream && on_gpu)?;
        let layers = self.model.spec.num_layers;
        let work = Work::of_token(&self.model.spec, self.settings.longest_document);
        let work = work.of_step(&self.settings);
        let offloaded = self.plan.offloaded_bytes() as u64;
        // Two blocks stay in their places.
        if layers <= STREAMED_BLOCKS && offloaded == 0 {
            return None;
        }
        Some(Transfer::new(layers, streamed.block, offloaded, self.settings.tokens, work))
    }

    fn heading(&self, args: &MemoryArgs) -> Heading {
        let tokens = thousands(self.settings.tokens as u64);
        let tokens = format!("{tokens} tokens in a forward pass");
        let cached = self.page_cache.as_ref().map(print::cached);
        let facts = std::iter::once(tokens).chain(self.facts.clone()).chain(cached).collect();
        Heading { model: args.base.model.display().to_string(), facts }
    }
}

/// A row that is shorter than was asked for.
fn note_positions(args: &MemoryArgs, spec: &ModelSpec) {
    let (asked, length) = (args.max_length.get(), row_length(args, spec));
    if length < asked {
        eprintln!("note: the model has positions for {length} tokens, `--max-length` is {asked}");
    }
}

/// Tokens of a row: no more than the model has learned positions for, as in training.
fn row_length(args: &MemoryArgs, spec: &ModelSpec) -> usize {
    spec.possible_length(args.max_length.get())
}

/// Tokens of a forward pass: no more than any machine could hold.
fn tokens_of_pass(args: &MemoryArgs, spec: &ModelSpec) -> Result<usize> {
    const MOST: usize = 1 << 28;
    let (rows, length) = (args.per_device_train_batch_size.get(), row_length(args, spec));
    rows.checked_mul(length).filter(|&tokens| tokens <= MOST).ok_or_else(|| {
        Error::usage(format_args!(
            "{} of {length} tokens in a forward pass: more than {MOST} tokens",
            counted(rows, "sequence")
        ))
        .hint("lower `--max-length` or `--per-device-train-batch-size`")
    })
}

/// The adapter's settings: those of `--init-adapter`, with a dropout of the run's own, or the flags'.
fn lora(args: &MemoryArgs, spec: &ModelSpec) -> Result<LoraConfig> {
    let Some(folder) = &args.lora.init_adapter else { return args.lora.config() };
    Ok(Adapter::load_to_begin_with(folder, spec, args.lora.lora_dropout)?.0.config)
}

fn settings(
    args: &MemoryArgs,
    lora: &LoraConfig,
    spec: &ModelSpec,
    processor: Processor,
) -> Result<Settings> {
    let tokens = tokens_of_pass(args, spec)?;
    Ok(Settings {
        longest_document: row_length(args, spec),
        targets: lora.resolve(spec)?,
        lora_dropout: lora.dropout().is_some(),
        bf16_working: args.lora.adapter_dtype == AdapterDtype::Bf16,
        optim: args.optim,
        mlp_tile_length: args.mlp_tile_length.map(NonZeroUsize::get),
        // Where temporary files go is often memory, which no account of the process shows.
        scratch_folder: Some(PathBuf::from(".")),
        ..Settings::of_pass(tokens, logit_rows(spec, tokens, args.logits_chunk_length, processor))
    })
}
