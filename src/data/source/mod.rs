//! Records of a data file, one at a time: the file may be larger than memory.
//!
//! Parquet is known by its first bytes, CSV by its name (`.csv`, `.tsv`); all else is JSON. Text may be
//! packed by gzip or Zstandard.

mod json;
mod packed;
mod quotes;
mod table;

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use serde_json::Value;

use super::files::{ARROW, unpacked_ending};
use super::rejection::Rejection;
use crate::error::{Error, Result};
use json::JsonSource;
use table::{CsvSource, ParquetSource};

/// Longest record. One that never ends (a binary file, a forgotten line break) must not fill memory.
const MAX_RECORD_BYTES: usize = 64 << 20;

/// A record as it stands in the file.
#[derive(Debug, PartialEq)]
pub struct Raw {
    /// Line on which it begins, from 1; in Parquet files, and lists with several on their first line, which
    /// record it is.
    pub line: usize,
    /// What it is, or why it is nothing.
    pub body: std::result::Result<Body, Rejection>,
}

/// What a record is.
#[derive(Debug, PartialEq)]
pub enum Body {
    /// Text that should be JSON.
    Json(String),
    /// Fields by the names of their columns.
    Fields(Value),
}

/// A data file that is being read.
pub struct Source<'a>(Kind<'a>);

enum Kind<'a> {
    Json(JsonSource<'a>),
    Csv(Box<CsvSource<'a>>),
    Parquet(ParquetSource<'a>),
}

impl<'a> Source<'a> {
    /// Opens `path` and finds out what it is.
    ///
    /// # Errors
    /// `Io` when it cannot be read, `Input` when it is something else than data.
    pub fn open(path: &'a Path) -> Result<Self> {
        let kind = match unpacked_ending(path).as_str() {
            "arrow" => {
                let what = format_args!("{} is an Arrow file", path.display());
                return Err(Error::input(what).hint(ARROW));
            }
            "csv" => Kind::Csv(Box::new(CsvSource::open(path, b',')?)),
            "tsv" => Kind::Csv(Box::new(CsvSource::open(path, b'\t')?)),
            _ if is_parquet(path)? => Kind::Parquet(ParquetSource::open(path)?),
            _ => Kind::Json(JsonSource::open(path)?),
        };
        Ok(Source(kind))
    }

    /// The next record; blank lines are none.
    ///
    /// # Errors
    /// `Io` when reading fails, `Input` when the file is damaged so that nothing after can be read.
    pub fn next(&mut self) -> Result<Option<Raw>> {
        match &mut self.0 {
            Kind::Json(source) => source.next(),
            Kind::Csv(source) => source.next(),
            Kind::Parquet(source) => source.next(),
        }
    }

    /// Bytes of the file that have been read.
    pub fn bytes_read(&self) -> u64 {
        match &self.0 {
            Kind::Json(source) => source.bytes_read(),
            Kind::Csv(source) => source.bytes_read(),
            Kind::Parquet(source) => source.bytes_read(),
        }
    }
}

impl Raw {
    /// Roughly how much text it is.
    pub fn bytes(&self) -> usize {
        match &self.body {
            Ok(Body::Json(text)) => text.len(),
            Ok(Body::Fields(fields)) => {
                let cells = fields.as_object().into_iter().flatten();
                cells.map(|(_, cell)| cell.as_str().map_or(64, str::len)).sum()
            }
            Err(_) => 0,
        }
    }
}

fn is_parquet(path: &Path) -> Result<bool> {
    let mut file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    // Looking into a pipe would take its first bytes.
    if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return Ok(false);
    }
    let mut magic = [0; 4];
    match file.read_exact(&mut magic) {
        Ok(()) => Ok(&magic == b"PAR1"),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(Error::io("read", path, error)),
    }
}
