//! Line charts as the page draws them: an SVG that stretches with its box, while labels, markers
//! and the cursor are HTML placed in percent, so that text keeps its size on every screen.

use serde::Serialize;

use super::axis::{ROWS, log_ticks, range, ticks, trimmed};

/// A line before it is placed.
pub struct Series {
    /// CSS class: its colour.
    pub class: &'static str,
    /// Name in the legend.
    pub name: &'static str,
    /// Step and value, steps ascending.
    pub points: Vec<(f64, f64)>,
}

/// What a chart shows beside its lines.
pub struct Frame<'a> {
    /// Heading.
    pub title: &'static str,
    /// Steps at the right edge; the left edge is 0.
    pub last_step: f64,
    /// Whether the values begin at 0.
    pub from_zero: bool,
    /// Whether the script offers a logarithmic scale, too.
    pub logarithmic: bool,
    /// What is 1 on the axis: round values are multiples of it.
    pub unit: f64,
    /// Writes a value.
    pub format: &'a dyn Fn(f64) -> String,
    /// Writes a value of the axis, of rows so far apart.
    pub tick: fn(f64, f64) -> String,
    /// A horizontal line at a value that is not of this run.
    pub reference: Option<(&'static str, f64)>,
    /// Vertical lines.
    pub marks: &'a [Mark],
}

/// A vertical line with a name.
pub struct Mark {
    /// The step of the point.
    pub step: f64,
    /// What is left out where there is no room: `epoch ` of `epoch 3`.
    pub kind: &'static str,
    /// The rest of the name.
    pub name: String,
    /// CSS class: the line of its name.
    pub class: &'static str,
}

/// A chart with places in percent of its area, from the upper left corner.
#[derive(Serialize)]
pub struct Chart {
    title: &'static str,
    description: String,
    last_step: f64,
    rows: Vec<Label>,
    /// Rows of the logarithmic scale; empty without one.
    log_rows: Vec<Label>,
    columns: Vec<Label>,
    marks: Vec<PlacedMark>,
    reference: Option<Label>,
    lines: Vec<Line>,
}

#[derive(Serialize)]
struct Label {
    at: String,
    text: String,
}

#[derive(Serialize)]
struct PlacedMark {
    at: String,
    kind: &'static str,
    name: String,
    class: &'static str,
    /// Whether the name stands before the line: behind it there is no room.
    late: bool,
}

#[derive(Serialize)]
struct Line {
    class: &'static str,
    name: &'static str,
    path: String,
    /// A path of dots, where points are few.
    dots: String,
    last: String,
    /// Step, place from above, text: what the script shows under the pointer.
    points: Vec<(f64, f64, String)>,
    /// Places of the points on the logarithmic scale; empty without one.
    log: Vec<Option<f64>>,
}

/// A screen shows no more points than this.
const MOST_POINTS: usize = 600;
/// Up to this many points are marked.
const MOST_DOTS: usize = 40;
const COLUMNS: f64 = 5.0;
/// The share of the width, in percent, behind which there is no room for a name.
const LAST_TENTH: f64 = 90.0;

/// Places `series` in `frame`; `None` when there is nothing to draw.
pub fn chart(series: Vec<Series>, frame: &Frame) -> Option<Chart> {
    let series: Vec<Series> = series.into_iter().map(finite).collect();
    let values = || series.iter().flat_map(|line| line.points.iter().map(|point| point.1));
    let reference = frame.reference.map(|(_, value)| value);
    let zero = frame.from_zero.then_some(0.0);
    let (low, high) = range(values().chain(reference).chain(zero));
    values().next()?;
    let unit = frame.unit;
    let rows: Vec<f64> =
        ticks(low / unit, high / unit, ROWS).into_iter().map(|row| row * unit).collect();
    let apart = rows[1] - rows[0];
    let (low, high) = (low.min(rows[0]), high.max(rows[rows.len() - 1]));
    let down = |value: f64| 100.0 * (high - value) / (high - low);
    let log = logarithmic(values(), frame);
    let last_step = frame.last_step.max(1.0);
    let across = |step: f64| 100.0 * step / last_step;
    let label = |at: f64, text: String| Label { at: percent(at), text };
    Some(Chart {
        title: frame.title,
        description: describe(&series, frame),
        last_step,
        rows: rows
            .iter()
            .map(|&row| label(down(row), trimmed(&(frame.tick)(row, apart))))
            .collect(),
        log_rows: log.iter().flat_map(Logarithmic::labels).collect(),
        columns: ticks(0.0, last_step, COLUMNS)
            .into_iter()
            .filter(|&step| step <= last_step && step.fract() == 0.0)
            .map(|step| label(across(step), format!("{step}")))
            .collect(),
        marks: frame.marks.iter().map(|mark| place_mark(mark, across(mark.step))).collect(),
        reference: frame.reference.map(|(text, value)| label(down(value), text.to_string())),
        lines: series
            .iter()
            .map(|line| place(line, &across, &down, log.as_ref(), frame.format))
            .collect(),
    })
}

fn place_mark(mark: &Mark, across: f64) -> PlacedMark {
    let Mark { kind, ref name, class, .. } = *mark;
    PlacedMark { at: percent(across), kind, name: name.clone(), class, late: across > LAST_TENTH }
}

fn finite(mut series: Series) -> Series {
    series.points.retain(|(step, value)| step.is_finite() && value.is_finite());
    series
}

fn place(
    series: &Series,
    across: &dyn Fn(f64) -> f64,
    down: &dyn Fn(f64) -> f64,
    log: Option<&Logarithmic>,
    format: &dyn Fn(f64) -> String,
) -> Line {
    let shown = thin(&series.points);
    let (mut path, mut dots) = (String::new(), String::new());
    for (index, (step, value)) in shown.iter().enumerate() {
        let place = format!("{} {}", percent(across(*step)), percent(down(*value)));
        path.push_str(if index == 0 { "M" } else { "L" });
        path.push_str(&place);
        if shown.len() <= MOST_DOTS {
            dots.push_str(&format!("M{place}h0"));
        }
    }
    let points = shown.iter().map(|&(step, value)| (step, hundredths(down(value)), format(value)));
    Line {
        class: series.class,
        name: series.name,
        path,
        dots,
        last: series.points.last().map_or(String::new(), |point| format(point.1)),
        points: points.collect(),
        log: log.iter().flat_map(|log| shown.iter().map(|point| log.down(point.1))).collect(),
    }
}

/// A logarithmic scale: its rows, the lowest first.
struct Logarithmic {
    rows: Vec<f64>,
}

/// The logarithmic axis; none where it is not wanted, or nothing is above 0.
fn logarithmic(values: impl Iterator<Item = f64>, frame: &Frame) -> Option<Logarithmic> {
    let (low, high) = range(values.filter(|&value| value > 0.0));
    let wanted = frame.logarithmic && low.is_finite();
    wanted.then(|| Logarithmic { rows: log_ticks(low, high) })
}

impl Logarithmic {
    /// Place from above in percent; none of what is not above 0.
    fn down(&self, value: f64) -> Option<f64> {
        let (low, high) = (self.rows.first()?.ln(), self.rows.last()?.ln());
        (value > 0.0).then(|| hundredths(100.0 * (high - value.ln()) / (high - low)))
    }

    fn labels(&self) -> Vec<Label> {
        let label = |&row: &f64| {
            let text = if row < 1e-3 { format!("{row:e}") } else { row.to_string() };
            Some(Label { at: percent(self.down(row)?), text })
        };
        self.rows.iter().filter_map(label).collect()
    }
}

/// The chart in words, for those who cannot see it.
fn describe(series: &[Series], frame: &Frame) -> String {
    let ends = |line: &Series| {
        let (first, last) = (line.points.first()?, line.points.last()?);
        let (from, to) = ((frame.format)(first.1), (frame.format)(last.1));
        Some(format!("{}: {from} at step {}, {to} at step {}", line.name, first.0, last.0))
    };
    let lines: Vec<String> = series.iter().filter_map(ends).collect();
    format!("{}. {}", frame.title, lines.join("; "))
}

/// Keeps the smallest and the largest of every few points, so that no spike is lost.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MOST_POINTS {
        return points.to_vec();
    }
    let width = points.len().div_ceil(MOST_POINTS / 2 - 1);
    let mut kept = vec![points[0]];
    for bucket in points[1..points.len() - 1].chunks(width) {
        let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let ends = bucket.iter().min_by(by_value).zip(bucket.iter().max_by(by_value));
        let Some((low, high)) = ends else { continue };
        kept.push(if low.0 < high.0 { *low } else { *high });
        if low.0 != high.0 {
            kept.push(if low.0 < high.0 { *high } else { *low });
        }
    }
    kept.push(points[points.len() - 1]);
    kept
}

fn hundredths(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

fn percent(value: f64) -> String {
    hundredths(value).to_string()
}

#[cfg(test)]
mod tests {
    use super::super::axis::tick_number;
    use super::*;

    fn frame(last_step: f64) -> Frame<'static> {
        Frame {
            title: "Loss",
            last_step,
            from_zero: false,
            logarithmic: false,
            unit: 1.0,
            format: &|value| format!("{value:.2}"),
            tick: tick_number,
            reference: None,
            marks: &[],
        }
    }

    fn line(points: Vec<(f64, f64)>) -> Series {
        Series { class: "a", name: "training", points }
    }

    #[test]
    fn points_are_placed_in_percent_and_nan_left_out() {
        let points = vec![(1.0, 2.0), (2.0, f64::NAN), (4.0, 1.0)];
        let chart = chart(vec![line(points)], &frame(4.0)).unwrap();
        assert_eq!(chart.lines[0].path, "M25 0L100 100");
        assert_eq!(chart.lines[0].dots, "M25 0h0M100 100h0");
        assert_eq!(chart.lines[0].points[1], (4.0, 100.0, "1.00".to_string()));
        assert_eq!(chart.description, "Loss. training: 2.00 at step 1, 1.00 at step 4");
        let steps: Vec<&str> = chart.columns.iter().map(|label| label.text.as_str()).collect();
        assert_eq!(steps, ["0", "1", "2", "3", "4"]);
    }

    #[test]
    fn points_have_a_place_on_the_logarithmic_scale() {
        let points = vec![(1.0, 10.0), (2.0, 0.1), (3.0, 0.0), (4.0, 1.0)];
        let log = Frame { logarithmic: true, ..frame(4.0) };
        let both = chart(vec![line(points.clone())], &log).unwrap();
        assert_eq!(both.lines[0].log, [Some(0.0), Some(100.0), None, Some(50.0)]);
        let rows: Vec<&str> = both.log_rows.iter().map(|row| row.text.as_str()).collect();
        assert_eq!(rows, ["0.1", "0.2", "0.5", "1", "2", "5", "10"]);
        let linear = chart(vec![line(points)], &frame(4.0)).unwrap();
        assert!(linear.log_rows.is_empty() && linear.lines[0].log.is_empty());
        assert_eq!(both.lines[0].path, linear.lines[0].path, "the page begins with the other one");
        let none = chart(vec![line(vec![(1.0, 0.0)])], &log).unwrap();
        assert!(none.log_rows.is_empty());
    }

    #[test]
    fn nothing_to_draw_is_no_chart() {
        assert!(chart(Vec::new(), &frame(4.0)).is_none());
        assert!(chart(vec![line(vec![(1.0, f64::INFINITY)])], &frame(4.0)).is_none());
        assert!(chart(vec![line(vec![(1.0, 0.0)])], &frame(1.0)).is_some());
    }

    #[test]
    fn thinning_keeps_ends_and_spikes() {
        let mut points: Vec<(f64, f64)> = (0..10_000).map(|i| (f64::from(i), 1.0)).collect();
        points[4_321].1 = 9.0;
        points[7_654].1 = -9.0;
        let kept = thin(&points);
        assert!(kept.len() <= MOST_POINTS, "{}", kept.len());
        assert!(kept.contains(&(4_321.0, 9.0)) && kept.contains(&(7_654.0, -9.0)));
        assert_eq!((kept[0].0, kept[kept.len() - 1].0), (0.0, 9_999.0));
        assert!(kept.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }

    /// A name behind a line in the last tenth would be as wide as it likes outside of the chart.
    #[test]
    fn names_of_the_last_marks_stand_before_them() {
        let mark = |step| Mark { step, kind: "epoch ", name: "3".into(), class: "" };
        let marks = [mark(5.0), mark(9.5)];
        let framed = Frame { marks: &marks, ..frame(10.0) };
        let chart = chart(vec![line(vec![(1.0, 1.0)])], &framed).unwrap();
        let late: Vec<bool> = chart.marks.iter().map(|mark| mark.late).collect();
        assert_eq!(late, [false, true]);
    }
}
