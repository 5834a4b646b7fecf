//! What the documents name is there: files, links, and the flags of every command that they show.

use std::fs;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use nibble::cli::Cli;
use nibble::model::spec::Family;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The documents, relative to the root, and their text.
fn documents() -> Vec<(PathBuf, String)> {
    let in_folder = |folder: &str| {
        let entries = fs::read_dir(Path::new(ROOT).join(folder)).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name());
        let paths = names.map(|name| Path::new(folder).join(name));
        paths.filter(|path| path.extension().is_some_and(|end| end == "md")).collect::<Vec<_>>()
    };
    let folders = ["", "docs", "docs/benchmarks", "scripts/golden", "scripts/sample"];
    let paths = folders.into_iter().flat_map(in_folder);
    let read = |path: PathBuf| {
        let text = fs::read_to_string(Path::new(ROOT).join(&path)).unwrap();
        (path, text)
    };
    paths.map(read).collect()
}

#[test]
fn files_that_are_named_exist() {
    let roots = ["src/", "quant/", "scripts/", "tests/", "docs/"];
    let mut named = 0;
    for (document, text) in documents() {
        for path in text.split('`').skip(1).step_by(2) {
            let path = path.split_whitespace().next().unwrap_or_default();
            let pattern = path.contains(['*', '{', '…']) || path.contains("PRESET");
            if roots.iter().any(|root| path.starts_with(root)) && !pattern {
                named += 1;
                assert!(Path::new(ROOT).join(path).exists(), "{}: {path}", document.display());
            }
        }
    }
    assert!(named > 50, "{named}");
}

#[test]
fn links_lead_somewhere() {
    for (document, text) in documents() {
        let folder = Path::new(ROOT).join(document.parent().unwrap());
        for link in text.split("](").skip(1) {
            let target = link.split([')', '#']).next().unwrap();
            let elsewhere = target.is_empty() || target.contains("://");
            assert!(elsewhere || folder.join(target).exists(), "{}: {target}", document.display());
        }
    }
}

#[test]
fn the_readme_names_every_family() {
    let readme = fs::read_to_string(Path::new(ROOT).join("README.md")).unwrap();
    for name in Family::ALL.map(Family::model_type) {
        assert!(readme.contains(&format!("`{name}`")), "{name}");
    }
}

/// Words of a command line; quotes hold them together.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for character in line.chars() {
        match character {
            '"' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            other => words.last_mut().unwrap().push(other),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[test]
fn commands_that_are_shown_have_the_flags_that_they_show() {
    let mut shown = 0;
    for (document, text) in documents() {
        let joined = text.replace("\\\n", " ");
        let lines = joined.lines().filter_map(|line| line.trim_start().strip_prefix("$ nibble "));
        for line in lines {
            let line = line.split("  #").next().unwrap();
            let arguments = [vec!["nibble".to_string()], words(line)].concat();
            let parsed = Cli::command().try_get_matches_from(arguments);
            assert!(
                parsed.is_ok(),
                "{}: nibble {line}\n{}",
                document.display(),
                parsed.unwrap_err()
            );
            shown += 1;
        }
    }
    assert!(shown >= 10, "{shown}");
}
