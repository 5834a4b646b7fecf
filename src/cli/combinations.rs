//! What no single flag of `nibble train` can be blamed for.

use super::intervals::IntervalStrategy;
use super::train::{SAMPLE_TOKENS, TrainArgs};
use crate::error::{Error, Result};

impl TrainArgs {
    /// Checks what no single flag can be blamed for.
    ///
    /// # Errors
    /// `Usage` naming the flags, and what to change.
    pub fn check_combinations(&self) -> Result<()> {
        let e = &self.evaluation;
        let without_data = !self.data.has_evaluation();
        for (flag, given) in [
            ("eval-steps", e.eval_steps.is_some()),
            ("eval-strategy", e.eval_strategy.is_some_and(|when| when != IntervalStrategy::No)),
            ("early-stopping-patience", e.early_stopping_patience.is_some()),
            ("load-best-model-at-end", e.load_best_model_at_end),
        ] {
            if given && without_data {
                return Err(Error::usage(format_args!("`--{flag}` needs evaluation data"))
                    .hint("add `--eval-data FILE` or `--validation-split 0.05`"));
            }
        }
        if e.eval_strategy == Some(IntervalStrategy::Steps) && e.eval_steps.is_none() {
            return Err(Error::usage("`--eval-strategy steps` needs `--eval-steps`")
                .hint("say how many steps lie between two evaluations"));
        }
        if e.early_stopping_patience.is_some() && e.eval_strategy == Some(IntervalStrategy::No) {
            return Err(Error::usage("`--early-stopping-patience` excludes `--eval-strategy no`")
                .hint("patience counts evaluations: use `epoch`, or `steps` with `--eval-steps`"));
        }
        if e.early_stopping_patience.is_some() && e.every().is_none() {
            return Err(Error::usage("`--early-stopping-patience` needs `--eval-steps`").hint(
                "patience counts evaluations: say how many steps lie between two, or use \
                 `--eval-strategy epoch`",
            ));
        }
        if e.early_stopping_threshold > 0.0 && e.early_stopping_patience.is_none() {
            return Err(Error::usage("`--early-stopping-threshold` has no effect by itself")
                .hint("add `--early-stopping-patience`: after how many evaluations to stop"));
        }
        self.check_schedule()?;
        if e.sample_steps.is_some() && e.sample_prompt.is_empty() {
            return Err(Error::usage("`--sample-steps` needs a prompt")
                .hint("add `--sample-prompt TEXT`, once for each prompt"));
        }
        let no_prompt = e.sample_prompt.is_empty() && !self.output.resume;
        if e.sample_max_new_tokens != SAMPLE_TOKENS && no_prompt {
            return Err(Error::usage("`--sample-max-new-tokens` needs a prompt")
                .hint("add `--sample-prompt TEXT`, once for each prompt"));
        }
        Ok(())
    }
}
