//! Rows of CSV and Parquet files as objects.
//!
//! CSV needs a header; its cells are texts. Parquet may be nested, so that lists of messages are read;
//! its pages may be plain or Snappy, as pandas and Hugging Face data sets write them.

use std::cell::Cell;
use std::fs::File;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::rc::Rc;
use std::sync::Once;

use csv::{ByteRecord, Reader, ReaderBuilder};
use parquet::errors::ParquetError;
use parquet::file::reader::FileReader;
use parquet::file::serialized_reader::SerializedFileReader;
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use serde_json::{Map, Value, json};

use super::super::rejection::Rejection;
use super::packed::{Text, refused};
use super::quotes::QuoteReader;
use super::{Body, MAX_RECORD_BYTES, Raw};
use crate::error::{Error, Result};
use crate::plural::noun;

pub(super) struct CsvSource<'a> {
    path: &'a Path,
    reader: Reader<QuoteReader<Text>>,
    columns: Vec<String>,
    row: ByteRecord,
    bytes_read: Rc<Cell<u64>>,
}

impl<'a> CsvSource<'a> {
    pub fn open(path: &'a Path, delimiter: u8) -> Result<Self> {
        let text = Text::open(path)?;
        let bytes_read = text.counter();
        let mut builder = ReaderBuilder::new();
        let text = QuoteReader::new(text, delimiter);
        let mut reader = builder.delimiter(delimiter).flexible(true).from_reader(text);
        let header = reader.byte_headers().map_err(|e| damaged(path, e))?;
        let columns = header.iter().map(|name| String::from_utf8_lossy(name).into_owned());
        let columns = columns.map(|name| name.trim_start_matches('\u{feff}').to_string()).collect();
        let source = CsvSource { path, reader, columns, row: ByteRecord::new(), bytes_read };
        source.check_quotes()?;
        let mut names = std::collections::HashSet::new();
        if let Some(name) =
            source.columns.iter().find(|name| !name.is_empty() && !names.insert(name.as_str()))
        {
            let what = format_args!("{}: two columns are named `{name}`", path.display());
            return Err(Error::input(what).hint("give each column a name of its own"));
        }
        Ok(source)
    }

    pub fn next(&mut self) -> Result<Option<Raw>> {
        let read = self.reader.read_byte_record(&mut self.row);
        let is_row = read.map_err(|e| damaged(self.path, e))?;
        self.check_quotes()?;
        if !is_row {
            return Ok(None);
        }
        // The position is that before blank lines; count back from the row's end to skip them.
        let before = self.row.position().map_or(0, csv::Position::line);
        let breaks = self.row.as_slice().iter().filter(|&&byte| byte == b'\n').count() as u64;
        let own = breaks + u64::from(!self.reader.get_ref().rows_end_in_returns());
        let line = before.max(self.reader.position().line().saturating_sub(own)) as usize;
        Ok(Some(Raw { line, body: self.fields().map(Body::Fields) }))
    }

    fn check_quotes(&self) -> Result<()> {
        if let Some(line) = self.reader.get_ref().endless() {
            let (path, most) = (self.path.display(), MAX_RECORD_BYTES >> 20);
            let what = format_args!("{path}:{line}: the row has more than {most} MiB");
            return Err(Error::input(what).hint("is there a line break after each row?"));
        }
        let Some(line) = self.reader.get_ref().unclosed() else { return Ok(()) };
        let path = self.path.display();
        Err(Error::input(format_args!(
            "{path}:{line}: the quotes that begin in this line are not closed"
        ))
        .hint("a cell in quotes ends in a quote; one inside of it is written twice: `\"\"`"))
    }

    fn fields(&self) -> std::result::Result<Value, Rejection> {
        let (cells, columns) = (self.row.len(), self.columns.len());
        if cells != columns {
            let what = format!("row has {cells} {}, the header {columns}", noun(cells, "cell"));
            return Err(Rejection::new(what)
                .hint("cells that hold commas, quotes or line breaks stand in double quotes"));
        }
        let mut fields = Map::new();
        for (column, cell) in self.columns.iter().zip(&self.row) {
            let text = std::str::from_utf8(cell).map_err(|e| {
                let byte = e.valid_up_to() + 1;
                Rejection::new(format!("field `{column}` is not UTF-8 at byte {byte}"))
                    .hint("save the file as UTF-8")
            })?;
            fields.insert(column.clone(), text.into());
        }
        Ok(Value::Object(fields))
    }

    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.get()
    }
}

fn damaged(path: &Path, error: csv::Error) -> Error {
    let text = error.to_string();
    match error.into_kind() {
        csv::ErrorKind::Io(error) => refused(path, error),
        _ => Error::input(format_args!("{}: {text}", path.display())),
    }
}

pub(super) struct ParquetSource<'a> {
    path: &'a Path,
    rows: RowIter<'static>,
    count: u64,
    row: usize,
    bytes: u64,
}

impl<'a> ParquetSource<'a> {
    pub fn open(path: &'a Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        let bytes = file.metadata().map_or(0, |metadata| metadata.len());
        let (rows, count) = guarded(path, || {
            let reader = SerializedFileReader::new(file)?;
            let count = reader.metadata().file_metadata().num_rows().max(0) as u64;
            Ok((reader.into_iter(), count))
        })?;
        Ok(ParquetSource { path, rows, count, row: 0, bytes })
    }

    pub fn next(&mut self) -> Result<Option<Raw>> {
        let rows = &mut self.rows;
        let next = || rows.next().map(|row| Ok(object(&row?))).transpose();
        let Some(fields) = guarded(self.path, next)? else { return Ok(None) };
        self.row += 1;
        Ok(Some(Raw { line: self.row, body: Ok(Body::Fields(fields)) }))
    }

    /// Bytes that have been read, in proportion to the rows.
    pub fn bytes_read(&self) -> u64 {
        self.bytes * self.row as u64 / self.count.max(1)
    }
}

fn object(row: &Row) -> Value {
    row.get_column_iter().map(|(name, field)| (name.clone(), json(field))).collect()
}

/// Bytes that nobody says are text are text if they can be, as some writers leave the note out; else they are
/// no value that a record has a use for.
fn json(field: &Field) -> Value {
    match field {
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.into(),
            Err(_) => json!({"bytes": bytes.data().len()}),
        },
        Field::Group(row) => object(row),
        Field::ListInternal(list) => list.elements().iter().map(json).collect(),
        other => other.to_json_value(),
    }
}

/// What `act` returns; its panics are errors too, since the crate has assertions on what files hold.
fn guarded<T>(
    path: &Path,
    act: impl FnOnce() -> std::result::Result<T, ParquetError>,
) -> Result<T> {
    QUIET_PANICS.call_once(|| {
        let hook = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !GUARDED.get() {
                hook(info);
            }
        }));
    });
    GUARDED.set(true);
    let done = panic::catch_unwind(AssertUnwindSafe(act));
    GUARDED.set(false);
    let hint = "write it again; pages may be plain, or compressed by snappy, zstd, gzip or lz4";
    match done {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Error::input(format_args!("{}: {error}", path.display())).hint(hint)),
        Err(_) => {
            let what = format!("{}: the Parquet file is damaged", path.display());
            Err(Error::input(what).hint(hint))
        }
    }
}

static QUIET_PANICS: Once = Once::new();

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn csv(text: &[u8]) -> Vec<(usize, std::result::Result<Value, String>)> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let mut source = CsvSource::open(file.path(), b',').unwrap();
        let mut rows = Vec::new();
        while let Some(raw) = source.next().unwrap() {
            rows.push((
                raw.line,
                match raw.body {
                    Ok(Body::Fields(fields)) => Ok(fields),
                    Ok(Body::Json(text)) => panic!("{text} out of a CSV file"),
                    Err(rejection) => Err(rejection.reason),
                },
            ));
        }
        assert_eq!(source.bytes_read(), text.len() as u64);
        rows
    }

    #[test]
    fn columns_have_names_of_their_own() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "text,,,text\na,,,b\n").unwrap();
        let error = CsvSource::open(file.path(), b',').err().unwrap().to_string();
        assert!(error.contains("two columns are named `text`"), "{error}");
        assert_eq!(csv(b"text,,\na,,\n")[0].1.as_ref().unwrap()["text"], "a");
    }

    #[test]
    fn cells_may_hold_anything_in_quotes() {
        let text = b"\xef\xbb\xbfprompt,completion\na,\"b, \"\"c\"\"\nd\"\n\n1,\ne\nf,\xff\n";
        let expected = [
            (2, Ok(json!({"prompt": "a", "completion": "b, \"c\"\nd"}))),
            (5, Ok(json!({"prompt": "1", "completion": ""}))),
            (6, Err("row has 1 cell, the header 2".to_string())),
            (7, Err("field `completion` is not UTF-8 at byte 1".to_string())),
        ];
        assert_eq!(csv(text), expected);
        assert!(csv(b"prompt,completion\n").is_empty());
    }
}
