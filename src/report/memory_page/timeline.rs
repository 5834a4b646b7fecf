//! Memory over a run's time: parts as planned to be in use by then, what was measured, and the
//! phases below.

use serde::Serialize;

use super::colours::colour;
use super::{percent, size};
use crate::figures::clock;
use crate::ledger::rows::Account;
use crate::ledger::{Phase, Sample};

/// Resident memory over time, in a box of 100 by 100.
#[derive(Debug, Serialize)]
pub(super) struct Timeline {
    /// Line of all memory.
    resident: String,
    /// Line of the mapped files' part; a GPU maps none.
    file: Option<String>,
    /// Colour and outline of each part, stacked: what is planned to be in use by then.
    layers: Vec<(usize, String)>,
    /// What hovering shows: begin, width, text.
    columns: Vec<(String, String, String)>,
    /// The most that was measured.
    peak: String,
    /// The plan: place from above, size.
    planned: Option<(String, String)>,
    /// Rows of the scale: place from above, size.
    scale: Vec<(String, String)>,
    /// The first step and what comes behind it: begin, width, name.
    bands: Vec<(String, String, &'static str, String)>,
    seconds: String,
}

/// The chart of what was measured over time; none where nothing was.
pub(super) fn timeline(account: &Account) -> Option<Timeline> {
    let samples = &account.record.samples;
    let last = samples.last()?.seconds.max(1e-3);
    let planned = account.planned_bytes();
    let seen = samples.iter().map(|sample| sample.resident_bytes).max().unwrap_or(0);
    let top = seen.max(planned).max(1) as f64 * 1.05;
    let down = |bytes: u64| percent(top - bytes as f64, top);
    let across = |seconds: f64| percent(seconds, last);
    let line = |bytes: &dyn Fn(&Sample) -> u64| {
        let point = |sample: &Sample| format!("{} {}", across(sample.seconds), down(bytes(sample)));
        let points: Vec<String> = samples.iter().map(point).collect();
        format!("M{}", points.join("L"))
    };
    const ROWS: u64 = 4;
    let step = round_up(top as u64 / ROWS);
    let scale = (1..=ROWS).map(|row| row * step).filter(|&bytes| (bytes as f64) < top);
    let mapped = samples.iter().any(|sample| sample.file_bytes > 0);
    Some(Timeline {
        resident: line(&|sample| sample.resident_bytes),
        file: mapped.then(|| line(&|sample| sample.file_bytes)),
        layers: layers(account, last, top),
        columns: columns(account, last),
        peak: size(account.peak_bytes.unwrap_or(0).max(seen)),
        planned: (planned > 0).then(|| (down(planned), size(planned))),
        scale: scale.map(|bytes| (down(bytes), size(bytes).replace(".0 ", " "))).collect(),
        bands: bands(samples, last),
        seconds: if last < 120.0 { format!("{last:.1} s") } else { clock(last) },
    })
}

/// The smallest number that is no less than `bytes`, of those that are one or three quarters of a power of
/// two.
fn round_up(bytes: u64) -> u64 {
    let power = bytes.max(1).next_power_of_two();
    if power - power / 4 >= bytes { power - power / 4 } else { power }
}

/// Bytes of each part that are planned to be in use at each sample: by a phase that has begun.
fn in_use(account: &Account) -> Vec<Vec<u64>> {
    let mut used = vec![0; account.rows.len()];
    let by_then = |sample: &Sample| {
        let phase = account.phases.iter().find(|row| row.phase == sample.phase);
        for (used, bytes) in used.iter_mut().zip(phase.map_or(&[][..], |row| &row.planned_bytes)) {
            *used = (*used).max(*bytes);
        }
        used.clone()
    };
    account.record.samples.iter().map(by_then).collect()
}

/// Outlines of the parts, one on the other: steps where a phase begins for the first time.
fn layers(account: &Account, last: f64, top: f64) -> Vec<(usize, String)> {
    let samples = &account.record.samples;
    let mut steps: Vec<(f64, Vec<u64>)> = Vec::new();
    for (index, used) in in_use(account).into_iter().enumerate() {
        // From the sample before on: this one is of the phase's end, or later.
        let begin = samples[index.saturating_sub(1)].seconds;
        if steps.last().is_none_or(|(_, before)| *before != used) {
            steps.push((begin, used));
        }
    }
    let mut below = vec![0; steps.len()];
    let mut layers = Vec::new();
    for (part, row) in account.rows.iter().enumerate() {
        let above: Vec<u64> =
            below.iter().zip(&steps).map(|(sum, step)| sum + step.1[part]).collect();
        if above != below {
            let edge = |heights: &[u64]| {
                let ends = steps.iter().skip(1).map(|step| step.0).chain([last]);
                let mut points = Vec::new();
                for ((step, end), &bytes) in steps.iter().zip(ends).zip(heights) {
                    let height = percent(top - bytes as f64, top);
                    points.push(format!("{} {height}", percent(step.0, last)));
                    points.push(format!("{} {height}", percent(end, last)));
                }
                points
            };
            let back = edge(&below).into_iter().rev();
            let points: Vec<String> = edge(&above).into_iter().chain(back).collect();
            layers.push((colour(&row.name), format!("M{}Z", points.join("L"))));
        }
        below = above;
    }
    layers
}

/// Around each sample, half the way to its neighbours.
fn columns(account: &Account, last: f64) -> Vec<(String, String, String)> {
    let samples = &account.record.samples;
    let between = |a: usize, b: usize| (samples[a].seconds + samples[b].seconds) / 2.0;
    let column = |(index, used): (usize, Vec<u64>)| {
        let sample = &samples[index];
        let begin = if index == 0 { 0.0 } else { between(index - 1, index) };
        let end = if index + 1 < samples.len() { between(index, index + 1) } else { last };
        let planned: u64 = used.iter().sum();
        let files = match sample.file_bytes {
            0 => String::new(),
            bytes => format!(", {} of it file-backed", size(bytes)),
        };
        let text = format!(
            "{:.2} s, {}: {}{files}; planned by then {}",
            sample.seconds,
            sample.phase.label(),
            size(sample.resident_bytes),
            size(planned)
        );
        (percent(begin, last), percent(end - begin, last), text)
    };
    in_use(account).into_iter().enumerate().map(column).collect()
}

/// Stretches of one phase, those too narrow to see left out; none where that is most of them.
fn bands(samples: &[Sample], last: f64) -> Vec<(String, String, &'static str, String)> {
    const NARROWEST: f64 = 0.004;
    const LEAST: f64 = 0.6;
    let mut bands: Vec<(f64, f64, Phase)> = Vec::new();
    for pair in samples.windows(2) {
        // A phase is looked at where it ends.
        let (begin, end, phase) = (pair[0].seconds, pair[1].seconds, pair[1].phase);
        match bands.last_mut() {
            Some(band) if band.2 == phase => band.1 = end,
            _ => bands.push((begin, end, phase)),
        }
    }
    bands.retain(|(begin, end, _)| end - begin >= NARROWEST * last);
    if bands.iter().map(|(begin, end, _)| end - begin).sum::<f64>() < LEAST * last {
        return Vec::new();
    }
    bands
        .into_iter()
        .map(|(begin, end, phase)| {
            let title = format!("{}: {begin:.2} to {end:.2} s", phase.label());
            (percent(begin, last), percent(end - begin, last), phase.label(), title)
        })
        .collect()
}
