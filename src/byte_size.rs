//! Amounts of memory as people write them: `23GiB`, `500MB`, `1048576B`.
//!
//! A number without a unit is refused: `24` may have meant 24 GiB, and would be 24 bytes.

use std::fmt;
use std::str::FromStr;

use crate::error::HINT;

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// Suffixes and their factors: powers of 1024 with an `i`, powers of 1000 without.
const UNITS: [(&str, u64); 9] = [
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
    ("b", 1),
];

impl FromStr for ByteSize {
    /// What was expected, and in a second line the way out, if there is one.
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.trim().to_ascii_lowercase();
        let (number, factor) = UNITS
            .iter()
            .find_map(|(unit, factor)| Some((lower.strip_suffix(unit)?.trim_end(), *factor)))
            .ok_or_else(|| without_unit(&lower).unwrap_or_else(|| expected(text)))?;
        let amount: f64 = number.parse().map_err(|_| expected(text))?;
        let bytes = amount * factor as f64;
        if !bytes.is_finite() || bytes < 0.0 || bytes >= u64::MAX as f64 {
            return Err(expected(text));
        }
        Ok(ByteSize(bytes.round() as u64))
    }
}

impl ByteSize {
    /// The value of a flag that means this many bytes and no other.
    pub fn exact(self) -> String {
        match self.0 {
            bytes if bytes > 0 && bytes.is_multiple_of(1 << 30) => format!("{}GiB", bytes >> 30),
            bytes if bytes > 0 && bytes.is_multiple_of(1 << 20) => format!("{}MiB", bytes >> 20),
            bytes => format!("{bytes}B"),
        }
    }
}

/// All of them together; of more than can be counted, `u64::MAX`, which no system has.
pub fn sum_of_bytes(amounts: impl IntoIterator<Item = u64>) -> u64 {
    amounts.into_iter().fold(0, u64::saturating_add)
}

fn expected(text: &str) -> String {
    format!("`{text}` is not a size, expected a number with a unit, such as 23GiB or 500MB")
}

/// What is wrong with a mere number: few are meant in GiB, many as bytes.
fn without_unit(text: &str) -> Option<String> {
    const MANY: f64 = 1e5;
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && *number >= 0.0)?;
    let meant = if number < MANY { "GiB" } else { "B" };
    Some(format!("expected a number with a unit\n{HINT}`{number}{meant}`"))
}

/// An amount in the largest power of 1024 that leaves at least 1, with one decimal.
impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS[..4].iter().rev().zip(["TiB", "GiB", "MiB", "KiB"]);
        let text = match unit.into_iter().find(|((_, factor), _)| self.0 >= *factor) {
            Some(((_, factor), name)) => format!("{:.1} {name}", self.0 as f64 / *factor as f64),
            None => format!("{} B", self.0),
        };
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_both_families_of_units() {
        for (text, bytes) in [
            ("23GiB", 23 << 30),
            ("1.5 kib", 1536),
            ("500MB", 500_000_000),
            ("0B", 0),
            ("17b", 17),
            ("2TiB", 2 << 40),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "GiB", "-1GiB", "-1", "many", "1e300GiB", "nan", "12 apples"] {
            let error = text.parse::<ByteSize>().unwrap_err();
            assert!(error.contains(&format!("`{text}`")), "{error}");
        }
    }

    #[test]
    fn a_number_without_a_unit_is_refused() {
        for (text, meant) in [("24", "24GiB"), ("0.5", "0.5GiB"), ("1048576", "1048576B")] {
            let error = text.parse::<ByteSize>().unwrap_err();
            assert_eq!(error, format!("expected a number with a unit\nhint: `{meant}`"));
        }
        assert!("0".parse::<ByteSize>().is_err());
    }

    #[test]
    fn a_flag_reads_back_what_is_exact() {
        for bytes in [0, 1, 1 << 20, (1 << 30) + 1, 24 << 30] {
            assert_eq!(ByteSize(bytes).exact().parse(), Ok(ByteSize(bytes)));
        }
    }

    #[test]
    fn prints_what_people_read() {
        assert_eq!(ByteSize(23 << 30).to_string(), "23.0 GiB");
        assert_eq!(ByteSize(1536).to_string(), "1.5 KiB");
        assert_eq!(ByteSize(1023).to_string(), "1023 B");
    }
}
