//! Pictures of an [`Account`]: a page of its own for `nibble memory --html`, and a section of
//! `report.html`. Both are the template `figures.html` over the same numbers; hovering shows bytes.

mod colours;
mod timeline;

use minijinja::{AutoEscape, Environment, Value, context};
use serde::Serialize;

use crate::byte_size::ByteSize;
use crate::figures::{change, thousands};
use crate::ledger::rows::{Account, PhaseRow, Row};
use colours::colour;
use timeline::{Timeline, timeline};

/// The template of the figures; the page of a training run includes it.
pub(super) const FIGURES: &str = include_str!("figures.html");
/// What every page of `nibble memory` has in its first [`MARK_WITHIN`] bytes.
pub const MARK: &str = "<!-- nibble memory -->";
/// Bytes at the beginning of such a page that hold the mark and a line before it.
pub const MARK_WITHIN: usize = 64;
/// The narrowest bar of something that is there, in percent.
const NARROWEST_BAR: f64 = 0.3;

/// What the page is about.
#[derive(Debug, Serialize)]
pub struct Heading {
    /// The model as the user named it.
    pub model: String,
    /// What is known of the run, in words.
    pub facts: Vec<String>,
}

/// An account as the template shows it; places and lengths in percent.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    parts: Vec<Part>,
    planned: String,
    measured: Option<String>,
    difference: Option<String>,
    phases: Vec<Bar>,
    timeline: Option<Timeline>,
    /// Beside a GPU: name, planned, measured.
    host: Vec<(&'static str, String, String)>,
}

#[derive(Debug, Serialize)]
struct Part {
    name: String,
    colour: usize,
    planned: String,
    planned_share: String,
    measured: Option<String>,
    measured_share: String,
    difference: String,
    title: String,
}

/// A phase: what is planned to be in use, stacked, and what was measured.
#[derive(Debug, Serialize)]
struct Bar {
    name: &'static str,
    segments: Vec<Segment>,
    planned: String,
    measured: Option<String>,
    measured_at: Option<String>,
}

#[derive(Debug, Serialize)]
struct Segment {
    colour: usize,
    width: String,
    title: String,
}

/// The page of `nibble memory --html`.
pub fn render(heading: &Heading, account: &Account) -> String {
    fill(
        include_str!("page.html"),
        context! {
            style => style(),
            version => env!("CARGO_PKG_VERSION"),
            heading => heading,
            memory => figures(account),
        },
    )
}

/// A page: a template, which may show figures, with what it needs.
pub(super) fn fill(page: &str, context: Value) -> String {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.add_template("figures", FIGURES).expect("the template is valid");
    environment.add_template("page", page).expect("the template is valid");
    let page = environment.get_template("page").expect("added above");
    page.render(context).expect("the template uses what it is given")
}

/// The style of every page.
pub(super) fn style() -> Value {
    let style = concat!(include_str!("../page/page.css"), include_str!("figures.css"));
    Value::from_safe_string(style.to_string())
}

/// Everything that the template needs.
pub(super) fn figures(account: &Account) -> Figures {
    let (planned, peak) = (account.planned_bytes(), account.peak_bytes);
    let measured_most = account.rows.iter().filter_map(|row| row.measured_bytes).max();
    let most = account.rows.iter().map(|row| row.planned_bytes).max();
    let largest = most.max(measured_most).unwrap_or(0).max(1);
    let difference = peak.map(|peak| signed_share(planned, peak));
    Figures {
        parts: account.rows.iter().map(|row| part(row, largest)).collect(),
        planned: size(planned),
        measured: peak.map(size),
        difference,
        phases: phases(account),
        timeline: timeline(account),
        host: host_rows(account),
    }
}

fn host_rows(account: &Account) -> Vec<(&'static str, String, String)> {
    let (planned, none) = (account.outside.pinned_bytes, String::new());
    let pinned = |measured| ("pinned memory", size(planned), measured);
    match account.host {
        Some(host) => vec![
            ("the program", none.clone(), size(host.resident_bytes)),
            ("of it file-backed", none, size(host.mapped_bytes)),
            pinned(size(host.pinned_bytes)),
        ],
        None if planned > 0 => vec![pinned(none)],
        None => Vec::new(),
    }
}

fn size(bytes: u64) -> String {
    ByteSize(bytes).to_string()
}

fn percent(part: f64, whole: f64) -> String {
    format!("{:.2}", 100.0 * part / whole.max(f64::MIN_POSITIVE))
}

fn signed_share(planned: u64, measured: u64) -> String {
    let share = 100.0 * (measured as f64 / planned.max(1) as f64 - 1.0);
    format!("{share:+.1} %").replace('-', "\u{2212}")
}

fn part(row: &Row, largest: u64) -> Part {
    let share = |bytes: u64| {
        let least = if bytes > 0 { NARROWEST_BAR / 100.0 * largest as f64 } else { 0.0 };
        percent((bytes as f64).max(least), largest as f64)
    };
    let difference = row.measured_bytes.map(|measured| change(row.planned_bytes, measured));
    Part {
        name: row.name.clone(),
        colour: colour(&row.name),
        planned: size(row.planned_bytes),
        planned_share: share(row.planned_bytes),
        measured: row.measured_bytes.map(size),
        measured_share: share(row.measured_bytes.unwrap_or(0)),
        difference: difference.unwrap_or_default(),
        title: exact(&row.name, row.planned_bytes, row.measured_bytes),
    }
}

fn exact(name: &str, planned: u64, measured: Option<u64>) -> String {
    let planned = thousands(planned);
    match measured {
        Some(bytes) => {
            let bytes = thousands(bytes);
            format!("{name}: planned {planned} bytes, measured {bytes}")
        }
        None => format!("{name}: {planned} bytes"),
    }
}

/// Phases that were seen; all of them where none was, before a run or on a GPU.
fn phases(account: &Account) -> Vec<Bar> {
    let total = |row: &PhaseRow| row.planned_bytes.iter().sum::<u64>();
    let none_seen = account.phases.iter().all(|row| row.measured_bytes.is_none());
    let shown = |row: &&PhaseRow| none_seen || row.measured_bytes.is_some();
    let rows: Vec<&PhaseRow> = account.phases.iter().filter(shown).collect();
    let most = rows.iter().map(|row| total(row).max(row.measured_bytes.unwrap_or(0))).max();
    let width = most.unwrap_or(0).max(1) as f64;
    let bar = |row: &&PhaseRow| Bar {
        name: row.phase.label(),
        segments: segments(account, row, width),
        planned: size(total(row)),
        measured: row.measured_bytes.map(size),
        measured_at: row.measured_bytes.map(|bytes| percent(bytes as f64, width)),
    };
    rows.iter().map(bar).collect()
}

fn segments(account: &Account, row: &PhaseRow, width: f64) -> Vec<Segment> {
    let parts = row.planned_bytes.iter().zip(&account.rows);
    let used = parts.filter(|(bytes, _)| **bytes > 0);
    used.map(|(&bytes, part)| Segment {
        colour: colour(&part.name),
        width: percent(bytes as f64, width),
        title: format!("{} in {}: {}", part.name, row.phase.label(), size(bytes)),
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::rows::HostMemory;
    use crate::ledger::{Phase, Record, Sample};
    use crate::plan::Outside;

    fn account() -> Account {
        let row = |name: &str, planned_bytes, measured_bytes| Row {
            name: name.into(),
            planned_bytes,
            measured_bytes,
        };
        let sample = |seconds, phase, resident_bytes| Sample {
            seconds,
            phase,
            resident_bytes,
            file_bytes: 1 << 20,
        };
        let mut record = Record::default();
        record.samples = vec![sample(0.0, Phase::Load, 1 << 20), sample(2.0, Phase::Loss, 5 << 20)];
        Account {
            outside: Outside::default(),
            rows: vec![row("a<b", 3 << 20, Some(4 << 20)), row("c", 1 << 20, Some(1 << 20))],
            phases: vec![PhaseRow {
                phase: Phase::Loss,
                planned_bytes: vec![3 << 20, 0],
                measured_bytes: Some(5 << 20),
            }],
            peak_bytes: Some(5 << 20),
            host: None,
            record,
        }
    }

    fn heading() -> Heading {
        Heading { model: "x&y".into(), facts: vec!["two facts".into()] }
    }

    #[test]
    fn a_page_shows_every_figure_and_loads_nothing() {
        let page = render(&heading(), &account());
        for text in ["a&lt;b", "x&amp;y", "two facts", "+25.0 %", "4,194,304", "5.0 MiB", "loss"] {
            assert!(page.contains(text), "{text}");
        }
        for text in ["http:", "https:", "src=", "href=", "url(", "@import", "a<b"] {
            assert!(!page.contains(text), "{text}");
        }
        // A pair of bars for each part, and values where the mouse is, without a script.
        let bars = "<title>a&lt;b: planned 3,145,728 bytes, measured 4,194,304</title>";
        assert!(page.contains(bars) && page.contains("class=\"seen\" y=\"14\" width=\"100.00\""));
        let hover =
            "<title>2.00 s, loss: 5.0 MiB, 1.0 MiB of it file-backed; planned by then 3.0 MiB";
        assert!(page.contains(hover) && !page.contains("<script"), "{page}");
    }

    #[test]
    fn a_part_has_one_colour_wherever_it_is() {
        let mut account = account();
        account.rows[0].name = "kept activations".into();
        let page = render(&heading(), &account);
        for place in
            ["<i class=\"swatch c8\"", "<rect class=\"c8\"", "<div class=\"c8\"", "layer c8\""]
        {
            assert!(page.contains(place), "{place}");
        }
    }

    /// Every mark of the charts is explained beside them.
    #[test]
    fn the_charts_say_what_they_show() {
        let page = render(&heading(), &account());
        for text in
            ["end of each phase of the first step", "in any step", "the whole plan", "plan 4.0 MiB"]
        {
            assert!(page.contains(text), "{text}");
        }
    }

    #[test]
    fn the_host_beside_a_gpu_has_rows() {
        let mut account = account();
        assert!(!render(&heading(), &account).contains("pinned memory"));
        account.outside.pinned_bytes = 7 << 20;
        let (resident_bytes, mapped_bytes, pinned_bytes) = (9 << 20, 2 << 20, 8 << 20);
        account.host = Some(HostMemory { resident_bytes, mapped_bytes, pinned_bytes });
        let page = render(&heading(), &account);
        for text in ["pinned memory", "9.0 MiB", "7.0 MiB", "8.0 MiB"] {
            assert!(page.contains(text), "{text}");
        }
    }

    #[test]
    fn a_plan_alone_has_no_measured_columns() {
        let mut account = account();
        account.peak_bytes = None;
        account.record = Record::default();
        for row in &mut account.rows {
            row.measured_bytes = None;
        }
        account.phases[0].measured_bytes = None;
        let page = render(&heading(), &account);
        assert!(!page.contains("measured") && page.contains("3.0 MiB"));
        assert!(!page.contains("pinned memory"));
        // A plan for a GPU says what it pins of the host's memory.
        account.outside.pinned_bytes = 7 << 20;
        let page = render(&heading(), &account);
        assert!(page.contains("<td>pinned memory</td><td class=\"n\">7.0 MiB</td></tr>"), "{page}");
        assert!(!page.contains("measured"));
    }

    /// What the timeline shows is told to those who cannot see it.
    #[test]
    fn the_timeline_has_its_figures_in_words() {
        let page = render(&heading(), &account());
        let words = "aria-label=\"memory over 2.0 s: measured peak 5.0 MiB, planned 4.0 MiB\"";
        assert!(page.contains(words), "{page}");
    }
}
