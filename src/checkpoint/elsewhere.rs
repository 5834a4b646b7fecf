//! Paths where nothing is, since they name something that is elsewhere: on the Hub, or in the home folder.

use std::path::{Component, Path};

use crate::error::{Error, Result};

/// What a shell puts the home folder in place of, unless it is in quotes or in a file.
pub(crate) const TILDE: &str =
    "`~` is not expanded in quotes or in a file: write the whole path, such as /home/NAME/models";

/// What to do about a path of one of `things` that does not exist, if its name tells.
pub(crate) fn not_here(things: &str, path: &Path) -> Option<String> {
    if is_in_home(path) {
        return Some(TILDE.to_string());
    }
    let name = path.display();
    is_hub_name(path).then(|| {
        format!(
            "{things} are not downloaded; one of the Hugging Face Hub comes with \
             `hf download {name} --local-dir DIR`"
        )
    })
}

/// Whether a path begins with `~`, and there is no such folder.
pub(crate) fn is_in_home(path: &Path) -> bool {
    path.starts_with("~") && !Path::new("~").exists()
}

/// Checks that what is to be written to `path` will not be in a new folder of the name `~`.
///
/// # Errors
/// `Usage` if it would.
pub(crate) fn check_not_in_home(path: &Path) -> Result<()> {
    if is_in_home(path) {
        let what = format_args!("there is no folder `~` for {}", path.display());
        return Err(Error::usage(what).hint(TILDE));
    }
    Ok(())
}

/// `owner/name`, where there is no folder `owner`.
pub(crate) fn is_hub_name(path: &Path) -> bool {
    let parts: Vec<_> = path.components().collect();
    let plain = parts.iter().all(|part| matches!(part, Component::Normal(_)));
    plain && parts.len() == 2 && path.parent().is_some_and(|owner| !owner.exists())
}
