//! Bars that show how far a command is, on stderr if that is a terminal.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar over `bytes` behind the word `doing`, such as `reading`.
pub fn over_bytes(doing: &str, bytes: u64) -> ProgressBar {
    bar(bytes, &format!("{doing} {{bar:30}} {{bytes}}/{{total_bytes}}  {{bytes_per_sec}}"))
}

/// A bar over `count` things behind the word `doing`, such as `answering`.
pub fn over_count(doing: &str, count: usize) -> ProgressBar {
    bar(count as u64, &format!("{doing} {{bar:30}} {{pos}}/{{len}}  {{per_sec}}"))
}

fn bar(length: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(&format!("{template}  ETA {{eta}}"));
    ProgressBar::new(length).with_style(style.expect("the template is valid"))
}
