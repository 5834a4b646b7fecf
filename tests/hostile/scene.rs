//! Running a command that must be refused, and damaging files for it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::training::{Workplace, fail};

/// What every refusal has in common; `says` are parts of the message.
pub fn assert_refused(place: &Workplace, command: Command, code: i32, says: &[&str]) {
    let before = contents(&place.path(""));
    let (got, text) = fail(command);
    assert_eq!(got, code, "{text}");
    let text = text.replace('\\', "/");
    for part in ["error: ", "hint: "].iter().chain(says) {
        assert!(text.contains(part), "no `{part}` in:\n{text}");
    }
    for trace in ["panicked", "RUST_BACKTRACE", "src/", ".rs:"] {
        assert!(!text.contains(trace), "`{trace}` in:\n{text}");
    }
    let after = contents(&place.path(""));
    let names = |files: &BTreeMap<PathBuf, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&before), names(&after), "files were written or lost");
    assert!(before == after, "a file was changed");
}

/// `nibble quantize` of `model` into `out`.
pub fn assert_not_quantized(place: &Workplace, says: &[&str]) {
    let command = place.nibble(&["quantize", "--model", "model", "--out", "out"]);
    assert_refused(place, command, 1, says);
}

/// Training on `train.jsonl`.
pub fn assert_not_trained(place: &Workplace, code: i32, flags: &[&str], says: &[&str]) {
    assert_refused(place, place.train("out", flags), code, says);
}

/// Every file below `folder`. Locks do not count: an empty one stays behind on purpose.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(contents(&path));
        } else if !path.ends_with(".nibble.lock") {
            files.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    files
}

/// Changes a JSON file.
pub fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// Header and data of a safetensors file.
pub fn safetensors_parts(path: &Path) -> (Value, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    (header, bytes[8 + length..].to_vec())
}

/// A safetensors file of this header and data.
pub fn safetensors_bytes(header: &Value, data: &[u8]) -> Vec<u8> {
    let header = header.to_string();
    let length = (header.len() as u64).to_le_bytes();
    [&length, header.as_bytes(), data].concat()
}

/// Changes the header of a safetensors file.
pub fn edit_header(path: &Path, edit: impl FnOnce(&mut Value)) {
    let (mut header, data) = safetensors_parts(path);
    edit(&mut header);
    fs::write(path, safetensors_bytes(&header, &data)).unwrap();
}
