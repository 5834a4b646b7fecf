//! `report.html`: one file, no script, nothing loaded from elsewhere.

use std::fmt::Write;

use super::chart::{self, Series};
use crate::cli::size::ByteSize;
use crate::train::events::{
    EndEvent, EndReason, EvalEvent, Event, SampleEvent, StartEvent, StepEvent,
};

/// The page after `events`.
pub fn render(start: &StartEvent, events: &[Event]) -> String {
    let run = Run::of(start, events);
    let mut page = String::from(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\"><title>Nibble training report</title>\
         <style>",
    );
    page.push_str(include_str!("page.css"));
    page.push_str("</style><main>");
    run.head(&mut page);
    run.tiles(&mut page);
    run.charts(&mut page);
    run.samples(&mut page);
    run.memory(&mut page);
    run.settings(&mut page);
    page.push_str("</main></html>\n");
    page
}

struct Run<'a> {
    start: &'a StartEvent,
    steps: Vec<&'a StepEvent>,
    evals: Vec<&'a EvalEvent>,
    samples: Vec<&'a SampleEvent>,
    end: Option<&'a EndEvent>,
}

impl<'a> Run<'a> {
    fn of(start: &'a StartEvent, events: &'a [Event]) -> Self {
        let mut run =
            Run { start, steps: Vec::new(), evals: Vec::new(), samples: Vec::new(), end: None };
        for event in events {
            match event {
                Event::Step(step) => run.steps.push(step),
                Event::Eval(eval) => run.evals.push(eval),
                Event::Sample(sample) => run.samples.push(sample),
                Event::End(end) => run.end = Some(end),
                Event::Start(_) | Event::Save(_) => {}
            }
        }
        run
    }

    fn head(&self, page: &mut String) {
        let state = match self.end.map(|end| end.reason) {
            None => "running",
            Some(EndReason::Finished) => "finished",
            Some(EndReason::EarlyStopping) => "stopped early: the evaluation loss no longer fell",
            Some(EndReason::Interrupted) => "interrupted; continue with --resume",
        };
        let step = self.steps.last().map_or(0, |step| step.step);
        let _ = write!(
            page,
            "<h1>Training report</h1><p class=\"sub\">{} · step {step} of {} · {state}</p>",
            escape(&self.start.model),
            self.start.max_steps
        );
    }

    fn tiles(&self, page: &mut String) {
        let mut tiles: Vec<(String, &str)> = Vec::new();
        if let Some(loss) = self.start.base_loss {
            tiles.push((format!("{loss:.4}"), "loss before training"));
        }
        if let Some(step) = self.steps.last() {
            tiles.push((format!("{:.4}", step.loss), "last training loss"));
        }
        if let Some(best) = self.evals.iter().map(|eval| eval.eval_loss).reduce(f64::min) {
            tiles.push((format!("{best:.4}"), "best evaluation loss"));
        }
        if let Some(step) = self.steps.last() {
            tiles.push((thousands(step.num_input_tokens_seen), "tokens seen"));
            let speed = self.end.map_or(step.tokens_per_second, |end| end.tokens_per_second);
            tiles.push((format!("{speed:.0}"), "tokens per second"));
            tiles.push((duration(step.elapsed_seconds), "training time"));
        }
        if let Some(peak) = self.peak_bytes() {
            tiles.push((bytes(peak), "peak memory"));
        }
        page.push_str("<div class=\"tiles\">");
        for (value, label) in tiles {
            let _ = write!(page, "<div class=\"tile\"><b>{value}</b><span>{label}</span></div>");
        }
        page.push_str("</div>");
    }

    fn peak_bytes(&self) -> Option<u64> {
        let seen = self.steps.iter().map(|step| step.rss_bytes).max();
        self.end.map(|end| end.peak_rss_bytes).filter(|&peak| peak > 0).or(seen)
    }

    fn charts(&self, page: &mut String) {
        let line = |value: fn(&StepEvent) -> f64| -> Vec<(f64, f64)> {
            self.steps.iter().map(|step| (step.step as f64, value(step))).collect()
        };
        let eval: Vec<(f64, f64)> =
            self.evals.iter().map(|eval| (eval.step as f64, eval.eval_loss)).collect();
        let one = |name, points| vec![Series { class: "a", name, points }];
        let mut loss = one("training", line(|step| step.loss));
        if !eval.is_empty() {
            loss.push(Series { class: "b", name: "evaluation", points: eval });
        }
        page.push_str("<div class=\"grid2\">");
        card(page, "Loss", &loss, &|v| format!("{v:.3}"));
        let rate = one("learning rate", line(|step| step.learning_rate));
        card(page, "Learning rate", &rate, &|v| format!("{v:.1e}"));
        let norm = one("gradient norm", line(|step| step.grad_norm));
        card(page, "Gradient norm", &norm, &|v| format!("{v:.3}"));
        let speed = one("tokens per second", line(|step| step.tokens_per_second));
        card(page, "Tokens per second", &speed, &|v| format!("{v:.0}"));
        let memory = one("resident", line(|step| step.rss_bytes as f64));
        card(page, "Memory", &memory, &|v| bytes(v.max(0.0) as u64));
        page.push_str("</div>");
    }

    fn samples(&self, page: &mut String) {
        if self.samples.is_empty() {
            return;
        }
        page.push_str(
            "<section class=\"card\"><h2>Samples</h2><div class=\"wide\"><table><tr>\
             <th class=\"n\">step</th><th>prompt</th><th>answer</th></tr>",
        );
        for sample in &self.samples {
            let _ = write!(
                page,
                "<tr><td class=\"n\">{}</td><td><pre>{}</pre></td><td><pre>{}</pre></td></tr>",
                sample.step,
                escape(&sample.prompt),
                escape(&sample.completion)
            );
        }
        page.push_str("</table></div></section>");
    }

    fn memory(&self, page: &mut String) {
        let plan = &self.start.memory_plan;
        if plan.is_empty() {
            return;
        }
        let total: u64 = plan.iter().map(|(_, bytes)| bytes).sum();
        let largest = plan.iter().map(|(_, bytes)| *bytes).max().unwrap_or(1).max(1);
        page.push_str(
            "<section class=\"card\"><h2>Memory plan</h2><table><tr><th>component</th>\
             <th class=\"n\">planned</th><th></th></tr>",
        );
        for (name, size) in plan {
            let share = 100.0 * *size as f64 / largest as f64;
            let _ = write!(
                page,
                "<tr><td>{}</td><td class=\"n\">{}</td><td style=\"width:40%\"><div class=\"bar\" \
                 style=\"width:{share:.1}%\"></div></td></tr>",
                escape(name),
                bytes(*size)
            );
        }
        let _ = write!(page, "<tr><th>sum</th><th class=\"n\">{}</th><th></th></tr>", bytes(total));
        if let Some(peak) = self.peak_bytes() {
            let label = "measured peak of the process";
            let _ = write!(
                page,
                "<tr><th>{label}</th><th class=\"n\">{}</th><th></th></tr>",
                bytes(peak)
            );
        }
        page.push_str("</table></section>");
    }

    fn settings(&self, page: &mut String) {
        let Some(settings) = self.start.settings.as_object() else { return };
        page.push_str("<section class=\"card\"><h2>Settings</h2><div class=\"wide\"><table>");
        for (name, value) in settings {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_string);
            let _ = write!(page, "<tr><th>{}</th><td>{}</td></tr>", escape(name), escape(&text));
        }
        page.push_str("</table></div></section>");
    }
}

fn card(page: &mut String, title: &str, series: &[Series], format: &dyn Fn(f64) -> String) {
    // Speed and memory are amounts; losses and norms are looked at closely.
    let from_zero = matches!(title, "Tokens per second" | "Memory");
    let chart = chart::render(series, format, from_zero);
    if chart.is_empty() {
        return;
    }
    let _ = write!(page, "<section class=\"card\"><h2>{title}");
    if series.len() > 1 {
        page.push_str("<span class=\"legend\">");
        for line in series {
            let _ = write!(page, "<i class=\"{}\"></i>{}", line.class, line.name);
        }
        page.push_str("</span>");
    }
    let _ = write!(page, "</h2>{chart}</section>");
}

fn bytes(count: u64) -> String {
    ByteSize(count).to_string()
}

fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 {
        format!("{hours}:{minutes:02}:{rest:02}")
    } else {
        format!("{minutes}:{rest:02}")
    }
}

fn thousands(count: u64) -> String {
    let digits = count.to_string();
    let groups: Vec<String> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|group| group.iter().map(|&digit| char::from(digit)).collect())
        .collect();
    groups.join(",")
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
