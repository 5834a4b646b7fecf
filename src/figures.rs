//! Figures as people read them.

use crate::byte_size::ByteSize;

/// Seconds as `1:02:03` or `2:03`.
pub fn clock(seconds: f64) -> String {
    let total = if seconds.is_finite() { seconds.max(0.0).round() as u64 } else { 0 };
    let (hours, minutes, seconds) = (total / 3600, total / 60 % 60, total % 60);
    if hours > 0 {
        format!("{hours}:{minutes:02}:{seconds:02}")
    } else {
        format!("{minutes}:{seconds:02}")
    }
}

/// Digits in groups of three: `1,234,567`.
pub fn thousands(count: u64) -> String {
    let digits = count.to_string();
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|group| std::str::from_utf8(group).expect("digits are ASCII"))
        .collect();
    groups.join(",")
}

/// A count in at most four digits: `538`, `53.8k`, `4.88M`, `7.24B`.
pub fn short_count(count: u64) -> String {
    let scaled = [(1_000_000_000, "B"), (1_000_000, "M"), (1_000, "k")];
    let Some((factor, unit)) = scaled.into_iter().find(|(factor, _)| count >= *factor) else {
        return count.to_string();
    };
    let value = count as f64 / factor as f64;
    let decimals = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    format!("{value:.decimals$}{unit}")
}

/// Tokens in a second: whole ones, or two digits where they are few: `305`, `2.5`, `0.46`.
pub fn rate(value: f64) -> String {
    match value.abs() {
        size if size >= 9.95 => format!("{value:.0}"),
        size if size < 0.001 => scientific(value),
        size => {
            let decimals = 1 - size.log10().floor() as i32;
            format!("{value:.*}", usize::try_from(decimals).unwrap_or(1).min(4))
        }
    }
}

/// A number with `decimals` behind the point; fewer of a large number, and a power of ten where so many would
/// leave one digit or none.
pub fn number(value: f64, decimals: usize) -> String {
    let least = 10f64.powi(1 - i32::try_from(decimals).unwrap_or(i32::MAX));
    match value.abs() {
        size if size >= 1e6 => scientific(value),
        size if size >= 1000.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.0$}", decimals.saturating_sub(1).min(2)),
        size if 0.0 < size && size < least => scientific(value),
        _ => format!("{value:.decimals$}"),
    }
}

/// `2e-4`, `1.35e-4`.
pub fn scientific(value: f64) -> String {
    if value == 0.0 {
        return "0".to_string();
    }
    let text = format!("{value:.2e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let digits = digits.trim_end_matches('0').trim_end_matches('.');
    format!("{digits}e{exponent}")
}

/// Seconds of a part of a step: `37.9 s`, `12.3 ms`, `4.0 µs`.
pub fn duration(seconds: f64) -> String {
    in_units(seconds, [(1.0, "s"), (1e-3, "ms"), (1e-6, "µs")])
}

/// Floating-point operations: `3.8 PFLOP`.
pub fn operations(count: f64) -> String {
    in_units(count, [(1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")])
}

/// A value in the largest unit that leaves at least 1, with one decimal; the last unit where none does.
fn in_units(value: f64, units: [(f64, &str); 3]) -> String {
    let large = units.into_iter().find(|(size, _)| value >= *size);
    let (size, unit) = large.unwrap_or(units[2]);
    format!("{:.1} {unit}", value / size)
}

/// `now` over `before` in bytes, with its sign.
pub fn change(before: u64, now: u64) -> String {
    match now.checked_sub(before) {
        Some(0) => "0 B".to_string(),
        Some(more) => format!("+{}", ByteSize(more)),
        None => format!("\u{2212}{}", ByteSize(before - now)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_a_clock() {
        assert_eq!(clock(3723.4), "1:02:03");
        assert_eq!(clock(123.0), "2:03");
        assert_eq!(clock(59.6), "1:00");
        assert_eq!(clock(f64::NAN), "0:00");
        assert_eq!(clock(-1.0), "0:00");
    }

    #[test]
    fn counts_have_groups_or_units() {
        assert_eq!(thousands(0), "0");
        assert_eq!(thousands(999), "999");
        assert_eq!(thousands(1_234_567), "1,234,567");
        assert_eq!(short_count(999), "999");
        assert_eq!(short_count(1_000), "1.00k");
        assert_eq!(short_count(53_812), "53.8k");
        assert_eq!(short_count(4_884_480), "4.88M");
        assert_eq!(short_count(134_515_008), "135M");
    }

    #[test]
    fn numbers_are_as_long_as_they_are_useful() {
        assert_eq!(scientific(2e-4), "2e-4");
        assert_eq!(scientific(1.349e-5), "1.35e-5");
        assert_eq!(scientific(0.0), "0");
        assert_eq!(number(1.23456, 3), "1.235");
        assert_eq!(number(12.3456, 3), "12.35");
        assert_eq!(number(4321.9, 3), "4322");
        assert_eq!(number(4.3219e7, 3), "4.32e7");
    }

    /// What is small keeps its digits.
    #[test]
    fn small_numbers_are_not_zero() {
        assert_eq!([0.0, 0.079, 0.01].map(|norm| number(norm, 3)), ["0.000", "0.079", "0.010"]);
        assert_eq!([1.234e-4, 0.0099].map(|norm| number(norm, 3)), ["1.23e-4", "9.9e-3"]);
        assert_eq!([0.006, 5e-5].map(|loss| number(loss, 4)), ["0.0060", "5e-5"]);
        let rates = [305.4, 9.96, 9.94, 2.5, 0.46, 0.0123, 1e-5, 0.0].map(rate);
        assert_eq!(rates, ["305", "10", "9.9", "2.5", "0.46", "0.012", "1e-5", "0"]);
    }

    #[test]
    fn units_leave_a_digit() {
        assert_eq!(
            [37.94, 1.0, 0.0123, 4e-6, 0.0].map(duration),
            ["37.9 s", "1.0 s", "12.3 ms", "4.0 µs", "0.0 µs"]
        );
        assert_eq!(
            [3.8e15, 2e12, 7.5e9, 1e7].map(operations),
            ["3.8 PFLOP", "2.0 TFLOP", "7.5 GFLOP", "0.0 GFLOP"]
        );
    }

    #[test]
    fn changes_have_a_sign() {
        assert_eq!(change(5, 5), "0 B");
        assert_eq!(change(1024, 3072), "+2.0 KiB");
        assert_eq!(change(3072, 1024), "\u{2212}2.0 KiB");
    }
}
