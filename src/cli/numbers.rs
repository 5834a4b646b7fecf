//! Value parsers for numbers with a range.

use std::num::{NonZeroU64, NonZeroUsize};
use std::str::FromStr;

use crate::byte_size::ByteSize;
use crate::train::recipe::Every;

const TOO_SMALL: &str = "too small: it would count as 0";
const TOO_LARGE: &str = "too large: more than 3.4e38";

/// Computation is in f32: what is no normal number there would count as 0, or as infinite.
fn number(text: &str, expected: &str, fits: impl Fn(f64) -> bool) -> Result<f64, String> {
    let value = text.trim().parse().ok().filter(|value: &f64| value.is_finite());
    if let Some(value) = value.filter(|value| fits(*value)) {
        let rounded = value as f32;
        if is_zero(text) || rounded.is_normal() {
            return Ok(value);
        }
        return Err(if rounded.is_finite() { TOO_SMALL } else { TOO_LARGE }.to_string());
    }
    let too_small = value == Some(0.0) && !is_zero(text);
    Err(if too_small { TOO_SMALL.to_string() } else { format!("expected {expected}") })
}

/// Whether a number is 0 as it is written, and not by rounding.
fn is_zero(text: &str) -> bool {
    let digits = text.split(['e', 'E']).next().unwrap_or_default();
    !digits.contains(|digit| ('1'..='9').contains(&digit))
}

/// Any number, in f32.
pub fn any(text: &str) -> Result<f32, String> {
    number(text, "a number", |_| true).map(|value| value as f32)
}

/// A number above 0.
pub fn positive(text: &str) -> Result<f64, String> {
    number(text, "a number above 0", |value| value > 0.0)
}

/// A number above 0, in f32.
pub fn positive_f32(text: &str) -> Result<f32, String> {
    positive(text).map(|value| value as f32)
}

/// 0 or more.
pub fn not_negative(text: &str) -> Result<f64, String> {
    number(text, "a number, 0 or more", |value| value >= 0.0)
}

/// From 0 to 1.
pub fn share(text: &str) -> Result<f64, String> {
    number(text, "a share from 0 to 1", |value| (0.0..=1.0).contains(&value))
}

/// 0 or more and below 1.
pub fn below_one(text: &str) -> Result<f64, String> {
    number(text, "a number from 0 to below 1", |value| (0.0..1.0).contains(&value))
}

/// A whole number, 0 or more.
pub fn whole<T: FromStr>(text: &str) -> Result<T, String> {
    text.trim().parse().map_err(|_| "expected a whole number, 0 or more".to_string())
}

fn whole_above_zero<T: FromStr>(text: &str) -> Result<T, String> {
    text.trim().parse().map_err(|_| "expected a whole number, 1 or more".to_string())
}

/// A count of 1 or more.
pub fn at_least_one(text: &str) -> Result<NonZeroUsize, String> {
    whole_above_zero(text)
}

/// Worker threads: more than any machine has cores would only take memory.
pub fn threads(text: &str) -> Result<NonZeroUsize, String> {
    const MOST: usize = 1024;
    let threads = text.trim().parse().ok().filter(|threads: &NonZeroUsize| threads.get() <= MOST);
    threads.ok_or_else(|| format!("expected a whole number from 1 to {MOST}"))
}

/// A number of steps, 1 or more.
pub fn steps(text: &str) -> Result<u64, String> {
    whole_above_zero::<NonZeroU64>(text).map(u64::from)
}

/// [`steps`] between two times, or a share of a run.
pub fn interval(text: &str) -> Result<Every, String> {
    // transformers has both in floats.
    let text = text.trim();
    match (steps(text.strip_suffix(".0").unwrap_or(text)), text.parse::<f64>()) {
        (Ok(steps), _) => Ok(Every::Steps(steps)),
        (Err(_), Ok(share)) if 0.0 < share && share < 1.0 => Ok(Every::Ratio(share)),
        _ => Err("expected a whole number, 1 or more, or a share of the run below 1".to_string()),
    }
}

/// [`steps`] of a run, which transformers has as -1 where there is no limit.
pub fn max_steps(text: &str) -> Result<u64, String> {
    steps(text).map_err(|expected| match text.trim() {
        "-1" => format!("{expected}\nhint: for no limit leave it out"),
        _ => expected,
    })
}

/// A number of warmup steps, which transformers has as a share of all steps where it is below 1.
pub fn warmup_steps(text: &str) -> Result<u64, String> {
    whole(text).map_err(|expected| {
        let share = text.trim().parse::<f64>().is_ok_and(|value| 0.0 < value && value < 1.0);
        let hint = format!("\nhint: a share of all steps is `--warmup-ratio {}`", text.trim());
        if share { expected + &hint } else { expected }
    })
}

/// Length of a document in tokens: one token has nothing to predict, and positions have 32 bits.
pub fn length(text: &str) -> Result<usize, String> {
    const MOST: usize = u32::MAX as usize;
    let length = text.trim().parse().ok().filter(|length: &usize| (2..=MOST).contains(length));
    length.ok_or_else(|| format!("expected a whole number from 2 to {MOST}"))
}

/// An amount of memory that is more than nothing.
pub fn some_bytes(text: &str) -> Result<ByteSize, String> {
    let size: ByteSize = text.parse()?;
    let something = (size.0 > 0).then_some(size);
    something.ok_or_else(|| "expected more than nothing, such as 5GB".to_string())
}

/// Weights that share a scale.
pub fn block_size(text: &str) -> Result<usize, String> {
    let fits = |size: &usize| size.is_power_of_two() && (32..=4096).contains(size);
    let size = text.trim().parse().ok().filter(fits);
    size.ok_or_else(|| "expected a power of two from 32 to 4096".to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_have_the_right_ends() {
        assert_eq!(positive("2e-4"), Ok(2e-4));
        assert_eq!(any("-1e-4"), Ok(-1e-4));
        for text in ["1e-400", " -0.003e-350", "1E-50"] {
            assert_eq!(any(text), Err(TOO_SMALL.to_string()), "{text}");
        }
        assert_eq!((any("0e9"), any("-0.00"), any("1e39").is_err()), (Ok(0.0), Ok(0.0), true));
        for parser in [positive, not_negative, share, below_one] {
            assert_eq!(parser("1e-400"), Err(TOO_SMALL.to_string()));
            // In f32, that is.
            assert_eq!(parser("1e-46"), Err(TOO_SMALL.to_string()));
        }
        assert_eq!(positive("1e39"), Err(TOO_LARGE.to_string()));
        assert_eq!((positive("1e-37"), positive("3e38")), (Ok(1e-37), Ok(3e38)));
        assert!(any("hot").is_err() && any("inf").is_err() && any("nan").is_err());
        assert!(positive("0").is_err() && positive("inf").is_err() && positive("nan").is_err());
        assert!(not_negative("0").is_ok() && not_negative("-1e-9").is_err());
        assert!(share("1").is_ok() && share("1.01").is_err());
        assert!(below_one("0").is_ok() && below_one("1").is_err());
        assert_eq!(whole::<u64>("0"), Ok(0));
        assert_eq!(whole::<u64>("-1"), Err("expected a whole number, 0 or more".to_string()));
        assert!(at_least_one("1").is_ok() && at_least_one("0").is_err());
        assert_eq!(steps("0"), Err("expected a whole number, 1 or more".to_string()));
        assert_eq!(interval("50"), Ok(Every::Steps(50)));
        assert_eq!(interval("50.0"), Ok(Every::Steps(50)));
        assert_eq!(interval("0.1"), Ok(Every::Ratio(0.1)));
        assert!(
            ["0", "0.0", "1.5", "-1", "many", "5.0.0"].iter().all(|text| interval(text).is_err())
        );
        assert!(max_steps("-1").unwrap_err().ends_with("\nhint: for no limit leave it out"));
        assert_eq!((warmup_steps("0"), warmup_steps("10")), (Ok(0), Ok(10)));
        assert!(
            warmup_steps("0.1")
                .unwrap_err()
                .ends_with("hint: a share of all steps is `--warmup-ratio 0.1`")
        );
        assert!(!warmup_steps("1.5").unwrap_err().contains("hint"));
        assert!(length("2").is_ok() && length("1").is_err() && length("4294967296").is_err());
        assert!(some_bytes("0B").is_err() && some_bytes("0.1B").is_err());
        assert_eq!(some_bytes("1kB"), Ok(ByteSize(1000)));
        assert!(block_size("64").is_ok() && block_size("96").is_err() && block_size("16").is_err());
    }
}
