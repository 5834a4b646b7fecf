//! [`Kernels`] on the CPU.

use std::ops::Range;

use rayon::prelude::*;

use super::arena::Buffer;
use super::{
    CHUNK, Cpu, FrozenMatrix, ROWS, attention, beta, cross_entropy, head_norms, lora, mlp, norm,
    rotary, view, view_mut,
};
use crate::error::Result;
use crate::kernels::{
    AttentionShape, Columns, DropoutMask, HeadNorms, Kernels, LogitShape, LoraShape, LoraTerm,
    NormParameters, RotaryTables, TokenLayout, UniformNoise,
};
use crate::model::parameters::Parameters;
use crate::model::spec::{Activation, ModelSpec};
use crate::random;
use nibble_quant::product::{Precision, product_forward, product_input_gradient, product_row};

impl Kernels for Cpu {
    fn check(&self, _spec: &ModelSpec) -> Result<()> {
        Ok(())
    }

    fn embed(
        &self,
        ids: &[u32],
        table: &FrozenMatrix,
        scale: f32,
        x: &mut Buffer<f32>,
        accumulate: bool,
    ) {
        let d = table.columns();
        x[..ids.len() * d].par_chunks_mut(d).zip(ids).for_each(|(x, &id)| {
            table.read_row(id as usize, scale, x, accumulate);
        });
    }

    fn norm_forward(
        &self,
        norm: &NormParameters<Vec<f32>>,
        x: &Buffer<f32>,
        y: &mut Buffer<f32>,
        stats: &mut Buffer<f32>,
        rows: usize,
        accumulate: bool,
    ) {
        let (n, stats) = (rows * norm.weight.len(), &mut stats[..2 * rows]);
        norm::forward(norm, &x[..n], &mut y[..n], stats, accumulate);
    }

    fn norm_backward(
        &self,
        norm: &NormParameters<Vec<f32>>,
        dy: &Buffer<f32>,
        x: &Buffer<f32>,
        stats: &Buffer<f32>,
        dx: &mut Buffer<f32>,
        rows: usize,
    ) {
        let n = rows * norm.weight.len();
        norm::backward(norm, &dy[..n], &x[..n], &stats[..2 * rows], &mut dx[..n]);
    }

    fn head_norms(
        &self,
        norms: &HeadNorms<Vec<f32>>,
        shape: &AttentionShape,
        qkv: &Buffer<f32>,
        to: &mut Buffer<f32>,
        rows: usize,
    ) {
        let n = rows * shape.qkv_width();
        head_norms::forward(norms, shape, &qkv[..n], &mut to[..n]);
    }

    fn head_norms_backward(
        &self,
        norms: &HeadNorms<Vec<f32>>,
        shape: &AttentionShape,
        qkv: &Buffer<f32>,
        dqkv: &mut Buffer<f32>,
        rows: usize,
    ) {
        let n = rows * shape.qkv_width();
        head_norms::backward(norms, shape, &qkv[..n], &mut dqkv[..n]);
    }

    fn linear_forward(
        &self,
        weight: &FrozenMatrix,
        bias: Option<&Vec<f32>>,
        lora: Option<LoraTerm<Buffer<f32>>>,
        x: &Buffer<f32>,
        (y, band): (&mut Buffer<f32>, Columns),
        rows: usize,
        accumulate: bool,
    ) {
        let x = view(x, Columns::all(weight.columns()), rows);
        let low_rank = lora.map(|term| lora::output_term(&term, rows));
        let beta = beta(accumulate);
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
        weight: &FrozenMatrix,
        bias: Option<&Vec<f32>>,
        lora: Option<LoraTerm<Buffer<f32>>>,
        x: &Buffer<f32>,
        (y, band): (&mut Buffer<f32>, Columns),
        accumulate: bool,
    ) {
        let low_rank = lora.map(|term| lora::output_term(&term, 1));
        let y = &mut y[band.offset..band.offset + band.width];
        let x = &x[..weight.columns()];
        product_row(x, weight.as_ref(), low_rank, beta(accumulate), y);
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
        accumulate: bool,
    ) {
        let dx = view_mut(dx, Columns::all(weight.columns()), rows);
        let dy = view(dy, band, rows);
        let low_rank = lora.map(|term| lora::input_term(&term, rows));
        let beta = beta(accumulate);
        product_input_gradient(dy, weight.as_ref(), low_rank, beta, dx, self.precision);
    }

    fn load_pair(&self, parameters: &Parameters, index: usize, pair: &mut Buffer<f32>) {
        parameters.widen_pair(index, pair);
    }

    fn lora_project(
        &self,
        shape: &LoraShape,
        pair: &Buffer<f32>,
        x: &Buffer<f32>,
        (ax, band): (&mut Buffer<f32>, Columns),
        rows: usize,
    ) {
        let x = view(x, Columns::all(shape.in_features), rows);
        lora::project(shape, pair, x, view_mut(ax, band, rows));
    }

    fn lora_project_row(
        &self,
        shape: &LoraShape,
        pair: &Buffer<f32>,
        x: &Buffer<f32>,
        (ax, band): (&mut Buffer<f32>, Columns),
    ) {
        let ax = &mut ax[band.offset..band.offset + band.width];
        lora::project_row(shape, pair, &x[..shape.in_features], ax);
    }

    fn lora_backward(
        &self,
        shape: &LoraShape,
        pair: &Buffer<f32>,
        (dy, band): (&Buffer<f32>, Columns),
        x: &Buffer<f32>,
        (ax, ax_band): (&Buffer<f32>, Columns),
        t: &mut Buffer<f32>,
        (gradients, offset): (&mut Buffer<f32>, usize),
        rows: usize,
    ) {
        let inputs = lora::BackwardInputs {
            dy: view(dy, band, rows),
            x: view(x, Columns::all(shape.in_features), rows),
            ax: view(ax, ax_band, rows),
        };
        let gradients = &mut gradients[offset..offset + shape.elements()];
        lora::backward(shape, pair, inputs, &mut t[..rows * shape.rank], gradients);
    }

    fn lora_input_gradient(
        &self,
        shape: &LoraShape,
        pair: &Buffer<f32>,
        t: &Buffer<f32>,
        dx: &mut Buffer<f32>,
        rows: usize,
    ) {
        let t = view(t, Columns::all(shape.rank), rows);
        let dx = view_mut(dx, Columns::all(shape.in_features), rows);
        lora::input_gradient(shape, pair, t, dx);
    }

    fn dropout(
        &self,
        mask: &DropoutMask,
        x: &Buffer<f32>,
        y: &mut Buffer<f32>,
        elements: usize,
        accumulate: bool,
    ) {
        let stream = random::Stream::new(mask.seed, mask.stream).at(mask.step);
        let chunks = y[..elements].par_chunks_mut(CHUNK).zip(x[..elements].par_chunks(CHUNK));
        chunks.enumerate().for_each_init(
            || vec![0.0; CHUNK],
            |factors, (chunk, (y, x))| {
                stream.fill_dropout(mask.first + (chunk * CHUNK) as u64, mask.probability, factors);
                for ((y, x), factor) in y.iter_mut().zip(x).zip(&*factors) {
                    *y = if accumulate { *y + x * factor } else { x * factor };
                }
            },
        );
    }

    fn add_noise(
        &self,
        noise: &UniformNoise,
        x: &mut Buffer<f32>,
        rows: Range<usize>,
        width: usize,
    ) {
        let stream = random::Stream::new(noise.seed, noise.stream).at(noise.step);
        let chunks = x[rows.start * width..rows.end * width].par_chunks_mut(CHUNK).enumerate();
        chunks.for_each_init(
            || vec![0.0; CHUNK],
            |values, (chunk, x)| {
                let (first, values) =
                    (noise.first + (chunk * CHUNK) as u64, &mut values[..x.len()]);
                stream.fill_uniform(first, -noise.amplitude, noise.amplitude, values);
                x.iter_mut().zip(values).for_each(|(x, value)| *x += *value);
            },
        );
    }

    fn rotary(
        &self,
        shape: &AttentionShape,
        tables: RotaryTables<Buffer<f32>>,
        qkv: &mut Buffer<f32>,
        rows: usize,
        backward: bool,
    ) {
        let half = rows * shape.rotary_dim / 2;
        let qkv = &mut qkv[..rows * shape.qkv_width()];
        let (cos, sin) = (&tables.cos[..half], &tables.sin[..half]);
        let query_scale = tables.query_scale.map(|scale| &scale[..rows]);
        rotary::rotate(shape, (cos, sin), query_scale, qkv, backward);
    }

    fn attention_forward(
        &self,
        shape: &AttentionShape,
        layout: &TokenLayout,
        qkv: &Buffer<f32>,
        o: &mut Buffer<f32>,
        lse: &mut Buffer<f32>,
        work: &mut Buffer<f32>,
    ) {
        attention::forward((shape, self.precision), layout, qkv, o, lse, work);
    }

    fn attention_cached(
        &self,
        shape: &AttentionShape,
        qkv: &Buffer<f32>,
        (cache, past): (&mut Buffer<f32>, usize),
        rows: usize,
        o: &mut Buffer<f32>,
        _lse: &mut Buffer<f32>,
        work: &mut Buffer<f32>,
    ) {
        let qkv = &qkv[..rows * shape.qkv_width()];
        // As the products of one row are.
        let precision = if rows == 1 { Precision::F32 } else { self.precision };
        attention::cached((shape, precision), qkv, (cache, past), o, work);
    }

    fn attention_backward(
        &self,
        shape: &AttentionShape,
        layout: &TokenLayout,
        qkv: &Buffer<f32>,
        o: &Buffer<f32>,
        lse: &Buffer<f32>,
        d_o: &Buffer<f32>,
        dqkv: &mut Buffer<f32>,
        work: &mut Buffer<f32>,
    ) {
        attention::backward((shape, self.precision), layout, qkv, o, lse, d_o, dqkv, work);
    }

    fn mlp_forward(
        &self,
        activation: Activation,
        gate: Option<&Buffer<f32>>,
        up: &Buffer<f32>,
        out: &mut Buffer<f32>,
        elements: usize,
    ) {
        let gate = gate.map(|gate| &gate[..elements]);
        mlp::forward(activation, gate, &up[..elements], &mut out[..elements]);
    }

    fn mlp_backward(
        &self,
        activation: Activation,
        gate: Option<&Buffer<f32>>,
        up: &Buffer<f32>,
        d_out: &mut Buffer<f32>,
        d_up: &mut Buffer<f32>,
        elements: usize,
    ) {
        let gate = gate.map(|gate| &gate[..elements]);
        let (d_out, d_up) = (&mut d_out[..elements], &mut d_up[..elements]);
        mlp::backward(activation, gate, &up[..elements], d_out, d_up);
    }

    fn fused_mlp_forward(
        &self,
        activation: Activation,
        gate_up: &Buffer<f32>,
        out: &mut Buffer<f32>,
        rows: usize,
        width: usize,
    ) {
        let (gate_up, out) = (&gate_up[..2 * rows * width], &mut out[..rows * width]);
        mlp::fused_forward(activation, gate_up, out, width);
    }

    fn fused_mlp_backward(
        &self,
        activation: Activation,
        gate_up: &mut Buffer<f32>,
        d_out: &Buffer<f32>,
        rows: usize,
        width: usize,
    ) {
        let (gate_up, d_out) = (&mut gate_up[..2 * rows * width], &d_out[..rows * width]);
        mlp::fused_backward(activation, gate_up, d_out, width);
    }

    fn cross_entropy(
        &self,
        logits: &mut Buffer<f32>,
        targets: &[u32],
        shape: LogitShape,
        scale: Option<f32>,
        loss: &mut f64,
    ) {
        let logits = &mut logits[..targets.len() * shape.vocab_size];
        *loss += cross_entropy::forward_backward(logits, targets, shape, scale);
    }

    fn gather_rows(&self, from: &Buffer<f32>, rows: &[u32], to: &mut Buffer<f32>, width: usize) {
        let to = to[..rows.len() * width].par_chunks_mut(ROWS * width);
        to.zip(rows.par_chunks(ROWS)).for_each(|(to, rows)| {
            for (to, &row) in to.chunks_exact_mut(width).zip(rows) {
                to.copy_from_slice(&from[row as usize * width..][..width]);
            }
        });
    }

    fn scatter_rows(&self, from: &Buffer<f32>, rows: &[u32], to: &mut Buffer<f32>, width: usize) {
        for (from, &row) in from.chunks_exact(width).zip(rows) {
            to[row as usize * width..][..width].copy_from_slice(from);
        }
    }

    fn copy(
        &self,
        (from, first): (&Buffer<f32>, usize),
        (to, start): (&mut Buffer<f32>, usize),
        elements: usize,
    ) {
        let to = to[start..start + elements].par_chunks_mut(CHUNK);
        to.zip(from[first..first + elements].par_chunks(CHUNK))
            .for_each(|(to, from)| to.copy_from_slice(from));
    }

    fn zero(&self, buffer: &mut Buffer<f32>, elements: usize) {
        buffer[..elements].par_chunks_mut(CHUNK).for_each(|chunk| chunk.fill(0.0));
    }
}
