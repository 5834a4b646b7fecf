//! The text of a file, which gzip or Zstandard may have packed: known by its first bytes.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufReader, Cursor, Read};
use std::path::Path;
use std::rc::Rc;

use flate2::bufread::MultiGzDecoder;

use crate::error::{Error, Result};

const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTANDARD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
const MAGIC_BYTES: u64 = 4;

/// Text, and how much of the file has been read for it.
pub(super) struct Text {
    reader: Box<dyn Read>,
    bytes_read: Rc<Cell<u64>>,
}

impl Text {
    /// Opens `path`, which may be a pipe.
    ///
    /// # Errors
    /// `Io` when it cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        let bytes_read = Rc::new(Cell::new(0));
        let counted = Counted { file, bytes_read: bytes_read.clone() };
        let mut reader = BufReader::with_capacity(1 << 16, counted);
        let begin = begin(&mut reader).map_err(|e| Error::io("read", path, e))?;
        let (is_gzip, is_zstandard) = (begin.starts_with(GZIP), is_zstandard(&begin));
        let reader = Cursor::new(begin).chain(reader);
        let reader: Box<dyn Read> = if is_gzip {
            Box::new(MultiGzDecoder::new(reader))
        } else if is_zstandard {
            let decoder = zstd::stream::read::Decoder::with_buffer(reader);
            Box::new(decoder.map_err(|e| Error::io("read", path, e))?)
        } else {
            Box::new(reader)
        };
        Ok(Text { reader, bytes_read })
    }

    /// Bytes of the file, packed as they are.
    pub fn counter(&self) -> Rc<Cell<u64>> {
        self.bytes_read.clone()
    }
}

impl Read for Text {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.reader.read(to)
    }
}

/// The first bytes, which a pipe may hand over one by one.
fn begin(reader: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut begin = Vec::new();
    reader.take(MAGIC_BYTES).read_to_end(&mut begin)?;
    Ok(begin)
}

/// Whether text begins as a packed file does.
pub(super) fn is_packed(begin: &[u8]) -> bool {
    begin.starts_with(GZIP) || begin.starts_with(ZSTANDARD)
}

/// A frame, or one that is to be skipped, such as parallel packers begin with.
fn is_zstandard(begin: &[u8]) -> bool {
    begin == ZSTANDARD || matches!(begin, [0x50..=0x5f, 0x2a, 0x4d, 0x18])
}

struct Counted {
    file: File,
    bytes_read: Rc<Cell<u64>>,
}

impl Read for Counted {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(to)?;
        self.bytes_read.set(self.bytes_read.get() + count as u64);
        Ok(count)
    }
}

/// What a reader of text met: a disk that fails, or a file that is damaged.
pub(super) fn refused(path: &Path, error: io::Error) -> Error {
    use io::ErrorKind::{InvalidData, InvalidInput, Other, UnexpectedEof};
    match error.kind() {
        InvalidData | InvalidInput | UnexpectedEof | Other if error.raw_os_error().is_none() => {
            let text = error.to_string();
            let hint = match text.contains("too much memory") {
                true => "it was packed with a window of more than 128 MiB: `zstd -d --long=31`",
                false => "the file is damaged or cut off: get it again",
            };
            let what = format_args!("{} cannot be unpacked: {text}", path.display());
            Error::input(what).hint(hint)
        }
        _ => Error::io("read", path, error),
    }
}
