//! The learning rate schedule of `nibble train`: names that it does not take, and flags that do not go with it.

use clap::builder::{EnumValueParser, PossibleValue, TypedValueParser};
use clap::{Arg, Command};

use super::train::{MIN_LR_RATE, TrainArgs, WARMUP_RATIO};
use crate::error::{Error, HINT, Result};
use crate::train::schedule::SchedulerType;

const FOLLOWS_LOSS: &str =
    "a schedule depends on the step alone: `--early-stopping-patience` follows the loss";

/// Schedules of other trainers, and what comes close.
const ELSEWHERE: [(&str, &str); 8] = [
    ("reduce_lr_on_plateau", FOLLOWS_LOSS),
    ("greedy", FOLLOWS_LOSS),
    ("one_cycle", "`cosine` with `--warmup-ratio 0.3` rises and falls much like it"),
    ("rex", "`cosine` or `polynomial` comes close"),
    ("log_sweep", "try a few values of `--learning-rate`"),
    ("cosine_decay", "it is `cosine`, or `cosine_with_min_lr`"),
    ("linear_schedule", "it is `linear`"),
    ("wsd", "it is `warmup_stable_decay`"),
];

/// The parser of `--lr-scheduler-type`.
#[derive(Debug, Clone, Copy)]
pub struct SchedulerParser;

impl TypedValueParser for SchedulerParser {
    type Value = SchedulerType;

    fn parse_ref(
        &self,
        command: &Command,
        arg: Option<&Arg>,
        value: &std::ffi::OsStr,
    ) -> std::result::Result<SchedulerType, clap::Error> {
        let answer = ELSEWHERE.iter().find(|(name, _)| *name == value);
        let Some((_, hint)) = answer else {
            return EnumValueParser::new().parse_ref(command, arg, value);
        };
        let refuse = move |_: &str| Err(format!("not supported\n{HINT}{hint}"));
        refuse.parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        use clap::ValueEnum;
        let values = SchedulerType::value_variants().iter();
        Some(Box::new(values.filter_map(ValueEnum::to_possible_value)))
    }
}

impl TrainArgs {
    /// Checks the flags of the learning rate schedule against each other.
    pub(super) fn check_schedule(&self) -> Result<()> {
        let o = &self.optimization;
        if o.lr_scheduler_type == SchedulerType::Constant {
            self.check_no_warmup()?;
        }
        if let Some(kwargs) = &o.lr_scheduler_kwargs {
            kwargs.check_read_by(o.lr_scheduler_type)?;
        }
        self.check_floor()?;
        self.check_last_rate()?;
        let needs_decay = o.lr_scheduler_type == SchedulerType::WarmupStableDecay;
        if needs_decay && self.scheduler_kwargs().num_decay_steps.is_none() {
            let what = "`--lr-scheduler-type warmup_stable_decay` needs `num_decay_steps`";
            return Err(Error::usage(what).hint(
                "such as `--lr-scheduler-kwargs '{\"num_decay_steps\": 100}'`: so many steps at the end",
            ));
        }
        // Of a run by epochs the data tell.
        o.max_steps.map_or(Ok(()), |steps| self.recipe(0).schedule(steps).check_length())
    }

    fn check_no_warmup(&self) -> Result<()> {
        let o = &self.optimization;
        // A run from before it was refused goes on.
        let has_ratio =
            o.warmup_ratio > 0.0 && o.warmup_ratio != WARMUP_RATIO && !self.output.resume;
        let flag = match o.warmup_steps {
            Some(1..) => "warmup-steps",
            _ if has_ratio => "warmup-ratio",
            _ => return Ok(()),
        };
        Err(Error::usage(format_args!("`--{flag}` has no effect: `constant` has no warmup"))
            .hint("use `--lr-scheduler-type constant_with_warmup`"))
    }

    /// One floor at most, below the peak, of a schedule that has one.
    fn check_floor(&self) -> Result<()> {
        let o = &self.optimization;
        let kwargs = self.scheduler_kwargs();
        let by_flag = o.min_lr_rate != MIN_LR_RATE;
        if by_flag && !o.lr_scheduler_type.has_floor() {
            return Err(Error::usage("`--min-lr-rate` has no effect on this schedule")
                .hint("use `--lr-scheduler-type cosine_with_min_lr`"));
        }
        let floors = [
            ("`--min-lr-rate`", by_flag),
            ("`min_lr_rate` in `--lr-scheduler-kwargs`", kwargs.min_lr_rate.is_some()),
            ("`min_lr` in `--lr-scheduler-kwargs`", kwargs.min_lr.is_some()),
        ];
        let mut given = floors.iter().filter(|(_, given)| *given);
        if let (Some((one, _)), Some((other, _))) = (given.next(), given.next()) {
            return Err(Error::usage(format_args!("{one} excludes {other}"))
                .hint("each is the final learning rate: keep one of them"));
        }
        match kwargs.min_lr.filter(|floor| *floor >= o.learning_rate) {
            Some(floor) => Err(above_peak("min_lr", floor, o.learning_rate)),
            None => Ok(()),
        }
    }

    /// What `polynomial` ends with is below the peak.
    fn check_last_rate(&self) -> Result<()> {
        let o = &self.optimization;
        let last = self.recipe(0).schedule(1).lr_end();
        match o.lr_scheduler_type == SchedulerType::Polynomial && last >= o.learning_rate {
            true => Err(above_peak("lr_end", last, o.learning_rate)),
            false => Ok(()),
        }
    }
}

fn above_peak(name: &str, rate: f64, peak: f64) -> Error {
    let what = format_args!("`{name}` is {rate:e}, expected less than `--learning-rate`, {peak:e}");
    Error::usage(what)
        .hint(format_args!("`--lr-scheduler-kwargs '{{\"{name}\": 0}}'` is a fall to zero"))
}
