//! What a run leaves to look at: `metrics.jsonl`, `trainer_state.json`, TensorBoard events and
//! `report.html`, all made from the same events.

mod chart;
mod html;
mod tensorboard;
mod trainer_state;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::checkpoint::atomic::write_file;
use crate::error::{Error, Result};
use crate::train::events::{Event, RunLog, StartEvent};
use tensorboard::EventFile;

/// One JSON object for each event.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// The state that transformers' `Trainer` writes; LLaMA-Factory and others plot from it.
pub const TRAINER_STATE_FILE: &str = "trainer_state.json";
/// The page for people.
pub const REPORT_FILE: &str = "report.html";
/// Folder of TensorBoard's event files.
pub const TENSORBOARD_FOLDER: &str = "runs";

/// Writes all logs of a run into its output folder.
pub struct Reports {
    folder: PathBuf,
    start: StartEvent,
    events: Vec<Event>,
    metrics: Option<File>,
    tensorboard: Option<EventFile>,
}

impl Reports {
    /// Logs in `folder`; files are made with the first event.
    pub fn new(folder: &Path) -> Self {
        Reports {
            folder: folder.to_path_buf(),
            start: StartEvent::default(),
            events: Vec::new(),
            metrics: None,
            tensorboard: None,
        }
    }

    /// Starts all files anew; a resumed run's are rebuilt from its history, so that nothing after
    /// the checkpoint stays in them.
    fn begin(&mut self, start: &StartEvent) -> Result<()> {
        let path = self.folder.join(METRICS_FILE);
        self.metrics = Some(File::create(&path).map_err(|e| Error::io("create", &path, e))?);
        let runs = self.folder.join(TENSORBOARD_FOLDER);
        if runs.exists() {
            std::fs::remove_dir_all(&runs).map_err(|e| Error::io("remove", &runs, e))?;
        }
        std::fs::create_dir_all(&runs).map_err(|e| Error::io("create", &runs, e))?;
        self.tensorboard = Some(EventFile::create(&runs)?);
        self.start = StartEvent { history: Vec::new(), ..start.clone() };
        self.append(&Event::Start(self.start.clone()))?;
        for event in &start.history {
            self.append(event)?;
            self.events.push(event.clone());
        }
        Ok(())
    }

    fn append(&mut self, event: &Event) -> Result<()> {
        let path = self.folder.join(METRICS_FILE);
        let line = serde_json::to_string(event).expect("events serialize");
        if let Some(file) = &mut self.metrics {
            writeln!(file, "{line}").map_err(|e| Error::io("write", &path, e))?;
        }
        if let Some(file) = &mut self.tensorboard {
            file.record(event)?;
        }
        Ok(())
    }

    /// The files that are written whole.
    fn summarize(&self) -> Result<()> {
        let state = trainer_state::render(&self.start, &self.events);
        write_file(&self.folder.join(TRAINER_STATE_FILE), state.as_bytes())?;
        let page = html::render(&self.start, &self.events);
        write_file(&self.folder.join(REPORT_FILE), page.as_bytes())
    }
}

impl RunLog for Reports {
    fn record(&mut self, event: &Event) -> Result<()> {
        if let Event::Start(start) = event {
            return self.begin(start);
        }
        self.append(event)?;
        self.events.push(event.clone());
        match event {
            Event::Eval(_) | Event::Save(_) | Event::End(_) => self.summarize(),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::events::{EndEvent, EvalEvent, SampleEvent, StepEvent};

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
            ..StepEvent::default()
        })
    }

    #[test]
    fn a_run_leaves_all_its_files() {
        let folder = tempfile::tempdir().unwrap();
        let mut reports = Reports::new(folder.path());
        let plan = vec![("kept activations".to_string(), 1 << 30)];
        let start = StartEvent { max_steps: 2, memory_plan: plan, ..StartEvent::default() };
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
        assert!(page.contains("&lt;b&gt;Hi&lt;/b&gt;") && page.contains("a &amp; b"));
        assert!(!page.contains("<b>Hi") && !page.contains("http"), "self-contained and escaped");

        let history = vec![step(1, 3.5)];
        let resumed = StartEvent { resumed_from_step: Some(1), history, ..start };
        let mut reports = Reports::new(folder.path());
        reports.record(&Event::Start(resumed)).unwrap();
        assert_eq!(read(METRICS_FILE).lines().count(), 2, "what followed the checkpoint is gone");
    }
}
