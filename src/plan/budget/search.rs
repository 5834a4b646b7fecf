//! The fastest of the ways to run that are allowed and fit.

use super::{Activations, Choice, Demand, Limit, WeightsMode};
use crate::error::{Error, Result};
use crate::plan::cost::Pace;
use crate::plan::processor::Processor;
use crate::plan::settings::Policy;
use crate::plan::strategy::Strategy;

/// Share of its time that a step may take, at most, for weights to stay dequantized where nobody asks for
/// it: to save less is not worth the memory, which other programs may want.
pub(super) const WORTH_MEMORY: f64 = 0.99;

impl Demand<'_> {
    /// The fastest way within `limit` of those that are allowed, by the
    /// arithmetic of `src/plan/cost.rs`; where only the leanest one fits into what is free, that. A run
    /// that goes on keeps its order of sums, which what is free then would not give again, if it can.
    ///
    /// # Errors
    /// `Budget` when nothing fits, with the nearest settings that do; `Usage` when the weights
    /// cannot be streamed and must be, or cannot stay dequantized and shall.
    pub fn choose(&self, limit: Limit) -> Result<Choice> {
        let candidates = self.candidates()?;
        let chosen = self.choose_of(&candidates, limit);
        chosen.ok_or_else(|| self.shortfall(limit, self.leanest_of(&candidates)))
    }

    fn choose_of(&self, candidates: &[Strategy], limit: Limit) -> Option<Choice> {
        let usable = limit.usable_bytes();
        let as_before = self.in_order(candidates).and_then(|same| self.fitting(&same, usable));
        as_before.or_else(|| self.fitting(candidates, usable)).or_else(|| {
            let leanest = self.leanest_of(candidates);
            self.fits(leanest, limit.most_bytes()).then(|| self.choice(leanest))
        })
    }

    /// What [`choose`](Demand::choose) would choose, if anything.
    pub(super) fn chosen(&self, limit: Limit) -> Option<Choice> {
        self.choose_of(&self.candidates().ok()?, limit)
    }

    /// Candidates that add up as the run did before; `None` for one that begins.
    fn in_order(&self, candidates: &[Strategy]) -> Option<Vec<Strategy>> {
        let order = self.wishes.sum_order?;
        let same = |c: &&Strategy| self.settings_of(**c).sum_order() == order;
        Some(candidates.iter().filter(same).copied().collect())
    }

    /// The way that takes the least of those that are allowed.
    ///
    /// # Errors
    /// `Usage` as [`choose`](Demand::choose).
    pub fn leanest(&self) -> Result<Choice> {
        Ok(self.choice(self.leanest_of(&self.candidates()?)))
    }

    /// The candidate that takes the least. What the host has no room for is no way out: of such plans, the
    /// one that lacks the least there.
    pub(super) fn leanest_of(&self, candidates: &[Strategy]) -> Strategy {
        let lacking = |candidate: &Strategy| {
            self.pinned_for(*candidate).saturating_sub(self.machine.pinned_bytes)
        };
        let least = candidates.iter().map(lacking).min();
        let possible: Vec<Strategy> = candidates
            .iter()
            .filter(|candidate| Some(lacking(candidate)) == least)
            .copied()
            .collect();
        let ends = ways(&possible).flat_map(|kept| [kept.first(), kept.last()]).flatten().copied();
        let bytes = |candidate: &Strategy| self.total_bytes(*candidate);
        ends.min_by_key(bytes).expect("one mode and one policy are allowed")
    }

    /// The fastest way that is allowed and takes at most `bytes`.
    pub(in crate::plan) fn within(&self, bytes: u64) -> Option<Choice> {
        self.fitting(&self.candidates().ok()?, bytes)
    }

    /// The fastest of `candidates` that takes at most `bytes`, with weights that stay dequantized in what it
    /// leaves of them; without these where they save next to nothing, unless they were asked for.
    fn fitting(&self, candidates: &[Strategy], bytes: u64) -> Option<Choice> {
        let ways = self.most_kept(candidates, bytes);
        let (seconds, fastest) = self.fastest_of(ways.iter().copied())?;
        let enough = match self.wishes.dequantized_blocks {
            Some(_) => seconds,
            None => WORTH_MEMORY * seconds,
        };
        // Results do not depend on what is left.
        let order = |way: Strategy| self.settings_of(way).sum_order();
        let order_of_fastest = order(fastest);
        let ways = ways.into_iter().filter(|way| order(*way) == order_of_fastest);
        let ways = ways.map(|way| self.with_weights(way, bytes));
        let with_weights = self.fastest_of(ways.filter(|way| way.dequantized_blocks > 0));
        let with_weights = with_weights.filter(|(seconds, _)| *seconds <= enough);
        Some(self.choice(with_weights.map_or(fastest, |(_, way)| way)))
    }

    /// The fastest of some ways, of equally fast ones the first, and what it takes for a token.
    pub(in crate::plan) fn fastest_of(
        &self,
        ways: impl Iterator<Item = Strategy>,
    ) -> Option<(f64, Strategy)> {
        let pace = Pace::new(self);
        let timed = ways.map(|way| (pace.seconds_per_token(&self.choice(way)), way));
        timed.min_by(|a, b| a.0.total_cmp(&b.0))
    }

    /// The candidate of each way that keeps most and takes at most `bytes`.
    pub(super) fn most_kept(&self, candidates: &[Strategy], bytes: u64) -> Vec<Strategy> {
        let fits = |candidate: &Strategy| self.fits(*candidate, bytes);
        // Blocks that do not keep may pin more.
        let candidates: Vec<Strategy> =
            candidates.iter().filter(|candidate| self.can_be_pinned(candidate)).copied().collect();
        // Of each group the first one that fits is found by bisection. That in which all keep is tried
        // apart: it needs no buffers to recompute in, and may take less than the next.
        let most = ways(&candidates).filter_map(|kept| {
            let (all, fewer) = kept.split_first()?;
            let first = || fewer.get(fewer.partition_point(|candidate| !fits(candidate)));
            // Most ways do not fit at all where memory is short.
            let any = || fewer.last().is_some_and(fits);
            if fits(all) { Some(all) } else { any().then(first).flatten() }
        });
        most.copied().collect()
    }

    /// A way that fits into `bytes`, with room in bf16 for the weights of as many blocks as do, up to those that
    /// were asked for.
    fn with_weights(&self, way: Strategy, bytes: u64) -> Strategy {
        let asked = self.wishes.dequantized_blocks.unwrap_or(usize::MAX);
        let most = asked.min(self.most_dequantized(way));
        if most == 0 {
            return way;
        }
        let with = |dequantized_blocks| Strategy { dequantized_blocks, ..way };
        let [none, one] = [0, 1].map(|blocks| self.total_bytes(with(blocks)));
        let fitting = bytes.saturating_sub(none) / (one - none).max(1);
        with(most.min(fitting as usize))
    }

    /// The most blocks whose weights can stay dequantized: one of streamed ones, as others take its place, and
    /// none where there is one buffer for all, of a base that is not in 4 bits, and on the CPU.
    pub(in crate::plan) fn most_dequantized(&self, strategy: Strategy) -> usize {
        match (self.machine.processor, strategy.stream) {
            _ if strategy.pieces.one_buffer || !self.weights.packs_linears() => 0,
            (Processor::Gpu, true) => 1,
            (Processor::Gpu, false) => self.spec.num_layers,
            (Processor::Cpu, _) => 0,
        }
    }

    /// All ways that are allowed; of two that take as long, the simpler one comes first.
    pub(super) fn candidates(&self) -> Result<Vec<Strategy>> {
        let (streams, others) = (self.streams()?, self.policies_of_others());
        self.check_dequantized_blocks()?;
        let mut candidates = Vec::new();
        for pieces in self.pieces() {
            for &on_host in self.embedding_places() {
                for &stream in streams {
                    for &others in &others {
                        let uniform = Strategy::uniform(self.spec.num_layers, others, stream);
                        let way = Strategy { on_host, pieces, ..uniform };
                        candidates.extend(self.keeping(way));
                    }
                }
            }
        }
        Ok(candidates)
    }

    fn check_dequantized_blocks(&self) -> Result<()> {
        let wanted = self.wishes.dequantized_blocks.is_some_and(|blocks| blocks > 0);
        if !wanted || self.weights.packs_linears() {
            return Ok(());
        }
        let what = "`--dequantized-blocks`: the weights of this base are not in 4 bits";
        Err(Error::usage(what).hint("leave it out, or quantize the base"))
    }

    /// Whether weights may stay in memory, be streamed, or either.
    fn streams(&self) -> Result<&'static [bool]> {
        match (self.wishes.weights, self.weights.streamed) {
            (WeightsMode::Resident, _) | (WeightsMode::Auto, None) => Ok(&[false]),
            (WeightsMode::Auto, Some(_)) => Ok(&[false, true]),
            (WeightsMode::Stream, Some(_)) => Ok(&[true]),
            (WeightsMode::Stream, None) => {
                let what = "`--weights stream`: the weights are quantized into memory, there is no \
                            4-bit file to read them from again";
                Err(Error::usage(what)
                    .hint("make one with `nibble quantize` and give it as `--model`"))
            }
        }
    }

    /// What blocks may do with their activations that do not keep them.
    fn policies_of_others(&self) -> Vec<Policy> {
        use Policy::{Attention, Checkpoint, Offload, OffloadAttention};
        match self.wishes.activations.of_every_block() {
            Some(policy) => vec![policy],
            None => vec![Checkpoint, Attention, OffloadAttention, Offload],
        }
    }

    /// Ways that differ from `way` in how many blocks keep their activations, or the output of attention,
    /// most first; `way` alone where every block does what was asked for.
    fn keeping(&self, way: Strategy) -> Vec<Strategy> {
        if self.wishes.activations != Activations::Auto {
            return vec![way];
        }
        let layers = self.spec.num_layers;
        let kept = (0..=layers).rev().map(|kept| Strategy { kept, ..way });
        match way.others {
            Policy::OffloadAttention => kept.filter_map(|way| self.as_far_as_pinned(way)).collect(),
            Policy::Offload => {
                let attended = (1..=layers).rev().map(|attended| Strategy { attended, ..way });
                kept.chain(attended).collect()
            }
            _ => kept.collect(),
        }
    }

    /// `way` with attention offloaded of as many blocks as the host has room for; `None` where that is none of
    /// those that do not keep their activations.
    fn as_far_as_pinned(&self, way: Strategy) -> Option<Strategy> {
        let others = self.spec.num_layers - way.kept;
        if others == 0 {
            return Some(way);
        }
        let with = |remaking_attention| Strategy { remaking_attention, ..way };
        let [all, fewer] = [0, 1].map(|blocks| self.pinned_for(with(blocks)));
        let lacking = all.saturating_sub(self.machine.pinned_bytes);
        let remaking = lacking.div_ceil((all - fewer).max(1)) as usize;
        (remaking < others).then(|| with(remaking))
    }
}

/// Groups of candidates that differ only in how many blocks keep their activations, or the output of
/// attention, most first: each block that keeps is faster and takes more memory.
fn ways(candidates: &[Strategy]) -> impl Iterator<Item = &[Strategy]> {
    let way = |c: &Strategy| (c.others, c.stream, c.on_host, c.pieces, c.attended > 0);
    candidates.chunk_by(move |a, b| way(a) == way(b))
}
