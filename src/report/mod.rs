//! What a run leaves to look at: `metrics.jsonl`, `trainer_state.json`, TensorBoard events and
//! `report.html`, all made from the same events.

pub mod memory_page;
pub mod metrics;
mod page;
pub mod table;
mod tensorboard;
mod trainer_state;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::checkpoint::atomic::write_file;
use crate::error::{Error, Result};
use crate::train::events::{Event, RunLog, StartEvent};
use metrics::Metrics;
use tensorboard::EventFile;

/// The file with one JSON object for each event.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// The state that transformers' `Trainer` writes; LLaMA-Factory and others plot from it.
pub const TRAINER_STATE_FILE: &str = "trainer_state.json";
/// The page for people.
pub const REPORT_FILE: &str = "report.html";
/// Folder of TensorBoard's event files.
pub const TENSORBOARD_FOLDER: &str = "runs";

/// The files that are written whole are not older than this after a log step.
const SUMMARY_INTERVAL: Duration = Duration::from_secs(30);
/// Evaluations and checkpoints are in them at once where writing takes no more than one part in so many of
/// the time: in a long run it takes a while, and there may be an evaluation every few steps.
const SUMMARY_SHARE: u32 = 20;

/// Writes all logs of a run into its output folder.
pub struct Reports {
    folder: PathBuf,
    open: Option<OpenRun>,
}

/// A run that has begun.
struct OpenRun {
    start: StartEvent,
    /// The events but for `Start`.
    events: Vec<Event>,
    metrics: Metrics,
    tensorboard: EventFile,
    summarized: Summarized,
}

/// When the files that are written whole were, and how long it took.
#[derive(Clone, Copy)]
struct Summarized {
    at: Instant,
    took: Duration,
}

impl Summarized {
    /// Whether they are to be written again after `event`.
    fn is_due(self, event: &Event, now: Instant) -> bool {
        let since = now.saturating_duration_since(self.at);
        match event {
            Event::Start(_) | Event::Sample(_) => false,
            Event::Step(_) => since >= SUMMARY_INTERVAL,
            Event::Eval(_) | Event::Save(_) => {
                since >= SUMMARY_INTERVAL.min(SUMMARY_SHARE * self.took)
            }
            Event::OutOfMemory(_) | Event::End(_) => true,
        }
    }
}

impl Reports {
    /// Logs in `folder`; files are made with the first event.
    pub fn new(folder: &Path) -> Self {
        Reports { folder: folder.to_path_buf(), open: None }
    }

    /// Starts all files anew; a resumed run's are rebuilt from its history, so that nothing after
    /// the checkpoint stays in them.
    fn begin(&mut self, start: &StartEvent) -> Result<()> {
        let events = start.history.clone();
        let start = StartEvent { history: Vec::new(), ..start.clone() };
        let first = Event::Start(start.clone());
        let all = std::iter::once(&first).chain(&events);
        let metrics = Metrics::begin(&self.folder.join(METRICS_FILE), all)?;
        let runs = self.folder.join(TENSORBOARD_FOLDER);
        std::fs::create_dir_all(&runs).map_err(|e| Error::io("create", &runs, e))?;
        let tensorboard = EventFile::begin(&runs, &events)?;
        let summarized = Summarized { at: Instant::now(), took: Duration::ZERO };
        let mut run = OpenRun { start, events, metrics, tensorboard, summarized };
        run.summarize(&self.folder)?;
        self.open = Some(run);
        Ok(())
    }
}

impl OpenRun {
    fn record(&mut self, event: &Event, folder: &Path) -> Result<()> {
        // By its end in the metrics a run is known as finished: all else is written then.
        let is_end = matches!(event, Event::End(_));
        if !is_end {
            self.metrics.record(event)?;
        }
        self.tensorboard.record(event)?;
        self.events.push(event.clone());
        if self.summarized.is_due(event, Instant::now()) {
            self.summarize(folder)?;
        }
        if is_end { self.metrics.record(event) } else { Ok(()) }
    }

    /// The files that are written whole.
    fn summarize(&mut self, folder: &Path) -> Result<()> {
        let begin = Instant::now();
        let state = trainer_state::render(&self.start, &self.events);
        write_file(&folder.join(TRAINER_STATE_FILE), state.as_bytes())?;
        let page = page::render(&self.start, &self.events, folder);
        write_file(&folder.join(REPORT_FILE), page.as_bytes())?;
        self.summarized = Summarized { at: Instant::now(), took: begin.elapsed() };
        Ok(())
    }
}

impl RunLog for Reports {
    fn record(&mut self, event: &Event) -> Result<()> {
        match (event, &mut self.open) {
            (Event::Start(start), _) => self.begin(start),
            (event, Some(run)) => run.record(event, &self.folder),
            (_, None) => Ok(()),
        }
    }
}

/// The page of the run in `folder` that `metrics` (the text of a `metrics.jsonl`) tells of.
///
/// # Errors
/// `Input` naming the line that is no event.
pub fn page_of_metrics(metrics: &str, folder: &Path) -> Result<String> {
    let (mut start, mut events) = (StartEvent::default(), Vec::new());
    for (number, line) in (1..).zip(metrics.lines()) {
        let event = serde_json::from_str(line);
        match event.map_err(|e| Error::input(format_args!("{METRICS_FILE}:{number}: {e}")))? {
            Event::Start(first) => start = first,
            event => events.push(event),
        }
    }
    Ok(page::render(&start, &events, folder))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::events::{EndEvent, EvalEvent, SampleEvent, SaveEvent, StepEvent};

    pub(super) fn step(step: u64, loss: f64) -> Event {
        Event::Step(StepEvent {
            step,
            epoch: step as f64 / 10.0,
            loss,
            learning_rate: 2e-4,
            grad_norm: 0.5,
            num_input_tokens_seen: 2048 * step,
            tokens_per_second: 200.0,
            elapsed_seconds: step as f64,
            rss_bytes: (1 << 30) + (step << 20),
            gpu_bytes: None,
            ..StepEvent::default()
        })
    }

    #[test]
    fn a_run_leaves_all_its_files() {
        let folder = tempfile::tempdir().unwrap();
        let mut reports = Reports::new(folder.path());
        let plan = vec![("kept activations".to_string(), 1 << 30)];
        let words = "2.0 GiB; 1 of 2 blocks".to_string();
        let start =
            StartEvent { max_steps: 2, memory_plan: plan, plan: words, ..StartEvent::default() };
        reports.record(&Event::Start(start.clone())).unwrap();
        reports.record(&step(1, 3.5)).unwrap();
        let eval = EvalEvent { step: 1, eval_loss: 3.25, is_best: true, ..EvalEvent::default() };
        reports.record(&Event::Eval(eval)).unwrap();
        let sample = SampleEvent {
            step: 1,
            prompt: "<b>Hi</b>".into(),
            completion: "a & b".into(),
            ..SampleEvent::default()
        };
        reports.record(&Event::Sample(sample)).unwrap();
        reports.record(&step(2, 3.0)).unwrap();
        let end = EndEvent { step: 2, train_loss: 3.25, ..EndEvent::default() };
        reports.record(&Event::End(end)).unwrap();
        let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
        let metrics = read(METRICS_FILE);
        assert_eq!(metrics.lines().count(), 6);
        assert!(metrics.lines().nth(1).unwrap().contains("\"loss\":3.5"), "{metrics}");
        let state: serde_json::Value = serde_json::from_str(&read(TRAINER_STATE_FILE)).unwrap();
        assert_eq!(state["global_step"], 2);
        assert_eq!(state["best_metric"], 3.25);
        let history = state["log_history"].as_array().unwrap();
        assert_eq!(history.len(), 4);
        assert_eq!(history[0]["loss"], 3.5);
        assert_eq!(history[1]["eval_loss"], 3.25);
        let page = read(REPORT_FILE);
        assert!(page.contains("&lt;b&gt;Hi&lt;&#x2f;b&gt;") && page.contains("a &amp; b"));
        assert!(!page.contains("<b>Hi") && !page.contains("http:"), "self-contained and escaped");
        assert!(page.contains("Plan: 2.0 GiB; 1 of 2 blocks<"), "how memory is used is said");
        assert_eq!(page_of_metrics(&metrics, folder.path()).unwrap(), page, "drawn again");

        drop(reports);
        let history = vec![step(1, 3.5)];
        let resumed = StartEvent { resumed_from_step: Some(1), history, ..start };
        let mut reports = Reports::new(folder.path());
        reports.record(&Event::Start(resumed)).unwrap();
        assert_eq!(read(METRICS_FILE).lines().count(), 2, "what followed the checkpoint is gone");
    }

    /// A session that is killed while it writes its last files has not come to its end.
    #[test]
    fn the_end_is_in_the_metrics_once_all_else_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let mut reports = Reports::new(folder.path());
        reports.record(&Event::Start(StartEvent::default())).unwrap();
        let report = folder.path().join(REPORT_FILE);
        std::fs::remove_file(&report).unwrap();
        std::fs::create_dir(&report).unwrap();
        std::fs::write(report.join("in the way"), "").unwrap();
        let end = Event::End(EndEvent::default());
        assert!(reports.record(&end).is_err());
        let metrics = folder.path().join(METRICS_FILE);
        assert_eq!(metrics::last_end(&metrics), None);
    }

    /// Writing everything at each of thousands of evaluations would take longer than the run.
    #[test]
    fn evaluations_are_summarized_no_more_often_than_it_pays() {
        let at = Instant::now();
        let eval = Event::Eval(EvalEvent::default());
        let save = Event::Save(SaveEvent::default());
        let due = |event: &Event, took: u64, since: u64| {
            let summarized = Summarized { at, took: Duration::from_millis(took) };
            summarized.is_due(event, at + Duration::from_millis(since))
        };
        for event in [&eval, &save] {
            assert_eq!([99, 100].map(|since| due(event, 5, since)), [false, true]);
            assert_eq!([29_999, 30_000].map(|since| due(event, 9000, since)), [false, true]);
        }
        assert_eq!([29_999, 30_000].map(|since| due(&step(1, 1.0), 5, since)), [false, true]);
        assert!(due(&Event::End(EndEvent::default()), 9000, 0));
    }

    #[test]
    fn the_page_has_the_checkpoints_that_are_there() {
        let folder = tempfile::tempdir().unwrap();
        let mut reports = Reports::new(folder.path());
        reports.record(&Event::Start(StartEvent::default())).unwrap();
        for step in [1, 2, 3] {
            let checkpoint = format!("checkpoint-{step}");
            std::fs::create_dir(folder.path().join(&checkpoint)).unwrap();
            let eval = EvalEvent { step, eval_loss: 3.25, ..EvalEvent::default() };
            reports.record(&Event::Eval(eval)).unwrap();
            if step == 3 {
                std::fs::remove_dir(folder.path().join("checkpoint-1")).unwrap();
            }
            let save = SaveEvent { step, checkpoint, bytes: 1 << 20, ..SaveEvent::default() };
            reports.record(&Event::Save(save)).unwrap();
        }
        reports.record(&Event::End(EndEvent::default())).unwrap();
        let page = std::fs::read_to_string(folder.path().join(REPORT_FILE)).unwrap();
        let shown = [1, 2, 3].map(|step| page.contains(&format!("checkpoint-{step}<")));
        assert_eq!(shown, [false, true, true]);
        assert_eq!(
            (page.matches("3.2500").count() >= 3, page.matches("1.0 MiB").count()),
            (true, 2)
        );
    }
}
