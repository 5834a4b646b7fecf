//! Reading data files into documents, and an account of every record.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::batch::Document;
use super::columns::no_table;
use super::encode::{Encoded, Encoder};
use super::files::{DataFiles, in_words};
use super::format::Format;
use super::json_text;
use super::load_report::{LoadReport, Rejected, RoleUse};
use super::options::DataOptions;
use super::record::parse;
use super::rejection::Rejection;
use super::source::{Body, Raw, Source};
use super::truncate::Truncation;
use crate::error::{Error, Result};

/// Records, and bytes of text, that are tokenized at a time.
const BATCH_RECORDS: usize = 2048;
const BATCH_BYTES: usize = 16 << 20;

/// The documents of a file and what became of its records.
#[derive(Debug, Clone, Default)]
pub struct Dataset {
    /// The documents in file order.
    pub documents: Vec<Document>,
    /// Counts.
    pub report: LoadReport,
}

/// Reads, tokenizes and truncates the records of `data`: files, folders and patterns
/// ([`DataFiles::find_all`]). `watch` as that of [`read`].
///
/// # Errors
/// As [`read`].
pub fn load(
    data: &[PathBuf],
    encoder: &Encoder,
    options: &DataOptions,
    watch: impl FnMut(u64, u64),
) -> Result<Dataset> {
    let mut documents = Vec::new();
    let report = read(data, encoder, options, |document| documents.push(document), watch)?;
    Ok(Dataset { documents, report })
}

/// Reads a data set as [`load`] does, but hands each document to `keep`, so that a file may be larger than
/// memory; `watch` hears now and then how many bytes have been read, and how many there are.
///
/// # Errors
/// `Io` when the file cannot be read, `Input` when it has no record or its shape is unknown. Bad
/// records are listed in the report, not raised.
pub fn read(
    data: &[PathBuf],
    encoder: &Encoder,
    options: &DataOptions,
    keep: impl FnMut(Document),
    mut watch: impl FnMut(u64, u64),
) -> Result<LoadReport> {
    if options.max_length < 2 {
        return Err(Error::usage(format_args!("--max-length {}", options.max_length))
            .hint("a document needs two tokens: one to predict the other from"));
    }
    let files = DataFiles::find_all(data)?;
    let report =
        LoadReport { files: files.clone(), format: options.format, ..LoadReport::default() };
    let idle = options.rename_columns.iter().collect();
    let (seen, unused, format) = (HashSet::new(), HashSet::new(), options.format);
    let mut loader = Loader { encoder, options, seen, idle, format, unused, report, keep };
    let (mut lines, mut bytes, all_bytes) = (0, 0, files.bytes());
    for (index, path) in files.paths().enumerate() {
        loader.report.files.begin(index, lines);
        loader.format = options.format;
        let mut source = Source::open(path)?;
        let before = lines;
        loop {
            let mut batch = next_batch(&mut source)?;
            batch.iter_mut().for_each(|raw| raw.line += before);
            let Some(last) = batch.last() else { break };
            lines = last.line;
            loader.take(batch)?;
            watch(bytes + source.bytes_read(), all_bytes);
        }
        bytes += source.bytes_read();
        if lines == before {
            loader.report.empty_files.push(path.to_path_buf());
        }
    }
    if loader.report.records == 0 {
        return Err(Error::input(format_args!("{} has no records", in_words(data))).hint(
            "expected one JSON object in each line, one JSON list of objects, CSV or Parquet",
        ));
    }
    let unread = loader.report.rejected.len() == loader.report.records;
    if let Some(idle @ (old, _)) = loader.idle.first().filter(|_| !unread) {
        let place = in_words(data);
        let what = format_args!("--rename-columns: no record of {place} has a field `{old}`");
        let several = several_in_one(idle);
        return Err(Error::usage(what).hint(several.as_deref().unwrap_or(
            "each is one OLD=NEW, the name in the file first; the flag may be repeated",
        )));
    }
    Ok(loader.report)
}

fn next_batch(source: &mut Source) -> Result<Vec<Raw>> {
    let (mut batch, mut bytes) = (Vec::new(), 0);
    while batch.len() < BATCH_RECORDS
        && bytes < BATCH_BYTES
        && let Some(raw) = source.next()?
    {
        bytes += raw.bytes();
        batch.push(raw);
    }
    Ok(batch)
}

struct Loader<'a, K> {
    encoder: &'a Encoder<'a>,
    options: &'a DataOptions,
    seen: HashSet<u64>,
    /// Fields to be renamed that no record has had, under either name.
    idle: Vec<&'a (String, String)>,
    /// The format of the records of the file at work, once it is known.
    format: Option<Format>,
    /// Fields that are in the report.
    unused: HashSet<String>,
    report: LoadReport,
    keep: K,
}

type Parsed = (usize, std::result::Result<Value, Rejection>);

impl<K: FnMut(Document)> Loader<'_, K> {
    /// Tokenizes a batch in parallel and files the results in order.
    fn take(&mut self, batch: Vec<Raw>) -> Result<()> {
        let read = |body| match body {
            Body::Json(text) => json_text::record(&text).and_then(no_table),
            Body::Fields(fields) => Ok(fields),
        };
        let parse_raw = |raw: Raw| (raw.line, raw.body.and_then(read));
        let mut parsed: Vec<Parsed> = batch.into_par_iter().map(parse_raw).collect();
        self.rename(&mut parsed);
        if self.format.is_none() {
            self.format = self.detect(&parsed)?;
            self.report.add_format(self.format);
        }
        self.note_unused(&parsed);
        let (encoder, format) = (self.encoder, self.format);
        let encode = |record: Value| match format {
            Some(format) => {
                let encoded = encoder.encode(&parse(&record, format)?)?;
                Ok((fingerprint(&encoded.document), encoded))
            }
            None => Err(Rejection::new("record of unknown format")),
        };
        let encoded: Vec<_> =
            parsed.into_par_iter().map(|(line, record)| (line, record.and_then(encode))).collect();
        for (line, result) in encoded {
            self.report.records += 1;
            match result {
                Ok((fingerprint, encoded)) => self.accept(line, fingerprint, encoded),
                Err(rejection) => self.report.rejected.push(Rejected { line, rejection }),
            }
        }
        Ok(())
    }

    fn rename(&mut self, parsed: &mut [Parsed]) {
        let renames = &self.options.rename_columns;
        if renames.is_empty() {
            return;
        }
        let has = |name: &str| {
            parsed.iter().any(|(_, record)| record.as_ref().is_ok_and(|it| it.get(name).is_some()))
        };
        self.idle.retain(|(old, new)| !has(old) && !has(new));
        parsed.par_iter_mut().for_each(|(_, record)| {
            if let Ok(Value::Object(fields)) = record
                && let Err(rejection) = renamed(fields, renames)
            {
                *record = Err(rejection);
            }
        });
    }

    /// Fields that the format has no use for, but for those that were renamed on purpose.
    fn note_unused(&mut self, parsed: &[Parsed]) {
        let Some(format) = self.format else { return };
        let renames = &self.options.rename_columns;
        let records = parsed.iter().filter_map(|(_, record)| record.as_ref().ok()?.as_object());
        for (name, value) in records.flatten() {
            let known = self.unused.contains(name) || format.is_read(name);
            if !known && !is_nothing(value) && renames.iter().all(|(_, new)| new != name) {
                self.unused.insert(name.clone());
                self.report.unused_fields.push(name.clone());
            }
        }
    }

    /// The format of the first record that is JSON; none if there is no such record.
    fn detect(&self, parsed: &[Parsed]) -> Result<Option<Format>> {
        let mut records =
            parsed.iter().filter_map(|(line, record)| Some((line, record.as_ref().ok()?)));
        let Some((line, record)) = records.next() else { return Ok(None) };
        let found = Format::detect(record).map_err(|rejection| {
            let place = self.report.files.place(*line);
            let idle = self.idle.first().map_or(String::new(), |(old, _)| {
                format!("; `--rename-columns` finds no field `{old}`")
            });
            let error = Error::input(format_args!("{place}: {}{idle}", rejection.reason));
            let several = self.idle.first().and_then(|idle| several_in_one(idle));
            match several.or(rejection.hint) {
                Some(hint) => error.hint(hint),
                None => error,
            }
        });
        found.map(Some)
    }

    fn accept(&mut self, line: usize, fingerprint: u64, encoded: Encoded) {
        let document = Document { line, ..encoded.document };
        let report = &mut self.report;
        if !document.input_ids.is_empty() && !self.seen.insert(fingerprint) {
            report.duplicates.push(line);
        }
        if encoded.double_bos {
            report.double_bos.push(line);
        }
        if encoded.bare_prompt {
            report.bare_prompts.push(line);
        }
        if encoded.rendered_text {
            report.rendered_texts.push(line);
        }
        let counted = [
            (encoded.content_left_out, &mut report.content_left_out),
            (encoded.reasoning_left_out, &mut report.reasoning_left_out),
            (encoded.empty_answers, &mut report.empty_answers),
        ];
        for (count, lines) in counted {
            lines.extend(std::iter::repeat_n(line, count));
        }
        for role in encoded.unknown_roles {
            let first = RoleUse { messages: 0, first_line: line };
            report.unknown_roles.entry(role).or_insert(first).messages += 1;
        }
        if document.num_targets() == 0 {
            report.without_targets.push(line);
            return;
        }
        let (length, max_length) = (document.input_ids.len(), self.options.max_length);
        report.lengths.push(length as u32);
        let before = report.documents;
        if length <= max_length {
            self.keep(document);
        } else {
            report.too_long.push(line);
            self.truncate(&document);
        }
        if encoded.untrained_eos && self.report.documents > before {
            self.report.untrained_eos.push(line);
        }
    }

    fn truncate(&mut self, document: &Document) {
        let (length, how) = (document.input_ids.len(), self.options.truncation);
        let before = (self.report.documents, self.report.tokens);
        let parts = how.parts(length, self.options.max_length);
        let cut = document.cut_answers(&parts, |id| self.encoder.ends_turn(id));
        self.report.cut_answers.extend(std::iter::repeat_n(document.line, cut));
        for range in parts {
            let part = document.part(range);
            if part.num_targets() > 0 {
                self.keep(part);
            }
        }
        if how != Truncation::Error {
            self.report.tokens_removed += length - (self.report.tokens - before.1);
        }
        // Everything that was trained has been cut off.
        if !matches!(how, Truncation::Error | Truncation::Drop) && self.report.documents == before.0
        {
            self.report.without_targets.push(document.line);
        }
    }

    fn keep(&mut self, document: Document) {
        self.report.documents += 1;
        self.report.tokens += document.input_ids.len();
        self.report.targets += document.num_targets();
        (self.keep)(document);
    }
}

/// The way out where several pairs were given as one, which begins with a name like `a=b,c`.
fn several_in_one((old, new): &(String, String)) -> Option<String> {
    let pairs = format!("{old}={new}");
    let pairs: Vec<&str> = pairs.split(',').map(str::trim).collect();
    let several = pairs.len() > 1 && pairs.iter().all(|pair| pair.contains('='));
    let flags: Vec<String> = pairs.iter().map(|pair| format!("--rename-columns {pair}")).collect();
    several.then(|| format!("the flag is given once for each field: `{}`", flags.join(" ")))
}

/// Gives fields other names, all at once: two may change places.
fn renamed(
    fields: &mut Map<String, Value>,
    renames: &[(String, String)],
) -> std::result::Result<(), Rejection> {
    let taken: Vec<(&String, Value)> =
        renames.iter().filter_map(|(from, to)| Some((to, fields.shift_remove(from)?))).collect();
    for (to, value) in taken {
        let there = fields.get(to).filter(|there| !is_nothing(there));
        match there {
            None => drop(fields.insert(to.clone(), value)),
            Some(_) if is_nothing(&value) => {}
            Some(_) => {
                let what = format!("`--rename-columns`: the record has a field `{to}` already");
                let hint = format!("rename that, too: `{to}=other_{to}`");
                return Err(Rejection::new(what).hint(hint));
            }
        }
    }
    Ok(())
}

/// Null, or an empty cell of a table.
fn is_nothing(value: &Value) -> bool {
    value.is_null() || value == ""
}

fn fingerprint(document: &Document) -> u64 {
    let mut hasher = DefaultHasher::new();
    document.input_ids.hash(&mut hasher);
    document.labels.hash(&mut hasher);
    hasher.finish()
}
