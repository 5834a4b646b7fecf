//! Short runs of the tiny model, and what they leave behind.

use std::cell::Cell;
use std::collections::BTreeMap;

use safetensors::SafeTensors;
use serde_json::Value;

use crate::training::{Workplace, error_of, fail, stderr, succeed};

/// One step on one packed row, with a gradient that is not clipped.
const DEFAULTS: &str = "model=model data=train.jsonl threads=2 max-length=32 max-steps=1 \
                        gradient-accumulation-steps=1 learning-rate=1e-2 \
                        lr-scheduler-type=constant max-grad-norm=0";

/// Runs in one folder.
pub struct Runs {
    pub place: Workplace,
    number: Cell<usize>,
}

impl Runs {
    pub fn new() -> Self {
        Runs { place: Workplace::new(), number: Cell::new(0) }
    }

    /// `nibble train` with the defaults above and `flags`: `name=value`, or `!name` to leave a
    /// default out.
    pub fn train(&self, flags: &str) -> Run<'_> {
        self.nibble(&arguments(flags).iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Flags as they stand, without the defaults.
    pub fn nibble(&self, arguments: &[&str]) -> Run<'_> {
        self.nibble_into(&self.next_out(), arguments)
    }

    /// Runs the command into a folder of its own.
    pub fn nibble_into(&self, out: &str, arguments: &[&str]) -> Run<'_> {
        let mut command = self.place.nibble(&["train", "--out", out]);
        command.args(arguments);
        let said = stderr(&succeed(command));
        Run { place: &self.place, out: out.to_string(), said }
    }

    /// The message of a run that is refused.
    pub fn refused(&self, flags: &str) -> String {
        let mut command = self.place.nibble(&["train", "--out", &self.next_out()]);
        command.args(arguments(flags));
        error_of(&fail(command).1).to_string()
    }

    pub fn next_out(&self) -> String {
        self.number.set(self.number.get() + 1);
        format!("out-{}", self.number.get())
    }
}

/// Flags of [`Runs::train`] as the command line has them.
pub fn arguments(flags: &str) -> Vec<String> {
    let name = |flag: &str| flag.trim_start_matches('!').split('=').next().unwrap().to_string();
    let given: Vec<String> = flags.split_whitespace().map(name).collect();
    let defaults = DEFAULTS.split_whitespace().filter(|default| !given.contains(&name(default)));
    let flags = flags.split_whitespace().filter(|flag| !flag.starts_with('!'));
    defaults.chain(flags).map(|flag| format!("--{flag}")).collect()
}

/// What a run left behind.
pub struct Run<'a> {
    place: &'a Workplace,
    pub out: String,
    /// What the run said on standard error.
    pub said: String,
}

impl Run<'_> {
    /// Events of one kind in `metrics.jsonl`.
    pub fn events(&self, kind: &str) -> Vec<Value> {
        let text = String::from_utf8(self.place.read(&format!("{}/metrics.jsonl", self.out)));
        let events = text.unwrap();
        let events = events.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        events.filter(|event| event["event"] == kind).collect()
    }

    /// The number `name` of each event of a kind.
    pub fn numbers(&self, kind: &str, name: &str) -> Vec<f64> {
        self.events(kind).iter().map(|event| event[name].as_f64().unwrap()).collect()
    }

    pub fn start(&self) -> Value {
        self.events("start").remove(0)
    }

    pub fn end(&self) -> Value {
        self.events("end").remove(0)
    }

    pub fn adapter_config(&self) -> Value {
        self.place.json(&format!("{}/adapter_config.json", self.out))
    }

    /// Steps of the checkpoints that are there, in order.
    pub fn checkpoints(&self) -> Vec<u64> {
        let names = self.place.list(&self.out).into_iter();
        let step = |name: String| name.strip_prefix("checkpoint-")?.parse().ok();
        let mut steps: Vec<u64> = names.filter_map(step).collect();
        steps.sort();
        steps
    }

    /// Tensors of the newest checkpoint: `master`, `exp_avg` or `exp_avg_sq`, by module and matrix.
    pub fn optimizer(&self, part: &str) -> Tensors {
        let newest = *self.checkpoints().last().unwrap();
        let path = format!("{}/checkpoint-{newest}/optimizer.safetensors", self.out);
        let bytes = self.place.read(&path);
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let prefix = format!("{part}.base_model.model.model.");
        let tensor = |(name, view): (&str, safetensors::tensor::TensorView)| {
            let name = name.strip_prefix(&prefix)?.strip_suffix(".weight")?.to_string();
            let bytes = view.data().chunks_exact(4);
            let values = bytes.map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
            Some((name, Tensor { shape: view.shape().to_vec(), values: values.collect() }))
        };
        file.iter().filter_map(tensor).collect()
    }

    /// The trained modules, without the number of their block.
    pub fn modules(&self) -> Vec<String> {
        let modules = self.optimizer("master").into_keys();
        let short = |name: String| name.splitn(3, '.').nth(2).unwrap().to_string();
        let mut modules: Vec<String> = modules
            .map(short)
            .filter_map(|name| name.strip_suffix(".lora_A").map(String::from))
            .collect();
        modules.sort();
        modules.dedup();
        modules
    }
}

pub type Tensors = BTreeMap<String, Tensor>;

#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// The tensors whose name holds `part`.
pub fn only(tensors: Tensors, part: &str) -> Tensors {
    tensors.into_iter().filter(|(name, _)| name.contains(part)).collect()
}

/// L2 norm over all tensors.
pub fn norm(tensors: &Tensors) -> f64 {
    let values = tensors.values().flat_map(|tensor| &tensor.values);
    values.map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt()
}

/// Asserts `got = factor · of`, within `tolerance` of the largest value; not all may be zero.
pub fn assert_scaled(got: &Tensors, factor: f64, of: &Tensors, tolerance: f64) {
    assert!(got.keys().eq(of.keys()), "{:?} {:?}", got.keys(), of.keys());
    assert!(norm(of) > 0.0);
    for (name, tensor) in of {
        let largest = tensor.values.iter().fold(0f32, |most, value| most.max(value.abs()));
        let limit = tolerance * factor.abs() * f64::from(largest);
        for (got, of) in got[name].values.iter().zip(&tensor.values) {
            let difference = f64::from(*got) - factor * f64::from(*of);
            assert!(difference.abs() <= limit, "{name}: {got} is not {factor} times {of}");
        }
    }
}
