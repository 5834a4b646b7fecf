//! `nibble train`: from a base model and a data file to an adapter.

mod data;
mod memory;
mod output;

use std::path::{Path, PathBuf};

use crate::adapter::Adapter;
use crate::byte_size::ByteSize;
use crate::checkpoint::Checkpoint;
use crate::cli::train::TrainArgs;
use crate::commands::device;
use crate::data::{ChatTokenizer, TemplateChoice, TokenizerFiles};
use crate::error::Result;
use crate::figures::{rate, thousands};
use crate::ledger::rows::{Account, Row};
use crate::model::families::{base_dropout, spec_from_config};
use crate::model::spec::{ModelSpec, TensorSpec};
use crate::model::weights::check_stored;
use crate::model::{Model, Randomness};
use crate::plan::Processor;
use crate::plural::{counted, noun};
use crate::printed;
use crate::report::{REPORT_FILE, Reports};
use crate::sample::Speaker;
use crate::system::interrupt::Interrupt;
use crate::train::backend::TrainingKernels;
use crate::train::base::{FrozenBase, LoadedBase};
use crate::train::checkpoints::{self, Found};
use crate::train::events::{EndEvent, EndReason, Event, ParameterCounts, StartEvent};
use crate::train::lora_model::LoraModel;
use crate::train::preview::Preview;
use crate::train::progress::Progress;
use crate::train::recipe::Recipe;
use crate::train::schedule::{Schedule, SchedulerType};
use crate::train::settings::{SettingsEcho, without_packing};
use crate::train::start::{self, AdapterOrigin, Start};
use crate::train::state::Identity;
use crate::train::trainee::Trainee;
use crate::train::trainer::{RunContext, Trainer};
use data::Prepared;
use memory::Memory;
use output::{Finished, Output};

/// Fewer steps than this are seldom meant, unless they are asked for by number.
const FEW_STEPS: u64 = 20;

/// Runs the command.
///
/// # Errors
/// Every wrong setting and input before the first weight is read; later, what the run reports.
pub fn run(args: &TrainArgs) -> Result<()> {
    printed::outlive_reader();
    args.check_combinations()?;
    super::threads::set(args.resources.threads)?;
    match args.output.resume {
        // A run from before sizes of blocks were refused goes on.
        true => super::packing::check_packed_as(&args.model)?,
        false => super::packing::check(&args.model)?,
    }
    let gpu = device::open(&args.device)?;
    device::check_dequantized_blocks(args.resources.dequantized_blocks, gpu.is_some())?;
    match gpu {
        Some(gpu) => run_on(args, gpu),
        None => run_on(args, device::cpu(&args.device)),
    }
}

fn run_on<K: TrainingKernels>(args: &TrainArgs, kernels: K) -> Result<()> {
    let mut progress = Progress::stderr();
    let mut output = Output::claim(&args.output, &progress)?;
    let begins_with = begins_with(args, output.found.as_ref());
    let template = template(args, output.found.as_ref(), &progress);
    let base = Base::open(args, &template, begins_with.as_deref())?;
    kernels.check_model(&base.spec)?;
    let (adapter, origin) = base.adapter(args, begins_with.as_deref(), &progress)?;
    let mut data = data::prepare(args, &base, &progress)?;
    let identity = identity(base.settings(args), &data, kernels.is_bf16());
    output.check_continues(&identity)?;
    let recipe = args.recipe(data.feed.num_batches());
    let max_steps = recipe.max_steps(data.feed.num_batches());
    if let Some(finished) = output.finished(&recipe, max_steps) {
        nothing_left(args, finished);
        return Ok(());
    }
    recipe.schedule(max_steps).check_length()?;
    tell_of_steps(&recipe, data.feed.num_batches(), &progress);
    warn(args, &base, &recipe, max_steps, &progress);
    let before = output.found.as_ref().and_then(|found| found.state.identity.sum_order);
    let memory = memory::plan(args, &base, &adapter, &data, &kernels, before)?;
    progress.note(&format!("plan: {}", memory.words));
    check_disk(args, &base, &adapter, &memory, &output, &progress)?;
    let introduction = introduction(&base, &adapter, &data, &memory, kernels.device());
    tell_of_device(args, &introduction.device, &memory, &progress);
    let interrupt = Interrupt::install()?;
    let (mut model, base_fingerprint) = base.load(args, kernels, &memory, adapter)?;
    let identity = Identity { base_fingerprint, ..identity };
    let found = output.found.take();
    let start = start::begin(&mut model, &recipe, &mut data.feed, identity, origin, found)?;
    output.write_settings(&start.state.identity.settings)?;
    progress.begin(&start);
    let context = RunContext {
        recipe: &recipe,
        feed: &mut data.feed,
        evaluation: &data.evaluation,
        prompts: &args.evaluation.sample_prompt,
        out: &args.output.out,
        log: &mut Reports::new(&args.output.out),
        progress: &progress,
        stop: &|| interrupt.requested(),
    };
    let end = train(args, &mut model, start, introduction, context);
    progress.finish();
    let end = end.map_err(|error| checkpoints::with_survivor(error, &args.output.out))?;
    report(args, &end, &memory.account);
    Ok(())
}

/// Checks that the disk has room for what the run writes.
fn check_disk(
    args: &TrainArgs,
    base: &Base,
    adapter: &Adapter,
    memory: &Memory,
    output: &Output,
    progress: &Progress,
) -> Result<()> {
    let checkpoint = memory.checkpoint_bytes(adapter, args) + base.brought.bytes();
    let offloaded = memory.offload_file_bytes(&base.spec);
    output.check_room(checkpoint, offloaded, &args.output, progress)
}

/// What the run's first event says of everything but where the run stands.
fn introduction(
    base: &Base,
    adapter: &Adapter,
    data: &Prepared,
    memory: &Memory,
    device: String,
) -> StartEvent {
    let row = |row: &Row| (row.name.clone(), row.planned_bytes);
    StartEvent {
        memory_plan: memory.account.rows.iter().map(row).collect(),
        plan: memory.words.clone(),
        data: data.summaries.clone(),
        parameters: base.parameters(adapter),
        device,
        ..StartEvent::default()
    }
}

/// Says what computes, where that is the CPU, and whether it could be faster.
fn tell_of_device(args: &TrainArgs, device: &str, memory: &Memory, progress: &Progress) {
    if memory.account.outside.processor == Processor::Cpu {
        let hint = if !args.output.resume && device::would_be_faster_in_bf16(&args.device) {
            "; `--bf16` is faster on this processor"
        } else {
            ""
        };
        progress.note(&format!("computing on {device}{hint}"));
    }
}

/// Makes the run, from its first event to its last.
fn train<'a, M: Trainee>(
    args: &TrainArgs,
    model: &'a mut M,
    start: Start,
    introduction: StartEvent,
    context: RunContext<'a>,
) -> Result<EndEvent> {
    let RunContext { recipe, feed, .. } = &context;
    let event = start::start_event(introduction, &start.state, recipe, feed, &args.model.model);
    context.log.record(&Event::Start(event))?;
    Trainer::new(model, context, start.state, start.checks).run()
}

/// Says how long the run is, before anything expensive: packing makes few steps of many documents.
fn tell_of_steps(recipe: &Recipe, num_batches: usize, progress: &Progress) {
    let number = |steps: u64| usize::try_from(steps).unwrap_or(usize::MAX);
    let steps = counted(number(recipe.max_steps(num_batches)), "step");
    let each = thousands(recipe.steps_per_epoch(num_batches));
    progress.note(&format!("{steps}, {each} in each pass over the data"));
}

/// The settings that give a run more steps, for people.
fn more_steps(recipe: &Recipe, packs: bool) -> String {
    let smaller = [
        ("gradient-accumulation-steps", recipe.gradient_accumulation_steps),
        ("per-device-train-batch-size", recipe.per_device_train_batch_size),
    ];
    let smaller = smaller.iter().filter(|(_, now)| *now > 1);
    let smaller = smaller.map(|(flag, now)| format!("a smaller `--{flag}` (here {now})"));
    let unpacked = packs.then(|| "`--packing false`".to_string());
    let others: Vec<String> = smaller.chain(unpacked).collect();
    let epochs = "a larger `--num-train-epochs`";
    match others.split_last() {
        None => epochs.to_string(),
        Some((last, [])) => format!("{epochs} or {last}"),
        Some((last, rest)) => format!("{epochs}, {} or {last}", rest.join(", ")),
    }
}

/// What a user may not expect of the run.
fn warn(args: &TrainArgs, base: &Base, recipe: &Recipe, max_steps: u64, progress: &Progress) {
    if let Some((key, probability)) = base_dropout(base.checkpoint.config()) {
        progress.note(&format!(
            "note: config.json's {key} of {probability} is not applied: dropout is `--lora-dropout`'s"
        ));
    }
    if max_steps < FEW_STEPS && args.optimization.max_steps.is_none() {
        progress.note(&format!(
            "note: so few steps change a model little; more of them come of {}",
            more_steps(recipe, args.data.packing)
        ));
    }
    warn_of_warmup(&recipe.schedule(max_steps), progress);
}

fn warn_of_warmup(schedule: &Schedule, progress: &Progress) {
    let (warmup, max_steps) = (schedule.warmup_steps, schedule.max_steps);
    if schedule.scheduler_type != SchedulerType::Constant && warmup >= max_steps {
        let first =
            if schedule.factor(0) == 0.0 { ", the first step at learning rate 0" } else { "" };
        progress.note(&format!(
            "warning: all of the run ({}) is warmup{first}; `--warmup-steps 0` begins at the peak",
            counted(usize::try_from(max_steps).unwrap_or(usize::MAX), "step")
        ));
    }
}

/// A finished run has nothing to resume; its files stay as they are.
fn nothing_left(args: &TrainArgs, Finished { step, all_steps, out_of_patience }: Finished) {
    let out = args.output.out.display();
    let how = if all_steps { "finished" } else { "stopped early" };
    let more = [
        out_of_patience.then_some("`--early-stopping-patience`"),
        all_steps.then_some("`--num-train-epochs` or `--max-steps`"),
    ];
    let more: Vec<&str> = more.into_iter().flatten().collect();
    println!("{out}: {how} at step {step}; nothing is left to resume");
    eprintln!("to train on, give more {};", more.join(", and "));
    eprintln!("to train its adapter further, give `--init-adapter {out}` and another `--out`");
}

/// The adapter that a run was given to begin with; once it has a checkpoint that one, which is there and as it
/// was.
fn begins_with(args: &TrainArgs, found: Option<&Found>) -> Option<PathBuf> {
    let given = args.lora.init_adapter.as_ref()?;
    Some(found.map_or(given, |found| &found.folder).clone())
}

/// The chat template that is asked for, or the copy of it that a checkpoint has. Whether it is the run's own the
/// fingerprint of the data tells.
fn template(args: &TrainArgs, found: Option<&Found>, progress: &Progress) -> TemplateChoice {
    let mut template = args.data.format.template_choice();
    let of_run = found.and_then(|found| found.state.identity.settings.get("chat_template"));
    let own = of_run.and_then(|values| values.first()).map(String::as_str);
    if let Some(found) = found
        && let Some(gone) = template.or_copy(&found.folder, own)
    {
        let copy = template.template.as_deref().unwrap_or_default();
        progress.note(&format!("chat template {gone} is gone; the run has a copy, {copy}"));
    }
    template
}

/// The frozen model before its weights are read.
struct Base {
    checkpoint: Checkpoint,
    spec: ModelSpec,
    tokenizer: ChatTokenizer,
    /// The tokenizer's files that the adapter must bring.
    brought: TokenizerFiles,
    preview: Preview,
}

impl Base {
    fn open(
        args: &TrainArgs,
        template: &TemplateChoice,
        begins_with: Option<&Path>,
    ) -> Result<Self> {
        let model = &args.model.model;
        let elsewhere = args.output.resume && model.is_relative() && !model.exists();
        let checkpoint = Checkpoint::open(model).map_err(|error| match elsewhere {
            true => {
                error.hint("paths are those of the folder where the run began: resume it there")
            }
            false => error,
        })?;
        super::notes::image_tensors(&checkpoint);
        let spec = spec_from_config(checkpoint.config())?;
        check_stored(&checkpoint, &spec)?;
        super::notes::unexpected_tensors(&checkpoint, &spec);
        let tokenizer = ChatTokenizer::open_for(model, template, begins_with)?;
        let speaker = Speaker::new(tokenizer.clone(), &spec.eos_token_ids)?;
        let preview = Preview::new(speaker, args.evaluation.sample_max_new_tokens.get(), &spec);
        let brought = tokenizer.beyond_the_model(model)?;
        Ok(Base { checkpoint, spec, tokenizer, brought, preview })
    }

    /// What the run was asked for, as far as this base leaves a choice.
    fn settings(&self, args: &TrainArgs) -> SettingsEcho {
        match self.checkpoint.packed_format() {
            Some(_) => without_packing(&args.settings),
            None => args.settings.clone(),
        }
    }

    /// Numbers that are trained, and those of base and adapter together.
    fn parameters(&self, adapter: &Adapter) -> ParameterCounts {
        let elements = |tensor: TensorSpec| tensor.shape.iter().product::<usize>() as u64;
        let frozen: u64 = self.spec.inventory().into_iter().map(elements).sum();
        let trained = adapter.parameters() as u64;
        ParameterCounts { trained, total: trained + frozen }
    }

    fn adapter(
        &self,
        args: &TrainArgs,
        begins_with: Option<&Path>,
        progress: &Progress,
    ) -> Result<(Adapter, AdapterOrigin)> {
        let lora = &args.lora;
        let (mut adapter, origin) = match begins_with {
            Some(folder) => {
                let dropout = lora.lora_dropout;
                let (adapter, was) = Adapter::load_to_begin_with(folder, &self.spec, dropout)?;
                if was != dropout {
                    progress.note(&format!(
                        "the adapter was made with `--lora-dropout {was}`, this run has {dropout}"
                    ));
                }
                (adapter, AdapterOrigin::Loaded)
            }
            None => {
                let seed = args.optimization.seed;
                (Adapter::init(lora.config()?, &self.spec, seed)?, AdapterOrigin::Fresh)
            }
        };
        adapter.base_model = Some(args.model.model.display().to_string());
        adapter.base_is_part = self.checkpoint.image_tensors() > 0;
        adapter.base_packing = self.checkpoint.kind().packing(args.model.block_format());
        Ok((adapter, origin))
    }

    fn load<K: TrainingKernels>(
        self,
        args: &TrainArgs,
        kernels: K,
        Memory { strategy, settings, account, .. }: &Memory,
        adapter: Adapter,
    ) -> Result<(LoraModel<K>, Vec<f32>)> {
        let kernels = kernels.with_on_host(strategy.on_host);
        let (checkpoint, spec, format) = (&self.checkpoint, &self.spec, args.model.block_format());
        let base = FrozenBase { checkpoint, spec, format, stream: strategy.stream };
        let LoadedBase { weights, fingerprint, meter } = base.load(&kernels)?;
        let random = Randomness {
            seed: args.optimization.seed,
            dropout: adapter.config.dropout(),
            neftune: args.optimization.neftune_noise_alpha,
        };
        let model = Model::shrunk_to_fit(kernels, self.spec, weights, settings.clone())?
            .with_randomness(random);
        let dtype = args.lora.adapter_dtype.into();
        let model = LoraModel::new(model, adapter, dtype, self.preview, settings.clone())
            .with_tokenizer(self.brought);
        let budget = args.resources.memory_budget.map(|budget| budget.0);
        Ok((model.with_meter(meter, account.clone(), budget), fingerprint))
    }
}

fn identity(settings: SettingsEcho, data: &Prepared, bf16: bool) -> Identity {
    Identity {
        settings,
        data_sha256: data.training_sha256.clone(),
        eval_data_sha256: data.evaluation_sha256.clone(),
        base_fingerprint: Vec::new(),
        base_loss: f64::NAN,
        bf16,
        sum_order: None,
    }
}

/// The result on stdout.
fn report(args: &TrainArgs, end: &EndEvent, planned: &Account) {
    let (out, step, loss) = (args.output.out.display(), end.step, end.train_loss);
    let speed = end.tokens_per_second;
    let steps = noun(step as usize, "step");
    println!("{out}: {step} {steps}, mean loss {loss:.4}, {} tokens/s", rate(speed));
    let (predicted, measured) = (ByteSize(planned.planned_bytes()), ByteSize(end.peak_rss_bytes));
    if planned.outside.processor == Processor::Cpu {
        println!("memory: planned {predicted}, measured peak {measured}");
    } else {
        let in_use = end.memory.as_ref().and_then(|account| account.peak_bytes);
        let in_use = in_use.map_or("an unknown part".to_string(), |it| ByteSize(it).to_string());
        let account = end.memory.as_ref();
        let pinned = |account: &Account| {
            let host = account.host?;
            let [planned, pinned] = [account.outside.pinned_bytes, host.pinned_bytes].map(ByteSize);
            Some(format!(", and {pinned} of pinned memory, planned {planned}"))
        };
        let pinned = account.and_then(pinned).unwrap_or_default();
        println!(
            "memory: planned {predicted} of the GPU, {in_use} of it in use at the end; the program \
             itself took {measured} of the host{pinned}"
        );
    }
    if let (Some(budget), Some(account)) = (args.resources.memory_budget, &end.memory)
        && let Some(excess) = account.excess(budget.0)
    {
        println!("warning: {excess}");
    }
    if let Some((loss, step)) = end.best {
        println!("lowest evaluation loss {loss:.4} at step {step}");
    }
    if end.reason == EndReason::EarlyStopping {
        println!("stopped early: the evaluation loss no longer fell");
    }
    println!("curves, memory and settings: {out}/{REPORT_FILE}");
}
