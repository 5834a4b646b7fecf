//! Sizes that are tried: the largest that fit, and smaller ones that are suggested.

use crate::plan::budget::Demand;
use crate::plan::settings::{LEAST_LOGIT_ROWS, Settings};

/// Lengths are multiples of this many tokens.
pub(in crate::plan) const LENGTH_STEP: usize = 64;
/// Tokens of the longest pass that is tried.
pub(super) const MOST_TOKENS: usize = 1 << 24;
/// Tokens of the shortest tile of the MLP that is suggested.
const LEAST_TILE_TOKENS: usize = 256;

/// The longest document that fits, in whole steps, or of all positions that the model has; no shorter than
/// `asked` where that fits.
pub(super) fn longest_document(
    demand: &Demand,
    asked: usize,
    fits: impl Fn(usize) -> bool,
) -> usize {
    let positions = demand.spec.learned_positions;
    let most = positions.unwrap_or(MOST_TOKENS);
    let longest = match positions {
        Some(most) if fits(most) => most,
        _ => LENGTH_STEP * largest(most / LENGTH_STEP, |n| fits(n * LENGTH_STEP)),
    };
    if longest < asked && fits(asked) { asked } else { longest }
}

/// The largest `n` up to `most` that fits; what fits with more fits with less. Sizes are doubled
/// first: most answers are far below the most that is tried.
pub(in crate::plan) fn largest(most: usize, fits: impl Fn(usize) -> bool) -> usize {
    let (mut good, mut bad) = (0, 1);
    while bad <= most && fits(bad) {
        (good, bad) = (bad, 2 * bad);
    }
    bad = bad.min(most + 1);
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        if fits(middle) { good = middle } else { bad = middle }
    }
    good
}

/// Gives `settings` the smallest tiles and chunks that are suggested.
pub(in crate::plan) fn smallest_pieces(settings: &mut Settings) {
    if settings.mlp_tile() > LEAST_TILE_TOKENS {
        settings.mlp_tile_length = Some(LEAST_TILE_TOKENS);
    }
    settings.logit_rows = settings.logit_rows.min(LEAST_LOGIT_ROWS);
}

/// A quarter of the tile, where it is long enough to be cut.
pub(super) fn smaller_tile(settings: &Settings) -> Option<usize> {
    let quarter = settings.mlp_tile() / 4;
    (quarter >= LEAST_TILE_TOKENS).then_some(quarter)
}

/// A quarter of the rows of logits, where there are enough of them, as a round number.
pub(super) fn smaller_chunk(settings: &Settings) -> Option<usize> {
    let quarter = settings.logit_rows / 4 / LEAST_LOGIT_ROWS * LEAST_LOGIT_ROWS;
    (quarter >= LEAST_LOGIT_ROWS).then_some(quarter)
}
