//! The audit as text: figures, lengths, and a list of checks.

use std::path::PathBuf;

use crate::commands::reading;
use crate::data::audit::{Audit, Bar};
use crate::data::files::in_words;
use crate::data::{BadRecords, ChatTokenizer, DataOptions, LoadReport, TrainOn, Truncation};
use crate::figures::thousands;
use crate::plural::noun;

/// Lines and bad records that are listed of each kind; `--json` has all.
const LISTED: usize = 20;
/// Columns of the longest bar.
const BAR_COLUMNS: usize = 40;

/// The whole report.
pub fn render(
    data: &[PathBuf],
    audit: &Audit,
    options: &DataOptions,
    tokenizer: &ChatTokenizer,
) -> String {
    let mut lines = vec![title(data, audit), String::new()];
    // Figures and checks of nothing would only hide why.
    if audit.report.rejected.len() < audit.report.records {
        lines.extend(figures(audit, options));
        lines.extend(histogram(audit));
        lines.extend(checks(audit, options, tokenizer));
    }
    lines.extend(rejected(audit, options));
    // What `nibble train` would say.
    let verdict = audit.would_stop.as_ref().map(|why| format!("\ntraining would stop: {why}"));
    lines.extend(verdict);
    lines.join("\n") + "\n"
}

fn title(data: &[PathBuf], audit: &Audit) -> String {
    let report = &audit.report;
    let format = report.formats();
    let (count, records) = (number(report.records), noun(report.records, "record"));
    let files = report.files.paths().count();
    let files = if files > 1 { format!(" in {files} files") } else { String::new() };
    format!("{}: {count} {records}{files}, format {format}", in_words(data))
}

fn figures(audit: &Audit, options: &DataOptions) -> Vec<String> {
    let report = &audit.report;
    let loss = match options.train_on {
        TrainOn::Assistant => "all answers",
        TrainOn::Completion => "last answers",
        TrainOn::All => "everything",
    };
    let length = &audit.length;
    vec![
        format!("documents   {}", number(report.documents)),
        format!(
            "tokens      {}, {} of them trained: {:.1} % (loss on {loss})",
            number(report.tokens),
            number(report.targets),
            percent(report.targets, report.tokens)
        ),
        format!(
            "length      shortest {}, median {}, 95 % up to {}, longest {} tokens",
            length.shortest, length.median, length.percentile_95, length.longest
        ),
        format!(
            "packed      {} {} of {} tokens, {:.1} % full",
            number(audit.packed_rows),
            noun(audit.packed_rows, "sequence"),
            options.max_length,
            100.0 * audit.packing_efficiency
        ),
        String::new(),
    ]
}

fn histogram(audit: &Audit) -> Vec<String> {
    let bars = &audit.length.histogram;
    let highest = bars.iter().map(|bar| bar.count).max().unwrap_or(1);
    let line = |bar: &Bar| {
        let range = format!("{} to {}", number(bar.from as usize), number(bar.to as usize));
        let drawn = "█".repeat((bar.count * BAR_COLUMNS).div_ceil(highest));
        format!("  {range:>17} {:>9}  {drawn}", number(bar.count)).trim_end().to_string()
    };
    let mut lines: Vec<String> = bars.iter().map(line).collect();
    lines.push(String::new());
    lines
}

/// Lines on what may be wrong, one for each thing.
fn checks(audit: &Audit, options: &DataOptions, tokenizer: &ChatTokenizer) -> Vec<String> {
    let report = &audit.report;
    let check = |fine: &str, found: &str, lines: &[usize]| match lines.len() {
        0 => format!("ok    {fine}"),
        _ => note(report, found, lines),
    };
    let mut all = vec![
        check(
            &format!("no record is longer than {} tokens", options.max_length),
            &too_long(audit, options),
            &report.too_long,
        ),
        check(
            "every record has a token to train on",
            "records without a token to train on, left out",
            &report.without_targets,
        ),
    ];
    all.extend(positions(audit));
    all.extend(ends(report, tokenizer));
    all.extend([
        check(
            "no record begins with two beginning-of-sequence tokens",
            "records that begin with two beginning-of-sequence tokens",
            &report.double_bos,
        ),
        check(
            "no record repeats another",
            "records that repeat an earlier one",
            &report.duplicates,
        ),
    ]);
    let found = [
        ("empty answers: only their end is trained", &report.empty_answers),
        ("messages whose text the chat template leaves out", &report.content_left_out),
        ("messages whose reasoning the chat template leaves out", &report.reasoning_left_out),
        (
            "prompts of plain text, without the chat template that `instruction` and `output` go through",
            &report.bare_prompts,
        ),
        (&format!("texts {}", reading::RENDERED_TEXTS), &report.rendered_texts),
    ];
    all.extend(notes(report, found));
    all.extend(unknown_roles(report, options));
    let files = reading::files_without_records(report).into_iter().chain(reading::held_out(report));
    all.extend(files.map(|found| format!("note  {found}")));
    let unused = reading::unused_fields(report);
    all.extend(unused.map(|fields| format!("note  fields that are not used: {fields}")));
    all
}

/// Mistyped, the assistant is nobody whom the loss knows.
fn unknown_roles(report: &LoadReport, options: &DataOptions) -> Option<String> {
    let roles = reading::unknown_roles(report)?;
    let only = match options.train_on {
        TrainOn::Assistant | TrainOn::Completion => "; only `assistant` is trained",
        TrainOn::All => "",
    };
    Some(format!("note  messages with roles that few templates know: {roles}{only}"))
}

/// Whether documents go beyond what the model knows, where `--max-length` lets them.
fn positions(audit: &Audit) -> Option<String> {
    let longer = &audit.beyond_trained_length;
    let found = reading::beyond_training(audit.trained_length?, longer.len());
    Some(match longer.len() {
        0 => format!("ok    {found}"),
        _ => format!("note  {found} ({})", places(&audit.report, longer)),
    })
}

/// Whether what truncation left teaches the model to stop.
fn ends(report: &LoadReport, tokenizer: &ChatTokenizer) -> Vec<String> {
    if report.documents == 0 {
        return vec!["note  no document is left to train on".into()];
    }
    let found = [
        (
            "records with an answer whose end-of-sequence token is not trained",
            &report.untrained_eos,
        ),
        ("answers that lost their end to truncation", &report.cut_answers),
    ];
    let notes: Vec<String> = notes(report, found).collect();
    if !notes.is_empty() {
        return notes;
    }
    let eos: Vec<String> =
        tokenizer.eos_ids().iter().filter_map(|&id| tokenizer.token(id)).collect();
    let eos = if eos.is_empty() { "which the tokenizer lacks".into() } else { eos.join(" or ") };
    vec![format!("ok    every answer ends in a trained end-of-sequence token ({eos})")]
}

/// A [`note`] on each thing that was found at all.
fn notes<'a>(
    report: &'a LoadReport,
    found: impl IntoIterator<Item = (&'a str, &'a Vec<usize>)>,
) -> impl Iterator<Item = String> {
    let found = found.into_iter().filter(|(_, lines)| !lines.is_empty());
    found.map(|(what, lines)| note(report, what, lines))
}

/// How many there are of something, and on which lines.
fn note(report: &LoadReport, what: &str, lines: &[usize]) -> String {
    format!("note  {what}: {} ({})", number(lines.len()), places(report, lines))
}

fn too_long(audit: &Audit, options: &DataOptions) -> String {
    let report = &audit.report;
    let share = percent(report.too_long.len(), report.lengths.len());
    let verb = if report.tokens_removed == 1 { "is" } else { "are" };
    let removed = report.tokens_removed;
    let removed = format!("{} {}", number(removed), noun(removed, "token"));
    let fate = match options.truncation {
        Truncation::Error => "refused without `--truncation`".to_string(),
        Truncation::Drop => format!("left out with {removed}"),
        Truncation::Right => format!("cut at the end by {removed} in all"),
        Truncation::Left => format!("cut at the beginning by {removed} in all"),
        Truncation::Split => format!("split; {removed} {verb} in parts without a target"),
    };
    format!("records longer than {} tokens ({share:.1} %), {fate}", options.max_length)
}

fn rejected(audit: &Audit, options: &DataOptions) -> Vec<String> {
    let rejected = &audit.report.rejected;
    if rejected.is_empty() {
        return vec!["ok    every record can be read".into()];
    }
    let fate = match options.bad_records {
        BadRecords::Error => "",
        BadRecords::Skip => ", left out",
    };
    let count = number(rejected.len());
    let mut lines = vec![format!("bad   records that cannot be used{fate}: {count}")];
    for bad in rejected.iter().take(LISTED) {
        let place = audit.report.files.place(bad.line);
        lines.push(format!("      {place}: {}", bad.rejection.reason));
        lines.extend(bad.rejection.hint.iter().map(|hint| format!("        hint: {hint}")));
    }
    if rejected.len() > LISTED {
        lines.push(format!("      … and {} more: `--json` has all", rejected.len() - LISTED));
    }
    lines
}

fn places(report: &LoadReport, lines: &[usize]) -> String {
    report.files.places(lines, LISTED)
}

fn percent(part: usize, whole: usize) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}

fn number(count: usize) -> String {
    thousands(count as u64)
}
