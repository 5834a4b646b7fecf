//! Values beside a scale: round ones, few enough to read, written so that no two are the same.

use crate::figures::{scientific, thousands};

/// Rows of a scale, about.
pub(super) const ROWS: f64 = 4.0;

/// Smallest and largest, never so close that no values between them could be told apart.
pub(super) fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    const LEAST_SHARE: f64 = 1e-9;
    let ends = (f64::INFINITY, f64::NEG_INFINITY);
    let (low, high) = values.fold(ends, |(low, high), v| (low.min(v), high.max(v)));
    let close = high - low <= LEAST_SHARE * low.abs().max(high.abs());
    if close { (low, high + low.abs().max(1.0) * 1e-3) } else { (low, high) }
}

/// Round values around the range, about `count` steps of 1, 2 or 5 times a power of ten.
pub(super) fn ticks(low: f64, high: f64, count: f64) -> Vec<f64> {
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

/// Round values around the range, no more than a few: 1, 2 and 5 times powers of ten, or 1 and 3, or
/// powers alone; in a range that is small beside its values those of a linear scale.
pub(super) fn log_ticks(low: f64, high: f64) -> Vec<f64> {
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

/// A row of an axis whose rows are `apart`: with the decimals that tell it from the next one.
pub(super) fn tick_number(value: f64, apart: f64) -> String {
    /// Decimals that are read at a glance.
    const MOST_DECIMALS: i32 = 4;
    let decimals = (-apart.max(f64::MIN_POSITIVE).log10().floor()) as i32;
    let few_digits = value.abs() < 100.0 * apart;
    match usize::try_from(decimals) {
        _ if value.abs() >= 1e6 || (decimals > MOST_DECIMALS && few_digits) => scientific(value),
        Ok(decimals) if decimals > 0 => format!("{value:.decimals$}"),
        _ if value < 0.0 => format!("{value:.0}"),
        _ => thousands(value.round() as u64),
    }
}

/// A number without the zeros behind its point, its unit kept: `2.500` is `2.5`, `1.0 GiB` `1 GiB`.
pub(super) fn trimmed(text: &str) -> String {
    let (number, unit) = text.split_at(text.find(' ').unwrap_or(text.len()));
    match number.contains('.') && !number.contains('e') {
        true => format!("{}{unit}", number.trim_end_matches('0').trim_end_matches('.')),
        false => text.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn rows_of_an_axis_differ() {
        let axis = |low: f64, high: f64| -> Vec<String> {
            let rows = ticks(low, high, ROWS);
            let apart = rows[1] - rows[0];
            rows.iter().map(|&row| trimmed(&tick_number(row, apart))).collect()
        };
        assert_eq!(axis(0.0, 0.46), ["0", "0.2", "0.4", "0.6"]);
        assert_eq!(axis(0.0, 1.2e-4), ["0", "5e-5", "1e-4", "1.5e-4"]);
        assert_eq!(axis(0.0, 3.1), ["0", "1", "2", "3", "4"]);
        assert_eq!(axis(0.0, 5300.0), ["0", "2,000", "4,000", "6,000"]);
        assert_eq!(axis(2.9, 3.8), ["2.5", "3", "3.5", "4"]);
        let last_bit = range([10.86, f64::from_bits(10.86f64.to_bits() + 1)].into_iter());
        for (low, high) in
            [(0.0, 1e-9), (1.0, 1.000_01), (0.99, 0.990_04), (0.0, 3e7), last_bit, (0.0, 1e-300)]
        {
            let mut rows = axis(low, high);
            let all = rows.len();
            rows.dedup();
            assert_eq!(rows.len(), all, "{rows:?}");
        }
    }
}
