//! Reading a data file: JSONL line by line, or one JSON array.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use clap::ValueEnum;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::batch::{Document, MASKED};
use super::encode::{Encoder, TrainOn};
use super::record::{Format, Rejection, parse};
use crate::error::{Error, Result};

/// Lines that are tokenized at a time.
const LINES_PER_BATCH: usize = 2048;

/// What to do with a document that is longer than the maximum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Truncation {
    /// Stop and say how many there are
    Error,
    /// Leave the document out
    Drop,
    /// Keep the beginning
    Right,
    /// Keep the end
    Left,
    /// Cut it into several documents
    Split,
}

/// How to read a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataOptions {
    /// Shape of the records; found from the first one if absent.
    pub format: Option<Format>,
    /// Which tokens are trained.
    pub train_on: TrainOn,
    /// What happens to long documents.
    pub truncation: Truncation,
    /// Longest document in tokens.
    pub max_length: usize,
}

/// The documents of a file and what became of its records.
#[derive(Debug, Clone, Default)]
pub struct Dataset {
    /// In file order.
    pub documents: Vec<Document>,
    /// Counts.
    pub report: LoadReport,
}

/// What became of the records of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct LoadReport {
    /// Shape of the records.
    pub format: Option<Format>,
    /// Records in the file, blank lines left out.
    pub records: usize,
    /// Records that could not be used: line and reason.
    pub rejected: Vec<(usize, Rejection)>,
    /// Documents longer than the maximum.
    pub too_long: usize,
    /// Tokens that truncation removed.
    pub tokens_removed: usize,
    /// Lines without a token to train on (left out).
    pub without_targets: Vec<usize>,
    /// Lines with an answer whose end-of-sequence is not trained.
    pub untrained_eos: Vec<usize>,
    /// Lines that repeat an earlier record.
    pub duplicates: Vec<usize>,
    /// Length of every accepted document, before truncation.
    pub lengths: Vec<usize>,
}

/// Reads, tokenizes and truncates the records of `path`.
///
/// # Errors
/// `Io` when the file cannot be read, `Input` when it has no record or its shape is unknown. Bad
/// records are listed in the report, not raised.
pub fn load(path: &Path, encoder: &Encoder, options: &DataOptions) -> Result<Dataset> {
    let mut loader = Loader {
        path,
        encoder,
        options,
        format: options.format,
        seen: HashSet::new(),
        dataset: Dataset::default(),
    };
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let is_array = starts_with_bracket(&mut reader).map_err(|e| Error::io("read", path, e))?;
    if is_array {
        loader.read_array(reader)?;
    } else {
        loader.read_lines(reader)?;
    }
    loader.dataset.report.format = loader.format;
    if loader.dataset.report.records == 0 {
        return Err(Error::input(format_args!("{} has no records", path.display()))
            .hint("expected one JSON object in each line, or one JSON list of objects"));
    }
    Ok(loader.dataset)
}

impl Dataset {
    /// Fails on the first thing that a training run should not pass over.
    ///
    /// # Errors
    /// `Input` for a rejected record, a document that is too long under `--truncation error`, or
    /// data without a token to train on.
    pub fn check(&self, path: &Path, options: &DataOptions) -> Result<()> {
        let report = &self.report;
        if let Some((line, rejection)) = report.rejected.first() {
            let more = match report.rejected.len() - 1 {
                0 => String::new(),
                more => format!(" (and {more} more bad records)"),
            };
            let place = path.display();
            let error = Error::input(format_args!("{place}:{line}: {}{more}", rejection.reason));
            let general = "`nibble data` lists every bad record of the file";
            return Err(error.hint(rejection.hint.as_deref().unwrap_or(general)));
        }
        if options.truncation == Truncation::Error && report.too_long > 0 {
            let longest = report.lengths.iter().max().copied().unwrap_or(0);
            return Err(Error::input(format_args!(
                "{}: {} of {} documents are longer than {} tokens (longest: {longest})",
                path.display(),
                report.too_long,
                report.lengths.len(),
                options.max_length
            ))
            .hint(format_args!(
                "raise `--max-length` to {longest}, or choose `--truncation drop`, `right`, `left` \
                 or `split`"
            )));
        }
        if self.documents.is_empty() {
            return Err(Error::input(format_args!(
                "{}: no record has a token to train on",
                path.display()
            ))
            .hint("see `nibble data --show 3`: which tokens does `--train-on` leave?"));
        }
        Ok(())
    }
}

struct Loader<'a> {
    path: &'a Path,
    encoder: &'a Encoder<'a>,
    options: &'a DataOptions,
    format: Option<Format>,
    seen: HashSet<u64>,
    dataset: Dataset,
}

impl Loader<'_> {
    fn read_lines(&mut self, mut reader: impl BufRead) -> Result<()> {
        let (mut batch, mut number) = (Vec::new(), 0);
        loop {
            let mut line = Vec::new();
            let count = reader.read_until(b'\n', &mut line);
            if count.map_err(|e| Error::io("read", self.path, e))? == 0 {
                break;
            }
            number += 1;
            if line.trim_ascii().is_empty() {
                continue;
            }
            batch.push((number, line));
            if batch.len() == LINES_PER_BATCH {
                self.take(std::mem::take(&mut batch), parse_line)?;
            }
        }
        self.take(batch, parse_line)
    }

    fn read_array(&mut self, reader: impl BufRead) -> Result<()> {
        let records: Vec<Value> = serde_json::from_reader(reader).map_err(|e| {
            Error::input(format_args!("{}: not a JSON list: {e}", self.path.display()))
        })?;
        let numbered = records.into_iter().enumerate().map(|(i, record)| (i + 1, record)).collect();
        self.take(numbered, |record: Value| Ok(record))
    }

    /// Tokenizes a batch in parallel and files the results in order.
    fn take<T: Send>(
        &mut self,
        batch: Vec<(usize, T)>,
        read: impl Fn(T) -> std::result::Result<Value, Rejection> + Sync,
    ) -> Result<()> {
        let parsed: Vec<_> = batch.into_par_iter().map(|(line, raw)| (line, read(raw))).collect();
        if self.format.is_none() {
            self.format = Some(self.detect(&parsed)?);
        }
        let format = self.format.unwrap_or(Format::Text);
        let encoder = self.encoder;
        let encoded: Vec<_> = parsed
            .into_par_iter()
            .map(|(line, record)| {
                let encode = |record: Value| encoder.encode(&parse(&record, format)?);
                (line, record.and_then(encode))
            })
            .collect();
        for (line, result) in encoded {
            self.dataset.report.records += 1;
            match result {
                Ok(encoded) => {
                    if encoded.untrained_eos {
                        self.dataset.report.untrained_eos.push(line);
                    }
                    self.accept(Document { line, ..encoded.document });
                }
                Err(rejection) => self.dataset.report.rejected.push((line, rejection)),
            }
        }
        Ok(())
    }

    fn detect(&self, parsed: &[(usize, std::result::Result<Value, Rejection>)]) -> Result<Format> {
        let Some((line, record)) =
            parsed.iter().find_map(|(line, record)| Some((line, record.as_ref().ok()?)))
        else {
            // Nothing parses: every line is reported as rejected.
            return Ok(Format::Text);
        };
        Format::detect(record).map_err(|rejection| {
            let place = format!("{}:{line}", self.path.display());
            let error = Error::input(format_args!("{place}: {}", rejection.reason));
            match rejection.hint {
                Some(hint) => error.hint(hint),
                None => error,
            }
        })
    }

    fn accept(&mut self, document: Document) {
        let report = &mut self.dataset.report;
        if !self.seen.insert(fingerprint(&document)) {
            report.duplicates.push(document.line);
        }
        if document.num_targets() == 0 {
            report.without_targets.push(document.line);
            return;
        }
        let (length, max_length) = (document.input_ids.len(), self.options.max_length);
        report.lengths.push(length);
        if length <= max_length {
            self.dataset.documents.push(document);
            return;
        }
        report.too_long += 1;
        match self.options.truncation {
            Truncation::Error => {}
            Truncation::Drop => report.tokens_removed += length,
            Truncation::Right => {
                report.tokens_removed += length - max_length;
                self.keep(&document, 0..max_length);
            }
            Truncation::Left => {
                report.tokens_removed += length - max_length;
                self.keep(&document, length - max_length..length);
            }
            Truncation::Split => {
                for begin in (0..length).step_by(max_length) {
                    self.keep(&document, begin..(begin + max_length).min(length));
                }
            }
        }
    }

    /// Keeps a part of a document if it still has something to train on.
    fn keep(&mut self, document: &Document, range: std::ops::Range<usize>) {
        let part = Document {
            input_ids: document.input_ids[range.clone()].to_vec(),
            labels: document.labels[range].to_vec(),
            line: document.line,
        };
        if part.num_targets() > 0 {
            self.dataset.documents.push(part);
        } else if self.dataset.report.without_targets.last() != Some(&document.line) {
            self.dataset.report.without_targets.push(document.line);
        }
    }
}

fn parse_line(line: Vec<u8>) -> std::result::Result<Value, Rejection> {
    let text = std::str::from_utf8(&line).map_err(|e| Rejection::new(format!("not UTF-8: {e}")))?;
    serde_json::from_str(text).map_err(|e| Rejection::new(format!("not valid JSON: {e}")))
}

fn starts_with_bracket(reader: &mut impl BufRead) -> std::io::Result<bool> {
    loop {
        let buffer = reader.fill_buf()?;
        let Some(&first) = buffer.first() else { return Ok(false) };
        if !first.is_ascii_whitespace() {
            return Ok(first == b'[');
        }
        reader.consume(1);
    }
}

fn fingerprint(document: &Document) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    document.input_ids.hash(&mut hasher);
    document.labels.iter().map(|&label| label == MASKED).for_each(|m| m.hash(&mut hasher));
    hasher.finish()
}
