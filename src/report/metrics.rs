//! `metrics.jsonl`: one JSON object for each event, on disk as soon as it happened.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::checkpoint::atomic::write_file;
use crate::error::{Error, Result};
use crate::train::events::{EndEvent, Event};

/// An open file.
pub struct Metrics {
    path: PathBuf,
    file: File,
}

impl Metrics {
    /// Replaces the file at `path` by `events`, whole or not at all, and goes on from there. A
    /// resumed run so drops what it had written after its checkpoint.
    ///
    /// # Errors
    /// `Io` when the disk refuses.
    pub fn begin<'e>(path: &Path, events: impl IntoIterator<Item = &'e Event>) -> Result<Self> {
        let text: String = events.into_iter().map(line).collect();
        write_file(path, text.as_bytes())?;
        let file = OpenOptions::new().append(true).open(path);
        let file = file.map_err(|e| Error::io("open", path, e))?;
        Ok(Metrics { path: path.to_path_buf(), file })
    }

    /// Adds an event.
    ///
    /// # Errors
    /// `Io` when the disk refuses.
    pub fn record(&mut self, event: &Event) -> Result<()> {
        // One write for the whole line: a reader never sees half of one.
        let written = self.file.write_all(line(event).as_bytes());
        written.map_err(|e| Error::io("write", &self.path, e))
    }
}

/// The end that the log at `path` closes with, if it does.
pub fn last_end(path: &Path) -> Option<EndEvent> {
    let text = std::fs::read_to_string(path).ok()?;
    match serde_json::from_str(text.lines().last()?) {
        Ok(Event::End(end)) => Some(end),
        _ => None,
    }
}

fn line(event: &Event) -> String {
    let mut line = serde_json::to_string(event).expect("events serialize");
    line.push('\n');
    line
}
