//! The events of a run by their kind, and the curves made from them.

use std::path::Path;

use serde::Serialize;

use super::axis::tick_number;
use super::chart::{Chart, Frame, Mark, Series, chart};
use super::smooth::smooth;
use crate::byte_size::ByteSize;
use crate::figures::{clock, number, rate, scientific, short_count, thousands};
use crate::plural::noun;
use crate::train::events::{
    EndEvent, EndReason, EvalEvent, Event, OutOfMemoryEvent, ParameterCounts, SampleEvent,
    SaveEvent, StartEvent, StepEvent,
};

/// Epochs whose ends are marked; more would hide the curve.
const MOST_MARKED_EPOCHS: u64 = 8;

/// A run to show.
pub struct Run<'a> {
    pub(super) start: &'a StartEvent,
    pub(super) steps: Vec<&'a StepEvent>,
    pub(super) evals: Vec<&'a EvalEvent>,
    pub(super) samples: Vec<&'a SampleEvent>,
    pub(super) saves: Vec<&'a SaveEvent>,
    pub(super) out_of_memory: Vec<&'a OutOfMemoryEvent>,
    pub(super) end: Option<&'a EndEvent>,
}

/// What stands on top.
#[derive(Serialize)]
pub struct Heading {
    model: String,
    state: &'static str,
    /// CSS class: the state's colour.
    class: &'static str,
    note: Option<String>,
    step: String,
    max_steps: String,
    percent: f64,
    facts: Vec<String>,
}

/// A figure with a name.
#[derive(Serialize)]
pub struct Tile {
    label: &'static str,
    value: String,
    note: String,
}

impl<'a> Run<'a> {
    /// Sorts `events`; of the checkpoints it has those that are in `folder` still.
    pub fn of(start: &'a StartEvent, events: &'a [Event], folder: &Path) -> Self {
        let mut run = Run {
            start,
            steps: Vec::new(),
            evals: Vec::new(),
            samples: Vec::new(),
            saves: Vec::new(),
            out_of_memory: Vec::new(),
            end: None,
        };
        for event in events {
            match event {
                Event::Start(_) => {}
                Event::Step(step) => run.steps.push(step),
                Event::Eval(eval) => run.evals.push(eval),
                Event::Sample(sample) => run.samples.push(sample),
                Event::Save(save) if folder.join(&save.checkpoint).exists() => run.saves.push(save),
                Event::Save(_) => {}
                Event::OutOfMemory(event) => run.out_of_memory.push(event),
                Event::End(end) => run.end = Some(end),
            }
        }
        run
    }

    /// State of the run and what it trains.
    pub fn heading(&self) -> Heading {
        let (state, class, note) = match self.end.map(|end| end.reason) {
            None => ("running", "running", None),
            Some(EndReason::Finished) => ("finished", "good", None),
            Some(EndReason::EarlyStopping) => {
                ("stopped early", "good", Some("the evaluation loss no longer fell".to_string()))
            }
            Some(EndReason::Interrupted) => {
                ("interrupted", "paused", Some("--resume continues it bit for bit".to_string()))
            }
        };
        let (step, max_steps) = (self.last_step(), self.start.max_steps);
        Heading {
            model: file_name(&self.start.model).to_string(),
            state,
            class,
            note,
            step: thousands(step),
            max_steps: thousands(max_steps),
            percent: 100.0 * step as f64 / max_steps.max(1) as f64,
            facts: self.facts(),
        }
    }

    fn facts(&self) -> Vec<String> {
        let setting = |name: &str| {
            let value = self.start.settings.get(name)?;
            Some(value.as_str().map_or_else(|| value.to_string(), str::to_string))
        };
        let mut facts = Vec::new();
        if !self.start.device.is_empty() {
            facts.push(format!("on {}", self.start.device));
        }
        if let (Some(r), Some(alpha)) = (setting("lora_r"), setting("lora_alpha")) {
            facts.push(format!("LoRA r {r}, alpha {alpha}"));
        }
        let ParameterCounts { trained, total } = self.start.parameters;
        if trained > 0 && total > 0 {
            let share = 100.0 * trained as f64 / total as f64;
            let (trained, total) = (short_count(trained), short_count(total));
            facts.push(format!("{trained} of {total} parameters trained ({share:.2} %)"));
        }
        let rows = self.start.train_batch_size * self.start.gradient_accumulation_steps;
        if rows > 0 {
            facts.push(format!("{rows} {} per step", noun(rows, "sequence")));
        }
        if let Some(step) = self.start.resumed_from_step {
            facts.push(format!("resumed at step {}", thousands(step)));
        }
        facts
    }

    pub(super) fn last_step(&self) -> u64 {
        let steps = self.steps.last().map(|step| step.step);
        steps.into_iter().chain(self.end.map(|end| end.step)).max().unwrap_or(0)
    }

    fn on_gpu(&self) -> bool {
        self.steps.iter().any(|step| step.gpu_bytes.is_some())
    }

    /// Highest memory where the model is: of the process, or of the GPU as seen.
    pub(super) fn peak_bytes(&self) -> Option<u64> {
        let seen = self.steps.iter().map(|step| step.memory_bytes()).max();
        if self.on_gpu() {
            return seen;
        }
        self.end.map(|end| end.peak_rss_bytes).filter(|&peak| peak > 0).max(seen)
    }

    pub(super) fn planned_bytes(&self) -> Option<u64> {
        let plan = &self.start.memory_plan;
        (!plan.is_empty()).then(|| plan.iter().map(|(_, bytes)| bytes).sum())
    }

    /// The figures that one looks for first.
    pub fn tiles(&self) -> Vec<Tile> {
        let mut tiles = Vec::new();
        let mut tile = |label, value, note: String| tiles.push(Tile { label, value, note });
        if let (Some(first), Some(last)) = (self.steps.first(), self.steps.last()) {
            let note = format!("{} at step {}", number(first.loss, 4), thousands(first.step));
            tile("training loss", number(last.loss, 4), note);
        }
        let best = self.evals.iter().min_by(|a, b| a.eval_loss.total_cmp(&b.eval_loss));
        if let Some(best) = best {
            let perplexity = perplexity(best.eval_loss);
            let note = format!("perplexity {perplexity}");
            tile("best evaluation loss", number(best.eval_loss, 4), note);
        }
        if let Some(last) = self.steps.last() {
            let tokens = last.num_input_tokens_seen;
            let share = 100.0 * last.num_target_tokens_seen as f64 / tokens.max(1) as f64;
            tile("tokens seen", short_count(tokens), format!("{share:.0} % of them trained"));
            let speed = self.end.map_or(last.tokens_per_second, |end| end.tokens_per_second);
            let span = if self.end.is_some() { "whole run" } else { "last log line" };
            tile("tokens per second", rate(speed), span.to_string());
            let epochs = format!("{:.2} epochs", last.epoch);
            tile("training time", clock(last.elapsed_seconds), epochs);
        }
        if let Some(peak) = self.peak_bytes() {
            let plan = self.planned_bytes().map(|bytes| format!("planned {}", ByteSize(bytes)));
            tile("peak memory", ByteSize(peak).to_string(), plan.unwrap_or_default());
        }
        tiles
    }

    fn line(&self, value: fn(&StepEvent) -> f64) -> Vec<(f64, f64)> {
        self.steps.iter().map(|step| (step.step as f64, value(step))).collect()
    }

    /// Ends of epochs, and where the run was resumed.
    fn marks(&self) -> Vec<Mark> {
        let (per_epoch, last) = (self.start.steps_per_epoch, self.last_step());
        let epochs = last.checked_div(per_epoch).unwrap_or(0);
        let mut marks = Vec::new();
        if epochs <= MOST_MARKED_EPOCHS {
            let ends = (1..=epochs).map(|epoch| (epoch, epoch * per_epoch));
            let inside = ends.filter(|(_, step)| *step < last);
            marks.extend(inside.map(|(epoch, step)| Mark {
                step: step as f64,
                kind: "epoch ",
                name: epoch.to_string(),
                class: "epoch",
            }));
        }
        let resumed = self.start.resumed_from_step.filter(|&step| step < last);
        marks.extend(resumed.map(|step| Mark {
            step: step as f64,
            kind: "",
            name: "resumed".to_string(),
            class: "resumed",
        }));
        marks
    }

    /// The curve of the loss.
    pub fn loss_chart(&self) -> Option<Chart> {
        let training = self.line(|step| step.loss);
        let smoothed = smooth(&training);
        let class = if smoothed.is_some() { "a faint" } else { "a" };
        let mut series = vec![Series { class, name: "training", points: training }];
        if let Some(points) = smoothed {
            series.push(Series { class: "a", name: "training, smoothed", points });
        }
        if !self.evals.is_empty() {
            let points = self.evals.iter().map(|eval| (eval.step as f64, eval.eval_loss));
            series.push(Series { class: "b", name: "evaluation", points: points.collect() });
        }
        let marks = self.marks();
        let frame = self.frame("Loss", &|value| number(value, 4));
        chart(series, &Frame { marks: &marks, logarithmic: true, ..frame })
    }

    fn frame<'f>(&self, title: &'static str, format: &'f dyn Fn(f64) -> String) -> Frame<'f> {
        let last_step = self.last_step() as f64;
        Frame {
            title,
            last_step,
            from_zero: false,
            logarithmic: false,
            unit: 1.0,
            format,
            tick: tick_number,
            reference: None,
            marks: &[],
        }
    }

    /// The curves beside that of the loss.
    pub fn charts(&self) -> Vec<Chart> {
        let one = |name, points| vec![Series { class: "a", name, points }];
        let from_zero = |frame| Frame { from_zero: true, ..frame };
        let learning = self.frame("Learning rate", &scientific);
        let learning = Frame { tick: |value, _| scientific(value), ..from_zero(learning) };
        let three_decimals = |value: f64| number(value, 3);
        let norm = from_zero(self.frame("Gradient norm", &three_decimals));
        let whole = |value: f64| match value {
            1000.0.. => thousands(value.round() as u64),
            _ => rate(value),
        };
        let speed = from_zero(self.frame("Tokens per second", &whole));
        let charts = [
            self.accuracy_chart(),
            chart(one("rate", self.line(|step| step.learning_rate)), &learning),
            chart(one("before clipping", self.line(|step| step.grad_norm)), &norm),
            chart(one("speed", self.line(|step| step.tokens_per_second)), &speed),
        ];
        charts.into_iter().flatten().collect()
    }

    /// Shares of tokens that the model would have chosen, where a run counted them.
    fn accuracy_chart(&self) -> Option<Chart> {
        let point = |step: u64, share: Option<f64>| share.map(|share| (step as f64, share));
        let training =
            self.steps.iter().filter_map(|step| point(step.step, step.mean_token_accuracy));
        let evaluation =
            self.evals.iter().filter_map(|eval| point(eval.step, eval.eval_mean_token_accuracy));
        let curves: [(_, _, Vec<_>); 2] =
            [("a", "training", training.collect()), ("b", "evaluation", evaluation.collect())];
        let series = curves.map(|(class, name, points)| Series { class, name, points });
        let series = series.into_iter().filter(|series| !series.points.is_empty());
        let frame = self.frame("Token accuracy", &percent);
        let frame = Frame { from_zero: true, tick: |value, _| percent(value), ..frame };
        chart(series.collect(), &frame)
    }

    /// Resident memory over the run, below the plan.
    pub(super) fn memory_chart(&self) -> Option<Chart> {
        let points = self.line(|step| step.memory_bytes() as f64);
        let (title, name) = match self.on_gpu() {
            true => ("Memory of the GPU, by step", "in use"),
            false => ("Memory of the process, by step", "resident"),
        };
        fn size(value: f64) -> String {
            ByteSize(value.max(0.0) as u64).to_string()
        }
        let reference = self.planned_bytes().map(|bytes| ("planned", bytes as f64));
        let largest = self.planned_bytes().max(self.peak_bytes()).unwrap_or(0);
        let unit = if largest < 1 << 30 { 1u64 << 20 } else { 1 << 30 } as f64;
        let frame = Frame { tick: |value, _| size(value), ..self.frame(title, &size) };
        let series = vec![Series { class: "m", name, points }];
        chart(series, &Frame { from_zero: true, unit, reference, ..frame })
    }
}

/// A share.
pub(super) fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// The last part of a path.
fn file_name(path: &str) -> &str {
    let name = Path::new(path).file_name().and_then(|name| name.to_str());
    name.unwrap_or(path)
}

/// `e^loss`, which soon has too many digits to read.
pub(super) fn perplexity(loss: f64) -> String {
    number(loss.exp(), 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A large model on a small machine, near the end of its training.
    #[test]
    fn slow_runs_and_small_losses_keep_their_digits() {
        let step = StepEvent {
            step: 1,
            loss: 4.21e-5,
            grad_norm: 1.2e-4,
            tokens_per_second: 0.46,
            ..StepEvent::default()
        };
        let (start, events) = (StartEvent::default(), [Event::Step(step)]);
        let run = Run::of(&start, &events, Path::new("run"));
        let text = serde_json::to_string(&(run.tiles(), run.loss_chart(), run.charts())).unwrap();
        for shown in ["4.21e-5", "1.2e-4", "0.46"] {
            assert!(text.contains(&format!("\"{shown}\"")), "{shown}: {text}");
        }
        assert_eq!(perplexity(0.5), "1.649");
    }

    #[test]
    fn epochs_and_the_resumption_are_marked_inside_the_curve() {
        let start = StartEvent {
            steps_per_epoch: 10,
            resumed_from_step: Some(12),
            ..StartEvent::default()
        };
        let events: Vec<Event> =
            (1..=30).map(|step| Event::Step(StepEvent { step, ..StepEvent::default() })).collect();
        let marks = Run::of(&start, &events, Path::new("run")).marks();
        let shown: Vec<_> =
            marks.iter().map(|mark| (mark.step, mark.kind, mark.name.as_str())).collect();
        assert_eq!(shown, [(10.0, "epoch ", "1"), (20.0, "epoch ", "2"), (12.0, "", "resumed")]);
    }
}
