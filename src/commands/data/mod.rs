//! `nibble data`: what a data set looks like to a model, without training.

mod report;
mod show;

use serde_json::json;

use super::reading;
use crate::checkpoint::{Checkpoint, read_json};
use crate::cli::data::DataArgs;
use crate::data::audit::Audit;
use crate::data::{ChatTokenizer, Encoder};
use crate::error::Result;
use crate::model::families::spec_from_config;
use crate::printed;

/// Runs the command.
///
/// # Errors
/// `Input` when the file cannot be read as records at all; bad records are listed, not raised.
pub fn run(args: &DataArgs) -> Result<()> {
    super::set_threads(args.threads)?;
    let tokenizer = ChatTokenizer::open(&args.model)?;
    let options = args.format.options(args.max_length);
    let encoder = Encoder::new(&tokenizer, vocab_size(args)?, options.train_on)?;
    let bar = reading::bar(&args.data);
    let watch = |bytes| bar.set_position(bytes);
    let (audit, first) = Audit::of(&args.data, &encoder, &options, args.show, watch)?;
    bar.finish_and_clear();
    let text = if args.json {
        format!("{:#}\n", json!(audit))
    } else {
        let shown = show::documents(&args.data, &first, &tokenizer)?;
        report::render(&args.data, &audit, &options, &tokenizer) + &shown
    };
    printed::at_once(&text)
}

/// Rows of the model's embedding; a folder with a tokenizer but no weights will do.
fn vocab_size(args: &DataArgs) -> Result<usize> {
    let config = args.model.join("config.json");
    let spec = if config.exists() {
        spec_from_config(&read_json(&config)?)?
    } else {
        spec_from_config(Checkpoint::open(&args.model)?.config())?
    };
    Ok(spec.vocab_size)
}
