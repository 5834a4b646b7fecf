//! What several commands say on stderr of a model and of flags, beside their results.

use crate::checkpoint::{Checkpoint, CheckpointKind};
use crate::cli::generate::GenerationArgs;
use crate::cli::train::BaseModelArgs;
use crate::model::spec::{ModelSpec, RopeScaling};
use crate::model::weights;
use crate::plural::noun;

/// Says that dense weights are packed while they are loaded: what is asked of a merged model should
/// not be answered by a coarser one unawares.
pub fn packing(base: &BaseModelArgs, kind: CheckpointKind) {
    if let Some(format) = kind.packing(base.block_format()) {
        let (model, quant_type) = (base.model.display(), format.quant_type.as_str());
        eprintln!(
            "{model}: linear layers are quantized to {quant_type}; `--quantization none` leaves them as they are"
        );
    }
}

/// Says that flags of random draws do nothing where none are made.
pub fn idle_flags(generation: &GenerationArgs) {
    if let Some(flags) = generation.idle_flags() {
        eprintln!("note: {flags} without effect: `--temperature` is 0, which is greedy decoding");
    }
}

/// Says that escapes in stop strings are none.
pub fn escapes(stop_strings: &[String]) {
    if let Some(text) = stop_strings.iter().find(|text| text.contains("\\n")) {
        eprintln!(
            "note: `\\n` in the stop string {text} is a backslash and an n; bash has line breaks in `$'\\n'`"
        );
    }
}

/// Says that a context is so long that LongRoPE turns short texts otherwise than in training.
pub fn long_rope(spec: &ModelSpec, context_tokens: usize) {
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
pub fn image_tensors(checkpoint: &Checkpoint) {
    if checkpoint.image_tensors() > 0 {
        let (path, count) = (checkpoint.path().display(), checkpoint.image_tensors());
        let tensors = noun(count, "tensor");
        eprintln!("{path}: the text model alone; {count} {tensors} for images are left out");
    }
}

/// Says which stored tensors the model does not compute with: it may not be what `config.json` says.
pub fn unexpected_tensors(checkpoint: &Checkpoint, spec: &ModelSpec) {
    if let Some(names) = first_of(&weights::unexpected_tensors(checkpoint, spec)) {
        eprintln!("note: the model has no use for tensor {names}");
    }
}

/// The first of some names, and how many more there are.
pub fn first_of(names: &[&str]) -> Option<String> {
    let (first, rest) = names.split_first()?;
    let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
    Some(format!("{first}{more}"))
}
