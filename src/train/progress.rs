//! The live line on stderr; plain lines where stderr is not a terminal.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::events::{EvalEvent, OutOfMemoryEvent, SampleEvent, SaveEvent, StepEvent};
use super::start::{OtherLength, Start};
use crate::byte_size::ByteSize;
use crate::figures::{clock, number, rate};

/// Where a run shows itself.
pub struct Progress {
    max_steps: u64,
    output: Output,
}

/// Plain lines about an evaluation are so far apart.
const EVALUATION_LINES: Duration = Duration::from_secs(30);

/// How far an evaluation is, shown while it lasts.
pub struct Evaluation<'a> {
    progress: &'a Progress,
    /// What the live line said before.
    before: String,
    step: u64,
    batches: usize,
    start: Instant,
    shown: Instant,
}

enum Output {
    Live(ProgressBar),
    Plain,
    Silent,
}

impl Progress {
    /// Progress on stderr: live on a terminal, else a line for each log step.
    pub fn stderr() -> Self {
        if !std::io::stderr().is_terminal() {
            return Progress { max_steps: 0, output: Output::Plain };
        }
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template("{bar:12} {wide_msg}");
        bar.set_style(style.expect("the template is valid").progress_chars("━╸─"));
        Progress { max_steps: 0, output: Output::Live(bar) }
    }

    /// Nowhere, for tests.
    pub fn silent() -> Self {
        Progress { max_steps: 0, output: Output::Silent }
    }

    /// The run begins, or continues.
    pub fn begin(&mut self, start: &Start) {
        self.max_steps = start.state.max_steps;
        if start.rounding_differs {
            self.note("another machine or another plan rounds differently: the run continues, but not bit for bit");
        }
        if let Some(OtherLength { max_steps: [was, now], rates: [rate_was, rate] }) =
            start.other_length
        {
            let mut text = format!("{now} steps instead of {was}");
            if start.state.step >= now {
                text += ": none is left";
            } else if rate != rate_was {
                text += &format!(
                    ": the learning rate goes on at {rate:.2e}, as in a run of that length, not at \
                     {rate_was:.2e}"
                );
            }
            self.note(&text);
        }
        if let Output::Live(bar) = &self.output {
            bar.set_length(self.max_steps);
            bar.set_position(start.state.step);
        }
    }

    /// A log step was made; `eta_seconds` are left.
    pub fn step(&self, event: &StepEvent, eta_seconds: f64) {
        let line = step_line(event, self.max_steps, eta_seconds);
        match &self.output {
            Output::Live(bar) => {
                bar.set_position(event.step);
                bar.set_message(line);
            }
            Output::Plain => eprintln!("{line}"),
            Output::Silent => {}
        }
    }

    /// An evaluation of `batches` after step `step` begins.
    pub fn evaluation(&self, step: u64, batches: usize) -> Evaluation<'_> {
        let now = Instant::now();
        let before = match &self.output {
            Output::Live(bar) => bar.message(),
            Output::Plain | Output::Silent => String::new(),
        };
        Evaluation { progress: self, before, step, batches, start: now, shown: now }
    }

    /// The evaluation data were scored.
    pub fn eval(&self, event: &EvalEvent) {
        let best = if event.is_best { ", the best so far" } else { "" };
        let (loss, accuracy) =
            (number(event.eval_loss, 4), accuracy(event.eval_mean_token_accuracy));
        self.note(&format!("step {}: eval loss {loss}{accuracy}{best}", event.step));
    }

    /// A sample answer.
    pub fn sample(&self, event: &SampleEvent) {
        let (prompt, completion) = (&event.prompt, &event.completion);
        self.note(&format!("step {}: {prompt}\n  → {}", event.step, completion.trim()));
    }

    /// A checkpoint was written.
    pub fn save(&self, event: &SaveEvent) {
        let size = ByteSize(event.bytes);
        self.note(&format!("step {}: saved {} ({size})", event.step, event.checkpoint));
    }

    /// Memory ran short.
    pub fn out_of_memory(&self, event: &OutOfMemoryEvent) {
        let OutOfMemoryEvent { step, reason, change, .. } = event;
        self.note(&format!(
            "step {step}: {reason}; continuing with {change}, at the same batch size a step"
        ));
    }

    /// A line that stays.
    pub fn note(&self, text: &str) {
        match &self.output {
            Output::Live(bar) => bar.suspend(|| eprintln!("{text}")),
            Output::Plain => eprintln!("{text}"),
            Output::Silent => {}
        }
    }

    /// Leaves the last state of the line on the screen.
    pub fn finish(&self) {
        if let Output::Live(bar) = &self.output {
            bar.abandon();
            eprintln!();
        }
    }
}

impl Evaluation<'_> {
    /// The first `done` batches are scored.
    pub fn scored(&mut self, done: usize) {
        let line = || evaluation_line(self.step, done, self.batches, self.start.elapsed());
        match &self.progress.output {
            Output::Live(bar) => bar.set_message(line()),
            Output::Plain if self.shown.elapsed() >= EVALUATION_LINES => {
                eprintln!("{}", line());
                self.shown = Instant::now();
            }
            Output::Plain | Output::Silent => {}
        }
    }
}

impl Drop for Evaluation<'_> {
    fn drop(&mut self) {
        if let Output::Live(bar) = &self.progress.output {
            bar.set_message(std::mem::take(&mut self.before));
        }
    }
}

fn evaluation_line(step: u64, done: usize, batches: usize, elapsed: Duration) -> String {
    let line = format!("step {step}: evaluating, {done} of {batches} batches");
    if done == 0 {
        return line;
    }
    let left = elapsed.as_secs_f64() / done as f64 * (batches - done) as f64;
    format!("{line}, ETA {}", clock(left))
}

/// Of tokens, behind their loss.
fn accuracy(share: Option<f64>) -> String {
    share.map_or(String::new(), |share| format!(", accuracy {:.1} %", 100.0 * share))
}

fn step_line(event: &StepEvent, max_steps: u64, eta_seconds: f64) -> String {
    let memory = ByteSize(event.memory_bytes());
    format!(
        "step {}/{max_steps}  loss {}{}  lr {:.2e}  grad norm {}  {} tokens/s  {memory}  ETA {}",
        event.step,
        number(event.loss, 4),
        accuracy(event.mean_token_accuracy),
        event.learning_rate,
        number(event.grad_norm, 3),
        rate(event.tokens_per_second),
        clock(eta_seconds),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_evaluation_says_how_far_it_is() {
        let line = |done| evaluation_line(6, done, 380, Duration::from_secs(20));
        assert_eq!(line(0), "step 6: evaluating, 0 of 380 batches");
        assert_eq!(line(40), "step 6: evaluating, 40 of 380 batches, ETA 2:50");
    }

    #[test]
    fn the_line_has_what_one_watches() {
        let event = StepEvent {
            step: 12,
            loss: 1.23456,
            mean_token_accuracy: Some(0.7318),
            learning_rate: 1.9e-4,
            grad_norm: 0.5,
            tokens_per_second: 203.4,
            rss_bytes: 1 << 30,
            gpu_bytes: None,
            ..StepEvent::default()
        };
        assert_eq!(
            step_line(&event, 100, 3723.4),
            "step 12/100  loss 1.2346, accuracy 73.2 %  lr 1.90e-4  grad norm 0.500  203 tokens/s  \
             1.0 GiB  ETA 1:02:03"
        );
        let slow = StepEvent { loss: 4.2e-5, grad_norm: 1.3e-4, tokens_per_second: 0.46, ..event };
        let line = step_line(&slow, 100, 3723.4);
        let shown = ["loss 4.2e-5,", "grad norm 1.3e-4 ", " 0.46 tokens/s "];
        assert!(shown.iter().all(|text| line.contains(text)), "{line}");
    }
}
