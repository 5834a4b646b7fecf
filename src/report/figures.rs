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
    fn changes_have_a_sign() {
        assert_eq!(change(5, 5), "0 B");
        assert_eq!(change(1024, 3072), "+2.0 KiB");
        assert_eq!(change(3072, 1024), "\u{2212}2.0 KiB");
    }
}
