//! The model of a plan: its files, or its config alone.

use std::path::Path;

use nibble_quant::FloatType;
use serde_json::Value;

use crate::checkpoint::{Checkpoint, check_quantization, dtype_of, holds_weights, read_config};
use crate::cli::memory::MemoryArgs;
use crate::data::ChatTokenizer;
use crate::error::Result;
use crate::kernels::cpu::Cpu;
use crate::model::families::spec_from_config;
use crate::model::spec::ModelSpec;
use crate::model::weights::check_stored;
use crate::plan::{Processor, WeightBytes};
use crate::system::allocator;
use crate::train::backend::TrainingKernels;

/// Program, tokenizer and what products take where only a config is at hand: SmolLM2's 49k vocabulary
/// took 28 MiB on two cores.
const ASSUMED_PROCESS_BYTES: u64 = 32 << 20;

/// Code that steps bring in, and small blocks: 5 to 8 MiB with SmolLM2 on x86-64. In training most of it is
/// there when the plan is made.
const LATER_BYTES: u64 = 6 << 20;

/// What is known of the model and its weights.
pub(super) struct PlannedModel {
    /// The files; none for a bare config.
    pub checkpoint: Option<Checkpoint>,
    pub spec: ModelSpec,
    pub weights: WeightBytes,
    /// Whether a config alone has its linears planned in 4 bits, of which no file is known.
    pub assumes_packing: bool,
    /// Bytes of program and tokenizer.
    pub process_bytes: u64,
    /// What was planned with stays until the trial is over, as in training.
    pub tokenizer: Option<ChatTokenizer>,
}

impl PlannedModel {
    /// Opens a folder, a GGUF file or a bare config.
    pub fn open(args: &MemoryArgs, processor: Processor) -> Result<Self> {
        match bare_config(&args.base.model)? {
            Some(config) => Self::of_config(args, &config, processor),
            None => Self::of_files(args, processor),
        }
    }

    fn of_config(args: &MemoryArgs, config: &Value, processor: Processor) -> Result<Self> {
        let (path, format) = (&args.base.model, args.base.block_format());
        check_quantization(config).map_err(|error| error.at(path.display()))?;
        let spec = spec_from_config(config).map_err(|error| error.at(path.display()))?;
        let dtype = dtype_of(config).unwrap_or(FloatType::Bf16);
        let weights = WeightBytes::of_config(&spec, dtype, format.as_ref(), processor);
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
        // A plan needs none: one that cannot be read may be an LFS pointer, as the weights are.
        let tokenizer = tokenizer_in(folder).ok().flatten();
        let process_bytes = match tokenizer {
            None => ASSUMED_PROCESS_BYTES,
            Some(_) => in_use()?,
        };
        let assumes_packing = format.is_some() && config["quantization_config"].is_null();
        let checkpoint = None;
        Ok(PlannedModel { checkpoint, spec, weights, assumes_packing, process_bytes, tokenizer })
    }

    fn of_files(args: &MemoryArgs, processor: Processor) -> Result<Self> {
        let (path, format) = (&args.base.model, args.base.block_format());
        let checkpoint = Checkpoint::open(path)?;
        let spec = spec_from_config(checkpoint.config())?;
        check_stored(&checkpoint, &spec)?;
        let weights = WeightBytes::of_checkpoint(&checkpoint, &spec, format.as_ref(), processor);
        // Weights alone can be measured, too.
        let tokenizer =
            if path.is_file() { Some(ChatTokenizer::open(path)?) } else { tokenizer_in(path)? };
        checkpoint.release_all();
        let (process_bytes, assumes_packing) = (in_use()?, false);
        let checkpoint = Some(checkpoint);
        Ok(PlannedModel { checkpoint, spec, weights, assumes_packing, process_bytes, tokenizer })
    }
}

/// Bytes that a run on the CPU takes beside weights and plan.
fn in_use() -> Result<u64> {
    allocator::give_back();
    let around = Cpu::default().surroundings()?;
    Ok(around.used_bytes + around.products_bytes + LATER_BYTES)
}

fn tokenizer_in(folder: &Path) -> Result<Option<ChatTokenizer>> {
    folder.join("tokenizer.json").exists().then(|| ChatTokenizer::open(folder)).transpose()
}

/// The config, if that is all there is: a JSON file, or a folder without weights.
fn bare_config(path: &Path) -> Result<Option<Value>> {
    if path.extension().is_some_and(|extension| extension == "json") {
        // Weights beside it know better than it which head is tied.
        let folder =
            path.parent().filter(|folder| path.ends_with("config.json") && holds_weights(folder));
        match folder.map(Checkpoint::open) {
            Some(Ok(checkpoint)) => return Ok(Some(checkpoint.config().clone())),
            Some(Err(error)) => eprintln!("note: the plan is by config.json alone: {error}"),
            None => {}
        }
        return read_config(path).map(Some);
    }
    let config = path.join("config.json");
    if path.is_dir() && config.exists() && !holds_weights(path) {
        return read_config(&config).map(Some);
    }
    Ok(None)
}
