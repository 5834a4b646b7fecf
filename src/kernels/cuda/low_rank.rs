//! Products of the adapters alone: `x·Aᵀ`, t, and the gradients of A and B.

use super::driver::{Address, Driver, Gemm};
use super::frozen::{a_of, b_of, gradient_tail, operand, output, output_in_f32, transposed};
use super::memory::{Buffer, Rows};
use super::rows::convert;
use super::{Cuda, row};
use crate::kernels::{Columns, LoraInputs, LoraKernels, LoraShape};
use crate::model::parameters::Parameters;

impl<D: Driver> LoraKernels for Cuda<D> {
    fn load_pair(&self, parameters: &Parameters<Self>, index: usize, pair: &mut Buffer<D>) {
        let range = parameters.pair_range(index);
        match parameters.working_copies() {
            // The bf16 copies are operands as they are.
            Some(working) => *pair = working.part(range),
            None => {
                let elements = range.len();
                let master = parameters.master_buffer().part(range);
                convert(self, &master, pair, elements);
            }
        }
    }

    fn lora_project(
        &self,
        shape: &LoraShape,
        pair: &Buffer<D>,
        x: &Buffer<D>,
        (ax, band): (&mut Buffer<D>, Columns),
        rows: usize,
    ) {
        let inner = shape.in_features;
        let (a, b) = (operand(x.rows(rows, inner)), transposed(a_of(pair, shape)));
        let to = output(ax.band(band, rows));
        self.gemm(Gemm::new([rows, shape.rank, inner], a, b, to));
    }

    fn lora_project_row(
        &self,
        shape: &LoraShape,
        pair: &Buffer<D>,
        x: &Buffer<D>,
        (ax, band): (&mut Buffer<D>, Columns),
    ) {
        row::project(self, shape, pair, x, (ax, band));
    }

    fn lora_backward(
        &self,
        shape: &LoraShape,
        pair: &Buffer<D>,
        LoraInputs { dy: (dy, band), x, ax: (ax, ax_band) }: LoraInputs<Buffer<D>>,
        t: &mut Buffer<D>,
        (gradients, offset): (&mut Buffer<D>, usize),
        rows: usize,
    ) {
        let (rank, inner) = (shape.rank, shape.in_features);
        // Behind the rows of dy where there is room.
        let t = gradient_tail((dy, band), rows, rank).unwrap_or_else(|| t.rows(rows, rank));
        let dy = dy.band(band, rows);
        inner_gradient(self, shape, pair, dy, t, rows);
        let middle = offset + shape.a_elements();
        let (a, b) = (transposed(t), operand(x.rows(rows, inner)));
        let ga = output_in_f32(Rows { address: gradients.at(offset..middle), stride: inner });
        self.gemm(Gemm { beta: 1.0, ..Gemm::new([rank, inner, rows], a, b, ga) });
        let gb = gradients.at(middle..offset + shape.elements());
        gradient_of_b(self, shape, (dy, ax.band(ax_band, rows)), gb, rows);
    }

    fn lora_input_gradient(
        &self,
        shape: &LoraShape,
        pair: &Buffer<D>,
        t: &Buffer<D>,
        dx: &mut Buffer<D>,
        rows: usize,
    ) {
        let inner = shape.in_features;
        let (a, b) = (operand(t.rows(rows, shape.rank)), operand(a_of(pair, shape)));
        self.gemm(Gemm::new([rows, inner, shape.rank], a, b, output(dx.rows(rows, inner))));
    }
}

/// `t = scale · dy · B`.
pub(super) fn inner_gradient<D: Driver>(
    cuda: &Cuda<D>,
    shape: &LoraShape,
    pair: &Buffer<D>,
    dy: Rows,
    t: Rows,
    rows: usize,
) {
    let (a, b) = (operand(dy), operand(b_of(pair, shape)));
    cuda.gemm(Gemm {
        alpha: shape.scale,
        ..Gemm::new([rows, shape.rank, shape.out_features], a, b, output(t))
    });
}

/// `gB += scale · dyᵀ ax`.
pub(super) fn gradient_of_b<D: Driver>(
    cuda: &Cuda<D>,
    shape: &LoraShape,
    (dy, ax): (Rows, Rows),
    gb: Address,
    rows: usize,
) {
    let (a, b) = (transposed(dy), operand(ax));
    let to = output_in_f32(Rows { address: gb, stride: shape.rank });
    cuda.gemm(Gemm {
        alpha: shape.scale,
        beta: 1.0,
        ..Gemm::new([shape.out_features, shape.rank, rows], a, b, to)
    });
}
