//! TensorBoard event files.
//!
//! A record is `length u64 | masked CRC32C of length | data | masked CRC32C of data`; data is an
//! `Event` protobuf: `1: wall_time double, 2: step int64, 3: file_version string, 5: summary`, with
//! `Summary.value (1) { tag (1) string, simple_value (2) float }`. Source: TensorFlow
//! `record_writer.cc`, `event.proto`, `summary.proto`.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};
use crate::train::events::Event;

/// An open event file.
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Makes a file in `folder`.
    ///
    /// # Errors
    /// `Io` when the disk refuses.
    pub fn create(folder: &Path) -> Result<Self> {
        let path = folder.join(format!("events.out.tfevents.{}.nibble", wall_time() as u64));
        let file = File::create(&path).map_err(|e| Error::io("create", &path, e))?;
        let mut events = EventFile { path, file };
        let mut version = double_field(1, wall_time());
        version.extend(bytes_field(3, b"brain.Event:2"));
        events.write(&version)?;
        Ok(events)
    }

    /// Writes the scalars of an event.
    ///
    /// # Errors
    /// `Io` when the disk refuses.
    pub fn record(&mut self, event: &Event) -> Result<()> {
        let scalars: Vec<(&str, f64)> = match event {
            Event::Step(step) => vec![
                ("train/loss", step.loss),
                ("train/learning_rate", step.learning_rate),
                ("train/grad_norm", step.grad_norm),
                ("train/epoch", step.epoch),
                ("perf/tokens_per_second", step.tokens_per_second),
                ("perf/rss_bytes", step.rss_bytes as f64),
            ],
            Event::Eval(eval) => vec![("eval/loss", eval.eval_loss)],
            _ => return Ok(()),
        };
        let values: Vec<u8> = scalars
            .into_iter()
            .flat_map(|(tag, value)| bytes_field(1, &scalar(tag, value as f32)))
            .collect();
        let mut data = double_field(1, wall_time());
        data.push(2 << 3);
        data.extend(varint(event.step()));
        data.extend(bytes_field(5, &values));
        self.write(&data)
    }

    fn write(&mut self, data: &[u8]) -> Result<()> {
        let framed = frame(data);
        self.file.write_all(&framed).map_err(|e| Error::io("write", &self.path, e))
    }
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

    #[test]
    fn a_record_is_framed_as_tensorflow_does() {
        // CRC32C of eight zero bytes is 0x8c28b28a; the frame of an empty record holds its mask.
        assert_eq!(crc32c::crc32c(&[0; 8]), 0x8c28_b28a);
        let expected = 0x8c28_b28au32.rotate_right(15).wrapping_add(0xa282_ead8);
        let framed = frame(&[]);
        assert_eq!(framed[8..12], expected.to_le_bytes());
        assert_eq!(framed[12..], 0xa282_ead8u32.to_le_bytes());
    }

    #[test]
    fn a_scalar_is_a_tag_and_a_float() {
        assert_eq!(scalar("a", 1.0), [0x0a, 1, b'a', 0x15, 0, 0, 0x80, 0x3f]);
        assert_eq!(varint(300), [0xac, 0x02]);
    }
}
