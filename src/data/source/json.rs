//! Lines of JSONL, or elements of a JSON list, one at a time.
//!
//! The file is streamed, so a pipe will do. A list is cut into its elements by brackets and quotes
//! alone: an element that is no valid JSON spoils only itself.

use std::cell::Cell;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::Path;
use std::rc::Rc;

use super::super::rejection::Rejection;
use super::packed::{Text, is_packed, refused};
use super::{Body, MAX_RECORD_BYTES, Raw};
use crate::error::{Error, Result};

/// A JSON file that is being read.
pub(super) struct JsonSource<'a> {
    path: &'a Path,
    reader: BufReader<Text>,
    layout: Layout,
    /// Line of the next byte, from 1.
    line: usize,
    /// Elements of a list so far, while all of them began on its first line.
    on_first_line: Option<usize>,
    bytes_read: Rc<Cell<u64>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    Lines,
    List,
    Ended,
}

impl<'a> JsonSource<'a> {
    /// Opens `path` and finds out which of the two it is.
    ///
    /// # Errors
    /// `Io` when it cannot be read, `Input` when it is something else than JSON.
    pub fn open(path: &'a Path) -> Result<Self> {
        let text = Text::open(path)?;
        let bytes_read = text.counter();
        let reader = BufReader::with_capacity(1 << 20, text);
        let mut source = JsonSource {
            path,
            reader,
            layout: Layout::Lines,
            line: 1,
            on_first_line: Some(0),
            bytes_read,
        };
        let begin = source.peek()?;
        let byte_order_mark = begin.starts_with(b"\xef\xbb\xbf");
        refuse_foreign(begin, path)?;
        if byte_order_mark {
            source.consume(3);
        }
        source.skip_space()?;
        if source.peek()?.first() == Some(&b'[') {
            source.consume(1);
            source.layout = Layout::List;
        }
        Ok(source)
    }

    /// The next record; blank lines are none.
    ///
    /// # Errors
    /// `Io` when reading fails, `Input` when a list ends too early or goes on after its end.
    pub fn next(&mut self) -> Result<Option<Raw>> {
        match self.layout {
            Layout::Lines => self.next_line(),
            Layout::List => self.next_element(),
            Layout::Ended => Ok(None),
        }
    }

    fn next_line(&mut self) -> Result<Option<Raw>> {
        self.skip_space()?;
        let (line, mut text) = (self.line, Bounded::default());
        loop {
            let buffer = fill(&mut self.reader, self.path)?;
            if buffer.is_empty() {
                break;
            }
            let end = buffer.iter().position(|&byte| byte == b'\n');
            text.extend(&buffer[..end.unwrap_or(buffer.len())]);
            let used = end.unwrap_or(buffer.len() - 1) + 1;
            self.consume(used);
            if end.is_some() {
                self.line += 1;
                break;
            }
        }
        Ok((text.length > 0).then(|| Raw { line, body: text.finish() }))
    }

    fn next_element(&mut self) -> Result<Option<Raw>> {
        self.skip_space()?;
        if self.peek()?.first() == Some(&b']') {
            self.consume(1);
            self.skip_space()?;
            if !self.peek()?.is_empty() {
                return Err(self.broken_list("something follows the end of the JSON list"));
            }
            self.layout = Layout::Ended;
            return Ok(None);
        }
        let (line, mut text, mut scan) = (self.place(), Bounded::default(), Scan::default());
        loop {
            let buffer = fill(&mut self.reader, self.path)?;
            if buffer.is_empty() {
                let what = "the JSON list is not closed: the file may be cut off";
                let error = Error::input(format_args!("{}:{line}: {what}", self.path.display()));
                return Err(error.hint("get the file again, or write one object a line"));
            }
            let end = buffer.iter().position(|&byte| scan.ends_before(byte));
            let part = &buffer[..end.unwrap_or(buffer.len())];
            text.extend(part);
            self.line += part.iter().filter(|&&byte| byte == b'\n').count();
            let comma = end.is_some_and(|end| buffer[end] == b',');
            let used = part.len() + usize::from(comma);
            self.consume(used);
            if end.is_some() {
                return Ok(Some(Raw { line, body: text.finish() }));
            }
        }
    }

    /// The line of the element that begins here; which element it is, where all stand on one line.
    fn place(&mut self) -> usize {
        self.on_first_line = self.on_first_line.filter(|before| self.line == 1 || *before > 1);
        match &mut self.on_first_line {
            Some(before) => {
                *before += 1;
                *before
            }
            None => self.line,
        }
    }

    fn skip_space(&mut self) -> Result<()> {
        loop {
            let buffer = fill(&mut self.reader, self.path)?;
            let blank = buffer.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            let more = blank > 0 && blank == buffer.len();
            self.line += buffer[..blank].iter().filter(|&&byte| byte == b'\n').count();
            self.consume(blank);
            if !more {
                return Ok(());
            }
        }
    }

    /// Bytes of the file that have been read.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.get()
    }

    fn consume(&mut self, bytes: usize) {
        self.reader.consume(bytes);
    }

    fn peek(&mut self) -> Result<&[u8]> {
        fill(&mut self.reader, self.path)
    }

    fn broken_list(&self, what: &str) -> Error {
        Error::input(format_args!("{}:{}: {what}", self.path.display(), self.line))
    }
}

fn fill<'b>(reader: &'b mut BufReader<Text>, path: &Path) -> Result<&'b [u8]> {
    while let Err(error) = reader.fill_buf() {
        if error.kind() != ErrorKind::Interrupted {
            return Err(refused(path, error));
        }
    }
    Ok(reader.buffer())
}

/// Says what a file is that is no JSON, where its first bytes tell.
fn refuse_foreign(begin: &[u8], path: &Path) -> Result<()> {
    let kind = match begin {
        [b'P', b'K', 3, 4, ..] => "a zip file",
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "an xz file",
        [b'B', b'Z', b'h', b'1'..=b'9', ..] => "a bzip2 file",
        begin if is_packed(begin) => "packed twice",
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "UTF-16 text",
        _ => return Ok(()),
    };
    Err(Error::input(format_args!("{} is {kind}", path.display()))
        .hint("unpack or convert it: one JSON object in each line, in UTF-8"))
}

/// Text that is collected up to [`MAX_RECORD_BYTES`].
#[derive(Default)]
struct Bounded {
    bytes: Vec<u8>,
    length: usize,
}

impl Bounded {
    fn extend(&mut self, part: &[u8]) {
        self.length += part.len();
        if self.length <= MAX_RECORD_BYTES {
            self.bytes.extend_from_slice(part);
        } else {
            self.bytes = Vec::new();
        }
    }

    fn finish(self) -> std::result::Result<Body, Rejection> {
        if self.length > MAX_RECORD_BYTES {
            let (got, most) = (self.length >> 20, MAX_RECORD_BYTES >> 20);
            let what = format!("record has {got} MiB, the most is {most} MiB");
            return Err(Rejection::new(what).hint("is there a line break after each record?"));
        }
        String::from_utf8(self.bytes).map(Body::Json).map_err(|e| {
            let byte = e.utf8_error().valid_up_to() + 1;
            Rejection::new(format!("record is not UTF-8 at byte {byte}"))
                .hint("save the file as UTF-8")
        })
    }
}

/// A scan for the end of an element of a list.
#[derive(Default)]
struct Scan {
    depth: usize,
    quoted: bool,
    escaped: bool,
}

impl Scan {
    /// Takes a byte; true if the element ended before it.
    fn ends_before(&mut self, byte: u8) -> bool {
        if self.escaped {
            self.escaped = false;
        } else if self.quoted {
            match byte {
                b'\\' => self.escaped = true,
                b'"' => self.quoted = false,
                _ => {}
            }
        } else {
            match byte {
                b'"' => self.quoted = true,
                b'{' | b'[' => self.depth += 1,
                b',' | b']' if self.depth == 0 => return true,
                b'}' | b']' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines and texts (or reasons) of a file with these bytes.
    fn read(bytes: &[u8]) -> Result<Vec<(usize, String)>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        let mut source = JsonSource::open(file.path())?;
        let mut records = Vec::new();
        while let Some(raw) = source.next()? {
            let text = match raw.body {
                Ok(Body::Json(text)) => text,
                Ok(Body::Fields(fields)) => panic!("{fields} out of a JSON file"),
                Err(rejection) => rejection.reason,
            };
            records.push((raw.line, text.trim_end().to_string()));
        }
        Ok(records)
    }

    fn numbered(expected: &[(usize, &str)]) -> Vec<(usize, String)> {
        expected.iter().map(|&(line, text)| (line, text.to_string())).collect()
    }

    #[test]
    fn lines_are_counted_and_blank_ones_skipped() {
        let bytes = b"\xef\xbb\xbf\r\n{\"a\": 1}\r\n \n\n{\"b\": [\n3";
        assert_eq!(
            read(bytes).unwrap(),
            numbered(&[(2, "{\"a\": 1}"), (5, "{\"b\": ["), (6, "3")])
        );
        assert!(read(b"").unwrap().is_empty());
        assert!(read(b" \n\t\n").unwrap().is_empty());
        assert_eq!(read(b"a\n\xff\xfe\nb").unwrap()[1].1, "record is not UTF-8 at byte 1");
    }

    #[test]
    fn elements_of_a_list_have_the_line_that_they_begin_on() {
        let bytes = b" [\n {\"a\": \"],{\\\"\",\n \"b\": [1, 2]},\n\n{}, 7 ,{\"c\" 1}\n]\n";
        let expected =
            [(2, "{\"a\": \"],{\\\"\",\n \"b\": [1, 2]}"), (5, "{}"), (5, "7"), (5, "{\"c\" 1}")];
        assert_eq!(read(bytes).unwrap(), numbered(&expected));
        assert!(read(b"[]").unwrap().is_empty());
        let lines = |bytes| read(bytes).unwrap().into_iter().map(|(line, _)| line);
        assert!(lines(b"[{},{}, {}\n,\n7]").eq([1, 2, 3, 4]), "no line tells them apart");
        assert!(lines(b"[{},\n{},{},\n7]").eq([1, 2, 2, 3]));
    }

    #[test]
    fn a_broken_list_is_an_error_that_says_where() {
        let error = |bytes: &[u8]| read(bytes).unwrap_err().to_string();
        assert!(error(b"[{},\n{\"a\": [1").contains(":2: the JSON list is not closed"));
        assert!(error(b"[{},").contains("not closed"));
        assert!(error(b"[{}]\n{}").contains(":2: something follows the end of the JSON list"));
    }

    #[test]
    fn other_kinds_of_files_are_named() {
        assert!(read(b"PK\x03\x04").unwrap_err().to_string().contains("is a zip file"));
        assert!(read(b"BZh91AY").unwrap_err().to_string().contains("is a bzip2 file"));
        assert!(read(b"\xff\xfe{\0").unwrap_err().to_string().contains("is UTF-16 text"));
    }

    #[test]
    fn a_record_without_end_does_not_fill_memory() {
        let mut text = Bounded::default();
        for _ in 0..65 {
            text.extend(&vec![b'x'; 1 << 20]);
        }
        assert!(text.bytes.is_empty());
        assert!(text.finish().unwrap_err().reason.contains("record has 65 MiB, the most is 64"));
    }
}
