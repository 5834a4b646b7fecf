//! A line chart as SVG: no script, values on hover through `<title>`.

use std::fmt::Write;

/// One line of a chart.
pub struct Series<'a> {
    /// CSS class: its colour.
    pub class: &'a str,
    /// Name in the legend and on hover.
    pub name: &'a str,
    /// Points, x ascending.
    pub points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 78.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 30.0;
/// More points than this are thinned: a screen shows no more.
const MOST_POINTS: usize = 400;

/// The chart; `format` writes values of the y axis, which begins at 0 with `from_zero`. Empty when
/// there is nothing to draw.
pub fn render(series: &[Series], format: &dyn Fn(f64) -> String, from_zero: bool) -> String {
    let finite = |(x, y): &&(f64, f64)| x.is_finite() && y.is_finite();
    let points: Vec<(f64, f64)> =
        series.iter().flat_map(|s| s.points.iter().filter(finite).copied()).collect();
    if points.is_empty() {
        return String::new();
    }
    let (x_low, x_high) = range(points.iter().map(|p| p.0));
    let floor = from_zero.then_some(0.0);
    let (low, high) = range(points.iter().map(|p| p.1).chain(floor));
    let ticks = ticks(low, high);
    let (y_low, y_high) = (low.min(ticks[0]), high.max(ticks[ticks.len() - 1]));
    let across = |x: f64| LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT);
    let down = |y: f64| HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM);
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">");
    for tick in ticks {
        let y = down(tick);
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
             <text class=\"axis\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 8.0,
            y + 4.0,
            format(tick)
        );
    }
    for (x, anchor) in [(x_low, "start"), (x_high, "end")] {
        let (place, base) = (across(x), HEIGHT - 10.0);
        let _ = write!(
            svg,
            "<text class=\"axis\" x=\"{place:.1}\" y=\"{base}\" text-anchor=\"{anchor}\">step \
             {x:.0}</text>"
        );
    }
    for line in series {
        draw(&mut svg, line, &across, &down, format);
    }
    svg.push_str("</svg>");
    svg
}

fn draw(
    svg: &mut String,
    line: &Series,
    across: &dyn Fn(f64) -> f64,
    down: &dyn Fn(f64) -> f64,
    format: &dyn Fn(f64) -> String,
) {
    let stride = line.points.len().div_ceil(MOST_POINTS).max(1);
    let last = line.points.len().saturating_sub(1);
    let shown: Vec<&(f64, f64)> = line
        .points
        .iter()
        .enumerate()
        .filter(|(i, (_, y))| (i % stride == 0 || *i == last) && y.is_finite())
        .map(|(_, point)| point)
        .collect();
    let path: Vec<String> =
        shown.iter().map(|(x, y)| format!("{:.1},{:.1}", across(*x), down(*y))).collect();
    let class = line.class;
    let _ = write!(svg, "<polyline class=\"{class}\" points=\"{}\"/>", path.join(" "));
    for (x, y) in shown {
        let _ = write!(
            svg,
            "<circle class=\"{class}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"5\"><title>step {x:.0}: {} \
             {}</title></circle>",
            across(*x),
            down(*y),
            line.name,
            format(*y)
        );
    }
}

/// Smallest and largest, never equal.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    if low == high { (low, high + low.abs().max(1.0) * 1e-3) } else { (low, high) }
}

/// Round values that cover the range: 1, 2 or 5 times a power of ten apart.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 4.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().find(|m| m * power >= rough).unwrap_or(10.0);
    let step = step * power;
    let first = (low / step).floor() as i64;
    let last = (high / step).ceil() as i64;
    (first..=last).map(|tick| tick as f64 * step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover_the_range() {
        assert_eq!(ticks(2.9, 3.8), [2.5, 3.0, 3.5, 4.0]);
        assert_eq!(ticks(0.0, 1.0), [0.0, 0.5, 1.0]);
    }

    #[test]
    fn values_that_are_no_numbers_are_left_out() {
        let points = vec![(1.0, 2.0), (2.0, f64::NAN), (3.0, 1.0)];
        let series = [Series { class: "a", name: "loss", points }];
        let svg = render(&series, &|v| format!("{v:.2}"), false);
        assert!(!svg.contains("NaN"), "{svg}");
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(svg.contains("<title>step 3: loss 1.00</title>"));
        assert!(render(&[], &|v| v.to_string(), true).is_empty());
    }
}
