//! `report.html`: one file that needs nothing else, made from a run's events.
//!
//! `page.html` is a template whose text is escaped by the template engine; style and script are put
//! in as they are. This module turns events into what the template shows, all of it as text; without
//! its script the page lacks only the values under the pointer.

mod axis;
mod chart;
mod run;
mod sections;
mod smooth;

use std::path::Path;

use minijinja::{Value, context};

use super::memory_page;
use crate::train::events::{Event, StartEvent};
use run::Run;

/// The page after `events` of the run in `folder`.
pub fn render(start: &StartEvent, events: &[Event], folder: &Path) -> String {
    let run = Run::of(start, events, folder);
    memory_page::fill(
        include_str!("page.html"),
        context! {
            style => memory_page::style(),
            script => Value::from_safe_string(include_str!("page.js").to_string()),
            version => env!("CARGO_PKG_VERSION"),
            run => run.heading(),
            tiles => run.tiles(),
            loss => run.loss_chart(),
            charts => run.charts(),
            samples => run.samples(),
            memory => run.memory(),
            data => run.data(),
            milestones => run.milestones(),
            settings => run.settings(),
            log => run.log(),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::{Event, Path, StartEvent};
    use crate::train::events::{EvalEvent, SampleEvent, StepEvent};

    fn render(start: &StartEvent, events: &[Event]) -> String {
        super::render(start, events, Path::new("run"))
    }

    fn step(step: u64) -> Event {
        Event::Step(StepEvent {
            step,
            loss: 3.0 - step as f64 / 1000.0,
            learning_rate: 2e-4,
            grad_norm: 0.5,
            tokens_per_second: 200.0,
            rss_bytes: 1 << 30,
            gpu_bytes: None,
            ..StepEvent::default()
        })
    }

    fn sample(step: u64, prompt: &str, completion: &str) -> Event {
        let (prompt, completion) = (prompt.to_string(), completion.to_string());
        Event::Sample(SampleEvent { step, prompt, completion, ..SampleEvent::default() })
    }

    #[test]
    fn text_of_the_run_is_escaped() {
        let start = StartEvent {
            model: "a<b>&c".into(),
            settings: serde_json::json!({"data": "</script><script>alert(1)</script>"}),
            ..StartEvent::default()
        };
        let events = [sample(0, "<i>\"x\"</i>", "</pre>&amp;"), step(1)];
        let page = render(&start, &events);
        assert!(page.contains("a&lt;b&gt;&amp;c"));
        assert!(page.contains("&lt;i&gt;&quot;x&quot;&lt;"));
        assert!(page.contains("&lt;&#x2f;pre&gt;&amp;amp;"));
        for text in ["<b>&c", "alert(1)</script>", "<i>\"x", "</pre>"] {
            assert!(!page.contains(text), "{text}");
        }
    }

    #[test]
    fn nothing_is_loaded_from_elsewhere() {
        let page = render(&StartEvent::default(), &[step(1), step(2)]);
        for text in ["http:", "https:", "src=", "href=", "url(", "@import", "fetch("] {
            assert!(!page.contains(text), "{text}");
        }
        assert!(page.contains("default-src 'none'"));
    }

    #[test]
    fn every_section_stands_when_there_is_something_to_show() {
        let mut events: Vec<Event> = (1..=60).map(step).collect();
        let page = render(&StartEvent::default(), &events);
        assert!(page.contains("Gradient norm") && page.contains("</i>training, smoothed"));
        for title in ["Answers", "Evaluations and checkpoints", "evaluation"] {
            assert!(!page.contains(title), "{title}");
        }
        events.push(sample(0, "Hi", "Hello"));
        events.push(sample(30, "Hi", "Hey"));
        events.push(sample(60, "Hi", "Ahoy"));
        let eval = EvalEvent { step: 60, eval_loss: 0.5, is_best: true, ..EvalEvent::default() };
        events.push(Event::Eval(eval));
        let page = render(&StartEvent::default(), &events);
        for text in ["Answers", "Evaluations and checkpoints", "Ahoy", "1.649", "0.5000"] {
            assert!(page.contains(text), "{text}");
        }
    }

    #[test]
    fn the_loss_alone_has_a_logarithmic_scale_and_begins_without() {
        let events: Vec<Event> = (1..=60).map(step).collect();
        let page = render(&StartEvent::default(), &events);
        assert_eq!(page.matches("class=\"scale\"").count(), 1);
        assert!(page.contains("aria-pressed=\"true\">linear<"));
        assert!(page.contains("aria-pressed=\"false\">log<"));
        assert!(page.matches("class=\"row log\"").count() > 1);
        // Losses of 2.999 to 2.94, on both scales; the other charts have one.
        assert!(page.contains("\"points\": [[[1.0, ") || page.contains("\"points\":[[[1.0,"));
        assert!(page.contains("\"log\": [[]]") || page.contains("\"log\":[[]]"));
    }

    /// On a narrow screen a table scrolls in its own box, not the page.
    #[test]
    fn every_table_is_in_a_box_that_scrolls() {
        for template in [include_str!("page.html"), super::memory_page::FIGURES] {
            let boxes: Vec<&str> = template.split("<table").collect();
            let (_, before) = boxes.split_last().unwrap();
            assert!(before.iter().all(|text| text.trim_end().ends_with("<div class=\"scroll\">")));
        }
    }

    /// What comes with each evaluation is shown as often as lines of the log.
    #[test]
    fn a_long_run_has_short_tables() {
        let mut events = Vec::new();
        for number in 1..=2000 {
            let eval_loss = 9.0 - number as f64 / 1000.0;
            let is_best = number == 1777;
            let eval = EvalEvent { step: number, eval_loss, is_best, ..EvalEvent::default() };
            events.extend([step(number), Event::Eval(eval), sample(number, "Hi", "Hello")]);
        }
        let page = render(&StartEvent::default(), &events);
        let rows = page.matches("<tr><td class=\"n\">").count();
        let answers = page.matches("<div class=\"answer between\">").count();
        // The last and the best besides.
        assert_eq!((rows, answers), (200 + 1 + 200 + 2, 200));
        let said = ["one in 10", "one line in 10"].map(|text| page.matches(text).count());
        assert_eq!(said, [2, 1]);
        assert!(page.contains("7.2230"), "the best one");
    }

    /// WCAG 2.1, 1.4.3: 4.5 to 1 for text of this size.
    #[test]
    fn text_has_enough_contrast() {
        let style = include_str!("page.css");
        let (light, dark) = style.split_once("prefers-color-scheme: dark").unwrap();
        let luminance = |theme: &str, name: &str| {
            let start = theme.find(&format!("--{name}: #")).unwrap() + name.len() + 5;
            let channel = |at: usize| {
                let text = &theme[start + at..start + at + 2];
                let value = f64::from(u8::from_str_radix(text, 16).unwrap()) / 255.0;
                if value <= 0.03928 { value / 12.92 } else { ((value + 0.055) / 1.055).powf(2.4) }
            };
            0.2126 * channel(0) + 0.7152 * channel(2) + 0.0722 * channel(4)
        };
        for theme in [light, dark] {
            let ground = luminance(theme, "ground");
            for name in ["ink", "dim", "faint", "good", "pause", "run"] {
                let text = luminance(theme, name);
                let contrast = (text.max(ground) + 0.05) / (text.min(ground) + 0.05);
                assert!(contrast >= 4.5, "{name}: {contrast:.2}");
            }
        }
    }

    /// Arrow keys move a cursor that some do not see.
    #[test]
    fn values_under_the_cursor_are_said() {
        let page = render(&StartEvent::default(), &[step(1), step(2)]);
        let charts = page.matches("<figure class=\"chart").count();
        assert_eq!(page.matches("<p class=\"unseen\" aria-live=\"polite\"></p>").count(), charts);
    }

    #[test]
    fn a_run_that_only_began_has_a_page() {
        let page = render(&StartEvent { max_steps: 10, ..StartEvent::default() }, &[]);
        assert!(page.contains("running") && page.ends_with("</html>"));
    }
}
