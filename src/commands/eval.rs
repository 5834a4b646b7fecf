//! `nibble eval`: loss and perplexity of a file, base against adapter.

use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use super::reading;
use crate::adapter::Adapter;
use crate::checkpoint::{Checkpoint, atomic};
use crate::cli::eval::EvalArgs;
use crate::data::{Batch, ChatTokenizer, Dataset, Document, Encoder};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::families::spec_from_config;
use crate::model::spec::ModelSpec;
use crate::model::weights::Weights;
use crate::plan::Settings;
use crate::sample::load_weights;

/// Tokens of a forward pass.
const TOKENS_PER_PASS: usize = 2048;
/// Rows of logits at a time.
const LOGIT_ROWS: usize = 256;

/// Runs the command.
///
/// # Errors
/// Whatever is wrong with flags, files or data.
pub fn run(args: &EvalArgs) -> Result<()> {
    super::set_threads(args.threads)?;
    let checkpoint = Checkpoint::open(&args.base.model)?;
    let spec = spec_from_config(checkpoint.config())?;
    let dataset = read_data(args, &spec)?;
    let format = args.base.block_format();
    let adapter = args.adapter.as_deref();
    let (weights, adapter) = load_weights(&checkpoint, &spec, format.as_ref(), adapter)?;
    let merged = args.adapter.is_some() && adapter.is_none();
    let batches = batches(&dataset.documents);
    let mut model = equip(spec, weights, adapter.as_ref(), &batches)?;
    let targets: usize = batches.iter().map(|batch| batch.num_targets).sum();
    let base = if merged { None } else { Some(mean(&mut model, &batches, Model::evaluate_base)?) };
    let adapted = args.adapter.is_some().then(|| mean(&mut model, &batches, Model::evaluate));
    let adapted = adapted.transpose()?;
    if let Some(file) = &args.save_logits {
        save_logits(&mut model, &dataset.documents, file)?;
    }
    print_result(args, targets, dataset.documents.len(), base, adapted)
}

fn read_data(args: &EvalArgs, spec: &ModelSpec) -> Result<Dataset> {
    let options = args.format.options(args.max_length);
    let tokenizer = ChatTokenizer::open(&args.base.model)?;
    let encoder = Encoder::new(&tokenizer, spec.vocab_size, options.train_on)?;
    reading::load(&args.data, &encoder, &options)
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

fn equip(
    spec: ModelSpec,
    weights: Weights,
    adapter: Option<&Adapter>,
    batches: &[Batch],
) -> Result<Model> {
    let tokens = batches.iter().map(Batch::tokens).max().unwrap_or(0);
    let settings = Settings {
        tokens,
        longest_document: tokens,
        logit_rows: LOGIT_ROWS.min(tokens),
        policies: Vec::new(),
        targets: adapter.map(|adapter| adapter.targets.clone()).unwrap_or_default(),
        lora_dropout: false,
        bf16_working: false,
        threads: rayon::current_num_threads(),
        cache_tokens: 0,
    };
    let mut model = Model::new(spec, weights, settings, None)?;
    if let Some(adapter) = adapter {
        model.parameters_mut().load(adapter);
    }
    Ok(model)
}

/// Mean loss over all trained tokens.
fn mean(
    model: &mut Model,
    batches: &[Batch],
    evaluate: impl Fn(&mut Model, &Batch) -> Result<f64>,
) -> Result<f64> {
    let (mut sum, mut targets) = (0.0, 0);
    for batch in batches {
        sum += evaluate(model, batch)?;
        targets += batch.num_targets;
    }
    Ok(sum / targets as f64)
}

fn save_logits(model: &mut Model, documents: &[Document], file: &Path) -> Result<()> {
    let length = documents[0].input_ids.len();
    if let Some(other) = documents.iter().find(|document| document.input_ids.len() != length) {
        return Err(Error::usage(format_args!(
            "--save-logits needs rows of equal length: line {} has {} tokens, the first {length}",
            other.line,
            other.input_ids.len()
        )));
    }
    let rows: Vec<u32> = (0..length as u32).collect();
    let mut logits = Vec::new();
    for document in documents {
        logits.extend(model.logits(&Batch::from_documents([document]), &rows)?);
    }
    let shape = vec![documents.len(), length, model.spec().vocab_size];
    let view = TensorView::new(Dtype::F32, shape, bytemuck::cast_slice(&logits));
    let bytes = view.and_then(|view| safetensors::serialize([("logits", view)], None));
    let bytes = bytes.map_err(|e| Error::usage(format_args!("--save-logits: {e}")))?;
    atomic::write_file(file, &bytes)
}

fn print_result(
    args: &EvalArgs,
    targets: usize,
    documents: usize,
    base: Option<f64>,
    adapted: Option<f64>,
) -> Result<()> {
    let figures = |loss: f64| json!({"loss": loss, "perplexity": loss.exp()});
    if args.json {
        let out = json!({
            "documents": documents,
            "targets": targets,
            "base": base.map(figures),
            "adapter": adapted.map(figures),
        });
        println!("{out:#}");
        return Ok(());
    }
    println!("{documents} documents, {targets} trained tokens\n");
    println!("{:<8} {:>9} {:>12}", "", "loss", "perplexity");
    for (name, loss) in [("base", base), ("adapter", adapted)] {
        if let Some(loss) = loss {
            println!("{name:<8} {loss:>9.4} {:>12.3}", loss.exp());
        }
    }
    Ok(())
}
