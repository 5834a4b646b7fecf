//! What the optimizer needs of a backend.

use std::ops::Range;

use nibble_quant::product::{Precision, buffer_bytes};

use super::adamw::{AdamW, RateGroup};
use super::buffers::Buffers;
use super::clip;
use crate::error::Result;
use crate::kernels::Kernels;
use crate::kernels::cpu::Cpu;
use crate::ledger::resident;
use crate::model::parameters::Parameters;
use crate::plan::Processor;
use crate::plural::noun;

/// One update of all parameters.
#[derive(Debug, Clone, Copy)]
pub struct Update<'a> {
    /// Settings.
    pub optimizer: &'a AdamW,
    /// Elements that share a learning rate.
    pub groups: &'a [RateGroup],
    /// Number of the update, counted from 1.
    pub step: u64,
    /// Learning rate of the schedule.
    pub learning_rate: f64,
    /// Clipping: what gradients are multiplied by.
    pub gradient_scale: f32,
}

/// The memory around a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Surroundings {
    /// Bytes in memory besides weights and plan: the program, or a GPU's context.
    pub used_bytes: u64,
    /// Bytes that a run may have in use in all: those, and what is free; on a GPU all of its memory.
    pub usable_bytes: u64,
    /// Bytes that products take beside weights and plan, from the first one on.
    pub products_bytes: u64,
    /// Whose memory it is: the process' own, or a GPU's.
    pub processor: Processor,
}

impl Surroundings {
    /// A GPU that has `total` bytes, of which `free` are.
    pub fn of_gpu(free: u64, total: u64) -> Self {
        Surroundings {
            used_bytes: total.saturating_sub(free),
            usable_bytes: total,
            products_bytes: 0,
            processor: Processor::Gpu,
        }
    }
}

/// A backend that can train.
pub trait TrainingKernels: Kernels {
    /// What computes, in words.
    fn device(&self) -> String;

    /// Whether products are of bf16.
    fn is_bf16(&self) -> bool;

    /// The memory that the plan has to fit.
    ///
    /// # Errors
    /// Those of the backend.
    fn surroundings(&self) -> Result<Surroundings>;

    /// `√Σ g²` over all gradients, in f64; finite if and only if every gradient is.
    ///
    /// # Errors
    /// Those of the backend.
    fn gradient_norm(&self, parameters: &mut Parameters<Self>) -> Result<f64>;

    /// Makes one update and refreshes the working copy.
    ///
    /// # Errors
    /// Those of the backend: the weights are then neither the old nor the new ones.
    fn update(&self, parameters: &mut Parameters<Self>, update: &Update) -> Result<()>;
}

impl TrainingKernels for Cpu {
    fn device(&self) -> String {
        let threads = rayon::current_num_threads();
        let bf16 = if self.is_bf16() { ", products in bf16" } else { "" };
        format!("the CPU, {threads} {}{bf16}", noun(threads, "thread"))
    }

    fn is_bf16(&self) -> bool {
        self.precision == Precision::Bf16
    }

    fn surroundings(&self) -> Result<Surroundings> {
        let used_bytes = resident::now_bytes();
        Ok(Surroundings {
            used_bytes,
            usable_bytes: resident::available_bytes().saturating_add(used_bytes),
            processor: Processor::Cpu,
            products_bytes: buffer_bytes(rayon::current_num_threads()) as u64,
        })
    }

    fn gradient_norm(&self, parameters: &mut Parameters) -> Result<f64> {
        Ok(clip::global_norm(parameters.gradients()))
    }

    fn update(&self, parameters: &mut Parameters, update: &Update) -> Result<()> {
        let view = parameters.optimizer_view();
        if view.places.blocks == 0 {
            update.apply(view.into());
        } else {
            update.apply_packed(view);
        }
        Ok(())
    }
}

impl Update<'_> {
    /// Learning rate of the elements `range`, which are all in one group; none if in no group.
    pub(super) fn rate(&self, range: &Range<usize>) -> Option<f64> {
        let group = self.groups.partition_point(|group| group.range.end < range.end);
        let group = self.groups.get(group).filter(|group| group.range.start <= range.start)?;
        Some(self.learning_rate * group.multiplier)
    }

    /// Makes the update on the CPU.
    pub fn apply(&self, buffers: Buffers<'_>) {
        let Update { optimizer, groups, step, learning_rate, gradient_scale } = *self;
        optimizer.update(step, learning_rate, gradient_scale, groups, buffers);
    }
}
