//! `nibble eval`: loss, perplexity, token accuracy and exact match on a file, base against adapter.

#[cfg(test)]
mod fixtures;
mod logits;
mod predictions;

use std::path::Path;

use serde_json::json;

use super::{device, progress_bar, reading};
use crate::checkpoint::atomic::AtomicFile;
use crate::checkpoint::{Checkpoint, is_there};
use crate::cli::eval::EvalArgs;
use crate::data::files::in_words;
use crate::data::{Batch, ChatTokenizer, Dataset, Document, Encoder, targets};
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::model::families::spec_from_config;
use crate::model::spec::ModelSpec;
use crate::model::weights::check_stored;
use crate::model::{Model, Variant};
use crate::plan::Settings;
use crate::plural::counted;
use crate::report::table::{Align, Table};
use crate::sample::{equip, load_weights};
use crate::train::interrupt::Interrupt;
use logits::SavedLogits;
use predictions::{Predicted, Predictions};

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
    if args.predictions.is_some() && args.predictions == args.save_logits {
        let what = "`--predictions` and `--save-logits` name one file";
        return Err(Error::usage(what).hint("give each a name of its own"));
    }
    match device::open(&args.device)? {
        Some(gpu) => run_on(args, gpu),
        None => run_on(args, device::cpu(&args.device)),
    }
}

fn run_on<K: Kernels>(args: &EvalArgs, kernels: K) -> Result<()> {
    let checkpoint = Checkpoint::open(&args.base.model)?;
    super::notes::image_tensors(&checkpoint);
    let spec = spec_from_config(checkpoint.config())?;
    check_stored(&checkpoint, &spec)?;
    super::notes::unexpected_tensors(&checkpoint, &spec);
    kernels.check_model(&spec)?;
    let (dataset, tokenizer) = read_data(args, &spec)?;
    let predictions = args
        .predictions
        .as_deref()
        .map(|path| Predictions::new(&dataset, &spec, path, args.max_new_tokens.get()));
    let predictions = predictions.transpose()?;
    let logits = args.save_logits.as_deref();
    let logits = logits.map(|path| SavedLogits::new(&dataset, path)).transpose()?;
    super::notes::packing(&args.base, checkpoint.kind());
    let format = args.base.block_format();
    let adapter = args.adapter.as_deref();
    let (weights, adapter) = load_weights(&checkpoint, &spec, format.as_ref(), adapter)?;
    let merged = args.adapter.is_some() && adapter.is_none();
    let batches = batches(&dataset.documents);
    let settings = settings(&batches, predictions.as_ref());
    let prefill_tokens = settings.tokens;
    let weights = weights.upload(&kernels);
    let equipped =
        weights.and_then(|weights| equip(&kernels, spec, weights, adapter.as_ref(), settings));
    let mut model = equipped.map_err(|error| match &predictions {
        Some(predictions) => predictions.shorter(error),
        None => error,
    })?;
    if merged {
        note_merged();
    }
    let (interrupt, [logits_file, answers_file]) = prepare_files(args)?;
    let mut figures = |variant| figures(&mut model, &batches, variant, &interrupt);
    let base = (!merged).then(|| figures(Variant::Base)).transpose()?;
    let adapted = args.adapter.is_some().then(|| figures(Variant::Adapted)).transpose()?;
    let write = |(logits, file): (SavedLogits, _)| logits.write(&mut model, file, &interrupt);
    let saved = logits.zip(logits_file).map(write);
    let predict = |()| {
        let asked = predictions.zip(answers_file);
        let make = |(predictions, file): (Predictions, _)| {
            predictions.make(file, &mut model, tokenizer, prefill_tokens, &interrupt)
        };
        asked.map(make).transpose()
    };
    match saved.unwrap_or(Ok(())).and_then(predict) {
        Ok(predicted) => print_result(args, base, adapted, predicted),
        // The figures are there, whatever became of the files.
        Err(error) => print_result(args, base, adapted, None).and(Err(error)),
    }
}

/// The files for logits and answers, made before anything is computed, and what Ctrl-C does meanwhile.
fn prepare_files(args: &EvalArgs) -> Result<(Interrupt, [Option<AtomicFile>; 2])> {
    let writes = args.save_logits.is_some() || args.predictions.is_some();
    // Otherwise Ctrl-C ends the program, which leaves nothing behind.
    let interrupt = if writes { Interrupt::install()? } else { Interrupt::default() };
    let new = |path: &Option<_>| path.as_deref().map(new_file).transpose();
    Ok((interrupt, [new(&args.save_logits)?, new(&args.predictions)?]))
}

fn note_merged() {
    eprintln!(
        "note: this adapter is more than LoRA on linear layers: it is merged into the weights, and \
         figures of the base alone are not shown"
    );
}

fn read_data(args: &EvalArgs, spec: &ModelSpec) -> Result<(Dataset, ChatTokenizer)> {
    let options = args.format.options(args.max_length, spec);
    let (template, adapter) = (args.format.chat_template.as_deref(), args.adapter.as_deref());
    let tokenizer = ChatTokenizer::open_for(&args.base.model, template, adapter)?;
    let encoder = Encoder::new(&tokenizer, spec.vocab_size, options.train_on)?;
    let dataset = reading::load(&args.data, &encoder, &options)?;
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

/// What a model makes of the file.
#[derive(Default)]
struct Figures {
    documents: usize,
    targets: usize,
    /// Sum over the trained tokens.
    loss: f64,
    tokens_right: usize,
    /// Documents all of whose trained tokens are right.
    documents_right: usize,
}

impl Figures {
    fn loss(&self) -> f64 {
        self.loss / self.targets as f64
    }

    fn accuracy(&self) -> f64 {
        self.tokens_right as f64 / self.targets as f64
    }

    fn json(&self) -> serde_json::Value {
        json!({
            "loss": self.loss(),
            "perplexity": self.loss().exp(),
            "mean_token_accuracy": self.accuracy(),
            "exact_match": self.documents_right as f64 / self.documents as f64,
        })
    }
}

fn figures<K: Kernels>(
    model: &mut Model<K>,
    batches: &[Batch],
    variant: Variant,
    interrupt: &Interrupt,
) -> Result<Figures> {
    let mut figures = Figures::default();
    let documents = batches.iter().map(|batch| batch.lines.len()).sum();
    let scoring = match variant {
        Variant::Base => "scoring the base",
        Variant::Adapted => "scoring with the adapter",
    };
    let bar = progress_bar::over_count(scoring, documents);
    for batch in batches {
        interrupt.check()?;
        bar.set_position(figures.documents as u64);
        let score = model.score(batch, variant)?;
        figures.documents += batch.lines.len();
        figures.targets += batch.num_targets();
        figures.loss += score.loss;
        figures.tokens_right += score.likeliest.iter().filter(|&&right| right).count();
        figures.documents_right += documents_right(batch, &score.likeliest);
    }
    bar.finish_and_clear();
    Ok(figures)
}

fn documents_right(batch: &Batch, likeliest: &[bool]) -> usize {
    let (mut rest, mut right) = (likeliest, 0);
    for document in batch.documents() {
        let targets = targets(&batch.labels[document]).count();
        let (own, others) = rest.split_at(targets);
        right += usize::from(own.iter().all(|&right| right));
        rest = others;
    }
    right
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

fn print_result(
    args: &EvalArgs,
    base: Option<Figures>,
    adapted: Option<Figures>,
    predicted: Option<Predicted>,
) -> Result<()> {
    let Some(any) = base.as_ref().or(adapted.as_ref()) else { return Ok(()) };
    let (documents, targets) = (any.documents, any.targets);
    if args.json {
        let out = json!({
            "documents": documents,
            "targets": targets,
            "base": base.as_ref().map(Figures::json),
            "adapter": adapted.as_ref().map(Figures::json),
            "predictions": predicted.as_ref().map(Predicted::json),
        });
        println!("{out:#}");
        return Ok(());
    }
    println!("{}, {}\n", counted(documents, "document"), counted(targets, "trained token"));
    let mut table = Table::new([
        ("", Align::Left),
        ("loss", Align::Right),
        ("perplexity", Align::Right),
        ("token accuracy", Align::Right),
        ("exact match", Align::Right),
    ]);
    for (name, figures) in [("base", &base), ("adapter", &adapted)] {
        let Some(figures) = figures else { continue };
        table.row([
            name.to_string(),
            format!("{:.4}", figures.loss()),
            format!("{:.3}", figures.loss().exp()),
            format!("{:.1} %", 100.0 * figures.accuracy()),
            format!("{} of {documents}", figures.documents_right),
        ]);
    }
    print!("{table}");
    if let Some(Predicted { path, documents, right, cut }) = predicted {
        let (path, answers) = (path.display(), counted(documents, "answer"));
        println!("\nwrote {path}: {answers}, {right} of them equal to the label");
        if cut > 0 {
            println!("{cut} cut off: at `--max-new-tokens`, or where there are no more positions");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_is_right_when_all_its_trained_tokens_are() {
        let document = |labels: &[i32]| Document {
            input_ids: vec![1; labels.len()],
            labels: labels.to_vec(),
            line: 1,
        };
        // The first label of a document has nothing to be foretold from.
        let documents = [document(&[5, -100, 1, 1]), document(&[1, 1]), document(&[-100, 1, 1])];
        let batch = Batch::from_documents(&documents);
        assert_eq!(batch.num_targets(), 5);
        assert_eq!(documents_right(&batch, &[true, false, true, true, true]), 2);
        assert_eq!(documents_right(&batch, &[true, true, false, true, false]), 1);
    }
}
