//! The optimizer on a GPU: norm and update without moving a parameter.

use std::ops::Range;

use super::adamw::{Coefficients, RateGroup};
use super::backend::{Surroundings, TrainingKernels, Update};
use crate::error::Result;
use crate::kernels::cuda::Cuda;
use crate::kernels::cuda::driver::Driver;
use crate::kernels::cuda::optimizer::UpdateRun;
use crate::model::parameters::{OptimizerView, Parameters};

impl<D: Driver> TrainingKernels for Cuda<D> {
    fn surroundings(&self) -> Result<Surroundings> {
        let (free, total) = self.driver().memory()?;
        Ok(Surroundings { used_bytes: total - free, free_bytes: total, in_process: false })
    }

    fn gradient_norm(&self, parameters: &mut Parameters<Self>) -> Result<f64> {
        let elements = parameters.elements();
        self.norm(parameters.optimizer_view().gradients, elements)
    }

    fn update(&self, parameters: &mut Parameters<Self>, update: &Update) {
        let view: OptimizerView<Self> = parameters.optimizer_view();
        self.set_gradient_scale(update.gradient_scale);
        for (range, multiplier) in runs(update.groups) {
            let rate = update.learning_rate * multiplier;
            let Coefficients {
                keep,
                first_weight,
                beta2,
                second_weight,
                second_correction,
                epsilon,
                negative_step,
                gradient_scale: _,
            } = update.optimizer.coefficients(update.step, rate, update.gradient_scale);
            self.adamw(UpdateRun {
                range,
                master: view.master,
                gradients: view.gradients,
                first_moment: view.first_moment,
                second_moment: view.second_moment,
                working: view.working.as_deref(),
                coefficients: [
                    keep,
                    first_weight,
                    beta2,
                    second_weight,
                    second_correction,
                    epsilon,
                    negative_step,
                ],
            });
        }
    }
}

/// Neighbouring groups of one rate as one.
fn runs(groups: &[RateGroup]) -> Vec<(Range<usize>, f64)> {
    let mut runs: Vec<(Range<usize>, f64)> = Vec::new();
    for group in groups {
        match runs.last_mut() {
            Some((range, multiplier))
                if range.end == group.range.start && *multiplier == group.multiplier =>
            {
                range.end = group.range.end;
            }
            _ => runs.push((group.range.clone(), group.multiplier)),
        }
    }
    runs
}
