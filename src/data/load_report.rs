//! What became of the records of a data set.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use super::files::{DataFiles, in_words};
use super::format::Format;
use super::options::{BadRecords, DataOptions};
use super::rejection::Rejection;
use super::truncate::Truncation;
use crate::error::{Error, Result};
use crate::plural::noun;

/// What became of the records. Lines are those that a record begins on; they are counted on from file
/// to file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct LoadReport {
    /// The files of the data set.
    pub files: DataFiles,
    /// Those of several that have no record.
    pub empty_files: Vec<PathBuf>,
    /// Shape of the records.
    pub format: Option<Format>,
    /// The formats of files that have another one.
    pub other_formats: Vec<Format>,
    /// How many there are, blank lines left out.
    pub records: usize,
    /// Records that could not be used.
    pub rejected: Vec<Rejected>,
    /// Length in tokens of every accepted document, before truncation.
    #[serde(skip)]
    pub lengths: Vec<u32>,
    /// Lines of documents longer than the maximum.
    pub too_long: Vec<usize>,
    /// Tokens that truncation removed.
    pub tokens_removed: usize,
    /// Lines without a token to train on (left out).
    pub without_targets: Vec<usize>,
    /// Lines with an answer whose end-of-sequence is not trained, if anything of them is.
    pub untrained_eos: Vec<usize>,
    /// The line of each answer that lost its end by truncation.
    pub cut_answers: Vec<usize>,
    /// Lines that begin with two beginning-of-sequence tokens.
    pub double_bos: Vec<usize>,
    /// The line of each message to the assistant whose text the chat template leaves out.
    pub content_left_out: Vec<usize>,
    /// The line of each message whose reasoning it leaves out.
    pub reasoning_left_out: Vec<usize>,
    /// The line of each answer that is trained and empty.
    pub empty_answers: Vec<usize>,
    /// Lines whose prompt is plain text, beside a chat template that is not applied to it.
    pub bare_prompts: Vec<usize>,
    /// Lines of plain text that a chat template rendered, all of which is trained.
    pub rendered_texts: Vec<usize>,
    /// Messages of roles that templates seldom know.
    pub unknown_roles: BTreeMap<String, RoleUse>,
    /// Fields that the format has no use for, in the order in which they came.
    pub unused_fields: Vec<String>,
    /// Lines that repeat an earlier record.
    pub duplicates: Vec<usize>,
    /// Documents that are left to train on.
    pub documents: usize,
    /// Tokens of the documents.
    pub tokens: usize,
    /// Tokens that are trained.
    pub targets: usize,
}

/// How many messages have a role, and where the first is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RoleUse {
    /// Messages that have it.
    pub messages: usize,
    /// Line of the first.
    pub first_line: usize,
}

/// A record that could not be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Rejected {
    /// Line that it begins on.
    pub line: usize,
    /// Why.
    #[serde(flatten)]
    pub rejection: Rejection,
}

impl LoadReport {
    /// What a file's records are.
    pub(super) fn add_format(&mut self, format: Option<Format>) {
        match (format, self.format) {
            (_, None) => self.format = format,
            (Some(new), Some(first)) if new != first && !self.other_formats.contains(&new) => {
                self.other_formats.push(new);
            }
            _ => {}
        }
    }

    /// The formats, for people.
    pub fn formats(&self) -> String {
        let names = self.format.iter().chain(&self.other_formats).map(|format| format.name());
        let names: Vec<String> = names.collect();
        if names.is_empty() { "unknown".to_string() } else { names.join(", ") }
    }

    /// Fails on the first thing that a training run should not pass over.
    ///
    /// # Errors
    /// `Input` for a rejected record that is not to be skipped, or where all are rejected, a document that
    /// is too long under `--truncation error`, or data without a token to train on.
    pub fn check(&self, data: &[PathBuf], options: &DataOptions) -> Result<()> {
        let at = |line: usize| self.files.place(line);
        let refuses =
            options.bad_records == BadRecords::Error || self.rejected.len() == self.records;
        if let Some(Rejected { line, rejection }) = self.rejected.first().filter(|_| refuses) {
            let more = match self.rejected.len() - 1 {
                0 => String::new(),
                more => format!(" (and {more} more bad {})", noun(more, "record")),
            };
            let error = Error::input(format_args!("{}: {}{more}", at(*line), rejection.reason));
            return Err(match &rejection.hint {
                Some(hint) => error.hint(hint),
                None => error,
            });
        }
        if options.truncation == Truncation::Error && !self.too_long.is_empty() {
            let longest = self.lengths.iter().max().copied().unwrap_or(0);
            let (place, most) = (at(self.too_long[0]), options.max_length);
            let (count, all) = (self.too_long.len(), self.lengths.len());
            let verb = if count == 1 { "is" } else { "are" };
            let way = match options.positions {
                Some(positions) if positions < longest as usize => {
                    format!("the model has {positions} positions: choose")
                }
                _ => format!("raise `--max-length` to {longest}, or choose"),
            };
            return Err(Error::input(format_args!(
                "{place}: document is longer than {most} tokens ({count} of {all} {verb}, \
                 the longest has {longest})"
            ))
            .hint(format_args!("{way} `--truncation drop`, `right`, `left` or `split`")));
        }
        if self.documents == 0 {
            let place = in_words(data);
            let error = Error::input(format_args!("{place}: no record has a token to train on"));
            if self.too_long.is_empty() {
                let hint = "see `nibble data --show 3`: which tokens does `--train-on` leave?";
                return Err(error.hint(hint));
            }
            let longest = self.lengths.iter().max().copied().unwrap_or(0);
            let (count, most) = (self.too_long.len(), options.max_length);
            let verb = if count == 1 { "is" } else { "are" };
            return Err(error.hint(format_args!(
                "{count} {} {verb} longer than `--max-length {most}` and lost them by truncation; \
                 the longest has {longest} tokens",
                noun(count, "record")
            )));
        }
        Ok(())
    }
}
