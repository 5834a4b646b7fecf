//! `nibble eval`: loss, perplexity, token accuracy and exact match on a file, base against adapters.

mod figures;
#[cfg(test)]
mod fixtures;
mod logits;
mod predictions;

use std::path::Path;

use super::{device, reading};
use crate::adapter::PeftAdapter;
use crate::checkpoint::atomic::AtomicFile;
use crate::checkpoint::{Checkpoint, is_there};
use crate::cli::adapters::{NamedAdapter, check_names};
use crate::cli::eval::EvalArgs;
use crate::cli::train::SEED;
use crate::data::files::in_words;
use crate::data::{Batch, ChatTokenizer, Dataset, Document, Encoder};
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::model::families::spec_from_config;
use crate::model::spec::ModelSpec;
use crate::model::weights::check_stored;
use crate::plan::Settings;
use crate::sample::AdaptedModel;
use crate::system::interrupt::Interrupt;
use figures::{BASE, Scores};
use logits::SavedLogits;
use predictions::Predictions;

/// Tokens of a forward pass.
const TOKENS_PER_PASS: usize = 2048;
/// Rows of logits at a time.
const LOGIT_ROWS: usize = 256;

/// Runs the command.
///
/// # Errors
/// Whatever is wrong with flags, files or data.
pub fn run(args: &EvalArgs) -> Result<()> {
    super::threads::set(args.threads)?;
    super::packing::check(&args.base)?;
    check_flags(args)?;
    match device::open(&args.device)? {
        Some(gpu) => run_on(args, gpu),
        None => run_on(args, device::cpu(&args.device)),
    }
}

fn check_flags(args: &EvalArgs) -> Result<()> {
    if args.predictions.is_some() && args.predictions == args.save_logits {
        let what = "`--predictions` and `--save-logits` name one file";
        return Err(Error::usage(what).hint("give each a name of its own"));
    }
    if args.seed.is_some() && args.validation_split.is_none() {
        return Err(Error::usage("`--seed` has no effect without `--validation-split`")
            .hint("give the `--validation-split` of the run, or leave the seed out"));
    }
    check_names(&args.adapter)?;
    let [_, _, ..] = &args.adapter[..] else { return Ok(()) };
    if let Some(NamedAdapter { folder, .. }) = args.adapter.iter().find(|a| a.name == BASE) {
        let folder = folder.display();
        let what = format_args!("an adapter is called `{BASE}`, as is the model without one");
        return Err(Error::usage(what).hint(format_args!("name it: `--adapter NAME={folder}`")));
    }
    let written = [("--predictions", &args.predictions), ("--save-logits", &args.save_logits)];
    if let Some((flag, _)) = written.iter().find(|(_, path)| path.is_some()) {
        let what = format_args!("`{flag}` takes one `--adapter`, not {}", args.adapter.len());
        return Err(Error::usage(what).hint("give each adapter a command and a file of its own"));
    }
    Ok(())
}

fn run_on<K: Kernels>(args: &EvalArgs, kernels: K) -> Result<()> {
    let checkpoint = Checkpoint::open(&args.base.model)?;
    super::notes::image_tensors(&checkpoint);
    let spec = spec_from_config(checkpoint.config())?;
    check_stored(&checkpoint, &spec)?;
    super::notes::unexpected_tensors(&checkpoint, &spec);
    kernels.check_model(&spec)?;
    let (dataset, tokenizer) = read_data(args, &spec)?;
    super::notes::escapes(&args.stop_strings);
    let ends = (args.max_new_tokens.get(), &args.stop_strings[..]);
    let predictions = args.predictions.as_deref();
    let predictions = predictions.map(|path| Predictions::new(&dataset, &spec, path, ends));
    let predictions = predictions.transpose()?;
    let logits = args.save_logits.as_deref();
    let logits = logits.map(|path| SavedLogits::new(&dataset, path)).transpose()?;
    super::notes::packing(&args.base, checkpoint.kind());
    let adapter = first_adapter(args, &spec)?;
    let batches = batches(&dataset.documents);
    let settings = settings(&batches, predictions.as_ref());
    let prefill_tokens = settings.tokens;
    let format = args.base.block_format();
    let mut model = AdaptedModel::load(
        kernels,
        &checkpoint,
        spec,
        format.as_ref(),
        adapter,
        settings,
        predictions.as_ref().map(Predictions::shorter),
    )?;
    let (interrupt, [logits_file, answers_file]) = prepare_files(args)?;
    let mut scores = Scores::new(&args.adapter);
    let scored = scores.measure(&mut model, &batches, &interrupt);
    let save = |()| {
        let asked = logits.zip(logits_file);
        let write =
            |(logits, file): (SavedLogits, _)| logits.write(model.model_mut()?, file, &interrupt);
        asked.map(write).transpose()?;
        let asked = predictions.zip(answers_file);
        let make = |(predictions, file): (Predictions, _)| {
            predictions.make(file, model.model_mut()?, tokenizer, prefill_tokens, &interrupt)
        };
        asked.map(make).transpose()
    };
    match scored.and_then(save) {
        Ok(predicted) => scores.print(args.json, predicted.as_ref()),
        Err(error) => {
            // Figures that are there are shown, whatever became of the rest.
            scores.print(args.json, None);
            return Err(error);
        }
    }
    Ok(())
}

/// The first adapter; the others are looked at, too, before the weights are read.
fn first_adapter(args: &EvalArgs, spec: &ModelSpec) -> Result<Option<PeftAdapter>> {
    let open = |adapter: &NamedAdapter| PeftAdapter::open(&adapter.folder, spec);
    for other in args.adapter.iter().skip(1) {
        open(other)?;
    }
    args.adapter.first().map(open).transpose()
}

/// The files for logits and answers, made before anything is computed, and what Ctrl-C does meanwhile.
fn prepare_files(args: &EvalArgs) -> Result<(Interrupt, [Option<AtomicFile>; 2])> {
    let writes = args.save_logits.is_some() || args.predictions.is_some();
    // Otherwise Ctrl-C ends the program, which leaves nothing behind.
    let interrupt = if writes { Interrupt::install()? } else { Interrupt::default() };
    let new = |path: &Option<_>| path.as_deref().map(new_file).transpose();
    Ok((interrupt, [new(&args.save_logits)?, new(&args.predictions)?]))
}

/// The data as the first adapter reads them. Figures of adapters can be compared only where all read the same.
fn read_data(args: &EvalArgs, spec: &ModelSpec) -> Result<(Dataset, ChatTokenizer)> {
    let options = args.format.options(args.max_length, spec);
    let (model, template) = (&args.base.model, &args.format.template_choice());
    let load = |tokenizer: &ChatTokenizer| {
        let encoder = Encoder::new(tokenizer, spec.vocab_size, options.train_on)?;
        let mut dataset = reading::load(&args.data, &encoder, &options)?;
        if let Some(share) = args.validation_split.filter(|&share| share > 0.0) {
            dataset.documents =
                reading::hold_out(dataset.documents, share, args.seed.unwrap_or(SEED))?.1;
        }
        Ok(dataset)
    };
    let first = args.adapter.first().map(|adapter| adapter.folder.as_path());
    let tokenizer = ChatTokenizer::open_for(model, template, first)?;
    let dataset = load(&tokenizer)?;
    for adapter in args.adapter.iter().skip(1) {
        let own = tokenizer.open_again(model, template, Some(&adapter.folder))?;
        if own.reads_like(&tokenizer) || load(&own)?.documents == dataset.documents {
            continue;
        }
        let (name, first) = (&adapter.name, &args.adapter[0].name);
        let data = in_words(&args.data);
        return Err(Error::usage(format_args!(
            "{data}: adapter `{name}` reads other tokens than `{first}`: it was trained with another \
             tokenizer or chat template"
        ))
        .hint("give it a command of its own, or `--chat-template` for all of them"));
    }
    for note in reading::notes(&dataset.report) {
        eprintln!("note: {}: {note}", in_words(&args.data));
    }
    Ok((dataset, tokenizer))
}

/// Documents together in passes of about [`TOKENS_PER_PASS`].
fn batches(documents: &[Document]) -> Vec<Batch> {
    let (mut batches, mut begin, mut tokens) = (Vec::new(), 0, 0);
    for (index, document) in documents.iter().enumerate() {
        let length = document.input_ids.len();
        if tokens > 0 && tokens + length > TOKENS_PER_PASS {
            batches.push(Batch::from_documents(&documents[begin..index]));
            (begin, tokens) = (index, 0);
        }
        tokens += length;
    }
    batches.push(Batch::from_documents(&documents[begin..]));
    batches
}

fn settings(batches: &[Batch], predictions: Option<&Predictions>) -> Settings {
    let tokens = batches.iter().map(Batch::tokens).max().unwrap_or(0);
    Settings {
        cache_tokens: predictions.map_or(0, |predictions| predictions.context_tokens),
        ..Settings::of_pass(tokens, LOGIT_ROWS.min(tokens))
    }
}

fn new_file(path: &Path) -> Result<AtomicFile> {
    AtomicFile::create(path, false)
}

/// Refuses a file that is there: it may be somebody's work.
fn check_is_new(flag: &str, path: &Path) -> Result<()> {
    if is_there(path) {
        let what = format_args!("{flag}: {} is there already", path.display());
        return Err(Error::usage(what).hint("remove it, or choose another name"));
    }
    Ok(())
}
