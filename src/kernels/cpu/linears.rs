//! Products with frozen weights.

use rayon::prelude::*;

use super::arena::Buffer;
use super::{Cpu, FrozenMatrix, lora, view, view_mut};
use crate::kernels::{Columns, LinearKernels, LinearTerms, LoraTerm, Write};
use nibble_quant::product::{product_forward, product_input_gradient, product_row};

impl LinearKernels for Cpu {
    fn linear_forward(
        &self,
        LinearTerms { weight, bias, lora }: LinearTerms<Self>,
        x: &Buffer<f32>,
        (y, band): (&mut Buffer<f32>, Columns),
        rows: usize,
        write: Write,
    ) {
        let x = view(x, Columns::all(weight.columns()), rows);
        let low_rank = lora.map(|term| lora::output_term(&term, rows));
        let beta = write.beta();
        product_forward(
            x,
            weight.as_ref(),
            low_rank,
            beta,
            view_mut(y, band, rows),
            self.precision,
        );
        if let Some(bias) = bias {
            y[..rows * band.stride].par_chunks_mut(band.stride).for_each(|row| {
                let band = &mut row[band.offset..band.offset + band.width];
                band.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            });
        }
    }

    fn linear_row(
        &self,
        LinearTerms { weight, bias, lora }: LinearTerms<Self>,
        x: &Buffer<f32>,
        (y, band): (&mut Buffer<f32>, Columns),
        write: Write,
    ) {
        let low_rank = lora.map(|term| lora::output_term(&term, 1));
        let y = &mut y[band.offset..band.offset + band.width];
        let x = &x[..weight.columns()];
        product_row(x, weight.as_ref(), low_rank, write.beta(), y);
        if let Some(bias) = bias {
            y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
    }

    fn linear_backward(
        &self,
        weight: &FrozenMatrix,
        lora: Option<LoraTerm<Buffer<f32>>>,
        (dy, band): (&Buffer<f32>, Columns),
        dx: &mut Buffer<f32>,
        rows: usize,
        write: Write,
    ) {
        let dx = view_mut(dx, Columns::all(weight.columns()), rows);
        let dy = view(dy, band, rows);
        let low_rank = lora.map(|term| lora::input_term(&term, rows));
        let beta = write.beta();
        product_input_gradient(dy, weight.as_ref(), low_rank, beta, dx, self.precision);
    }
}
