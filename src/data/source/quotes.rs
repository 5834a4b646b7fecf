//! Whether the quotes of a CSV file are closed. The parser does not tell: to it, all that follows a
//! quote, up to the next one or to the end of the file, is one cell. Nor does it count lines that end in a
//! carriage return alone: it gets line feeds in their place.

use std::io::{self, Read};

use super::MAX_RECORD_BYTES;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// A reader that follows the quotes in what it reads, by the parser's rules.
pub(super) struct QuoteReader<R> {
    inner: R,
    delimiter: u8,
    has_begun: bool,
    place: Place,
    /// Line of the next byte, from 1.
    line: usize,
    /// Line of the last quote that began a cell.
    opened: usize,
    unclosed: Option<usize>,
    /// Bytes of the row so far.
    row_bytes: usize,
    /// Line on which a row begins that has more than [`MAX_RECORD_BYTES`].
    endless: Option<usize>,
    /// Line on which this row begins.
    row_line: usize,
    /// Whether the first row ends in a carriage return.
    returns: Option<bool>,
    /// Whether no line feed is behind it: no row has one then.
    lone_returns: bool,
    /// Whether what was read last is a carriage return that waits for what comes behind it.
    holds_return: bool,
}

/// What comes before the next byte.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// A delimiter, a line break or nothing.
    Begin,
    /// Text of a cell without quotes, where quotes mean nothing.
    Plain,
    /// Text in quotes.
    Quoted,
    /// A quote: the last one, or the first of two that stand for one.
    Quote,
}

impl<R> QuoteReader<R> {
    pub fn new(inner: R, delimiter: u8) -> Self {
        let (has_begun, place, line) = (false, Place::Begin, 1);
        QuoteReader {
            inner,
            delimiter,
            has_begun,
            place,
            line,
            opened: line,
            unclosed: None,
            row_bytes: 0,
            endless: None,
            row_line: line,
            returns: None,
            lone_returns: false,
            holds_return: false,
        }
    }

    /// Whether rows end in a carriage return, with a line feed behind it that the parser counts with the
    /// next row.
    pub fn rows_end_in_returns(&self) -> bool {
        self.returns == Some(true)
    }

    /// The line of a row that is too long to be one; nothing is read behind it.
    pub fn endless(&self) -> Option<usize> {
        self.endless
    }

    /// The line of the first quote that has no partner in what has been read: none is there when the
    /// file ends, or the one that was found stands in the middle of a cell on a later line.
    pub fn unclosed(&self) -> Option<usize> {
        self.unclosed
    }

    fn take(&mut self, byte: u8) {
        self.place = match (self.place, byte) {
            (Place::Begin, b'"') => {
                self.opened = self.line;
                Place::Quoted
            }
            (Place::Quoted, b'"') => Place::Quote,
            (Place::Quoted, _) | (Place::Quote, b'"') => Place::Quoted,
            (_, b'\r' | b'\n') => Place::Begin,
            (_, byte) if byte == self.delimiter => Place::Begin,
            (Place::Quote, byte) if self.line > self.opened && byte != b' ' => {
                self.unclosed.get_or_insert(self.opened);
                Place::Plain
            }
            _ => Place::Plain,
        };
        if self.place == Place::Begin && matches!(byte, b'\r' | b'\n') {
            self.returns.get_or_insert(byte == b'\r');
        }
        self.line += usize::from(byte == b'\n');
        self.row_bytes += 1;
        if byte == b'\n' && self.place == Place::Begin {
            (self.row_bytes, self.row_line) = (0, self.line);
        } else if self.row_bytes > MAX_RECORD_BYTES {
            self.endless.get_or_insert(self.row_line);
        }
    }

    fn end(&mut self) {
        if self.place == Place::Quoted {
            self.unclosed.get_or_insert(self.opened);
        }
    }
}

impl<R: Read> QuoteReader<R> {
    /// Fills the buffer, first with what was held back.
    fn fill(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match buffer.split_first_mut() {
            Some((first, rest)) if std::mem::take(&mut self.holds_return) => {
                *first = b'\r';
                Ok(1 + self.inner.read(rest)?)
            }
            _ => self.inner.read(buffer),
        }
    }
}

impl<R: Read> Read for QuoteReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.endless.is_some() {
            return Ok(0);
        }
        let length = self.fill(buffer)?;
        if length == 0 && !buffer.is_empty() {
            self.end();
        }
        let text = &mut buffer[..length];
        let has_mark = !self.has_begun && text.starts_with(BYTE_ORDER_MARK);
        self.has_begun = true;
        for index in if has_mark { BYTE_ORDER_MARK.len() } else { 0 }..length {
            if text[index] == b'\r' && self.place != Place::Quoted {
                if self.returns.is_none() {
                    if index > 0 && index + 1 == length {
                        self.holds_return = true;
                        return Ok(index);
                    }
                    self.lone_returns = text.get(index + 1).is_some_and(|&next| next != b'\n');
                }
                if self.lone_returns {
                    text[index] = b'\n';
                }
            }
            self.take(text[index]);
        }
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unclosed(text: &str) -> Option<usize> {
        let mut reader = QuoteReader::new(text.as_bytes(), b',');
        io::copy(&mut reader, &mut io::sink()).unwrap();
        reader.unclosed()
    }

    #[test]
    fn a_quote_without_a_partner_has_a_line() {
        assert_eq!(unclosed("a,b\nc,\"d\ne,f\n"), Some(2));
        assert_eq!(unclosed("\u{feff}\"a,b\nc,d\n"), Some(1));
        assert_eq!(unclosed("a,\"b \"\"c\"\"\nd"), Some(1));
        assert_eq!(unclosed("a,b\nc,\"d\ne,\"f\"\ng,h\n"), Some(2), "closed by another's quote");
    }

    #[test]
    fn lone_returns_become_line_feeds_but_for_those_in_quotes() {
        let read = |text: &str, at_once: usize| {
            let mut reader = QuoteReader::new(text.as_bytes(), b',');
            let (mut all, mut buffer) = (Vec::new(), vec![0; at_once]);
            while let length @ 1.. = reader.read(&mut buffer).unwrap() {
                all.extend(&buffer[..length]);
            }
            String::from_utf8(all).unwrap()
        };
        for at_once in [2, 3, 4, 5, 100] {
            assert_eq!(read("a,b\rc,\"d\r\"\re\r", at_once), "a,b\nc,\"d\r\"\ne\n", "{at_once}");
            for same in ["a,b\r\nc\rd\r\n", "a,b\nc\rd\r\n", "a\r", ""] {
                assert_eq!(read(same, at_once), same, "{at_once}");
            }
        }
    }

    #[test]
    fn a_large_file_of_lone_returns_is_no_endless_row() {
        let rows = "a,b\r".repeat(MAX_RECORD_BYTES / 4 + 9);
        let mut reader = QuoteReader::new(rows.as_bytes(), b',');
        io::copy(&mut reader, &mut io::sink()).unwrap();
        assert_eq!(reader.endless(), None);
    }

    #[test]
    fn closed_and_plain_quotes_are_fine() {
        for text in [
            "a,\"b \"\"c\"\"\r\nd\"\r\ne,f\r\n",
            "\u{feff}\"a\",\"\"\n\"\",\"\n\"",
            "\"a\nb\" ,c\n",
            "5\" pipe,it's \"so\"\n\"a\"b,c\n",
            "",
        ] {
            assert_eq!(unclosed(text), None, "{text:?}");
        }
    }
}
