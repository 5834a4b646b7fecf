//! CSV and Parquet files are the same data as JSONL, packed ones the same as what they hold.
//!
//! `tests/data/tables` was made by `scripts/golden/gen_parquet.py` with pyarrow.

use std::io::Write;
use std::path::{Path, PathBuf};

use nibble::data::{Dataset, Encoder, Format, LoadReport, load};
use nibble::random::Stream;

use crate::smollm2::{VOCAB, options, tokenizer};

fn tables() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tables"))
}

fn try_load(path: &Path) -> nibble::Result<Dataset> {
    let options = options();
    let encoder = Encoder::new(tokenizer(), VOCAB, options.train_on)?;
    load(&[path.to_path_buf()], &encoder, &options, |_, _| ())
}

fn write(name: &str, bytes: impl AsRef<[u8]>) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    (folder, path)
}

#[test]
fn parquet_rows_are_records() {
    let table = try_load(&tables().join("messages.parquet")).unwrap();
    let lines = try_load(&tables().join("messages.jsonl")).unwrap();
    assert_eq!(table.documents, lines.documents);
    assert_eq!(
        LoadReport { files: lines.report.files.clone(), ..table.report.clone() },
        lines.report
    );
    assert_eq!((table.report.records, table.report.documents), (54, 52));
    // A list of none, and null.
    assert_eq!((&table.report.without_targets[..], table.report.rejected.len()), (&[3, 4][..], 0));
}

#[test]
fn parquet_pages_may_be_compressed_in_any_usual_way() {
    let lines = try_load(&tables().join("messages.jsonl")).unwrap();
    for codec in ["gzip", "lz4", "none", "zstd"] {
        let table = try_load(&tables().join(format!("messages-{codec}.parquet"))).unwrap();
        assert_eq!(table.documents, lines.documents, "{codec}");
    }
}

#[test]
fn csv_rows_are_records() {
    let rows = "id,prompt,completion\n1,\"a, b\",c\n2,\"d\ne\",f\n3,g\n";
    let (_folder, path) = write("data.csv", rows);
    let (_other, tabs) =
        write("data.TSV", "id\tprompt\tcompletion\n1\ta, b\tc\n2\t\"d\ne\"\tf\n3\tg\n");
    let (_third, lines) = write(
        "data.jsonl",
        "{\"prompt\": \"a, b\", \"completion\": \"c\"}\n{\"prompt\": \"d\\ne\", \"completion\": \"f\"}",
    );
    let (table, lines) = (try_load(&path).unwrap(), try_load(&lines).unwrap());
    let ids = |dataset: &Dataset| -> Vec<Vec<u32>> {
        dataset.documents.iter().map(|document| document.input_ids.clone()).collect()
    };
    assert_eq!(table.report.format, Some(Format::Prompt));
    assert_eq!(ids(&table), ids(&lines));
    assert_eq!(ids(&try_load(&tabs).unwrap()), ids(&lines));
    let places: Vec<usize> = table.documents.iter().map(|document| document.line).collect();
    assert_eq!(places, [2, 3], "the lines that rows begin on");
    assert_eq!(table.report.rejected[0].line, 5);
    assert_eq!(table.report.rejected[0].rejection.reason, "row has 2 cells, the header 3");
}

/// As spreadsheets write them.
#[test]
fn rows_stand_on_the_same_lines_whatever_ends_them() {
    let rows = "prompt,completion\na,b\n\n\"c\nd\",e\nf,g,h\ni,j";
    let places = |text: &str| {
        let (_folder, path) = write("data.csv", text);
        let found = try_load(&path).unwrap();
        let lines: Vec<usize> = found.documents.iter().map(|document| document.line).collect();
        (lines, found.report.rejected[0].line)
    };
    for last in ["", "\n"] {
        let text = rows.to_string() + last;
        assert_eq!(places(&text), (vec![2, 4, 7], 6));
        assert_eq!(places(&text.replace('\n', "\r\n")), (vec![2, 4, 7], 6));
        // As old ones of a Mac did; breaks in quotes are not counted then.
        assert_eq!(places(&text.replace('\n', "\r")), (vec![2, 4, 6], 5));
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(bytes).unwrap();
    packed.finish().unwrap()
}

#[test]
fn text_may_be_packed() {
    let lines = std::fs::read(tables().join("messages.jsonl")).unwrap();
    let expected = try_load(&tables().join("messages.jsonl")).unwrap().documents;
    // By what it holds, whatever its name is; several members are one file.
    let (first, rest) = lines.split_at(lines.len() / 3);
    let zstandard = zstd::encode_all(&lines[..], 1).unwrap();
    let members = [gzip(first), gzip(rest)].concat();
    for (name, bytes) in [
        ("data.jsonl.gz", gzip(&lines)),
        ("data.jsonl", members),
        ("data.json.zst", zstandard.clone()),
        // As parallel packers write it: a frame to be skipped comes first.
        ("data.zst", [&b"\x50\x2a\x4d\x18\x02\0\0\0ab"[..], &zstandard].concat()),
    ] {
        let (_folder, path) = write(name, bytes);
        assert_eq!(try_load(&path).unwrap().documents, expected, "{name}");
    }
    let rows = "prompt,completion\n\"a, b\",c\n";
    let (_folder, plain) = write("data.csv", rows);
    let (_other, packed) = write("data.csv.gz", gzip(rows.as_bytes()));
    assert_eq!(try_load(&packed).unwrap().documents, try_load(&plain).unwrap().documents);
    let mut spoilt = gzip(rows.as_bytes());
    let middle = spoilt.len() / 2;
    spoilt[middle] ^= 0x55;
    for (name, bytes) in [
        ("cut.jsonl.gz", gzip(&lines)[..40].to_vec()),
        ("cut.zst", zstandard[..zstandard.len() / 2].to_vec()),
        ("spoilt.csv.gz", spoilt),
        ("no.gz", b"\x1f\x8b\x08".to_vec()),
    ] {
        let (_folder, path) = write(name, bytes);
        let error = try_load(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("{name} cannot be unpacked")), "{error}");
        assert!(error.contains("hint: the file is damaged or cut off"), "{error}");
    }
}

/// A few bytes that unpack to more than there is memory.
#[test]
fn a_row_without_end_does_not_fill_memory() {
    let mut rows = b"text\n".to_vec();
    rows.resize(rows.len() + (65 << 20), b'x');
    let (_folder, path) = write("data.csv.zst", zstd::encode_all(&rows[..], 1).unwrap());
    let error = try_load(&path).unwrap_err().to_string();
    assert!(error.contains("data.csv.zst:2: the row has more than 64 MiB"), "{error}");
}

/// Otherwise the rest of the file would be one record, and nothing said.
#[test]
fn quotes_that_are_not_closed_are_an_error_that_says_where() {
    let rest = "more,rows\n".repeat(2000);
    for (text, line) in [
        (format!("prompt,completion\na,b\nc,\"d\n{rest}"), 3),
        (format!("prompt,\"completion\na,b\n{rest}"), 1),
        (format!("prompt,completion\nc,\"d\ne,\"f\"\n{rest}"), 2),
        ("prompt,completion\n\na,\"b".to_string(), 3),
    ] {
        let (_folder, path) = write("data.csv", text);
        let error = try_load(&path).unwrap_err().to_string();
        let says = format!("data.csv:{line}: the quotes that begin in this line are not closed\n");
        assert!(error.contains(&says), "{error}");
        assert!(error.contains("hint: a cell in quotes ends in a quote"), "{error}");
    }
}

/// No byte of a damaged table makes a reader panic.
#[test]
fn damaged_tables_are_reported() {
    let good = std::fs::read(tables().join("messages.parquet")).unwrap();
    let random = Stream::new(3, "damage");
    for round in 0..400u64 {
        let mut bytes = good.clone();
        for hit in 0..1 + round % 5 {
            let at = random.below(round * 64 + 2 * hit, bytes.len() as u64) as usize;
            bytes[at] = random.below(round * 64 + 2 * hit + 1, 256) as u8;
        }
        if round % 4 == 0 {
            bytes.truncate(random.below(round * 64 + 63, bytes.len() as u64) as usize);
        }
        let (_folder, path) = write("data.parquet", bytes);
        let _ = try_load(&path);
    }
    let (_folder, path) = write("cut.parquet", &good[..good.len() / 2]);
    let error = try_load(&path).unwrap_err().to_string();
    assert!(error.contains("cut.parquet: "), "{error}");
}
