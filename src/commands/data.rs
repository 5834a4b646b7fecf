//! `nibble data`: what a data set looks like to a model, without training.

use std::io::{IsTerminal, Write};

use serde_json::json;

use crate::checkpoint::{Checkpoint, read_json};
use crate::cli::data::DataArgs;
use crate::data::audit::Audit;
use crate::data::{ChatTokenizer, Dataset, Document, Encoder, load};
use crate::error::{Error, Result};
use crate::model::families::spec_from_config;

/// Lines that are listed of each kind; `--json` has all.
const LISTED_LINES: usize = 20;
/// Columns of the longest bar.
const BAR_COLUMNS: usize = 40;

/// Runs the command.
///
/// # Errors
/// `Input` when the file cannot be read as records at all; bad records are listed, not raised.
pub fn run(args: &DataArgs) -> Result<()> {
    super::set_threads(args.threads)?;
    let tokenizer = ChatTokenizer::open(&args.model)?;
    let options = args.format.options(args.max_length);
    let encoder = Encoder::new(&tokenizer, vocab_size(args)?, options.train_on)?;
    let dataset = load(&args.data, &encoder, &options)?;
    let audit = Audit::of(&dataset, &options);
    let text = if args.json {
        format!("{:#}\n", json!(audit))
    } else {
        let mut text = render(args, &audit);
        text.push_str(&show(&dataset, &tokenizer, args.show)?);
        text
    };
    super::generate::print(&text)
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

fn render(args: &DataArgs, audit: &Audit) -> String {
    let mut out = Vec::new();
    let share = |part: usize, whole: usize| 100.0 * part as f64 / whole.max(1) as f64;
    let [shortest, median, most, longest] = audit.lengths;
    let format = audit.format.map_or("?".to_string(), |f| format!("{f:?}").to_lowercase());
    let mut line = |text: String| out.push(text);
    line(format!("{}: {} records, format {format}", args.data.display(), audit.records));
    line(format!(
        "{} documents, {} tokens per epoch, {} of them trained ({:.1} %)",
        audit.documents,
        audit.tokens,
        audit.targets,
        share(audit.targets, audit.tokens)
    ));
    line(format!("length: shortest {shortest}, median {median}, 95 % {most}, longest {longest}"));
    let highest = audit.histogram.iter().map(|(_, count)| *count).max().unwrap_or(1).max(1);
    for (bound, count) in &audit.histogram {
        let bar = "█".repeat((count * BAR_COLUMNS).div_ceil(highest));
        line(format!("  up to {bound:>6} {count:>7} {bar}"));
    }
    line(format!(
        "longer than {} tokens: {} ({:.1} %), {} tokens removed",
        args.max_length,
        audit.too_long,
        share(audit.too_long, audit.lengths_count()),
        audit.tokens_removed
    ));
    line(format!(
        "packed into {} rows of {} tokens, {:.1} % full",
        audit.packed_rows,
        args.max_length,
        100.0 * audit.packing_efficiency
    ));
    for (what, lines) in [
        ("without a token to train on", &audit.without_targets),
        ("with an answer whose end-of-sequence is not trained", &audit.untrained_eos),
        ("that repeat an earlier record", &audit.duplicates),
    ] {
        line(format!("{} records {what}{}", lines.len(), numbers(lines)));
    }
    line(format!("{} bad records", audit.rejected.len()));
    for (number, rejection) in &audit.rejected {
        line(format!("  {}:{number}: {}", args.data.display(), rejection.reason));
    }
    out.join("\n") + "\n"
}

impl Audit {
    fn lengths_count(&self) -> usize {
        self.histogram.iter().map(|(_, count)| count).sum()
    }
}

fn numbers(lines: &[usize]) -> String {
    if lines.is_empty() {
        return String::new();
    }
    let listed: Vec<String> = lines.iter().take(LISTED_LINES).map(usize::to_string).collect();
    let more = if lines.len() > LISTED_LINES { ", …" } else { "" };
    format!(": lines {}{more}", listed.join(", "))
}

/// The first documents token by token; what is trained is green, or in brackets without a terminal.
fn show(dataset: &Dataset, tokenizer: &ChatTokenizer, count: usize) -> Result<String> {
    let colour = std::io::stdout().is_terminal();
    let mut out = Vec::new();
    for document in dataset.documents.iter().take(count) {
        let targets = document.num_targets();
        let length = document.input_ids.len();
        let written = writeln!(
            out,
            "\n── line {}: {length} tokens, {targets} trained {}",
            document.line,
            if colour { "(green)" } else { "([in brackets])" }
        );
        written.map_err(|e| Error::io("write to", "memory".as_ref(), e))?;
        out.extend(tokens(document, tokenizer, colour)?.into_bytes());
        out.push(b'\n');
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

fn tokens(document: &Document, tokenizer: &ChatTokenizer, colour: bool) -> Result<String> {
    let mut text = String::new();
    for (index, (&id, &label)) in document.input_ids.iter().zip(&document.labels).enumerate() {
        let token = tokenizer.decode(&[id], false)?;
        // The first token has nothing to be predicted from.
        let trained = label >= 0 && index > 0;
        match (trained, colour) {
            (true, true) => text.push_str(&format!("\x1b[32m{token}\x1b[0m│")),
            (true, false) => text.push_str(&format!("[{token}]")),
            (false, true) => text.push_str(&format!("\x1b[2m{token}\x1b[0m│")),
            (false, false) => text.push_str(&token),
        }
    }
    Ok(text)
}
