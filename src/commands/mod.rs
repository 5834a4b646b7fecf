//! One module per command: `run(&Args)`, a short list of named steps.

pub mod chat;
pub mod completions;
pub mod data;
mod device;
pub mod doctor;
pub mod eval;
pub mod export;
pub mod generate;
pub mod memory;
pub mod merge;
mod model_folder;
mod progress_bar;
pub mod quantize;
mod reading;
pub mod train;

use std::num::NonZeroUsize;

use crate::checkpoint::{Checkpoint, CheckpointKind};
use crate::cli::Command;
use crate::cli::generate::GenerationArgs;
use crate::cli::train::{BaseModelArgs, Quantization};
use crate::error::{Error, Result};
use crate::model::spec::{ModelSpec, RopeScaling};
use crate::model::weights::unexpected_tensors;
use crate::plural::noun;

/// Runs one parsed command.
///
/// # Errors
/// Whatever the command reports.
pub fn run(command: &Command) -> Result<()> {
    match command {
        Command::Quantize(args) => quantize::run(args),
        Command::Data(args) => data::run(args),
        Command::Memory(args) => memory::run(args),
        Command::Train(args) => train::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Merge(args) => merge::run(args),
        Command::Export(args) => export::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Completions(args) => completions::run(args),
    }
}

/// Says that dense weights are packed while they are loaded: what is asked of a merged model should
/// not be answered by a coarser one unawares.
fn note_packing(base: &BaseModelArgs, kind: CheckpointKind) {
    if let Some(format) = kind.packing(base.block_format()) {
        let (model, quant_type) = (base.model.display(), format.quant_type.as_str());
        eprintln!(
            "{model}: linear layers are quantized to {quant_type}; `--quantization none` leaves them as they are"
        );
    }
}

/// Says that flags of random draws do nothing where none are made.
fn note_idle_flags(generation: &GenerationArgs) {
    if let Some(flags) = generation.idle_flags() {
        eprintln!("note: {flags} without effect: `--temperature` is 0, which is greedy decoding");
    }
}

/// Says that a context is so long that LongRoPE turns short texts otherwise than in training.
fn note_long_rope(spec: &ModelSpec, context_tokens: usize) {
    let scaling = spec.rotary.as_ref().map(|rotary| &rotary.scaling);
    if let Some(RopeScaling::LongRope { original_max_position_embeddings: most, .. }) = scaling
        && context_tokens > *most
    {
        eprintln!(
            "note: a context of more than {most} tokens takes LongRoPE's long factors, for short texts, \
             too; `--context-length {most}` takes the short ones, as in training on such texts"
        );
    }
}

/// Says that a model for text and images is taken for its text alone.
fn note_image_tensors(checkpoint: &Checkpoint) {
    if checkpoint.image_tensors() > 0 {
        let (path, count) = (checkpoint.path().display(), checkpoint.image_tensors());
        let tensors = noun(count, "tensor");
        eprintln!("{path}: the text model alone; {count} {tensors} for images are left out");
    }
}

/// Says which stored tensors the model does not compute with: it may not be what `config.json` says.
fn note_unexpected_tensors(checkpoint: &Checkpoint, spec: &ModelSpec) {
    if let Some(names) = first_of(&unexpected_tensors(checkpoint, spec)) {
        eprintln!("note: the model has no use for tensor {names}");
    }
}

/// The first of some names, and how many more there are.
fn first_of(names: &[&str]) -> Option<String> {
    let (first, rest) = names.split_first()?;
    let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
    Some(format!("{first}{more}"))
}

/// Refuses sizes of blocks for weights that are not packed, and what [`check_packed_as`] does.
fn check_packing(base: &BaseModelArgs) -> Result<()> {
    let of_blocks = base.block_size.is_some() || base.double_quant.is_some();
    if base.quantization == Some(Quantization::None) && of_blocks {
        let what = "`--block-size` and `--double-quant` have no effect with `--quantization none`";
        return Err(Error::usage(what).hint("leave them out, or choose `--quantization nf4`"));
    }
    check_packed_as(base)
}

/// Refuses a packing that is asked for where the base is packed in another already.
fn check_packed_as(base: &BaseModelArgs) -> Result<()> {
    let asks = base.quantization.is_some() || base.block_size.is_some();
    if !asks && base.double_quant.is_none() {
        return Ok(());
    }
    // What is wrong with the model is told by who opens it to work with it.
    let Ok(checkpoint) = Checkpoint::open(&base.model) else { return Ok(()) };
    let Some(stored) = checkpoint.packed_format() else { return Ok(()) };
    if base.block_format_or(stored) == Some(stored) {
        return Ok(());
    }
    let (model, kind) = (base.model.display(), stored.quant_type.as_str());
    let (size, nested) = (stored.block_size, stored.double_quant);
    Err(Error::usage(format_args!(
        "{model} is 4-bit already: --quantization {kind} --block-size {size} --double-quant {nested}"
    ))
    .hint("leave these flags out, or give the dense model"))
}

/// Sizes the pool that all parallel loops share; all cores by default.
fn set_threads(threads: Option<NonZeroUsize>) -> Result<()> {
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads.map_or(0, usize::from));
    let builder = builder.use_current_thread();
    let hint = "ask for fewer; a limit (`ulimit -u`) may leave no room for so many";
    builder.build_global().map_err(|e| Error::usage(format_args!("--threads: {e}")).hint(hint))
}
