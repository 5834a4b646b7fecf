//! Nouns behind counts.

/// `one` as it stands behind `count`: `row` behind 1, else `rows`.
pub fn noun(count: usize, one: &str) -> String {
    let ending = if count == 1 { "" } else { "s" };
    format!("{one}{ending}")
}

/// The count and the noun: `3 rows`.
pub fn counted(count: usize, one: &str) -> String {
    format!("{count} {}", noun(count, one))
}
