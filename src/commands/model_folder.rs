//! The folder that `quantize` and `merge` write a model into.

use std::fs;
use std::path::Path;

use crate::checkpoint::atomic::{check_destination, check_not_within};
use crate::checkpoint::is_there;
use crate::data::{TOKENIZER_FILES, TokenizerFiles};
use crate::error::{Error, Result};

/// Copied as it is.
const GENERATION_FILE: &str = "generation_config.json";

/// Copies what a model folder has beside its weights and its config: generation_config.json of
/// `model`, and the files of a tokenizer.
///
/// # Errors
/// `Io` when the disk refuses.
pub fn copy_side_files(model: &Path, tokenizer: &TokenizerFiles, folder: &Path) -> Result<()> {
    let (from, to) = (model.join(GENERATION_FILE), folder.join(GENERATION_FILE));
    if is_there(&from) {
        // Not `fs::copy`: that the original may not be written is not copied.
        let text = fs::read(&from).map_err(|e| Error::io("read", &from, e))?;
        fs::write(&to, text).map_err(|e| Error::io("write", &to, e))?;
    }
    tokenizer.save(folder)
}

/// Whether the folder `out` may be written: it may replace a model's, but none of `inputs` and
/// nothing else.
///
/// # Errors
/// `Usage` naming what would be lost.
pub fn check(out: &Path, overwrite: bool, inputs: &[&Path]) -> Result<()> {
    if out.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
        let what = format_args!("{} is to be a folder, not a GGUF file", out.display());
        return Err(Error::usage(what)
            .hint("give it another name; `nibble export` makes a GGUF file of a folder"));
    }
    check_destination(out, overwrite)?;
    inputs.iter().try_for_each(|input| check_not_within(input, out))?;
    let Ok(entries) = fs::read_dir(out) else { return Ok(()) };
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let foreign = names.filter(|name| !is_of_a_model(name)).min();
    foreign.map_or(Ok(()), |name| {
        let what = format_args!("{} holds `{name}`, which is no file of a model", out.display());
        Err(Error::usage(what)
            .hint("choose another `--out`, or move it away: all would be replaced"))
    })
}

fn is_of_a_model(name: &str) -> bool {
    let weights = [".safetensors", ".safetensors.index.json"];
    ["config.json", GENERATION_FILE].contains(&name)
        || TOKENIZER_FILES.contains(&name)
        || weights.iter().any(|suffix| name.ends_with(suffix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_model_is_replaced() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("out");
        check(&out, true, &[]).unwrap();
        fs::create_dir(&out).unwrap();
        for name in ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json"] {
            fs::write(out.join(name), "").unwrap();
        }
        let refused = check(&out, false, &[]).unwrap_err().to_string();
        assert!(refused.contains("is not empty"), "{refused}");
        check(&out, true, &[]).unwrap();
        assert!(check(&out, true, &[&out.join("config.json")]).is_err());
        fs::create_dir(out.join("thesis")).unwrap();
        let refused = check(&out, true, &[]).unwrap_err().to_string();
        assert!(refused.contains("holds `thesis`") && refused.contains("hint: "), "{refused}");
    }
}
