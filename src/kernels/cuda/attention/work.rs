//! The workspace of attention on a GPU, and where its parts lie.

use super::exact::BLOCK_ROWS;
use super::implementation::AttnImplementation;
use crate::model::spec::ModelSpec;
use crate::plan::Settings;

/// Parts of the workspace begin on this many f32 elements.
const PART_ELEMENTS: usize = 64;

/// Where the parts of the workspace lie, in f32 elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkLayout {
    /// Scores of one part: rows · keys of a group of heads.
    pub(super) scores: usize,
    /// dk and dv of one document and key head, each.
    pub(super) keys: usize,
    /// δ of all tokens and heads.
    pub(super) delta: usize,
    training: bool,
}

impl WorkLayout {
    /// The layout for the largest document of a plan.
    pub fn new(spec: &ModelSpec, settings: &Settings, attention: AttnImplementation) -> Self {
        let heads = [spec.num_heads, spec.num_kv_heads, spec.head_dim];
        let (tokens, longest) = (settings.tokens, settings.longest_document);
        let exact = WorkLayout::exact(heads, tokens, longest, settings.training());
        match attention.flash(spec.head_dim) {
            Some(_) => WorkLayout { scores: 0, keys: 0, ..exact },
            None => exact,
        }
    }

    /// The layout of the exact path, for H and K heads of so many columns.
    pub(super) fn exact(
        [num_heads, num_kv_heads, head_dim]: [usize; 3],
        tokens: usize,
        longest: usize,
        training: bool,
    ) -> Self {
        let group = num_heads / num_kv_heads;
        let in_training = |elements: usize| if training { padded(elements) } else { 0 };
        WorkLayout {
            scores: padded(group * BLOCK_ROWS.min(longest) * padded(longest)),
            keys: in_training(longest * head_dim),
            delta: in_training(tokens * num_heads),
            training,
        }
    }

    /// Scores in bf16.
    pub(super) fn half_scores(&self) -> usize {
        padded(self.scores.div_ceil(2))
    }

    /// f32 elements of everything: products, probabilities (bf16), and their gradients.
    pub fn elements(&self) -> usize {
        let pair = self.scores + self.half_scores();
        self.delta + 2 * self.keys + if self.training { 2 * pair } else { pair }
    }
}

fn padded(elements: usize) -> usize {
    elements.next_multiple_of(PART_ELEMENTS)
}
