//! Learning-rate schedules under Hugging Face's names, equal to transformers' `get_*_schedule`.
//!
//! Step `k` counts from 0, so with warm-up the first step has learning rate 0.

use std::f64::consts::PI;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

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
    /// Cosine decay to `min_lr_rate` of the peak.
    CosineWithMinLr,
}

/// How long the learning rate rises from zero.
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
    /// Floor of [`SchedulerType::CosineWithMinLr`] as a share of the peak.
    pub min_lr_rate: f64,
}

impl Schedule {
    /// Learning rate of step `k`, counted from 0: the peak times [`factor`](Self::factor).
    pub fn rate(&self, k: u64) -> f64 {
        self.learning_rate * self.factor(k)
    }

    /// `λ(k)`: `k / warmup` while warming up, then with `p = (k − warmup) / (max − warmup)`:
    /// 1 (constant), `1 − p` (linear), `½(1 + cos πp)` (cosine), and that between floor and 1.
    /// Source: transformers, `optimization.py`.
    pub fn factor(&self, k: u64) -> f64 {
        if self.scheduler_type == SchedulerType::Constant {
            return 1.0;
        }
        if k < self.warmup_steps {
            return k as f64 / self.warmup_steps as f64;
        }
        let decay_steps = self.max_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        match self.scheduler_type {
            SchedulerType::Constant | SchedulerType::ConstantWithWarmup => 1.0,
            SchedulerType::Linear => (self.max_steps as f64 - k as f64).max(0.0) / decay_steps,
            SchedulerType::Cosine => cosine((k - self.warmup_steps) as f64 / decay_steps),
            SchedulerType::CosineWithMinLr => {
                let fall = cosine((k - self.warmup_steps) as f64 / decay_steps);
                fall * (1.0 - self.min_lr_rate) + self.min_lr_rate
            }
        }
    }
}

fn cosine(progress: f64) -> f64 {
    0.5 * (1.0 + (PI * progress).cos())
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
        rates: Vec<f64>,
    }

    /// Made by `scripts/golden/gen_optimizer.py`.
    #[test]
    fn rates_are_those_of_transformers() {
        let text =
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/train/schedules.json"));
        let cases: Vec<Case> = serde_json::from_str(text).unwrap();
        assert_eq!(cases.len(), 30);
        for case in cases {
            let schedule = Schedule {
                scheduler_type: case.name,
                learning_rate: case.learning_rate,
                warmup_steps: case.warmup_steps,
                max_steps: case.max_steps,
                min_lr_rate: case.min_lr_rate,
            };
            for (k, &expected) in case.rates.iter().enumerate() {
                let rate = schedule.rate(k as u64);
                assert!((rate - expected).abs() <= 1e-19, "{schedule:?} step {k}: {rate:e}");
            }
        }
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
