//! The optimizer on a GPU: norm and update without moving a parameter.

use std::ops::Range;

use super::backend::{Surroundings, TrainingKernels, Update};
use crate::error::Result;
use crate::kernels::cuda::Cuda;
use crate::kernels::cuda::driver::Driver;
use crate::kernels::cuda::optimizer::{RunMoments, UpdateRun};
use crate::model::parameters::{OptimizerView, Parameters};
use crate::plan::MomentPlace;

impl<D: Driver> TrainingKernels for Cuda<D> {
    fn device(&self) -> String {
        self.driver().in_words()
    }

    fn is_bf16(&self) -> bool {
        true
    }

    fn surroundings(&self) -> Result<Surroundings> {
        let (free, total) = self.driver().memory()?;
        Ok(Surroundings::of_gpu(free, total))
    }

    fn gradient_norm(&self, parameters: &mut Parameters<Self>) -> Result<f64> {
        let elements = parameters.elements();
        self.norm(parameters.optimizer_view().gradients, elements)
    }

    fn update(&self, parameters: &mut Parameters<Self>, update: &Update) -> Result<()> {
        let view: OptimizerView<Self> = parameters.optimizer_view();
        self.set_gradient_scale(update.gradient_scale);
        for (range, rate, place) in runs(&view, update) {
            let moments = match place {
                MomentPlace::Floats(floats) => RunMoments::Floats {
                    moments: view.moments.each_ref().map(|moment| &moment.floats),
                    first_element: floats.start,
                },
                MomentPlace::Blocks(blocks) => {
                    let moments = view
                        .moments
                        .each_ref()
                        .map(|moment| moment.blocks.as_ref().expect("8-bit moments are planned"));
                    RunMoments::Packed { moments, blocks }
                }
            };
            let c = update.optimizer.coefficients(update.step, rate, update.gradient_scale);
            self.adamw(UpdateRun {
                range,
                master: view.master,
                gradients: view.gradients,
                moments,
                working: view.working.as_deref(),
                coefficients: [
                    c.keep,
                    c.first_weight,
                    c.beta2,
                    c.second_weight,
                    c.second_correction,
                    c.epsilon,
                    c.negative_step,
                ],
            });
        }
        // A launch that was refused is this update's failure, not one of the next pass, which could be
        // made again.
        self.take_failure()
    }
}

/// What one launch can update: neighbouring tensors of one rate with f32 moments together, each
/// tensor with 8-bit moments alone, whose blocks begin anew.
fn runs<D: Driver>(
    view: &OptimizerView<Cuda<D>>,
    update: &Update,
) -> Vec<(Range<usize>, f64, MomentPlace)> {
    use MomentPlace::Floats;
    let mut runs: Vec<(Range<usize>, f64, MomentPlace)> = Vec::new();
    for (tensor, place) in view.tensors.iter().zip(&view.places.places) {
        let Some(rate) = update.rate(&tensor.range) else { continue };
        match (runs.last_mut(), place) {
            (Some((range, last, Floats(before))), Floats(place))
                if range.end == tensor.range.start && *last == rate =>
            {
                (range.end, before.end) = (tensor.range.end, place.end);
            }
            _ => runs.push((tensor.range.clone(), rate, place.clone())),
        }
    }
    runs
}
