//! Choosing the next token from logits.
//!
//! In transformers' order: repetition penalty, temperature, top-k, top-p, min-p, then one draw.
//! A draw depends on (seed, number of the token) only.

use std::cmp::Ordering;

use crate::error::{Error, Result};
use crate::random::Stream;

/// Settings under the names of transformers' `GenerationConfig`.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; 0 always takes the likeliest token.
    pub temperature: f32,
    /// Only the k likeliest tokens; 0 is all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability.
    pub top_p: f32,
    /// Only tokens at least this likely, relative to the likeliest.
    pub min_p: f32,
    /// Divides positive logits of tokens that occurred, multiplies negative ones; 1 is off.
    pub repetition_penalty: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl SamplingOptions {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        SamplingOptions {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

/// A sampler with its count of draws.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplingOptions,
    stream: Stream,
    draws: u64,
}

impl Sampler {
    /// A sampler with `options`.
    ///
    /// # Errors
    /// `Usage` naming the option that is out of its range.
    pub fn new(options: SamplingOptions) -> Result<Self> {
        let within = |name: &str, value: f32, low: f32, high: f32| {
            if (low..=high).contains(&value) {
                return Ok(());
            }
            Err(Error::usage(format_args!("--{name} {value} is not between {low} and {high}")))
        };
        within("temperature", options.temperature, 0.0, 100.0)?;
        within("top-p", options.top_p, 0.0, 1.0)?;
        within("min-p", options.min_p, 0.0, 1.0)?;
        within("repetition-penalty", options.repetition_penalty, 0.01, 100.0)?;
        let stream = Stream::new(options.seed, "sample");
        Ok(Sampler { options, stream, draws: 0 })
    }

    /// The next token after `history`, from `logits` `[V]`.
    ///
    /// # Errors
    /// `Numeric` when a logit is NaN or the largest is not finite; single tokens may be impossible.
    pub fn next(&mut self, logits: &[f32], history: &[u32]) -> Result<u32> {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if !largest.is_finite() || logits.iter().any(|logit| logit.is_nan()) {
            return Err(Error::numeric("the model's logits are not numbers").hint(
                "an adapter may have diverged in training: try an earlier checkpoint, or the base alone",
            ));
        }
        let mut logits = logits.to_vec();
        self.penalize(&mut logits, history);
        if self.options.temperature == 0.0 {
            return Ok(likeliest(&logits));
        }
        let candidates = self.candidates(&logits);
        let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
        let mut left = f64::from(self.stream.uniform(self.draws)) * total;
        self.draws += 1;
        for (token, weight) in &candidates {
            left -= weight;
            if left < 0.0 {
                return Ok(*token);
            }
        }
        Ok(candidates.last().map_or(0, |(token, _)| *token))
    }

    fn penalize(&self, logits: &mut [f32], history: &[u32]) {
        let penalty = self.options.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        let mut seen: Vec<u32> = history.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for token in seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }

    /// The tokens that may be drawn and their weights.
    fn candidates(&self, logits: &[f32]) -> Vec<(u32, f64)> {
        let options = &self.options;
        let scaled = |logit: f32| f64::from(logit) / f64::from(options.temperature);
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut candidates: Vec<(u32, f64)> = logits
            .iter()
            .zip(0..)
            .map(|(&logit, token)| (token, (scaled(logit) - scaled(largest)).exp()))
            .collect();
        if options.top_k > 0 {
            if options.top_k < candidates.len() {
                candidates.select_nth_unstable_by(options.top_k - 1, by_weight);
                candidates.truncate(options.top_k);
            }
            candidates.sort_unstable_by(by_weight);
        }
        let enough = (options.top_p < 1.0).then(|| {
            let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
            f64::from(options.top_p) * total
        });
        // Weights are relative to the likeliest token's, which is 1.
        let floor = f64::from(options.min_p);
        candidates.retain(|(_, weight)| *weight >= floor);
        if let Some(enough) = enough {
            keep_nucleus(&mut candidates, enough);
        }
        candidates
    }
}

/// Likeliest first.
fn by_weight(a: &(u32, f64), b: &(u32, f64)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Leaves the fewest of the likeliest that weigh `enough` together. Those are few as a rule: sorting a whole
/// vocabulary takes longer than a GPU for a token.
fn keep_nucleus(candidates: &mut Vec<(u32, f64)>, enough: f64) {
    const FIRST: usize = 256;
    let mut count = FIRST.min(candidates.len());
    loop {
        if count < candidates.len() {
            candidates.select_nth_unstable_by(count, by_weight);
        }
        let front = &mut candidates[..count];
        front.sort_unstable_by(by_weight);
        let mut sum = 0.0;
        let reached = front.iter().position(|(_, weight)| {
            sum += weight;
            sum >= enough
        });
        if let Some(last) = reached {
            return candidates.truncate(last + 1);
        }
        if count == candidates.len() {
            return;
        }
        count = (4 * count).min(candidates.len());
    }
}

/// The first of the largest.
fn likeliest(logits: &[f32]) -> u32 {
    let best = logits.iter().zip(0u32..).fold((f32::NEG_INFINITY, 0), |best, (&logit, token)| {
        if logit > best.0 { (logit, token) } else { best }
    });
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> SamplingOptions {
        SamplingOptions {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 3,
        }
    }

    fn counts(options: SamplingOptions, logits: &[f32]) -> Vec<usize> {
        let mut sampler = Sampler::new(options).unwrap();
        let mut counts = vec![0; logits.len()];
        for _ in 0..20_000 {
            counts[sampler.next(logits, &[]).unwrap() as usize] += 1;
        }
        counts
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.5f32.ln(), 0.25f32.ln(), 0.125f32.ln(), 0.125f32.ln()];
        let plain = counts(options(), &logits);
        for (count, expected) in plain.iter().zip([10_000, 5_000, 2_500, 2_500]) {
            assert!(count.abs_diff(expected) < 300, "{plain:?}");
        }
        let top_k = counts(SamplingOptions { top_k: 2, ..options() }, &logits);
        assert!(top_k[0].abs_diff(13_333) < 300 && top_k[2] + top_k[3] == 0, "{top_k:?}");
        let top_p = counts(SamplingOptions { top_p: 0.7, ..options() }, &logits);
        assert!(top_p[0] > 0 && top_p[1] > 0 && top_p[2] + top_p[3] == 0, "{top_p:?}");
        let min_p = counts(SamplingOptions { min_p: 0.4, ..options() }, &logits);
        assert!(min_p[1] > 0 && min_p[2] + min_p[3] == 0, "{min_p:?}");
        let cold = counts(SamplingOptions { temperature: 0.5, ..options() }, &logits);
        assert!(cold[0].abs_diff(14_545) < 300, "{cold:?}");
    }

    /// However many tokens that takes: of flat weights nearly all.
    #[test]
    fn a_nucleus_is_what_sorting_all_would_leave() {
        let stream = Stream::new(5, "weights");
        for (steepness, share) in [(0.001, 0.9), (0.001, 0.01), (0.1, 0.9), (2.0, 0.5)] {
            let mut exponents = vec![0f32; 5000];
            stream.fill_uniform(0, -4.0, 0.0, &mut exponents);
            let weights = exponents.iter().map(|&x| (f64::from(x) * steepness).exp());
            let all: Vec<(u32, f64)> = (0..).zip(weights).collect();
            let enough = share * all.iter().map(|(_, weight)| weight).sum::<f64>();
            let mut sorted = all.clone();
            sorted.sort_by(by_weight);
            let mut sum = 0.0;
            let fewest = sorted.iter().position(|(_, weight)| {
                sum += weight;
                sum >= enough
            });
            sorted.truncate(fewest.unwrap() + 1);
            let mut nucleus = all;
            keep_nucleus(&mut nucleus, enough);
            assert_eq!(nucleus, sorted, "{steepness} {share}: {}", sorted.len());
        }
    }

    #[test]
    fn greedy_takes_the_largest_and_the_penalty_moves_it() {
        let mut greedy = Sampler::new(SamplingOptions { temperature: 0.0, ..options() }).unwrap();
        assert_eq!(greedy.next(&[0.1, 2.0, 1.5], &[]).unwrap(), 1);
        let penalized = SamplingOptions { repetition_penalty: 2.0, temperature: 0.0, ..options() };
        let mut penalized = Sampler::new(penalized).unwrap();
        assert_eq!(penalized.next(&[0.1, 2.0, 1.5], &[1]).unwrap(), 2);
        let never = f32::NEG_INFINITY;
        assert_eq!(greedy.next(&[never, -5.0], &[]).unwrap(), 1);
        for logits in [[f32::NAN, 1.0], [1.0, f32::INFINITY], [never, never]] {
            for temperature in [0.0, 1.0] {
                let mut any = Sampler::new(SamplingOptions { temperature, ..options() }).unwrap();
                let error = any.next(&logits, &[]).unwrap_err().to_string();
                assert!(error.contains("not numbers"), "{logits:?}: {error}");
            }
        }
        let wrong = Sampler::new(SamplingOptions { top_p: 1.5, ..options() });
        assert!(wrong.unwrap_err().to_string().contains("--top-p 1.5"));
    }
}
