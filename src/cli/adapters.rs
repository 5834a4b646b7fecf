//! Adapters on the command line: `--adapter NAME=DIR`.

use std::path::{Path, PathBuf, is_separator};
use std::str::FromStr;

use crate::error::{Error, Result};

/// A PEFT adapter folder and what it is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedAdapter {
    /// What the user calls it.
    pub name: String,
    /// Where it is.
    pub folder: PathBuf,
}

/// `NAME=DIR`, or `DIR` whose last part is the name. A path may hold `=` itself: one that exists, or
/// has a separator before its first `=`, is taken whole.
impl FromStr for NamedAdapter {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let split = text.split_once('=').filter(|(name, _)| !name.contains(is_separator));
        match split.filter(|_| !Path::new(text).exists()) {
            Some((_, "")) => Err("no folder stands behind the `=`, expected NAME=DIR".into()),
            Some(("", _)) => Err("no name stands before the `=`, expected NAME=DIR".into()),
            Some((name, folder)) => {
                Ok(NamedAdapter { name: name.to_string(), folder: folder.into() })
            }
            None => NamedAdapter::from_folder(text),
        }
    }
}

impl NamedAdapter {
    fn from_folder(text: &str) -> std::result::Result<Self, String> {
        let folder = PathBuf::from(text);
        let name = |path: &Path| path.file_name().and_then(|name| name.to_str()).map(String::from);
        // `.` and `..` end in no name, but the folders that they are have one.
        let name = name(&folder).or_else(|| name(&folder.canonicalize().ok()?));
        let name = name.ok_or("expected NAME=DIR, or a folder that has a name")?;
        Ok(NamedAdapter { name, folder })
    }
}

/// That no two adapters have the same name: what one of them says could not be told from the other.
///
/// # Errors
/// `Usage` with the name and both folders.
pub fn check_names(adapters: &[NamedAdapter]) -> Result<()> {
    for (index, NamedAdapter { name, folder }) in adapters.iter().enumerate() {
        let Some(first) = adapters[..index].iter().find(|first| first.name == *name) else {
            continue;
        };
        let (first, folder) = (first.folder.display(), folder.display());
        let what = format_args!("two adapters are called `{name}`: {first} and {folder}");
        let hint = format_args!("name one of them: `--adapter NAME={folder}`");
        return Err(Error::usage(what).hint(hint));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(text: &str) -> std::result::Result<NamedAdapter, String> {
        text.parse()
    }

    fn adapter(name: &str, folder: &str) -> NamedAdapter {
        NamedAdapter { name: name.into(), folder: folder.into() }
    }

    #[test]
    fn an_adapter_is_called_by_name_or_by_its_folder() {
        assert_eq!(named("a=b/c"), Ok(adapter("a", "b/c")));
        assert_eq!(named("b/c"), Ok(adapter("c", "b/c")));
        let here = std::env::current_dir().unwrap();
        let here = here.file_name().unwrap().to_str().unwrap();
        assert_eq!(named("."), Ok(adapter(here, ".")));
        assert!(named("/").is_err());
    }

    #[test]
    fn a_path_may_hold_the_sign_behind_a_name() {
        assert_eq!(named("./od=d"), Ok(adapter("od=d", "./od=d")));
        assert_eq!(named("runs/lr=1e-4"), Ok(adapter("lr=1e-4", "runs/lr=1e-4")));
        assert_eq!(named("a=runs/lr=1e-4"), Ok(adapter("a", "runs/lr=1e-4")));
        assert!(named("a=").unwrap_err().starts_with("no folder"));
        assert!(named("=a").unwrap_err().starts_with("no name"));
    }
}
