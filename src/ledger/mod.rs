//! Where memory really went: a run's phases, and what was in memory in each of them.
//!
//! [`enter`] says what the process is doing now; a [`Recorder`] looks at the process at the end of
//! each phase and a hundred times a second, and keeps the highest figures of each phase. What it reads
//! are the kernel's own accounts (`/proc/self/statm`), so a look costs microseconds and nothing
//! escapes: mapped files, heap, stacks. Windows does not count mapped files apart: theirs are 0 there. On
//! other systems without `/proc` everything measured is 0.

mod control_group;
pub mod pinned;
pub mod resident;
pub mod rows;

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rows::Measured;
use serde::{Deserialize, Serialize};

use crate::plan::WeightParts;
use crate::system::allocator;

/// What a run is doing.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Reads weights and data, allocates.
    #[default]
    Load,
    /// Activations of a micro-batch.
    Forward,
    /// Logits, loss and their gradient.
    Loss,
    /// Gradients of the adapters.
    Backward,
    /// Clipping and AdamW.
    Optimizer,
    /// Scores held-out data or writes sample answers.
    Eval,
    /// Writes a checkpoint.
    Save,
}

impl Phase {
    /// All phases, in the order of a run.
    pub const ALL: [Phase; 7] = [
        Phase::Load,
        Phase::Forward,
        Phase::Loss,
        Phase::Backward,
        Phase::Optimizer,
        Phase::Eval,
        Phase::Save,
    ];

    /// The phase's name in tables.
    pub fn label(self) -> &'static str {
        match self {
            Phase::Load => "load",
            Phase::Forward => "forward",
            Phase::Loss => "loss",
            Phase::Backward => "backward",
            Phase::Optimizer => "optimizer",
            Phase::Eval => "eval",
            Phase::Save => "save",
        }
    }
}

/// What the process is doing now: there is one training run in a process.
static PHASE: AtomicU8 = AtomicU8::new(Phase::Load as u8);

/// Recorders that look where a phase ends: a short one lies between two looks of a recorder's own thread.
static WATCHING: Mutex<Vec<Weak<Shared>>> = Mutex::new(Vec::new());

/// Says that `phase` begins; what the one before had at its end is recorded.
pub fn enter(phase: Phase) {
    if current() == phase {
        return;
    }
    for shared in lock(&WATCHING).iter().filter_map(Weak::upgrade) {
        shared.look();
    }
    PHASE.store(phase as u8, Ordering::Relaxed);
}

fn current() -> Phase {
    Phase::ALL[usize::from(PHASE.load(Ordering::Relaxed)).min(Phase::ALL.len() - 1)]
}

/// The memory of the process at a time.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Sample {
    /// Seconds since the recorder started.
    pub seconds: f64,
    /// What the process was doing.
    pub phase: Phase,
    /// Bytes in memory.
    pub resident_bytes: u64,
    /// Bytes of mapped files among these: program, libraries, weights.
    pub file_bytes: u64,
}

impl Sample {
    /// Bytes that no file backs.
    pub fn anonymous_bytes(&self) -> u64 {
        self.resident_bytes.saturating_sub(self.file_bytes)
    }

    /// The process now.
    pub fn now(start: Instant) -> Self {
        let (resident_bytes, file_bytes) = resident::now_and_files();
        let seconds = start.elapsed().as_secs_f64();
        Sample { seconds, phase: current(), resident_bytes, file_bytes }
    }
}

/// What a recorder saw.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Record {
    /// Samples in order of time; thinned where the run is long, without losing a phase's highest.
    pub samples: Vec<Sample>,
    /// The highest resident and the highest file bytes of each phase that was seen.
    pub peaks: Vec<Sample>,
    /// Seconds for which there is one sample, the highest.
    #[serde(skip)]
    spacing_seconds: f64,
}

impl Record {
    /// The highest bytes of mapped files once everything was loaded: loading looks at all of them.
    pub fn peak_file_bytes(&self) -> u64 {
        let steps = self.peaks.iter().filter(|peak| peak.phase != Phase::Load);
        steps.map(|peak| peak.file_bytes).max().unwrap_or(0)
    }

    /// The highest resident bytes of `phase`.
    pub fn peak_of(&self, phase: Phase) -> Option<u64> {
        self.peaks.iter().find(|peak| peak.phase == phase).map(|peak| peak.resident_bytes)
    }

    /// Adds that `used_bytes` of a GPU are in use now.
    pub fn add_now(&mut self, start: Instant, used_bytes: u64) {
        let seconds = start.elapsed().as_secs_f64();
        self.add(Sample { seconds, phase: current(), resident_bytes: used_bytes, file_bytes: 0 });
        if self.samples.len() > MOST_SHOWN {
            self.thin();
        }
    }

    fn add(&mut self, sample: Sample) {
        match self.peaks.iter_mut().find(|peak| peak.phase == sample.phase) {
            Some(peak) => {
                if sample.resident_bytes > peak.resident_bytes {
                    peak.seconds = sample.seconds;
                }
                peak.resident_bytes = peak.resident_bytes.max(sample.resident_bytes);
                peak.file_bytes = peak.file_bytes.max(sample.file_bytes);
            }
            None => self.peaks.push(sample),
        }
        let stretch = |sample: &Sample| (sample.seconds / self.spacing_seconds).floor();
        match self.samples.last_mut() {
            Some(last) if self.spacing_seconds > 0.0 && stretch(last) == stretch(&sample) => {
                if sample.resident_bytes > last.resident_bytes {
                    *last = sample;
                }
            }
            _ => self.samples.push(sample),
        }
        if self.samples.len() > MOST_SAMPLES {
            self.thin();
            self.spacing_seconds = (2.0 * self.spacing_seconds).max(INTERVAL.as_secs_f64());
        }
    }

    /// Keeps the higher one of every two neighbours. Peaks are apart: they lose nothing.
    fn thin(&mut self) {
        let higher = |pair: &[Sample]| match pair {
            [a, b] if a.resident_bytes > b.resident_bytes => *a,
            _ => pair[pair.len() - 1],
        };
        self.samples = self.samples.chunks(2).map(higher).collect();
    }
}

/// Time between two looks at the process.
const INTERVAL: Duration = Duration::from_millis(10);
/// Samples of a record from which on fewer are kept than are seen.
const MOST_SAMPLES: usize = 1500;

/// Samples of a finished record, at most: enough for a picture.
const MOST_SHOWN: usize = 400;

/// What a recorder's thread and the ends of phases add to.
struct Shared {
    start: Instant,
    record: Mutex<Record>,
    stopped: AtomicBool,
}

impl Shared {
    fn look(&self) -> Sample {
        // Under the lock, so that samples are in order of time.
        let mut record = lock(&self.record);
        let sample = Sample::now(self.start);
        record.add(sample);
        sample
    }
}

/// Watches the process from its own thread, and where phases end, until it is stopped or dropped.
pub struct Recorder {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Recorder {
    /// Starts to watch. Where no thread can be had, it sees only ends of phases, and what
    /// [`Recorder::look`] is called for.
    pub fn start() -> Self {
        let (record, stopped) = (Mutex::new(Record::default()), AtomicBool::new(false));
        let shared = Arc::new(Shared { start: Instant::now(), record, stopped });
        {
            let mut watching = lock(&WATCHING);
            watching.retain(|other| other.strong_count() > 0);
            watching.push(Arc::downgrade(&shared));
        }
        let watched = shared.clone();
        let watch = move || {
            while !watched.stopped.load(Ordering::Relaxed) {
                watched.look();
                std::thread::park_timeout(INTERVAL);
            }
        };
        let thread = std::thread::Builder::new().name("ledger".into()).spawn(watch).ok();
        Recorder { shared, thread }
    }

    /// Looks now, however long ago the last look was; returns what it saw.
    pub fn look(&self) -> Sample {
        self.shared.look()
    }

    /// What was seen so far.
    pub fn record(&self) -> Record {
        lock(&self.shared.record).clone()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It only reads numbers: a panic in it would lose no work.
            let _ = thread.join();
        }
    }
}

/// Watches a run from before its weights are read.
pub struct Watch {
    recorder: Recorder,
    before: Sample,
    loaded: Sample,
}

impl Watch {
    /// Begins to watch, before weights are read.
    pub fn begin() -> Self {
        let recorder = Recorder::start();
        let before = recorder.look();
        Watch { recorder, before, loaded: before }
    }

    /// Notes that weights were read, before anything else is allocated.
    pub fn loaded(&mut self) {
        self.loaded = self.recorder.look();
    }

    /// The process now.
    pub fn look(&self) -> Sample {
        self.recorder.look()
    }

    /// The most that frozen weights had in memory at a time: their files' pages, and what was copied.
    pub fn most_weight_bytes(&self) -> u64 {
        let copied = self.loaded.anonymous_bytes().saturating_sub(self.before.anonymous_bytes());
        let files = self.recorder.record().peak_file_bytes();
        copied + files.saturating_sub(self.before.file_bytes)
    }

    /// What was measured so far; `weights` and `region_bytes` are the model's and the arena's
    /// accounts of themselves.
    pub fn measured(&self, weights: WeightParts, region_bytes: Vec<u64>) -> Measured {
        self.recorder.look();
        let mut record = self.recorder.record();
        while record.samples.len() > MOST_SHOWN {
            record.thin();
        }
        let peak_bytes = resident::peak_bytes();
        let free_heap_bytes = allocator::free_heap_bytes();
        let host = None;
        let before_bytes = None;
        Measured { before_bytes, weights, free_heap_bytes, region_bytes, peak_bytes, host, record }
    }
}

/// Locks what is whole after every statement, so that a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
