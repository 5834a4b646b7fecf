//! How fast this process has been, and how long the rest of the run will take.

use crate::data::Batch;
use crate::train::recipe::Recipe;

/// A forward pass beside a step, which also has a backward pass of about twice the work.
const FORWARD_SHARE: f64 = 1.0 / 3.0;

/// What was done since this process began, and how long it took.
#[derive(Debug, Default)]
pub(super) struct Session {
    /// Optimizer steps.
    pub steps: u64,
    /// Tokens of these steps.
    tokens: u64,
    /// Seconds of these steps.
    seconds: f64,
    /// Seconds of the last evaluation.
    pub evaluation_seconds: Option<f64>,
}

impl Session {
    /// Counts a step.
    pub fn add_step(&mut self, tokens: u64, seconds: f64) {
        self.steps += 1;
        self.tokens += tokens;
        self.seconds += seconds;
    }

    /// Seconds from after step `step` to the end of a run of `max_steps`: of its steps, and of the evaluations
    /// that are due. These take as long as the last one, or before there was one as a forward pass of so many
    /// tokens.
    pub fn eta_seconds(
        &self,
        recipe: &Recipe,
        evaluation: &[Batch],
        step: u64,
        max_steps: u64,
    ) -> f64 {
        let steps = (max_steps - step) as f64 * self.seconds / self.steps as f64;
        if evaluation.is_empty() {
            return steps;
        }
        let each = self.evaluation_seconds.unwrap_or_else(|| {
            let tokens: usize = evaluation.iter().map(Batch::tokens).sum();
            tokens as f64 * self.seconds / self.tokens as f64 * FORWARD_SHARE
        });
        steps + recipe.evaluation.left(step, max_steps) as f64 * each
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Document;
    use crate::train::tests::recipe;

    #[test]
    fn evaluations_take_part_of_the_time_that_is_left() {
        let mut recipe = recipe();
        recipe.evaluation.steps = Some(10);
        let document = Document { input_ids: vec![1; 30], labels: vec![1; 30], line: 1 };
        let evaluation = [Batch::from_documents(&[document])];
        let mut session = Session::default();
        (0..4).for_each(|_| session.add_step(20, 2.0));
        // 30 tokens at a third of 0.1 s each; after steps 10, 20 and the last, 25.
        assert_eq!(session.eta_seconds(&recipe, &[], 4, 25), 42.0);
        let eta = session.eta_seconds(&recipe, &evaluation, 4, 25);
        assert!((eta - (42.0 + 3.0)).abs() < 1e-9, "{eta}");
        session.evaluation_seconds = Some(5.0);
        assert_eq!(session.eta_seconds(&recipe, &evaluation, 10, 25), 30.0 + 3.0 * 5.0);
        assert_eq!(session.eta_seconds(&recipe, &evaluation, 11, 25), 28.0 + 2.0 * 5.0);
        assert_eq!(session.eta_seconds(&recipe, &evaluation, 25, 25), 5.0);
        recipe.evaluation.steps = None;
        assert_eq!(session.eta_seconds(&recipe, &evaluation, 11, 25), 28.0 + 5.0);
    }
}
