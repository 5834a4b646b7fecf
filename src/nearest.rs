//! Names that a mistyped one may have meant.

/// How many suggestions one message carries.
const SUGGESTIONS: usize = 3;
/// Below this share of agreement a suggestion is noise.
const THRESHOLD: f64 = 0.6;

/// The `known` names closest to `wanted`, quoted and joined by `or`; empty when none is close.
pub fn nearest<'a>(wanted: &str, known: impl Iterator<Item = &'a str>) -> String {
    let score = |name: &str| strsim::normalized_damerau_levenshtein(wanted, name);
    let mut close: Vec<(f64, &str)> =
        known.map(|name| (score(name), name)).filter(|(score, _)| *score >= THRESHOLD).collect();
    close.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    close.dedup_by(|a, b| a.1 == b.1);
    let names: Vec<String> =
        close.iter().take(SUGGESTIONS).map(|(_, name)| format!("`{name}`")).collect();
    names.join(" or ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closest_come_first_and_strangers_not_at_all() {
        let known = ["v_proj", "q_proj", "k_proj", "o_proj", "gate_proj", "lm_head"];
        assert_eq!(nearest("qproj", known.into_iter()), "`q_proj` or `k_proj` or `o_proj`");
        assert_eq!(nearest("lm-head", known.into_iter()), "`lm_head`");
        assert_eq!(nearest("transformer", known.into_iter()), "");
    }
}
