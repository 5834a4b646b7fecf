//! Python's `strftime`, as far as chat templates go: they put the date into system prompts.

use std::time::{SystemTime, UNIX_EPOCH};

const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
#[rustfmt::skip]
const MONTHS: [&str; 12] = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
];

/// The present.
pub fn unix_seconds_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs())
}

/// `format` with its directives filled in for `unix_seconds`, UTC. Unknown directives stay.
pub fn strftime(format: &str, unix_seconds: u64) -> String {
    let (days, seconds) = (unix_seconds / 86_400, unix_seconds % 86_400);
    let (year, month, day) = civil_date(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let (weekday, month_name) = (DAYS[((days + 4) % 7) as usize], MONTHS[month - 1]);
    let twelve = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let mut directive = characters.next();
        // `%-d` is `%d` without padding.
        let plain = directive == Some('-');
        if plain {
            directive = characters.next();
        }
        let number = |value: u64| if plain { value.to_string() } else { format!("{value:02}") };
        out += &match directive {
            Some('Y') => year.to_string(),
            Some('y') => number(year % 100),
            Some('m') => number(month as u64),
            Some('d') => number(day),
            Some('e') => format!("{day:2}"),
            Some('H') => number(hour),
            Some('I') => number(twelve),
            Some('M') => number(minute),
            Some('S') => number(second),
            Some('j') if plain => of_year(year, month, day).to_string(),
            Some('j') => format!("{:03}", of_year(year, month, day)),
            Some('p') => (if hour < 12 { "AM" } else { "PM" }).into(),
            Some('B') => month_name.into(),
            Some('b' | 'h') => month_name[..3].into(),
            Some('A') => weekday.into(),
            Some('a') => weekday[..3].into(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('D' | 'x') => format!("{month:02}/{day:02}/{:02}", year % 100),
            Some('T' | 'X') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('%') => "%".into(),
            other => "%".chars().chain(plain.then_some('-')).chain(other).collect(),
        };
    }
    out
}

/// Which day of its year a day is, from 1.
fn of_year(year: u64, month: usize, day: u64) -> u64 {
    const BEFORE: [u64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
    let is_leap = year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    BEFORE[month - 1] + day + u64::from(is_leap && month > 2)
}

/// Year, month and day of a day since 1970-01-01: Howard Hinnant's `civil_from_days`.
fn civil_date(days: u64) -> (u64, usize, u64) {
    let z = days + 719_468;
    let (era, of_era) = (z / 146_097, z % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year + era * 400 + u64::from(month <= 2), month as usize, day)
}

#[cfg(test)]
mod tests {
    use super::strftime;

    /// Expected values: Python's `datetime.fromtimestamp(…, UTC).strftime(…)`.
    #[test]
    fn directives_are_pythons() {
        let at = 1_721_984_703; // 2024-07-26 09:05:03
        assert_eq!(strftime("%d %b %Y", at), "26 Jul 2024");
        assert_eq!(strftime("%A, %B %-d, %Y at %I:%M %p", at), "Friday, July 26, 2024 at 09:05 AM");
        assert_eq!(
            strftime("%F %T %a %y %e %H %S %m", at),
            "2024-07-26 09:05:03 Fri 24 26 09 03 07"
        );
        assert_eq!(strftime("100%% %Q %-Q %", at), "100% %Q %-Q %");
        assert_eq!(strftime("%F %a %-I%p", 951_782_400), "2000-02-29 Tue 12AM");
        assert_eq!(strftime("%j %-j %x %D %X", at), "208 208 07/26/24 07/26/24 09:05:03");
        assert_eq!(strftime("%j %-j", 951_782_400), "060 60");
        assert_eq!(strftime("%j", 978_220_800), "366");
        assert_eq!(strftime("%j", 4_107_542_400), "060");
        assert_eq!(strftime("%F", 4_107_542_399), "2100-02-28");
        assert_eq!(strftime("%F", 4_107_542_400), "2100-03-01");
    }
}
