//! Learning-rate schedules under Hugging Face's names, equal to transformers' `get_*_schedule`.
//!
//! Step `k` counts from 0, so with most warm-ups the first step has learning rate 0. Schedules that follow the loss
//! (`reduce_lr_on_plateau`, `greedy`) are refused: the rate of a step depends on nothing but its number.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::scheduler_kwargs::{Curve, SchedulerKwargs};
use crate::error::{Error, Result};
use crate::plural::counted;

/// `--lr-scheduler-type`: what the learning rate does after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[value(rename_all = "snake_case")]
#[serde(rename_all = "snake_case")]
pub enum SchedulerType {
    /// Constant, without warmup.
    Constant,
    /// Constant after the warmup.
    ConstantWithWarmup,
    /// Linear decay to zero.
    Linear,
    /// Cosine decay to zero.
    Cosine,
    /// Cosine decay to zero, `num_cycles` times from the peak.
    CosineWithRestarts,
    /// Cosine decay to `min_lr_rate` of the peak.
    CosineWithMinLr,
    /// Cosine decay to `min_lr_rate` of the peak, which the last step has; warmup from above zero.
    CosineWarmupWithMinLr,
    /// Decay to `lr_end` as a power of what is left.
    Polynomial,
    /// Decay by the square root of the steps.
    InverseSqrt,
    /// Peak for a while, then decay in the last `num_decay_steps`.
    WarmupStableDecay,
}

impl SchedulerType {
    /// Its name on the command line.
    pub fn name(self) -> String {
        let value = self.to_possible_value();
        value.map(|value| value.get_name().to_string()).unwrap_or_default()
    }

    /// Whether it ends at `min_lr_rate` of the peak.
    pub fn has_floor(self) -> bool {
        matches!(self, SchedulerType::CosineWithMinLr | SchedulerType::CosineWarmupWithMinLr)
    }
}

/// How long the learning rate rises.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Warmup {
    /// So many steps.
    Steps(u64),
    /// A share of all steps, rounded up, but not the last one: a run of one step would learn nothing.
    Ratio(f64),
}

impl Warmup {
    /// Steps of warmup in a run of `max_steps`.
    pub fn steps(self, max_steps: u64) -> u64 {
        match self {
            Warmup::Steps(steps) => steps,
            Warmup::Ratio(ratio) => {
                ((max_steps as f64 * ratio).ceil() as u64).min(max_steps.saturating_sub(1))
            }
        }
    }
}

/// The learning rate of every step of one run.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// Shape after the warm-up.
    pub scheduler_type: SchedulerType,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Steps of warm-up.
    pub warmup_steps: u64,
    /// Steps of the run.
    pub max_steps: u64,
    /// Floor of schedules that have one, as a share of the peak.
    pub min_lr_rate: f64,
    /// What else the schedule is told.
    pub kwargs: SchedulerKwargs,
}

/// `lr_end` of `polynomial`, by default.
const LR_END: f64 = 1e-7;
/// `timescale` of `inverse_sqrt` without warmup, by default.
const TIMESCALE: f64 = 10_000.0;
/// `num_cycles` of a cosine by default: one fall.
const HALF: f64 = 0.5;

impl Schedule {
    /// Learning rate of step `k`, counted from 0: the peak times [`factor`](Self::factor).
    pub fn rate(&self, k: u64) -> f64 {
        self.learning_rate * self.factor(k)
    }

    /// `λ(k)`: `k / warmup` while warming up, then with `p = (k − warmup) / (max − warmup)`:
    /// 1 (constant), `1 − p` (linear), `½(1 + cos 2πnp)` (cosine in `n` cycles, ½ by default; with restarts
    /// `½(1 + cos π(np mod 1))`), and that between floor and 1.
    /// Source: transformers, `optimization.py`.
    pub fn factor(&self, k: u64) -> f64 {
        match self.scheduler_type {
            SchedulerType::Constant => 1.0,
            SchedulerType::WarmupStableDecay => self.warmup_stable_decay(k),
            _ if k < self.warmup_steps => self.warmup(k),
            SchedulerType::ConstantWithWarmup => 1.0,
            SchedulerType::Linear => {
                (self.max_steps as f64 - k as f64).max(0.0) / self.decay_steps()
            }
            SchedulerType::Cosine => self.cosine(self.progress(k)),
            SchedulerType::CosineWithRestarts => self.cosine_with_restarts(self.progress(k)),
            SchedulerType::CosineWithMinLr => self.above_floor(self.cosine(self.progress(k))),
            SchedulerType::CosineWarmupWithMinLr => {
                self.above_floor(self.cosine(self.progress(k + 1)))
            }
            SchedulerType::Polynomial => self.polynomial(k),
            SchedulerType::InverseSqrt => self.inverse_sqrt(k),
        }
    }

    /// Checks that the schedule fits into a run of `max_steps`.
    ///
    /// # Errors
    /// `Usage` with the steps of each part: a decay that does not end, or steps behind it that learn nothing.
    pub fn check_length(&self) -> Result<()> {
        if self.scheduler_type != SchedulerType::WarmupStableDecay {
            return Ok(());
        }
        let (warmup, max_steps) = (self.warmup_steps, self.max_steps);
        let (stable, decay) = (self.kwargs.num_stable_steps, self.num_decay_steps());
        let parts = warmup.saturating_add(stable.unwrap_or(0)).saturating_add(decay);
        let idle = stable.is_some() && self.floor_ratio() == 0.0 && parts < max_steps;
        if parts <= max_steps && !idle {
            return Ok(());
        }
        let of_stable = stable.map_or(String::new(), |steps| format!(", {steps} at the peak"));
        let what = format_args!(
            "`warmup_stable_decay` has {} of warmup{of_stable} and {decay} of decay, the run has {max_steps}",
            counted(usize::try_from(warmup).unwrap_or(usize::MAX), "step")
        );
        Err(Error::usage(what).hint(match idle {
            true => "leave `num_stable_steps` out: the peak then lasts until the decay begins",
            false if warmup >= max_steps => "give fewer `--warmup-steps`, or more `--max-steps`",
            false if stable.is_some_and(|steps| steps >= max_steps) => {
                "give fewer `num_stable_steps`, or more `--max-steps`"
            }
            false => "give fewer `num_decay_steps`, or more `--max-steps`",
        }))
    }

    /// `(k + 1) / warmup`, or from `warmup_lr_rate` to 1, where the warmup does not begin at zero.
    fn warmup(&self, k: u64) -> f64 {
        let (k, steps) = (k as f64, self.warmup_steps as f64);
        match (self.scheduler_type, self.kwargs.warmup_lr_rate) {
            (SchedulerType::CosineWarmupWithMinLr, None) => (k + 1.0) / steps,
            (SchedulerType::CosineWarmupWithMinLr, Some(first)) => {
                first + (1.0 - first) * k / (steps - 1.0).max(1.0)
            }
            _ => k / steps,
        }
    }

    fn decay_steps(&self) -> f64 {
        self.max_steps.saturating_sub(self.warmup_steps).max(1) as f64
    }

    /// `p`, from 0 at the end of the warmup to 1 at the end of the run.
    fn progress(&self, k: u64) -> f64 {
        (k - self.warmup_steps) as f64 / self.decay_steps()
    }

    fn cosine(&self, p: f64) -> f64 {
        Curve::Cosine.fall(p, self.kwargs.num_cycles.unwrap_or(HALF)).max(0.0)
    }

    fn cosine_with_restarts(&self, p: f64) -> f64 {
        let num_cycles = self.kwargs.num_cycles.unwrap_or(1.0);
        if p < 1.0 { Curve::Cosine.fall((num_cycles * p) % 1.0, HALF) } else { 0.0 }
    }

    fn above_floor(&self, fall: f64) -> f64 {
        fall * (1.0 - self.min_lr_rate) + self.min_lr_rate
    }

    /// `((lr − lr_end)·(1 − p)^power + lr_end) / lr`.
    fn polynomial(&self, k: u64) -> f64 {
        let lr_end = self.lr_end();
        let left = (1.0 - self.progress(k)).max(0.0);
        let power = self.kwargs.power.unwrap_or(1.0);
        ((self.learning_rate - lr_end) * left.powf(power) + lr_end) / self.learning_rate
    }

    /// Learning rate that `polynomial` ends with.
    pub fn lr_end(&self) -> f64 {
        self.kwargs.lr_end.unwrap_or(LR_END)
    }

    /// `1 / √((k − warmup + timescale) / timescale)`; the timescale is the warmup by default.
    fn inverse_sqrt(&self, k: u64) -> f64 {
        let warmup = Some(self.warmup_steps as f64).filter(|steps| *steps > 0.0);
        let timescale = self.kwargs.timescale.or(warmup).unwrap_or(TIMESCALE);
        let shift = timescale - self.warmup_steps as f64;
        1.0 / ((k as f64 + shift) / timescale).sqrt()
    }

    /// From `min_lr_ratio` up to 1, there, and down again in `num_decay_steps`.
    fn warmup_stable_decay(&self, k: u64) -> f64 {
        let (warmup, decay) = (self.warmup_steps, self.num_decay_steps());
        let rest = self.max_steps.saturating_sub(warmup + decay);
        let peak_ends = warmup + self.kwargs.num_stable_steps.unwrap_or(rest);
        let floor = self.floor_ratio();
        let above = |factor: f64| (factor * (1.0 - floor) + floor).max(0.0);
        if k < warmup {
            let curve = self.kwargs.warmup_type.unwrap_or(Curve::Linear);
            above(curve.rise(k as f64 / warmup as f64))
        } else if k < peak_ends {
            1.0
        } else if k < peak_ends + decay {
            let curve = self.kwargs.decay_type.unwrap_or(Curve::Cosine);
            let num_cycles = self.kwargs.num_cycles.unwrap_or(HALF);
            above(curve.fall((k - peak_ends) as f64 / decay as f64, num_cycles))
        } else {
            floor
        }
    }

    fn num_decay_steps(&self) -> u64 {
        self.kwargs.num_decay_steps.unwrap_or(0)
    }

    fn floor_ratio(&self) -> f64 {
        self.kwargs.min_lr_ratio.unwrap_or(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Case {
        name: SchedulerType,
        learning_rate: f64,
        warmup_steps: u64,
        max_steps: u64,
        min_lr_rate: f64,
        #[serde(default)]
        kwargs: Option<serde_json::Value>,
        rates: Vec<f64>,
    }

    /// Made by `scripts/golden/gen_optimizer.py`.
    #[test]
    fn rates_are_those_of_transformers() {
        let text =
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/train/schedules.json"));
        let cases: Vec<Case> = serde_json::from_str(text).unwrap();
        assert_eq!(cases.len(), 94);
        for case in cases {
            let schedule = Schedule {
                scheduler_type: case.name,
                learning_rate: case.learning_rate,
                warmup_steps: case.warmup_steps,
                max_steps: case.max_steps,
                min_lr_rate: case.min_lr_rate,
                kwargs: case
                    .kwargs
                    .map_or_else(Default::default, |kwargs| kwargs.to_string().parse().unwrap()),
            };
            schedule.kwargs.check_read_by(case.name).unwrap();
            for (k, &expected) in case.rates.iter().enumerate() {
                let rate = schedule.rate(k as u64);
                assert!((rate - expected).abs() <= 1e-19, "{schedule:?} step {k}: {rate:e}");
            }
        }
    }

    #[test]
    fn a_decay_ends_with_the_run() {
        let check = |kwargs: &str, warmup_steps, max_steps| {
            let schedule = Schedule {
                scheduler_type: SchedulerType::WarmupStableDecay,
                learning_rate: 1.0,
                warmup_steps,
                max_steps,
                min_lr_rate: 0.1,
                kwargs: kwargs.parse().unwrap(),
            };
            schedule.check_length().map_err(|error| error.to_string())
        };
        assert_eq!(check("{\"num_decay_steps\": 8}", 2, 10), Ok(()));
        let fewer = "give fewer `num_decay_steps`, or more `--max-steps`";
        let of_run = |parts: &str, hint: &str| {
            Err(format!(
                "`warmup_stable_decay` has 2 steps of {parts}, the run has 10\nhint: {hint}"
            ))
        };
        let message = of_run("warmup and 9 of decay", fewer);
        assert_eq!(check("{\"num_decay_steps\": 9}", 2, 10), message);
        assert!(check("{\"num_decay_steps\": 1}", u64::MAX, 10).is_err());
        let parts =
            |stable: u64| format!("{{\"num_stable_steps\": {stable}, \"num_decay_steps\": 4}}");
        assert_eq!(check(&parts(4), 2, 10), Ok(()));
        let message = of_run("warmup, 5 at the peak and 4 of decay", fewer);
        assert_eq!(check(&parts(5), 2, 10), message);
        let idle = "leave `num_stable_steps` out: the peak then lasts until the decay begins";
        let message = of_run("warmup, 3 at the peak and 4 of decay", idle);
        assert_eq!(check(&parts(3), 2, 10), message);
        let above_zero = parts(3).replace('}', ", \"min_lr_ratio\": 0.1}");
        assert_eq!(check(&above_zero, 2, 10), Ok(()));
    }

    #[test]
    fn warmup_ratio_rounds_up() {
        assert_eq!(Warmup::Ratio(0.03).steps(100), 3);
        assert_eq!(Warmup::Ratio(0.03).steps(101), 4);
        assert_eq!(Warmup::Ratio(0.0).steps(100), 0);
        assert_eq!([1, 2].map(|steps| Warmup::Ratio(0.03).steps(steps)), [0, 1]);
        assert_eq!(Warmup::Steps(7).steps(3), 7);
    }
}
