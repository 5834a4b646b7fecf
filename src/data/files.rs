//! Which files a data set consists of, and which of them a line is in.

use std::fs;
use std::path::{Path, PathBuf};

use glob::{MatchOptions, Pattern, glob_with};
use serde::Serialize;

use crate::checkpoint::elsewhere::{TILDE, is_hub_name, is_in_home};
use crate::error::{Error, Result};
use crate::plural::noun;

/// Endings of the files that are taken from a folder.
const ENDINGS: [&str; 6] = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"];
/// Endings behind those of text.
const PACKED_ENDINGS: [&str; 3] = ["gz", "zst", "zstd"];
/// What `datasets` and the hub write beside data.
const ABOUT_DATA: [&str; 4] =
    ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"];
/// Words in the names of files that are kept apart from training data.
const HELD_OUT: [(&str, &[&str]); 2] = [
    ("validation", &["val", "valid", "validation", "dev", "eval", "evaluation"]),
    ("test", &["test", "tests", "testing"]),
];

/// Files in the order in which they are read. Lines are counted on from each to the next.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DataFiles(Vec<DataFile>);

/// A file of a data set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DataFile {
    /// The path of the file.
    pub path: PathBuf,
    /// Lines of those before it.
    pub lines_before: usize,
}

/// What the user gave as data, for people.
pub fn in_words(given: &[PathBuf]) -> String {
    const NAMED: usize = 3;
    let named: Vec<String> =
        given.iter().take(NAMED).map(|path| path.display().to_string()).collect();
    match given.len().saturating_sub(NAMED) {
        0 => named.join(", "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}

impl DataFiles {
    /// [`find`](DataFiles::find) for each of `given`, in this order.
    ///
    /// # Errors
    /// As there, and `Io` when one of several is missing: before the first one is read.
    pub fn find_all(given: &[PathBuf]) -> Result<Self> {
        let found = given.iter().map(|path| Ok(DataFiles::find(path)?.0));
        let found: Vec<Vec<DataFile>> = found.collect::<Result<_>>()?;
        let files = DataFiles(found.concat());
        for path in files.paths().filter(|_| files.0.len() > 1) {
            fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
        }
        Ok(files)
    }

    /// What the names of several files say that they are for, where they differ: `train.jsonl`, and `test.jsonl`
    /// for something else.
    pub fn held_out_among(&self) -> Option<(&Path, &'static str)> {
        let mut kinds = self.paths().filter_map(|path| Some((path, held_out(name(path))?)));
        let first = kinds.next()?;
        let all = kinds.count() + 1 == self.0.len();
        (!all).then_some(first)
    }

    /// A file by itself, the data files of a folder, or the files that a pattern such as
    /// `data/train-*.parquet` fits, by name. Nothing is read.
    ///
    /// # Errors
    /// `Input` when there is none, or a folder holds several parts of a data set.
    pub fn find(given: &Path) -> Result<Self> {
        let paths = match given.to_str().filter(|text| is_pattern(text) && !given.exists()) {
            Some(pattern) => fitting(pattern)?,
            None if given.is_dir() => in_folder(given)?,
            None if ending(given) == "toml" => {
                let given = given.display();
                return Err(Error::input(format_args!("{given} holds settings, not data"))
                    .hint(format_args!("settings are read by `--config {given}`")));
            }
            None if is_in_home(given) => {
                let what = format_args!("there is no file {}", given.display());
                return Err(Error::input(what).hint(TILDE));
            }
            None if is_hub_name(given) && !is_data(given) => {
                let given = given.display();
                let what = format_args!("there is no file {given}");
                return Err(Error::input(what).hint(format_args!(
                    "if it is a data set of the Hugging Face hub, get it first: \
                     `hf download --repo-type dataset {given} --local-dir DIR`"
                )));
            }
            None => vec![given.to_path_buf()],
        };
        let file = |path| DataFile { path, lines_before: 0 };
        Ok(DataFiles(paths.into_iter().map(file).collect()))
    }

    /// The paths.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.0.iter().map(|file| file.path.as_path())
    }

    /// Bytes of all.
    pub fn bytes(&self) -> u64 {
        self.paths().map(|path| fs::metadata(path).map_or(0, |metadata| metadata.len())).sum()
    }

    /// Sets what has been counted up to file `index`, which is read now.
    pub(super) fn begin(&mut self, index: usize, lines_before: usize) {
        self.0[index].lines_before = lines_before;
        // Not reached yet.
        self.0[index + 1..].iter_mut().for_each(|file| file.lines_before = usize::MAX);
    }

    /// `train.jsonl:7`.
    pub fn place(&self, line: usize) -> String {
        self.places(&[line], 1)
    }

    /// `line 7`; of several files `b.jsonl:7`.
    pub fn line(&self, line: usize) -> String {
        if self.0.len() > 1 { self.place(line) } else { format!("line {line}") }
    }

    /// The file that a line is in, where there are several, and the line in it.
    pub fn locate(&self, line: usize) -> (Option<&Path>, usize) {
        let file = self.0.get(self.index_of(line));
        let several = file.filter(|_| self.0.len() > 1).map(|file| file.path.as_path());
        (several, line - file.map_or(0, |file| file.lines_before))
    }

    /// `train.jsonl:4, 9, 17`, or `a.jsonl:4, 9; b.jsonl:17`: the first `most` of the lines, each once.
    pub fn places(&self, lines: &[usize], most: usize) -> String {
        let mut once: Vec<usize> = lines.to_vec();
        once.dedup();
        let listed = &once[..once.len().min(most)];
        let by_file = listed.chunk_by(|&a, &b| self.index_of(a) == self.index_of(b));
        let parts: Vec<String> = by_file.map(|lines| self.in_one_file(lines)).collect();
        let more = if once.len() > most { ", …" } else { "" };
        parts.join("; ") + more
    }

    fn in_one_file(&self, lines: &[usize]) -> String {
        let file = lines.first().and_then(|&line| self.0.get(self.index_of(line)));
        let before = file.map_or(0, |file| file.lines_before);
        let numbers: Vec<String> = lines.iter().map(|line| (line - before).to_string()).collect();
        let numbers = numbers.join(", ");
        file.map_or(format!("lines {numbers}"), |file| format!("{}:{numbers}", file.path.display()))
    }

    /// The last file that begins before `line`.
    fn index_of(&self, line: usize) -> usize {
        self.0.partition_point(|file| file.lines_before < line).saturating_sub(1)
    }
}

fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?', '['])
}

/// Files that fit a pattern, in the order of their names, as `glob` gives them.
fn fitting(pattern: &str) -> Result<Vec<PathBuf>> {
    let options = MatchOptions { require_literal_leading_dot: true, ..MatchOptions::new() };
    let found = glob_with(pattern, options)
        .map_err(|e| Error::usage(format_args!("pattern {pattern}: {e}")))?;
    let mut files = Vec::new();
    for path in found {
        let path = path.map_err(|e| {
            let place = e.path().to_path_buf();
            Error::io("list", &place, e.into())
        })?;
        if !path.is_dir() {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(Error::input(format_args!("no file fits {pattern}")));
    }
    Ok(files)
}

/// A file that is there by name alone (a link to nowhere) is in, so that it is missed.
fn in_folder(folder: &Path) -> Result<Vec<PathBuf>> {
    let refused = |e| Error::io("list", folder, e);
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(refused)? {
        let path = entry.map_err(refused)?.path();
        if is_data(&path) && !path.is_dir() {
            files.push(path);
        }
    }
    files.sort();
    let place = folder.display();
    if files.is_empty() {
        let error = Error::input(format_args!("{place} holds no data file"));
        return Err(error.hint(way_out(folder)));
    }
    let part = |file: &PathBuf| held_out(name(file));
    if let Some(other) = files.iter().find(|file| part(file) != part(&files[0])) {
        let (count, one) = (files.len(), [&files[0], other]);
        let [first, second] = one.map(|file| name(file));
        let what = format_args!(
            "{place} holds {count} data {}, for training and for something else: {first}, {second}",
            noun(count, "file")
        );
        return Err(Error::input(what)
            .hint("give one of them, or a pattern in quotes that fits those of one kind"));
    }
    Ok(files)
}

/// A hint on where the data of a folder without any may be.
fn way_out(folder: &Path) -> String {
    const ENDINGS_TOLD: &str =
        "files end in .jsonl, .json, .csv, .tsv or .parquet; folders within it are not searched";
    let options = MatchOptions { require_literal_leading_dot: true, ..MatchOptions::new() };
    // Whatever folder that is, looking ends soon.
    const MOST_LOOKED_AT: usize = 10_000;
    let folder_text = folder.to_str().map(Pattern::escape);
    let within = folder_text.and_then(|text| glob_with(&format!("{text}/**/*"), options).ok());
    let within = within.into_iter().flatten().take(MOST_LOOKED_AT);
    let within: Vec<PathBuf> = within.flatten().collect();
    let data = |path: &&PathBuf| is_data(path) && held_out(name(path)).is_none() && path.is_file();
    if let Some(path) = within.iter().find(data) {
        let (folder, ending) = (path.parent().unwrap_or(folder).display(), ending(path));
        let start = if name(path).starts_with("train") { "train" } else { "" };
        return format!(
            "give the files below it by a pattern, such as `'{folder}/{start}*.{ending}'`"
        );
    }
    match within.iter().any(|path| ending(path) == "arrow") {
        true => ARROW.to_string(),
        false => ENDINGS_TOLD.to_string(),
    }
}

/// What `save_to_disk` writes.
pub(super) const ARROW: &str =
    "Arrow files are not read: write them again by `dataset.to_parquet(\"data.parquet\")`";

/// What a file of this name is kept for, if not for training.
fn held_out(name: &str) -> Option<&'static str> {
    let name = name.to_ascii_lowercase();
    let mut words = name.split(|c: char| !c.is_ascii_alphabetic());
    words.find_map(|word| {
        let kind = HELD_OUT.iter().find(|(_, words)| words.contains(&word));
        kind.map(|(kind, _)| *kind)
    })
}

fn name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// Whether a file's name says that it holds data.
fn is_data(path: &Path) -> bool {
    let (ending, last) = (unpacked_ending(path), ending(path));
    let packed = ending != last;
    let known = ENDINGS.contains(&ending.as_str()) && !(packed && ending == "parquet");
    known && !name(path).starts_with('.') && !ABOUT_DATA.contains(&name(path))
}

fn ending(path: &Path) -> String {
    let ending = path.extension().and_then(|ending| ending.to_str());
    ending.unwrap_or_default().to_ascii_lowercase()
}

/// The ending of a file's name, less that of a compressor: `csv` of `a.csv.gz`.
pub(super) fn unpacked_ending(path: &Path) -> String {
    let last = ending(path);
    if PACKED_ENDINGS.contains(&last.as_str()) { ending(&path.with_extension("")) } else { last }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(names: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        names.iter().for_each(|name| fs::write(folder.path().join(name), name).unwrap());
        folder
    }

    fn names(found: Result<DataFiles>) -> Vec<String> {
        found.unwrap().paths().map(|path| name(path).to_string()).collect()
    }

    #[test]
    fn a_folder_or_a_pattern_stands_for_its_files() {
        let all = [
            "b-2.jsonl",
            "b-1.jsonl",
            "a.csv.gz",
            "README.md",
            ".hidden.json",
            "c.parquet",
            "d.gz",
        ];
        let folder = folder(&all);
        fs::create_dir(folder.path().join("more.json")).unwrap();
        let found = names(DataFiles::find(folder.path()));
        assert_eq!(found, ["a.csv.gz", "b-1.jsonl", "b-2.jsonl", "c.parquet"]);
        let pattern = |pattern: &str| DataFiles::find(&folder.path().join(pattern));
        assert_eq!(names(pattern("b-*")), ["b-1.jsonl", "b-2.jsonl"]);
        assert_eq!(names(pattern("b-[2-9].json?")), ["b-2.jsonl"]);
        assert!(pattern("x*").unwrap_err().to_string().contains("no file fits"));
        assert!(pattern("b-[").unwrap_err().to_string().contains("pattern"));
        // A file may be called so.
        fs::write(folder.path().join("b-[1].json"), "").unwrap();
        assert_eq!(names(pattern("b-[1].json")), ["b-[1].json"]);
        assert_eq!(pattern("b-*.jsonl").unwrap().bytes(), 18);
        assert_eq!(names(DataFiles::find(Path::new("missing.jsonl"))), ["missing.jsonl"]);
    }

    #[test]
    fn parts_of_a_data_set_are_not_mixed() {
        for (names, said) in [
            (["train-0.parquet", "train-1.parquet", "test-0.parquet"], "test-0.parquet, train-0"),
            (["squad_train.jsonl", "b.jsonl", "squad_VAL.jsonl.gz"], "b.jsonl, squad_VAL.jsonl.gz"),
            (["a.csv", "x.dev.csv", "y.csv"], "a.csv, x.dev.csv"),
        ] {
            let error = DataFiles::find(folder(&names).path()).unwrap_err().to_string();
            let says = format!("3 data files, for training and for something else: {said}");
            assert!(error.contains(&says), "{error}");
        }
        let one_kind = folder(&["trainers.jsonl", "devices.jsonl", "contest.jsonl"]);
        assert_eq!(names(DataFiles::find(one_kind.path())).len(), 3);
        let held_out = folder(&["eval-1.jsonl", "validation-2.jsonl"]);
        assert_eq!(names(DataFiles::find(held_out.path())).len(), 2);
        let empty = DataFiles::find(folder(&["notes.txt"]).path()).unwrap_err().to_string();
        assert!(empty.contains("holds no data file\nhint: files end in .jsonl"), "{empty}");
    }

    /// As the hub and `datasets` leave them.
    #[test]
    fn a_folder_without_data_says_where_they_are() {
        let about = ["dataset_infos.json", "state.json", "dataset_dict.json", "README.md"];
        let hub = folder(&about);
        let place = |name: &str| hub.path().join(name);
        for name in ["data/test-0.parquet", "data/train-0.parquet", "data/train-1.parquet"] {
            fs::create_dir_all(place("data")).unwrap();
            fs::write(place(name), "").unwrap();
        }
        let says = |path: &Path| DataFiles::find(path).unwrap_err().to_string();
        let pattern = place("data").join("train*.parquet").display().to_string();
        let text = says(hub.path());
        assert!(
            text.contains("holds no data file") && text.contains(&format!("`'{pattern}'`")),
            "{text}"
        );
        assert_eq!(names(DataFiles::find(Path::new(&pattern))).len(), 2);
        let saved = folder(&["dataset_info.json", "state.json", "data-00000-of-00001.arrow"]);
        let text = says(saved.path());
        assert!(text.contains("hint: Arrow files are not read"), "{text}");
        let text = says(Path::new("nobody/no-such-data"));
        assert!(text.contains("`hf download --repo-type dataset nobody/no-such-data "), "{text}");
        assert!(says(Path::new("~/data.jsonl")).contains("hint: `~` is not expanded"));
        assert_eq!(names(DataFiles::find(Path::new("nobody/none.jsonl"))), ["none.jsonl"]);
    }

    #[cfg(unix)]
    #[test]
    fn a_link_to_nowhere_is_a_file_that_is_missed() {
        let folder = folder(&["a-0.jsonl"]);
        std::os::unix::fs::symlink("gone", folder.path().join("a-1.jsonl")).unwrap();
        assert_eq!(names(DataFiles::find(folder.path())).len(), 2);
        assert_eq!(names(DataFiles::find(&folder.path().join("a-*"))).len(), 2);
    }

    #[test]
    fn lines_are_those_of_their_file() {
        let file = |name: &str, lines_before| DataFile { path: name.into(), lines_before };
        let one = DataFiles(vec![file("d.jsonl", 0)]);
        assert_eq!(one.places(&[4, 9, 9], 3), "d.jsonl:4, 9");
        assert_eq!((one.place(7), one.line(7)), ("d.jsonl:7".into(), "line 7".into()));
        let several =
            DataFiles(vec![file("a", 0), file("empty", 10), file("b", 10), file("c", 13)]);
        assert_eq!(several.places(&[10, 11, 13, 14], 9), "a:10; b:1, 3; c:1");
        assert_eq!(several.places(&[1, 2, 11], 2), "a:1, 2, …");
        assert_eq!(several.line(14), "c:1");
        assert_eq!(several.locate(13), (Some(Path::new("b")), 3));
        assert_eq!((one.locate(7), DataFiles::default().locate(3)), ((None, 7), (None, 3)));
        assert_eq!(DataFiles::default().places(&[3, 5], 9), "lines 3, 5");
        // While the second one is read.
        let mut begun = several;
        begun.begin(2, 10);
        assert_eq!(begun.places(&[2, 12], 9), "a:2; b:2");
    }
}
