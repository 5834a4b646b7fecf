//! A budget that nothing fits: the nearest settings that would.

use super::{Activations, Candidate, Demand, WeightsMode};
use crate::cli::size::ByteSize;
use crate::error::Error;
use crate::plan::fit::largest;
use crate::plan::settings::{Policy, Settings};

/// Suggested lengths are multiples of this many tokens.
const LENGTH_STEP: usize = 64;

impl Demand<'_> {
    /// `leanest` is the least that was allowed.
    pub(super) fn shortfall(&self, budget: u64, leanest: Candidate) -> Error {
        let error = self.too_little(budget, leanest);
        // What is not asked for, but would help: the less changes the better.
        let relaxed = [
            (self.activations, WeightsMode::Auto),
            (Activations::Auto, self.mode),
            (Activations::Auto, WeightsMode::Auto),
        ];
        for (activations, mode) in relaxed {
            if let Some(choice) = self.allowing(activations, mode).within(budget) {
                let bytes = ByteSize(self.total_bytes(self.settings, choice.candidate));
                let flags = self.flags(choice.candidate);
                return error.hint(format_args!("{flags} would need {bytes}"));
            }
        }
        let stream = self.weights.streamed.is_some();
        let embedding_on_host = self.embedding_places().contains(&true);
        let others = Policy::Offload;
        let offload = Candidate { kept: 0, others, stream, embedding_on_host, pieces: true };
        let least = match self.pinned_for(offload) <= self.pinned_bytes {
            true => offload,
            false => Candidate { others: Policy::Checkpoint, ..offload },
        };
        let flags = self.flags(least);
        if let Some((tokens, bytes)) = self.longest_fit(budget, least) {
            return error.hint(format_args!(
                "{flags} with {tokens} tokens in a forward pass would need {}: lower `--max-length` \
                 or `--per-device-train-batch-size`",
                ByteSize(bytes)
            ));
        }
        if let Some((rank, bytes)) = self.highest_rank_fit(budget, least) {
            return error.hint(format_args!(
                "{flags} with {LENGTH_STEP} tokens in a forward pass (`--max-length`) and \
                 `--lora-r {rank}` would need {}",
                ByteSize(bytes)
            ));
        }
        let alone = {
            let outside = self.outside_of(least);
            ByteSize(outside.weights.total() + outside.process_bytes)
        };
        error.hint(format_args!("the frozen weights and data alone take {alone}"))
    }

    fn too_little(&self, budget: u64, leanest: Candidate) -> Error {
        let (need, pinned) = (self.total_bytes(self.settings, leanest), self.pinned_for(leanest));
        if need <= budget {
            return Error::budget(format_args!(
                "offloaded inputs need {} of pinned host memory, {} can be had: half of what is free",
                ByteSize(pinned),
                ByteSize(self.pinned_bytes)
            ));
        }
        Error::budget(format_args!(
            "plan needs {}, budget is {}: {} too little",
            ByteSize(need),
            ByteSize(budget),
            ByteSize(need - budget)
        ))
    }

    /// What to type for a candidate.
    fn flags(&self, Candidate { kept, others, stream, .. }: Candidate) -> String {
        let activations = match (kept, others) {
            (0, Policy::Offload) => "`--activations offload`",
            (0, _) => "`--activations checkpoint`",
            (kept, _) if kept == self.spec.num_layers => "`--activations keep`",
            _ => "`--activations auto`",
        };
        let stream = stream.then_some("`--weights stream`");
        [Some(activations), stream].into_iter().flatten().collect::<Vec<_>>().join(" with ")
    }

    /// The largest forward pass that fits, and what it needs.
    fn longest_fit(&self, budget: u64, candidate: Candidate) -> Option<(usize, u64)> {
        let need =
            |steps| self.total_bytes(&shorter(self.settings, steps * LENGTH_STEP), candidate);
        let steps = largest(self.settings.tokens / LENGTH_STEP, |steps| need(steps) <= budget);
        (steps > 0).then(|| (steps * LENGTH_STEP, need(steps)))
    }

    /// The highest rank that fits with the shortest forward pass, and what it needs.
    fn highest_rank_fit(&self, budget: u64, candidate: Candidate) -> Option<(usize, u64)> {
        let mut settings = shorter(self.settings, LENGTH_STEP);
        let mut rank = settings.targets.iter().map(|target| target.r).max()? / 2;
        while rank > 0 {
            settings.targets.iter_mut().for_each(|target| target.r = target.r.min(rank));
            let bytes = self.total_bytes(&settings, candidate);
            if bytes <= budget {
                return Some((rank, bytes));
            }
            rank /= 2;
        }
        None
    }
}

/// The same with at most `tokens` in a forward pass.
pub(super) fn shorter(settings: &Settings, tokens: usize) -> Settings {
    let tokens = settings.tokens.min(tokens);
    let longest_document = settings.longest_document.min(tokens);
    let logit_rows = settings.logit_rows.min(tokens);
    Settings { tokens, longest_document, logit_rows, ..settings.clone() }
}
