//! `nibble memory`: the plan of a run, from a model or a bare `config.json`.

use std::path::Path;

use nibble_quant::FloatType;
use serde_json::{Value, json};

use crate::checkpoint::{Checkpoint, read_json};
use crate::cli::lora::AdapterDtype;
use crate::cli::memory::MemoryArgs;
use crate::cli::size::ByteSize;
use crate::data::ChatTokenizer;
use crate::error::Result;
use crate::model::families::spec_from_config;
use crate::model::spec::ModelSpec;
use crate::plan::{Choice, Demand, Limit, MemoryPlan, Policy, Settings, WeightBytes, logit_rows};
use crate::train::resident;

/// Program and tokenizer where only a config is at hand: what a 49k vocabulary takes.
const ASSUMED_PROCESS_BYTES: u64 = 64 << 20;

/// Runs the command.
///
/// # Errors
/// `Input` for an unsupported model, `Budget` with the nearest plan that fits.
pub fn run(args: &MemoryArgs) -> Result<()> {
    super::set_threads(args.threads)?;
    let model = Model::open(args)?;
    let settings = settings(args, &model.spec)?;
    let demand = Demand {
        spec: &model.spec,
        settings: &settings,
        activations: args.activations,
        mode: args.weights,
        weights: model.weights,
        process_bytes: model.process,
    };
    let limit = args.budget.map_or(Limit::Free(u64::MAX), |budget| Limit::Budget(budget.0));
    let Choice { policies, stream } = demand.choose(limit)?;
    let kept = policies.iter().filter(|policy| **policy == Policy::Keep).count();
    let plan = demand.plan(policies);
    let rows = rows(&model, demand.weight_bytes(stream), &plan);
    if args.json {
        print_json(args, &settings, (kept, stream), &rows, &plan);
    } else {
        print_table(args, &model, &settings, (kept, stream), &rows);
    }
    Ok(())
}

/// What is known of the model and its weights.
struct Model {
    spec: ModelSpec,
    weights: WeightBytes,
    process: u64,
    measured_process: bool,
}

impl Model {
    fn open(args: &MemoryArgs) -> Result<Self> {
        let (path, format) = (&args.base.model, args.base.block_format());
        if let Some(config) = bare_config(path)? {
            let spec = spec_from_config(&config)?;
            let dtype = ["dtype", "torch_dtype"].iter().find_map(|key| config[*key].as_str());
            let dtype = dtype.and_then(FloatType::from_name).unwrap_or(FloatType::Bf16);
            let weights = WeightBytes::of_config(&spec, dtype, format.as_ref());
            let process = ASSUMED_PROCESS_BYTES;
            return Ok(Model { spec, weights, process, measured_process: false });
        }
        let checkpoint = Checkpoint::open(path)?;
        let spec = spec_from_config(checkpoint.config())?;
        let weights = WeightBytes::of_checkpoint(&checkpoint, &spec, format.as_ref());
        let tokenizer = ChatTokenizer::open(path)?;
        let process = resident::now_bytes();
        drop(tokenizer);
        Ok(Model { spec, weights, process, measured_process: true })
    }
}

/// The config, if that is all there is: a JSON file, or a folder without weights.
fn bare_config(path: &Path) -> Result<Option<Value>> {
    if path.extension().is_some_and(|extension| extension == "json") {
        return read_json(path).map(Some);
    }
    let weights = ["model.safetensors", "model.safetensors.index.json"];
    let config = path.join("config.json");
    if path.is_dir() && config.exists() && !weights.iter().any(|file| path.join(file).exists()) {
        return read_json(&config).map(Some);
    }
    Ok(None)
}

fn settings(args: &MemoryArgs, spec: &ModelSpec) -> Result<Settings> {
    let lora = args.lora.config()?;
    let tokens = args.per_device_train_batch_size.get() * args.max_length.get();
    Ok(Settings {
        tokens,
        longest_document: args.max_length.get(),
        logit_rows: logit_rows(spec, tokens),
        policies: Vec::new(),
        targets: lora.resolve(spec)?,
        lora_dropout: lora.lora_dropout > 0.0,
        bf16_working: args.lora.adapter_dtype == AdapterDtype::Bf16,
        threads: rayon::current_num_threads(),
        cache_tokens: 0,
    })
}

fn rows(model: &Model, weights: u64, plan: &MemoryPlan) -> Vec<(&'static str, u64)> {
    let outside = [("program, tokenizer", model.process), ("frozen weights", weights)];
    let arena = plan.by_component().into_iter().map(|(part, bytes)| (part.label(), bytes as u64));
    outside.into_iter().chain(arena).collect()
}

fn total(rows: &[(&str, u64)]) -> u64 {
    rows.iter().map(|(_, bytes)| bytes).sum()
}

fn print_table(
    args: &MemoryArgs,
    model: &Model,
    settings: &Settings,
    (kept, stream): (usize, bool),
    rows: &[(&str, u64)],
) {
    let trained: usize = settings.targets.iter().map(|target| target.parameters()).sum();
    println!(
        "{}: {} layers, {} tokens in a forward pass, {trained} trained parameters",
        args.base.model.display(),
        model.spec.num_layers,
        settings.tokens
    );
    println!("{kept} of {} blocks keep their activations", model.spec.num_layers);
    if stream {
        println!("the blocks' weights are streamed from their file, two blocks are in memory");
    }
    println!();
    for (label, bytes) in rows {
        println!("{label:<24} {:>12}", ByteSize(*bytes).to_string());
    }
    println!("{:<24} {:>12}", "total", ByteSize(total(rows)).to_string());
    if let Some(budget) = args.budget {
        let free = ByteSize(budget.0.saturating_sub(total(rows)));
        println!("\nfits {budget} with {free} to spare");
    }
    if !model.measured_process {
        println!("\nprogram and tokenizer are assumed: there is no tokenizer beside the config");
    }
}

fn print_json(
    args: &MemoryArgs,
    settings: &Settings,
    (kept, stream): (usize, bool),
    rows: &[(&str, u64)],
    plan: &MemoryPlan,
) {
    let components: serde_json::Map<String, Value> =
        rows.iter().map(|(label, bytes)| ((*label).to_string(), json!(bytes))).collect();
    let out = json!({
        "model": args.base.model,
        "tokens": settings.tokens,
        "kept_blocks": kept,
        "streamed": stream,
        "total_bytes": total(rows),
        "arena_bytes": plan.arena_bytes(),
        "components": components,
        "regions": plan.regions,
    });
    println!("{out:#}");
}
