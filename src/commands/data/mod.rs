//! `nibble data`: what a data set looks like to a model, without training.

mod report;
mod show;

use std::path::PathBuf;

use serde_json::json;

use super::reading;
use crate::adapter::PeftAdapter;
use crate::checkpoint::{Checkpoint, read_config};
use crate::cli::data::DataArgs;
use crate::data::audit::Audit;
use crate::data::files::in_words;
use crate::data::{ChatTokenizer, Encoder};
use crate::error::{Error, Result};
use crate::model::families::spec_from_config;
use crate::model::spec::ModelSpec;
use crate::printed;

/// Runs the command.
///
/// # Errors
/// `Input` when the file cannot be read as records at all, or, below the whole report, when training
/// would stop.
pub fn run(args: &DataArgs) -> Result<()> {
    super::threads::set(args.threads)?;
    let (template, adapter) = (&args.format.template_choice(), args.adapter.as_deref());
    let spec = spec(args)?;
    if let Some(adapter) = adapter {
        PeftAdapter::open(adapter, &spec)?;
    }
    let tokenizer = ChatTokenizer::open_for(&args.model, template, adapter)?;
    let options = args.format.options(args.max_length, &spec);
    let encoder = Encoder::new(&tokenizer, spec.vocab_size, options.train_on)?;
    let bar = reading::bar();
    let watch = |bytes, of| reading::show(&bar, bytes, of);
    let trained = spec.trained_length();
    let (audit, first) = Audit::of(&args.data, &encoder, &options, trained, args.show, watch)?;
    bar.finish_and_clear();
    let text = if args.json {
        format!("{:#}\n", json!(audit))
    } else {
        let shown = show::documents(&audit.report.files, &first, &tokenizer)?;
        report::render(&args.data, &audit, &options, &tokenizer) + &shown
    };
    printed::at_once(&text)?;
    audit.report.check(&args.data, &options).map_err(|error| refused(&args.data, &error))
}

/// The report has said why; what to do about it stands here.
fn refused(data: &[PathBuf], why: &Error) -> Error {
    let error = Error::input(format_args!("{} cannot be trained on as it is", in_words(data)));
    let general =
        "fix the records named above, or leave them out by `--bad-records skip`".to_string();
    error.hint(why.message().hint.as_ref().unwrap_or(&general))
}

/// The model; a folder with a tokenizer but no weights will do.
fn spec(args: &DataArgs) -> Result<ModelSpec> {
    let config = args.model.join("config.json");
    if config.exists() {
        return spec_from_config(&read_config(&config)?);
    }
    spec_from_config(Checkpoint::open(&args.model)?.config())
}
