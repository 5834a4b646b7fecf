//! TensorBoard event files.
//!
//! A record is `length u64 | masked CRC32C of length | data | masked CRC32C of data`; data is an
//! `Event` protobuf: `1: wall_time double, 2: step int64, 3: file_version string, 5: summary`, with
//! `Summary.value (1) { tag (1) string, simple_value (2) float }`. Source: TensorFlow
//! `record_writer.cc`, `event.proto`, `summary.proto`.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::checkpoint::atomic::write_file;
use crate::error::{Error, Result};
use crate::train::events::Event;

/// What every name of an event file begins with.
const NAME: &str = "events.out.tfevents";

/// An open event file.
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Starts a file in `folder` with the events of `history`, and removes those of earlier
    /// sessions, which it replaces, whole or not.
    ///
    /// # Errors
    /// `Io` when the disk refuses.
    pub fn begin(folder: &Path, history: &[Event]) -> Result<Self> {
        let now = wall_time();
        let path = folder.join(format!("{NAME}.{now:.0}.nibble"));
        let mut bytes = frame(&version(now));
        // Events know the seconds of training that came before them: the last one ends now.
        let elapsed = elapsed_seconds(history);
        let last = elapsed.last().copied().unwrap_or(0.0);
        for (event, seconds) in history.iter().zip(&elapsed) {
            bytes.extend(record(event, now - (last - seconds)).iter().flat_map(|r| frame(r)));
        }
        write_file(&path, &bytes)?;
        remove_others(folder, &path)?;
        let file = OpenOptions::new().append(true).open(&path);
        Ok(EventFile { file: file.map_err(|e| Error::io("open", &path, e))?, path })
    }

    /// Writes the scalars of an event, if it has any.
    ///
    /// # Errors
    /// `Io` when the disk refuses.
    pub fn record(&mut self, event: &Event) -> Result<()> {
        let Some(data) = record(event, wall_time()) else { return Ok(()) };
        self.file.write_all(&frame(&data)).map_err(|e| Error::io("write", &self.path, e))
    }
}

fn remove_others(folder: &Path, keep: &Path) -> Result<()> {
    let entries = std::fs::read_dir(folder).map_err(|e| Error::io("list", folder, e))?;
    for entry in entries {
        let path = entry.map_err(|e| Error::io("list", folder, e))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if path != keep && is_ours(name) {
            std::fs::remove_file(&path).map_err(|e| Error::io("remove", &path, e))?;
        }
    }
    Ok(())
}

/// Whether it is the file of a session, or what one left that was killed before it had its name: TensorBoard
/// reads hidden files, too.
fn is_ours(name: &str) -> bool {
    let hidden = name.strip_prefix('.');
    let half = hidden.and_then(|name| {
        name.strip_suffix(".partial").or_else(|| name.strip_suffix(".nibble-lock"))
    });
    let name = half.unwrap_or(name);
    name.starts_with(NAME) && name.ends_with(".nibble")
}

/// Seconds of training before each event; only step events know them.
fn elapsed_seconds(events: &[Event]) -> Vec<f64> {
    let mut last = 0.0;
    let seconds = |event: &Event| {
        if let Event::Step(step) = event {
            last = step.elapsed_seconds;
        }
        last
    };
    events.iter().map(seconds).collect()
}

fn version(wall_time: f64) -> Vec<u8> {
    let mut data = double_field(1, wall_time);
    data.extend(bytes_field(3, b"brain.Event:2"));
    data
}

/// The `Event` message of a training event, under the tags that transformers uses.
fn record(event: &Event, wall_time: f64) -> Option<Vec<u8>> {
    let scalars: Vec<(&str, f64)> = match event {
        Event::Step(step) => [
            ("train/loss", step.loss),
            ("train/learning_rate", step.learning_rate),
            ("train/grad_norm", step.grad_norm),
            ("train/epoch", step.epoch),
            ("perf/tokens_per_second", step.tokens_per_second),
            ("perf/rss_bytes", step.rss_bytes as f64),
        ]
        .into_iter()
        .chain(step.mean_token_accuracy.map(|share| ("train/mean_token_accuracy", share)))
        .chain(step.gpu_bytes.map(|bytes| ("perf/gpu_bytes", bytes as f64)))
        .collect(),
        Event::Eval(eval) => {
            let accuracy = eval.eval_mean_token_accuracy;
            let accuracy = accuracy.map(|share| ("eval/mean_token_accuracy", share));
            [("eval/loss", eval.eval_loss)].into_iter().chain(accuracy).collect()
        }
        _ => return None,
    };
    let values: Vec<u8> = scalars
        .into_iter()
        .flat_map(|(tag, value)| bytes_field(1, &scalar(tag, value as f32)))
        .collect();
    let mut data = double_field(1, wall_time);
    // Zero is the default of a number and not written.
    if event.step() > 0 {
        data.push(2 << 3);
        data.extend(varint(event.step()));
    }
    data.extend(bytes_field(5, &values));
    Some(data)
}

fn scalar(tag: &str, value: f32) -> Vec<u8> {
    let mut out = bytes_field(1, tag.as_bytes());
    out.push((2 << 3) | 5);
    out.extend(value.to_le_bytes());
    out
}

fn double_field(number: u8, value: f64) -> Vec<u8> {
    let mut out = vec![(number << 3) | 1];
    out.extend(value.to_le_bytes());
    out
}

fn bytes_field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![(number << 3) | 2];
    out.extend(varint(bytes.len() as u64));
    out.extend(bytes);
    out
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut out = length.to_vec();
    out.extend(masked_crc(&length).to_le_bytes());
    out.extend(data);
    out.extend(masked_crc(data).to_le_bytes());
    out
}

fn masked_crc(data: &[u8]) -> u32 {
    const DELTA: u32 = 0xa282_ead8;
    crc32c::crc32c(data).rotate_right(15).wrapping_add(DELTA)
}

fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::events::{EvalEvent, SaveEvent, StepEvent};

    /// `tests/data/report/events.tfevents` was written by TensorBoard's own `EventFileWriter`:
    /// `scripts/golden/gen_tensorboard.py`.
    #[test]
    fn a_file_is_what_tensorboard_writes() {
        let step = Event::Step(StepEvent {
            step: 300,
            epoch: 1.25,
            loss: 2.5,
            learning_rate: 2e-4,
            grad_norm: 0.75,
            tokens_per_second: 203.5,
            rss_bytes: 3 << 30,
            gpu_bytes: None,
            ..StepEvent::default()
        });
        let eval = EvalEvent { step: 0, eval_loss: 3.25, ..EvalEvent::default() };
        let mut bytes = frame(&version(1_700_000_000.5));
        for (event, time) in [(Event::Eval(eval), 1_700_000_001.0), (step, 1_700_000_002.25)] {
            bytes.extend(frame(&record(&event, time).unwrap()));
        }
        assert_eq!(bytes, include_bytes!("../../tests/data/report/events.tfevents"));
        assert!(record(&Event::Save(SaveEvent::default()), 0.0).is_none());
    }

    #[test]
    fn history_keeps_its_pace() {
        let step = |step, elapsed_seconds| {
            Event::Step(StepEvent { step, elapsed_seconds, ..StepEvent::default() })
        };
        let events = [step(1, 2.0), Event::Eval(EvalEvent::default()), step(2, 5.0), step(3, 6.5)];
        assert_eq!(elapsed_seconds(&events), [2.0, 2.0, 5.0, 6.5]);
    }

    #[test]
    fn a_resumed_run_replaces_its_files_and_no_others() {
        let folder = tempfile::tempdir().unwrap();
        let earlier = folder.path().join("events.out.tfevents.1.nibble");
        // What one leaves that is killed before its file has a name.
        let halves =
            [".events.out.tfevents.2.nibble.partial", ".events.out.tfevents.2.nibble.nibble-lock"];
        let halves = halves.map(|name| folder.path().join(name));
        let foreign = folder.path().join("events.out.tfevents.1.elsewhere");
        std::fs::write(&earlier, "").unwrap();
        halves.iter().for_each(|half| std::fs::write(half, "").unwrap());
        std::fs::write(&foreign, "").unwrap();
        let file = EventFile::begin(folder.path(), &[]).unwrap();
        assert!(file.path.exists() && foreign.exists() && !earlier.exists());
        assert!(halves.iter().all(|half| !half.exists()));
    }
}
