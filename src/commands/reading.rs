//! Reading data files behind a bar that shows how far it is, and what is said of them then.

use std::path::PathBuf;

use indicatif::ProgressBar;

use super::progress_bar;
use crate::data::files::in_words;
use crate::data::{DataOptions, Dataset, Document, Encoder, LoadReport, RoleUse, split};
use crate::error::{Error, Result};
use crate::figures::thousands;
use crate::plural::noun;

/// What is to be known of texts that hold conversations.
pub const RENDERED_TEXTS: &str =
    "rendered by a chat template, whose questions are trained, too: of `messages` only answers are";
/// What is shown of roles that may be anything.
const MOST_ROLES: usize = 8;
const MOST_FIELDS: usize = 12;
const MOST_CHARACTERS: usize = 40;

/// [`crate::data::load()`] behind a [`bar`]; fails on what training should not pass over.
pub fn load(data: &[PathBuf], encoder: &Encoder, options: &DataOptions) -> Result<Dataset> {
    let bar = bar();
    let dataset = crate::data::load(data, encoder, options, |bytes, of| show(&bar, bytes, of))?;
    bar.finish_and_clear();
    let general = "`nibble data` lists every bad record; `--bad-records skip` leaves them out";
    dataset.report.check(data, options).map_err(|error| error.or_hint(general))?;
    Ok(dataset)
}

/// Training and evaluation documents: [`split::hold_out`].
///
/// # Errors
/// `Usage` where nothing can be held out.
pub fn hold_out(
    documents: Vec<Document>,
    share: f64,
    seed: u64,
) -> Result<(Vec<Document>, Vec<Document>)> {
    let (training, evaluation) = split::hold_out(documents, share, seed);
    if evaluation.is_empty() {
        let what =
            format_args!("`--validation-split {share}`: there is one record, or all are the same");
        return Err(Error::usage(what).hint(
            "the documents of a record stay together, and so do records that are the same: give several, or \
             other data to evaluate",
        ));
    }
    Ok((training, evaluation))
}

/// Files that were named and gave nothing.
pub fn files_without_records(report: &LoadReport) -> Option<String> {
    let empty = &report.empty_files;
    (!empty.is_empty()).then(|| format!("no record in {}", in_words(empty)))
}

/// Whether files that are kept for something else by their names are among the others.
pub fn held_out(report: &LoadReport) -> Option<String> {
    let (file, kind) = report.files.held_out_among()?;
    Some(format!("{} among the others, which by its name is for {kind}", file.display()))
}

/// What was left out or looks wrong.
pub fn notes(report: &LoadReport) -> Vec<String> {
    let plain = |count: usize, what: &str| (count > 0).then(|| format!("{count} {what}"));
    let counted = |count, one, what| plain(count, &format!("{} {what}", noun(count, one)));
    let notes = [
        plain(report.rejected.len(), "that cannot be used, left out"),
        plain(report.without_targets.len(), "without a token to train on, left out"),
        plain(report.too_long.len(), "longer than `--max-length`"),
        counted(report.tokens_removed, "token", "removed by truncation"),
        plain(
            report.untrained_eos.len(),
            "with an answer whose end-of-sequence token is not trained",
        ),
        counted(report.cut_answers.len(), "answer", "cut before the end"),
        plain(report.double_bos.len(), "with two beginning-of-sequence tokens in front"),
        plain(report.duplicates.len(), "repeating an earlier one"),
        counted(report.empty_answers.len(), "answer", "with nothing in it"),
        counted(
            report.content_left_out.len(),
            "message",
            "whose text the chat template leaves out",
        ),
        counted(
            report.reasoning_left_out.len(),
            "message",
            "whose reasoning the chat template leaves out",
        ),
        counted(
            report.bare_prompts.len(),
            "prompt",
            "of plain text, without the chat template that `instruction` and `output` go through",
        ),
        counted(report.rendered_texts.len(), "text", RENDERED_TEXTS),
        files_without_records(report),
        held_out(report),
        unused_fields(report).map(|fields| format!("with fields that are not used: {fields}")),
        unknown_roles(report)
            .map(|roles| format!("messages with roles that few templates know: {roles}")),
    ];
    notes.into_iter().flatten().collect()
}

/// What the format has no use for; the first few.
pub fn unused_fields(report: &LoadReport) -> Option<String> {
    let names = &report.unused_fields;
    let name = |name: &String| match name.escape_debug().take(MOST_CHARACTERS).collect::<String>() {
        // pandas' column of row numbers.
        none if none.is_empty() => "one without a name".to_string(),
        name => name,
    };
    let shown: Vec<String> = names.iter().take(MOST_FIELDS).map(name).collect();
    let more = names.len() - shown.len();
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    (!shown.is_empty()).then(|| shown.join(", ") + &more)
}

/// Which roles templates seldom know, and where: ``3 of `Assistant` (from line 7)``; the first few.
pub fn unknown_roles(report: &LoadReport) -> Option<String> {
    let mut roles: Vec<(&String, &RoleUse)> = report.unknown_roles.iter().collect();
    roles.sort_by_key(|(_, found)| found.first_line);
    let words = |(role, found): &(&String, &RoleUse)| {
        let name: String = role.escape_debug().take(MOST_CHARACTERS).collect();
        format!("{} of `{name}` (from {})", found.messages, report.files.line(found.first_line))
    };
    let words: Vec<String> = roles.iter().take(MOST_ROLES).map(words).collect();
    let more = if roles.len() > MOST_ROLES { ", …" } else { "" };
    (!words.is_empty()).then(|| words.join(", ") + more)
}

/// How many documents are longer than the model was trained on.
pub fn beyond_training(trained_length: usize, longer: usize) -> String {
    let most = thousands(trained_length as u64);
    let found = match longer {
        0 => "no document is longer".to_string(),
        1 => "1 document is longer: its later positions are new to the model".to_string(),
        _ => format!("{longer} documents are longer: their later positions are new to the model"),
    };
    format!("the model was trained on up to {most} tokens; {found}")
}

/// A bar over the bytes of data.
pub fn bar() -> ProgressBar {
    progress_bar::over_bytes("reading", 0)
}

/// Shows that `bytes` have been read of `all`.
pub fn show(bar: &ProgressBar, bytes: u64, all: u64) {
    bar.set_length(all);
    bar.set_position(bytes);
}
