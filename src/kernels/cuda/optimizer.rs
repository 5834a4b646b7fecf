//! Norm of the gradients, and AdamW.

use std::ops::Range;

use super::Cuda;
use super::driver::{Address, Argument, Driver};
use super::launch::{FLAT_THREADS, flat, launch, partial_sums};
use super::memory::{Buffer, PARTIALS};
use crate::error::Result;
use crate::model::parameters::MomentBlocks;
use crate::plan::moments::MOMENT_BLOCK;

/// An update of the parameters `range` with one set of coefficients.
pub struct UpdateRun<'a, D: Driver> {
    /// Elements of the buffers.
    pub range: Range<usize>,
    /// f32 weights.
    pub master: &'a Buffer<D>,
    /// f32 gradients.
    pub gradients: &'a Buffer<D>,
    /// The elements' moments.
    pub moments: RunMoments<'a, D>,
    /// bf16 copies of the weights.
    pub working: Option<&'a Buffer<D>>,
    /// The update's coefficients, in the order of the kernel's parameters.
    pub coefficients: [f32; 7],
}

/// Moments of an update's elements.
pub enum RunMoments<'a, D: Driver> {
    /// First and second in f32, from element `first_element` on.
    Floats {
        /// First and second moments.
        moments: [&'a Buffer<D>; 2],
        /// Where the run begins in the moments.
        first_element: usize,
    },
    /// First and second in 8 bits, from a block's begin.
    Packed {
        /// First and second moments.
        moments: [&'a MomentBlocks<Buffer<D>>; 2],
        /// Blocks.
        blocks: Range<usize>,
    },
}

impl<D: Driver> Cuda<D> {
    /// `√Σ x²` in f64, summed in a fixed order; waits.
    ///
    /// # Errors
    /// What went wrong in the operations before.
    pub fn norm(&self, x: &Buffer<D>, elements: usize) -> Result<f64> {
        let grid = partial_sums(elements);
        if grid[0] == 0 {
            return Ok(0.0);
        }
        let partials = Argument::Pointer(self.scalar(0));
        launch!(self, "sum_squares_f32", grid, FLAT_THREADS; x.argument(elements), elements as i64, partials);
        let sum = self.scalar(PARTIALS);
        launch!(self, "sum_partials", [1, 1, 1], FLAT_THREADS;
            partials, grid[0] as usize, Argument::Pointer(sum), false);
        let mut bytes = [0; 8];
        self.download(sum, &mut bytes)?;
        Ok(f64::from_le_bytes(bytes).sqrt())
    }

    /// What [`adamw`](Cuda::adamw) multiplies gradients by.
    pub fn set_gradient_scale(&self, scale: f32) {
        let to = self.scalar(PARTIALS + 1);
        self.through_staging(|staging| staging.word(scale.to_bits(), to));
    }

    /// Makes an update; gradients are multiplied by the scale in the device's memory.
    pub fn adamw(&self, run: UpdateRun<D>) {
        let part = |buffer: &Buffer<D>| Argument::Pointer(buffer.at(run.range.clone()));
        let working = run.working.map_or(Argument::Pointer(0), part);
        let [keep, first_weight, beta2, second_weight, correction, epsilon, step] =
            run.coefficients;
        let elements = run.range.len();
        let scale = Argument::Pointer(self.scalar(PARTIALS + 1));
        match run.moments {
            RunMoments::Floats { moments, first_element } => {
                let range = first_element..first_element + elements;
                let [first, second] =
                    moments.map(|moment| Argument::Pointer(moment.at(range.clone())));
                launch!(self, "adamw", flat(elements), FLAT_THREADS;
                    part(run.master), part(run.gradients), first, second, working,
                    elements as i64, scale, keep, first_weight, beta2, second_weight, correction,
                    epsilon, step);
            }
            RunMoments::Packed { moments: [first, second], blocks } => {
                let grid = [blocks.len() as u32, 1, 1];
                let words = blocks.start * MOMENT_BLOCK / 4..blocks.end * MOMENT_BLOCK / 4;
                let codes = |buffer: &Buffer<D>| Argument::Pointer(buffer.at(words.clone()));
                let absmax = |buffer: &Buffer<D>| Argument::Pointer(buffer.at(blocks.clone()));
                let tables = &self.shared.tables;
                let maps = [tables.map(), tables.unsigned_map()].map(Argument::Pointer);
                launch!(self, "adamw_8bit", grid, MOMENT_BLOCK as u32;
                    part(run.master), part(run.gradients), codes(&first.codes),
                    absmax(&first.absmax), codes(&second.codes), absmax(&second.absmax),
                    maps[0], maps[1], working, elements as i64, scale, keep, first_weight, beta2,
                    second_weight, correction, epsilon, step);
            }
        }
    }

    /// Address of the f64 `index` of the scalars.
    fn scalar(&self, index: usize) -> Address {
        self.shared.scalars.address() + 8 * index as u64
    }
}
