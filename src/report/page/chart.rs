//! Line charts as the page draws them: an SVG that stretches with its box, while labels, markers
//! and the cursor are HTML placed in percent, so that text keeps its size on every screen.

use serde::Serialize;

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
    /// A horizontal line at a value that is not of this run.
    pub reference: Option<(&'static str, f64)>,
    /// Vertical lines: step and name.
    pub marks: &'a [(f64, String)],
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
    marks: Vec<Label>,
    reference: Option<Label>,
    lines: Vec<Line>,
}

#[derive(Serialize)]
struct Label {
    at: String,
    text: String,
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
const ROWS: f64 = 4.0;
const COLUMNS: f64 = 5.0;

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
        rows: rows.iter().map(|&row| label(down(row), trimmed(&(frame.format)(row)))).collect(),
        log_rows: log.iter().flat_map(Logarithmic::labels).collect(),
        columns: ticks(0.0, last_step, COLUMNS)
            .into_iter()
            .filter(|&step| step <= last_step && step.fract() == 0.0)
            .map(|step| label(across(step), format!("{step}")))
            .collect(),
        marks: frame.marks.iter().map(|(step, text)| label(across(*step), text.clone())).collect(),
        reference: frame.reference.map(|(text, value)| label(down(value), text.to_string())),
        lines: series
            .iter()
            .map(|line| place(line, &across, &down, log.as_ref(), frame.format))
            .collect(),
    })
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

/// None where it is not wanted, or nothing is above 0.
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

/// Round values around the range, no more than a few: 1, 2 and 5 times powers of ten, or 1 and 3, or
/// powers alone; in a range that is small beside its values those of a linear scale.
fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    const MOST: usize = 7;
    let linear = ticks(low, high, ROWS);
    if high < 5.0 * low && linear[0] > 0.0 {
        return linear;
    }
    let digits: [&[i32]; 3] = [&[1, 2, 5], &[1, 3], &[1]];
    let around = |digits: &[i32]| {
        let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
        let all = (first..=last).flat_map(|power| digits.iter().map(move |&d| (d, power)));
        // By division where the power is negative: 3 / 1000 is 0.003, 3 · 0.001 may not be.
        let value = |(digit, power): (i32, i32)| match power {
            0.. => f64::from(digit) * 10f64.powi(power),
            _ => f64::from(digit) / 10f64.powi(-power),
        };
        let all: Vec<f64> = all.map(value).collect();
        let begin = all.iter().rposition(|&tick| tick <= low).unwrap_or(0);
        let end = all.iter().position(|&tick| tick >= high).unwrap_or(all.len() - 1);
        all[begin..=end].to_vec()
    };
    let fitting = digits.iter().map(|digits| around(digits)).find(|rows| rows.len() <= MOST);
    fitting.unwrap_or_else(|| {
        let rows = around(&[1]);
        let every = rows.len().div_ceil(MOST);
        let last = (rows.len() - 1) % every;
        // The highest stays; the lowest stands for what is below it.
        let kept = rows[last..].iter().copied().step_by(every);
        if last == 0 { kept.collect() } else { [rows[0]].into_iter().chain(kept).collect() }
    })
}

/// For those who cannot see the chart.
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

/// Mean of each point and its neighbours, with weights `βᵈ` at a distance of d points, as many on either
/// side, so that the line neither lags behind nor leaves the ends. None of its own where points are few.
pub fn smooth(points: &[(f64, f64)]) -> Option<Vec<(f64, f64)>> {
    const FEW: usize = 40;
    if points.len() < FEW {
        return None;
    }
    let beta = 1.0 - 1.0 / (points.len() as f64 / (2.0 * FEW as f64) + 2.0);
    // Σ βᵈ·x and Σ βᵈ over all points before, and after; either has the point itself.
    let sums = |values: &mut dyn Iterator<Item = f64>| -> Vec<(f64, f64)> {
        let next = |sums: &mut (f64, f64), value: f64| {
            *sums = (beta * sums.0 + value, beta * sums.1 + 1.0);
            Some(*sums)
        };
        values.scan((0.0, 0.0), next).collect()
    };
    let before = sums(&mut points.iter().map(|point| point.1));
    let mut after = sums(&mut points.iter().rev().map(|point| point.1));
    after.reverse();
    let last = points.len() - 1;
    let mean = |index: usize| {
        let near = index.min(last - index);
        let far = beta.powi(near as i32 + 1);
        let within = |sums: &[(f64, f64)], beyond: Option<usize>| {
            let (value, weight) = beyond.map_or((0.0, 0.0), |beyond| sums[beyond]);
            (sums[index].0 - far * value, sums[index].1 - far * weight)
        };
        let left = within(&before, index.checked_sub(near + 1));
        let right = within(&after, Some(index + near + 1).filter(|beyond| *beyond <= last));
        let (step, value) = points[index];
        (step, (left.0 + right.0 - value) / (left.1 + right.1 - 1.0))
    };
    Some((0..points.len()).map(mean).collect())
}

/// Smallest and largest, never equal.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let ends = (f64::INFINITY, f64::NEG_INFINITY);
    let (low, high) = values.fold(ends, |(low, high), v| (low.min(v), high.max(v)));
    if low == high { (low, high + low.abs().max(1.0) * 1e-3) } else { (low, high) }
}

/// Round values around the range, about `count` steps of 1, 2 or 5 times a power of ten.
fn ticks(low: f64, high: f64, count: f64) -> Vec<f64> {
    let rough = (high - low) / count;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0].into_iter().find(|m| m * power >= rough).unwrap_or(10.0) * power;
    let (first, last) = ((low / step).floor() as i64, (high / step).ceil() as i64);
    // By division where the step is a fraction: 3 / 10 is 0.3, 3 · 0.1 is not.
    let value = |tick: i64| {
        if step < 1.0 { tick as f64 / (1.0 / step).round() } else { tick as f64 * step }
    };
    (first..=last).map(value).collect()
}

/// A number without the zeros behind its point, its unit kept: `2.500` is `2.5`, `1.0 GiB` `1 GiB`.
fn trimmed(text: &str) -> String {
    let (number, unit) = text.split_at(text.find(' ').unwrap_or(text.len()));
    match number.contains('.') && !number.contains('e') {
        true => format!("{}{unit}", number.trim_end_matches('0').trim_end_matches('.')),
        false => text.to_string(),
    }
}

fn hundredths(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

fn percent(value: f64) -> String {
    hundredths(value).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(last_step: f64) -> Frame<'static> {
        Frame {
            title: "Loss",
            last_step,
            from_zero: false,
            logarithmic: false,
            unit: 1.0,
            format: &|value| format!("{value:.2}"),
            reference: None,
            marks: &[],
        }
    }

    fn line(points: Vec<(f64, f64)>) -> Series {
        Series { class: "a", name: "training", points }
    }

    #[test]
    fn ticks_are_round_and_cover_the_range() {
        assert_eq!(ticks(2.9, 3.8, 4.0), [2.5, 3.0, 3.5, 4.0]);
        assert_eq!(ticks(0.0, 1.0, 4.0), [0.0, 0.5, 1.0]);
        assert_eq!(ticks(0.0, 0.3, 4.0), [0.0, 0.1, 0.2, 0.3]);
        assert_eq!(ticks(0.0, 396.0, 5.0), [0.0, 100.0, 200.0, 300.0, 400.0]);
    }

    #[test]
    fn axis_labels_lose_their_zeros() {
        let texts = ["2.500", "0.000", "100", "1.0 GiB", "2e-10", "1.25e-4"].map(trimmed);
        assert_eq!(texts, ["2.5", "0", "100", "1 GiB", "2e-10", "1.25e-4"]);
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
    fn a_logarithmic_scale_has_few_round_rows_around_all_values() {
        assert_eq!(log_ticks(0.0048, 2.7), [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]);
        assert_eq!(log_ticks(0.3, 2.7), [0.2, 0.5, 1.0, 2.0, 5.0]);
        assert_eq!(log_ticks(2.1, 2.9), [2.0, 2.2, 2.4, 2.6, 2.8, 3.0]);
        assert_eq!(log_ticks(2e-4, 5.0), [1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0]);
        for (low, high) in [(1e-9, 3.0), (1e-12, 1e3), (1e-300, 1e300), (1.0, 1.001)] {
            let rows = log_ticks(low, high);
            assert!((2..=9).contains(&rows.len()) && rows.is_sorted(), "{rows:?}");
            assert!(rows[0] <= low * 1.0001 && rows[rows.len() - 1] >= high, "{rows:?}");
        }
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

    #[test]
    fn the_average_is_of_both_sides_and_does_not_lag() {
        assert!(smooth(&[(1.0, 2.0); 39]).is_none());
        let points: Vec<(f64, f64)> = (0..41).map(|i| (f64::from(i), 3.0)).collect();
        let flat = smooth(&points).unwrap();
        assert!(flat.iter().all(|(_, value)| (value - 3.0).abs() < 1e-12));
        let ramp: Vec<(f64, f64)> = (0..41).map(|i| (f64::from(i), f64::from(i))).collect();
        let smoothed = smooth(&ramp).unwrap();
        assert!(smoothed.iter().all(|(step, mean)| (mean - step).abs() < 1e-9), "{smoothed:?}");
        // β = 1 − 1 / 2.5125 for 41 points: a spike leaves β of itself to each neighbour.
        let spike: Vec<(f64, f64)> =
            (0..41).map(|i| (f64::from(i), f64::from(u8::from(i == 20)))).collect();
        let spread = smooth(&spike).unwrap();
        let beta = 1.0 - 1.0 / 2.5125;
        assert!((spread[21].1 / spread[20].1 - beta).abs() < 1e-4, "{:?}", spread[21]);
        assert!((spread[19].1 - spread[21].1).abs() < 1e-12);
    }
}
