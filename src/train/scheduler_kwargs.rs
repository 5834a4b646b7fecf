//! What a learning-rate schedule can be told, under the names and with the defaults of transformers'
//! `get_*_schedule`.
//!
//! Refused: names that no schedule knows, values of another type, and those that make no schedule, such as no
//! cycles at all. What a schedule does not read is refused by [`SchedulerKwargs::check_read_by`].

use std::f64::consts::PI;
use std::str::FromStr;

use serde_json::{Map, Value};

use super::schedule::SchedulerType;
use crate::error::{Error, HINT, Result};
use crate::nearest::nearest;

/// Every name that some schedule reads.
const NAMES: [&str; 12] = [
    "decay_type",
    "lr_end",
    "min_lr",
    "min_lr_rate",
    "min_lr_ratio",
    "num_cycles",
    "num_decay_steps",
    "num_stable_steps",
    "power",
    "timescale",
    "warmup_lr_rate",
    "warmup_type",
];

/// `--lr-scheduler-kwargs`: what is not there is as the schedule has it by itself.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SchedulerKwargs {
    /// Waves of a cosine, where a half is one fall; of `cosine_with_restarts`, falls.
    pub num_cycles: Option<f64>,
    /// Learning rate that `polynomial` ends with.
    pub lr_end: Option<f64>,
    /// Exponent of `polynomial`.
    pub power: Option<f64>,
    /// Steps in which the factor of `inverse_sqrt` falls from 1 to √½, where there is no warmup.
    pub timescale: Option<f64>,
    /// Floor as a learning rate.
    pub min_lr: Option<f64>,
    /// Floor as a share of the peak.
    pub min_lr_rate: Option<f64>,
    /// Learning rate of the first step of `cosine_warmup_with_min_lr`, as a share of the peak.
    pub warmup_lr_rate: Option<f64>,
    /// Steps at the peak.
    pub num_stable_steps: Option<u64>,
    /// Steps of the fall of `warmup_stable_decay`.
    pub num_decay_steps: Option<u64>,
    /// Learning rate on both ends of `warmup_stable_decay`, as a share of the peak.
    pub min_lr_ratio: Option<f64>,
    /// Rise of `warmup_stable_decay`.
    pub warmup_type: Option<Curve>,
    /// Fall of `warmup_stable_decay`.
    pub decay_type: Option<Curve>,
    /// Names of those that are there.
    given: Vec<String>,
}

/// Course of the learning rate between two levels, with `p` from 0 to 1 on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Curve {
    /// `p` up, `1 − p` down.
    Linear,
    /// `½(1 − cos πp)` up, `½(1 + cos 2πnp)` down in `n` cycles.
    Cosine,
    /// `1 − √(1 − p)` up, `1 − √p` down.
    OneMinusSqrt,
}

impl Curve {
    fn named(name: &str) -> Option<Self> {
        match name {
            "linear" => Some(Curve::Linear),
            "cosine" => Some(Curve::Cosine),
            "1-sqrt" => Some(Curve::OneMinusSqrt),
            _ => None,
        }
    }

    /// From 0 to 1.
    pub fn rise(self, p: f64) -> f64 {
        match self {
            Curve::Linear => p,
            Curve::Cosine => 0.5 * (1.0 - (PI * p).cos()),
            Curve::OneMinusSqrt => 1.0 - (1.0 - p).sqrt(),
        }
    }

    /// From 1 to 0; a cosine in `num_cycles`, of which a half is one fall.
    pub fn fall(self, p: f64, num_cycles: f64) -> f64 {
        match self {
            Curve::Linear => 1.0 - p,
            Curve::Cosine => 0.5 * (1.0 + (PI * num_cycles * 2.0 * p).cos()),
            Curve::OneMinusSqrt => 1.0 - p.sqrt(),
        }
    }
}

impl SchedulerType {
    /// Names of the kwargs that the schedule reads.
    pub fn reads(self) -> &'static [&'static str] {
        match self {
            SchedulerType::Constant | SchedulerType::ConstantWithWarmup | SchedulerType::Linear => {
                &[]
            }
            SchedulerType::Cosine | SchedulerType::CosineWithRestarts => &["num_cycles"],
            SchedulerType::CosineWithMinLr => &["num_cycles", "min_lr", "min_lr_rate"],
            SchedulerType::CosineWarmupWithMinLr => {
                &["num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"]
            }
            SchedulerType::Polynomial => &["lr_end", "power"],
            SchedulerType::InverseSqrt => &["timescale"],
            SchedulerType::WarmupStableDecay => &[
                "num_decay_steps",
                "num_stable_steps",
                "warmup_type",
                "decay_type",
                "min_lr_ratio",
                "num_cycles",
            ],
        }
    }
}

impl SchedulerKwargs {
    /// Checks that the schedule reads all that is there.
    ///
    /// # Errors
    /// `Usage` with what it reads.
    pub fn check_read_by(&self, scheduler_type: SchedulerType) -> Result<()> {
        let reads = scheduler_type.reads();
        let Some(other) = self.given.iter().find(|name| !reads.contains(&name.as_str())) else {
            return Ok(());
        };
        let what =
            format_args!("`--lr-scheduler-kwargs`: `{}` reads no `{other}`", scheduler_type.name());
        Err(Error::usage(what).hint(match reads {
            [] => "it reads nothing: leave the flag out".to_string(),
            reads => format!("it reads `{}`", reads.join("`, `")),
        }))
    }

    fn set(&mut self, name: &str, value: &Value) -> std::result::Result<(), String> {
        let not_negative = || number(value, "a number, 0 or more", |value| value >= 0.0);
        let positive = || number(value, "a number above 0", |value| value > 0.0);
        let share = || number(value, "a share from 0 to 1", |value| (0.0..=1.0).contains(&value));
        match name {
            "num_cycles" => self.num_cycles = Some(positive()?),
            "lr_end" => self.lr_end = Some(not_negative()?),
            "power" => self.power = Some(positive()?),
            "timescale" => self.timescale = Some(whole(value, 1)? as f64),
            "min_lr" => self.min_lr = Some(not_negative()?),
            "min_lr_rate" => self.min_lr_rate = Some(share()?),
            "warmup_lr_rate" => self.warmup_lr_rate = Some(share()?),
            "num_stable_steps" => self.num_stable_steps = Some(whole(value, 0)?),
            "num_decay_steps" => self.num_decay_steps = Some(whole(value, 1)?),
            "min_lr_ratio" => self.min_lr_ratio = Some(share()?),
            "warmup_type" => self.warmup_type = Some(curve(value)?),
            "decay_type" => self.decay_type = Some(curve(value)?),
            _ => return Err("expected a name that a schedule reads".to_string()),
        }
        Ok(())
    }
}

fn number(
    value: &Value,
    expected: &str,
    fits: impl Fn(f64) -> bool,
) -> std::result::Result<f64, String> {
    let number = value.as_f64().filter(|value| value.is_finite() && fits(*value));
    number.ok_or_else(|| format!("expected {expected}"))
}

/// A whole number, also as `100.0`.
fn whole(value: &Value, least: u32) -> std::result::Result<u64, String> {
    let fits = |value: f64| {
        value.fract() == 0.0 && f64::from(least) <= value && value <= f64::from(u32::MAX)
    };
    let expected = format!("a whole number, {least} or more");
    number(value, &expected, fits).map(|value| value as u64)
}

fn curve(value: &Value) -> std::result::Result<Curve, String> {
    let curve = value.as_str().and_then(Curve::named);
    curve.ok_or_else(|| "expected \"linear\", \"cosine\" or \"1-sqrt\"".to_string())
}

impl FromStr for SchedulerKwargs {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let object: Map<String, Value> = serde_json::from_str(text).map_err(|_| {
            format!("expected a JSON object\n{HINT}in quotes, as `'{{\"num_cycles\": 3}}'`")
        })?;
        let mut kwargs = SchedulerKwargs::default();
        // As in Python, where `None` is what a schedule has by itself.
        for (name, value) in object.iter().filter(|(_, value)| !value.is_null()) {
            kwargs.set(name, value).map_err(|expected| match nearest(name, NAMES.into_iter()) {
                _ if NAMES.contains(&&**name) => format!("`{name}` is {value}, {expected}"),
                close if close.is_empty() => {
                    format!("no schedule reads `{name}`\n{HINT}they read {}", NAMES.join(", "))
                }
                close => format!("no schedule reads `{name}`\n{HINT}did you mean {close}?"),
            })?;
            kwargs.given.push(name.clone());
        }
        Ok(kwargs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_read_by_a_schedule_and_known() {
        use clap::ValueEnum;
        let all = SchedulerType::value_variants();
        for name in NAMES {
            assert!(all.iter().any(|schedule| schedule.reads().contains(&name)), "{name}");
            let value = if name.ends_with("_type") { "\"1-sqrt\"" } else { "1.0" };
            let kwargs: SchedulerKwargs = format!("{{\"{name}\": {value}}}").parse().unwrap();
            assert_eq!(kwargs.given, [name]);
        }
        for name in all.iter().flat_map(|schedule| schedule.reads()) {
            assert!(NAMES.contains(name), "{name}");
        }
    }

    #[test]
    fn null_is_as_if_it_were_left_out() {
        assert_eq!("{\"num_cycles\": null}".parse(), Ok(SchedulerKwargs::default()));
    }

    #[test]
    fn what_makes_no_schedule_is_refused() {
        let hint = "expected a JSON object\nhint: in quotes, as `'{\"num_cycles\": 3}'`";
        for (text, message) in [
            ("{'num_cycles': 3}", hint),
            ("[3]", hint),
            ("{\"num_cycles\": NaN}", hint),
            ("{\"num_cycles\": 0}", "`num_cycles` is 0, expected a number above 0"),
            ("{\"num_cycles\": \"nan\"}", "`num_cycles` is \"nan\", expected a number above 0"),
            ("{\"num_cycles\": true}", "`num_cycles` is true, expected a number above 0"),
            ("{\"power\": -1}", "`power` is -1, expected a number above 0"),
            ("{\"lr_end\": -1e-7}", "`lr_end` is -1e-7, expected a number, 0 or more"),
            ("{\"min_lr\": [1]}", "`min_lr` is [1], expected a number, 0 or more"),
            ("{\"min_lr_rate\": 1.5}", "`min_lr_rate` is 1.5, expected a share from 0 to 1"),
            ("{\"min_lr_ratio\": -0.5}", "`min_lr_ratio` is -0.5, expected a share from 0 to 1"),
            ("{\"warmup_lr_rate\": 2}", "`warmup_lr_rate` is 2, expected a share from 0 to 1"),
            ("{\"timescale\": 0}", "`timescale` is 0, expected a whole number, 1 or more"),
            (
                "{\"num_decay_steps\": 0}",
                "`num_decay_steps` is 0, expected a whole number, 1 or more",
            ),
            (
                "{\"num_stable_steps\": 2.5}",
                "`num_stable_steps` is 2.5, expected a whole number, 0 or more",
            ),
            (
                "{\"decay_type\": \"sqrt\"}",
                "`decay_type` is \"sqrt\", expected \"linear\", \"cosine\" or \"1-sqrt\"",
            ),
            (
                "{\"num_cycle\": 2}",
                "no schedule reads `num_cycle`\nhint: did you mean `num_cycles`?",
            ),
        ] {
            assert_eq!(text.parse::<SchedulerKwargs>(), Err(message.to_string()), "{text}");
        }
        let error = "{\"gamma\": 2}".parse::<SchedulerKwargs>().unwrap_err();
        assert!(error.starts_with("no schedule reads `gamma`\nhint: they read decay_type, lr_end"));
    }

    #[test]
    fn what_a_schedule_does_not_read_is_refused() {
        let kwargs: SchedulerKwargs = "{\"num_cycles\": 2, \"power\": 2}".parse().unwrap();
        for (schedule, message) in [
            (
                SchedulerType::Linear,
                "`--lr-scheduler-kwargs`: `linear` reads no `num_cycles`\n\
                 hint: it reads nothing: leave the flag out",
            ),
            (
                SchedulerType::Polynomial,
                "`--lr-scheduler-kwargs`: `polynomial` reads no `num_cycles`\n\
                 hint: it reads `lr_end`, `power`",
            ),
            (
                SchedulerType::Cosine,
                "`--lr-scheduler-kwargs`: `cosine` reads no `power`\nhint: it reads `num_cycles`",
            ),
        ] {
            assert_eq!(kwargs.check_read_by(schedule).unwrap_err().to_string(), message);
        }
    }
}
