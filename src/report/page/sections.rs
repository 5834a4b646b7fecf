//! What stands below the curves: answers, memory, data, milestones, settings, the log.

use serde::Serialize;

use super::chart::Chart;
use super::run::{Run, percent, perplexity};
use crate::byte_size::ByteSize;
use crate::figures::{number, rate, scientific, thousands};
use crate::ledger::rows::{Account, Row};
use crate::report::memory_page::{Figures, figures};
use crate::train::events::{EvalEvent, OutOfMemoryEvent, SampleEvent, SaveEvent};

/// Rows of a table, and answers to a prompt, that are shown; a few more that matter may come with them.
const MOST_ROWS: usize = 200;

/// A prompt and its answers in the course of the run.
#[derive(Serialize)]
pub struct Prompt {
    text: String,
    first: Answer,
    last: Option<Answer>,
    /// Every how manyth answer of those between is shown.
    every: usize,
    between: Vec<Answer>,
}

#[derive(Serialize, Clone)]
struct Answer {
    when: String,
    text: String,
}

/// The plan beside what was measured.
#[derive(Serialize)]
pub struct Memory {
    /// What the plan does.
    plan: String,
    figures: Figures,
    /// The process from step to step.
    chart: Option<Chart>,
    /// What is said of memory that ran short.
    short: Vec<String>,
}

/// Texts of a data file.
#[derive(Serialize)]
pub struct DataRow {
    name: String,
    file: String,
    documents: String,
    tokens: String,
    trained: String,
    longest: String,
    rows: String,
    notes: Vec<String>,
}

/// Steps at which something was evaluated or saved.
#[derive(Serialize)]
pub struct Milestones {
    /// Every how manyth step is shown.
    every: usize,
    rows: Vec<Milestone>,
}

#[derive(Serialize)]
struct Milestone {
    step: String,
    epoch: String,
    eval_loss: String,
    perplexity: String,
    accuracy: String,
    checkpoint: String,
    size: String,
    best: bool,
}

/// Lines of the training log.
#[derive(Serialize)]
pub struct Log {
    /// Every how manyth line is shown.
    every: usize,
    rows: Vec<[String; 9]>,
}

/// Every how manyth of `count` is shown where they are many.
fn every(count: usize) -> usize {
    count.div_ceil(MOST_ROWS).max(1)
}

fn short_of_memory(event: &OutOfMemoryEvent) -> String {
    format!(
        "After step {}, memory ran out ({}). Since then: {}. The batch size of a step is unchanged.",
        thousands(event.step),
        event.reason,
        event.change,
    )
}

impl Run<'_> {
    /// Answers by prompt, in the order in which the prompts came.
    pub fn samples(&self) -> Vec<Prompt> {
        let mut prompts: Vec<(&str, Vec<&SampleEvent>)> = Vec::new();
        for sample in &self.samples {
            match prompts.iter_mut().find(|(prompt, _)| *prompt == sample.prompt) {
                Some((_, answers)) => answers.push(sample),
                None => prompts.push((&sample.prompt, vec![sample])),
            }
        }
        prompts.into_iter().filter_map(|(prompt, answers)| prompt_of(prompt, &answers)).collect()
    }

    /// The account of a run that ended, else the plan, and the curve; `None` when nothing is known.
    pub fn memory(&self) -> Option<Memory> {
        self.planned_bytes().or(self.peak_bytes())?;
        let row = |(name, bytes): &(String, u64)| Row {
            name: name.clone(),
            planned_bytes: *bytes,
            measured_bytes: None,
        };
        let planned = || Account {
            rows: self.start.memory_plan.iter().map(row).collect(),
            ..Account::default()
        };
        let account = self.end.and_then(|end| end.memory.clone()).unwrap_or_else(planned);
        let short = self.out_of_memory.iter().map(|event| short_of_memory(event)).collect();
        let (plan, figures) = (self.start.plan.clone(), figures(&account));
        Some(Memory { plan, figures, chart: self.memory_chart(), short })
    }

    /// The data files.
    pub fn data(&self) -> Vec<DataRow> {
        let files = self.start.data.iter();
        let row = files.map(|data| DataRow {
            name: data.name.clone(),
            file: data.file.clone(),
            documents: thousands(data.documents),
            tokens: thousands(data.tokens),
            trained: format!(
                "{} ({:.0} %)",
                thousands(data.trained_tokens),
                100.0 * data.trained_tokens as f64 / data.tokens.max(1) as f64
            ),
            longest: thousands(data.longest_document_tokens),
            rows: thousands(data.rows),
            notes: data.notes.clone(),
        });
        row.collect()
    }

    /// Evaluations and checkpoints, a row for each step that has any; thinned where they are many, but for
    /// the best, the last, and checkpoints.
    pub fn milestones(&self) -> Milestones {
        let mut steps: Vec<u64> = self.evals.iter().map(|eval| eval.step).collect();
        steps.extend(self.saves.iter().map(|save| save.step));
        steps.sort_unstable();
        steps.dedup();
        let best = self.evals.iter().rev().find(|eval| eval.is_best).map(|eval| eval.step);
        let (every, last) = (every(steps.len()), steps.last().copied());
        let few_saves = self.saves.len() <= MOST_ROWS;
        let matters = |step: u64| {
            let saved = || self.saves.iter().any(|save| save.step == step);
            [best, last].contains(&Some(step)) || (few_saves && saved())
        };
        let row = |step: u64| {
            let eval = self.evals.iter().find(|eval| eval.step == step);
            let save = self.saves.iter().find(|save| save.step == step);
            milestone(step, eval.copied(), save.copied(), best == Some(step))
        };
        let shown = steps.iter().enumerate().filter(|(i, step)| i % every == 0 || matters(**step));
        Milestones { every, rows: shown.map(|(_, step)| row(*step)).collect() }
    }

    /// Names and values.
    pub fn settings(&self) -> Vec<(String, String)> {
        let Some(settings) = self.start.settings.as_object() else { return Vec::new() };
        let text = |value: &serde_json::Value| match value {
            serde_json::Value::String(text) => text.clone(),
            serde_json::Value::Array(items) => {
                let items = items.iter().map(|item| item.as_str().map(str::to_string));
                let texts: Option<Vec<String>> = items.collect();
                texts.map_or_else(|| value.to_string(), |texts| texts.join("\n"))
            }
            other => other.to_string(),
        };
        settings.iter().map(|(name, value)| (name.clone(), text(value))).collect()
    }

    /// The log as a table, thinned where it is long.
    pub fn log(&self) -> Log {
        let every = every(self.steps.len());
        let last = self.steps.len().saturating_sub(1);
        let shown = self.steps.iter().enumerate().filter(|(i, _)| i % every == 0 || *i == last);
        let rows = shown.map(|(_, step)| {
            [
                thousands(step.step),
                format!("{:.2}", step.epoch),
                number(step.loss, 4),
                step.mean_token_accuracy.map(percent).unwrap_or_default(),
                scientific(step.learning_rate),
                number(step.grad_norm, 3),
                thousands(step.num_input_tokens_seen),
                rate(step.tokens_per_second),
                ByteSize(step.memory_bytes()).to_string(),
            ]
        });
        Log { every, rows: rows.collect() }
    }
}

fn prompt_of(prompt: &str, answers: &[&SampleEvent]) -> Option<Prompt> {
    let answer = |sample: &&SampleEvent| Answer {
        when: match sample.step {
            0 => "before training".to_string(),
            step => format!("after step {}", thousands(step)),
        },
        text: sample.completion.trim().to_string(),
    };
    let (first, rest) = answers.split_first()?;
    let (last, between) = rest.split_last().map_or((None, rest), |(last, b)| (Some(last), b));
    let every = every(between.len());
    Some(Prompt {
        text: prompt.to_string(),
        first: answer(first),
        last: last.map(answer),
        every,
        between: between.iter().step_by(every).map(answer).collect(),
    })
}

fn milestone(
    step: u64,
    eval: Option<&EvalEvent>,
    save: Option<&SaveEvent>,
    best: bool,
) -> Milestone {
    let of_eval = |text: fn(&EvalEvent) -> String| eval.map(text).unwrap_or_default();
    Milestone {
        step: thousands(step),
        epoch: of_eval(|eval| format!("{:.2}", eval.epoch)),
        eval_loss: of_eval(|eval| number(eval.eval_loss, 4)),
        perplexity: of_eval(|eval| perplexity(eval.eval_loss)),
        accuracy: of_eval(|eval| eval.eval_mean_token_accuracy.map(percent).unwrap_or_default()),
        checkpoint: save.map(|save| save.checkpoint.clone()).unwrap_or_default(),
        size: save.map(|save| ByteSize(save.bytes).to_string()).unwrap_or_default(),
        best,
    }
}
