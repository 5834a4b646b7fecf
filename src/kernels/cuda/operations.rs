//! Every operation of [`Kernels`], by the file that has it.

use std::ops::Range;

use super::driver::Driver;
use super::host::DeviceVector;
use super::loss::{self, LossSum};
use super::memory::Buffer;
use super::together::{self};
use super::weight::DeviceWeight;
use super::{Cuda, adapted_mlp, attention, elementwise, frozen, head, low_rank, row};
use crate::error::Result;
use crate::kernels::head::loss_at_once;
use crate::kernels::{
    AttentionShape, Columns, DropoutMask, HeadNorms, Kernels, LogitShape, LoraShape, LoraTerm,
    NormParameters, RotaryTables, TokenLayout, UniformNoise,
};
use crate::model::block::{GatedMlp, Linear};
use crate::model::parameters::Parameters;
use crate::model::spec::{Activation, ModelSpec};

impl<D: Driver> Kernels for Cuda<D> {
    /// cuBLAS chooses a kernel for each shape.
    const BITS_DEPEND_ON_SHAPE: bool = true;
    const TAKES_BF16: bool = true;

    fn check(&self, spec: &ModelSpec) -> Result<()> {
        self.attention.check(spec.head_dim)?;
        self.on_host.check(spec)
    }

    fn embed(
        &self,
        ids: &[u32],
        table: &DeviceWeight<D>,
        scale: f32,
        x: &mut Buffer<D>,
        accumulate: bool,
    ) {
        if !accumulate && let Some(ahead) = &mut self.state().ahead {
            ahead.begin_pass();
        }
        elementwise::embed(self, ids, table, scale, x, accumulate);
    }

    fn norm_forward(
        &self,
        norm: &NormParameters<DeviceVector<D>>,
        x: &Buffer<D>,
        y: &mut Buffer<D>,
        stats: &mut Buffer<D>,
        rows: usize,
        accumulate: bool,
    ) {
        elementwise::norm_forward(self, norm, x, (y, stats), rows, accumulate);
    }

    fn norm_backward(
        &self,
        norm: &NormParameters<DeviceVector<D>>,
        dy: &Buffer<D>,
        x: &Buffer<D>,
        stats: &Buffer<D>,
        dx: &mut Buffer<D>,
        rows: usize,
    ) {
        elementwise::norm_backward(self, norm, (dy, x, stats), dx, rows);
    }

    fn linear_forward(
        &self,
        weight: &DeviceWeight<D>,
        bias: Option<&DeviceVector<D>>,
        lora: Option<LoraTerm<Buffer<D>>>,
        x: &Buffer<D>,
        (y, band): (&mut Buffer<D>, Columns),
        rows: usize,
        accumulate: bool,
    ) {
        frozen::forward(self, (weight, bias), lora, x, (y, band), rows, accumulate);
    }

    fn linear_row(
        &self,
        weight: &DeviceWeight<D>,
        bias: Option<&DeviceVector<D>>,
        lora: Option<LoraTerm<Buffer<D>>>,
        x: &Buffer<D>,
        (y, band): (&mut Buffer<D>, Columns),
        accumulate: bool,
    ) {
        row::forward(self, (weight, bias), lora, x, (y, band), accumulate);
    }

    fn linear_backward(
        &self,
        weight: &DeviceWeight<D>,
        lora: Option<LoraTerm<Buffer<D>>>,
        dy: (&Buffer<D>, Columns),
        dx: &mut Buffer<D>,
        rows: usize,
        accumulate: bool,
    ) {
        frozen::backward(self, weight, lora, dy, dx, rows, accumulate);
    }

    fn linears_forward(
        &self,
        parameters: &Parameters<Self>,
        linears: &[&Linear<Self>],
        x: &Buffer<D>,
        ys: &mut [&mut Buffer<D>],
        ax: &mut Buffer<D>,
        pair: &mut Buffer<D>,
        rows: usize,
        scale: f32,
    ) -> bool {
        together::forward(self, parameters, linears, x, ys, ax, pair, rows, scale)
    }

    fn linears_backward(
        &self,
        parameters: &Parameters<Self>,
        linears: &[&Linear<Self>],
        dys: &[&Buffer<D>],
        inputs: (&Buffer<D>, &Buffer<D>),
        dx: Option<&mut Buffer<D>>,
        t: &mut Buffer<D>,
        gradients: &mut Buffer<D>,
        pair: &mut Buffer<D>,
        rows: usize,
    ) -> bool {
        let dx = dx.as_deref();
        together::backward(self, parameters, linears, dys, inputs, dx, t, gradients, pair, rows)
    }

    fn adapted_mlp_forward(
        &self,
        parameters: &Parameters<Self>,
        down: &Linear<Self>,
        activation: Activation,
        (gate, up): (&Buffer<D>, &Buffer<D>),
        h: Option<&mut Buffer<D>>,
        ax: &mut Buffer<D>,
        rows: usize,
    ) -> bool {
        let inputs = (activation, gate, up);
        adapted_mlp::forward(self, parameters, down, inputs, h.as_deref(), ax, rows).is_some()
    }

    fn adapts_mlp_backward(
        &self,
        parameters: &Parameters<Self>,
        mlp: &GatedMlp<Self>,
        rows: usize,
    ) -> bool {
        adapted_mlp::goes_backward(self, parameters, mlp, rows)
    }

    fn adapted_mlp_backward(
        &self,
        parameters: &Parameters<Self>,
        mlp: &GatedMlp<Self>,
        (dy, x): (&Buffer<D>, &Buffer<D>),
        [d_gate, d_up]: [&mut Buffer<D>; 2],
        dx: &mut Buffer<D>,
        t: &mut Buffer<D>,
        gradients: &mut Buffer<D>,
        rows: usize,
    ) -> bool {
        let (inputs, to) = ((dy, x), [&*d_gate, &*d_up]);
        adapted_mlp::backward(self, parameters, mlp, inputs, to, dx, t, gradients, rows).is_some()
    }

    fn load_pair(&self, parameters: &Parameters<Self>, index: usize, pair: &mut Buffer<D>) {
        let range = parameters.pair_range(index);
        match parameters.working() {
            // The bf16 copies are operands as they are.
            Some(working) => *pair = working.part(range),
            None => {
                let elements = range.len();
                let master = parameters.master_buffer().part(range);
                elementwise::convert(self, &master, pair, elements);
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
        if rows == 1 {
            return row::project(self, shape, pair, x, (ax, band));
        }
        low_rank::project(self, shape, pair, x, (ax, band), rows);
    }

    fn lora_backward(
        &self,
        shape: &LoraShape,
        pair: &Buffer<D>,
        dy: (&Buffer<D>, Columns),
        x: &Buffer<D>,
        ax: (&Buffer<D>, Columns),
        t: &mut Buffer<D>,
        (gradients, offset): (&mut Buffer<D>, usize),
        rows: usize,
    ) {
        let to = (&*gradients, offset);
        low_rank::backward(self, shape, pair, dy, x, ax, t, to, rows);
    }

    fn lora_input_gradient(
        &self,
        shape: &LoraShape,
        pair: &Buffer<D>,
        t: &Buffer<D>,
        dx: &mut Buffer<D>,
        rows: usize,
    ) {
        low_rank::input_gradient(self, shape, pair, t, dx, rows);
    }

    fn dropout(
        &self,
        mask: &DropoutMask,
        x: &Buffer<D>,
        y: &mut Buffer<D>,
        elements: usize,
        accumulate: bool,
    ) {
        elementwise::dropout(self, mask, x, y, elements, accumulate);
    }

    fn add_noise(&self, noise: &UniformNoise, x: &mut Buffer<D>, rows: Range<usize>, width: usize) {
        elementwise::add_noise(self, noise, x, rows, width);
    }

    fn head_norms(
        &self,
        norms: &HeadNorms<DeviceVector<D>>,
        shape: &AttentionShape,
        qkv: &Buffer<D>,
        to: &mut Buffer<D>,
        rows: usize,
    ) {
        elementwise::head_norms(self, "head_norms", norms, shape, (qkv, to), rows);
    }

    fn head_norms_backward(
        &self,
        norms: &HeadNorms<DeviceVector<D>>,
        shape: &AttentionShape,
        qkv: &Buffer<D>,
        dqkv: &mut Buffer<D>,
        rows: usize,
    ) {
        let kernel = "head_norms_backward";
        elementwise::head_norms(self, kernel, norms, shape, (qkv, dqkv), rows);
    }

    fn rotary(
        &self,
        shape: &AttentionShape,
        tables: RotaryTables<Buffer<D>>,
        qkv: &mut Buffer<D>,
        rows: usize,
        backward: bool,
    ) {
        elementwise::rotary(self, shape, tables, qkv, rows, backward);
    }

    fn attention_forward(
        &self,
        shape: &AttentionShape,
        layout: &TokenLayout,
        qkv: &Buffer<D>,
        o: &mut Buffer<D>,
        lse: &mut Buffer<D>,
        work: &mut Buffer<D>,
    ) {
        attention::forward(self, shape, layout, qkv, (o, lse), work);
    }

    fn attention_cached(
        &self,
        shape: &AttentionShape,
        qkv: &Buffer<D>,
        (cache, past): (&mut Buffer<D>, usize),
        rows: usize,
        o: &mut Buffer<D>,
        lse: &mut Buffer<D>,
        _work: &mut Buffer<D>,
    ) {
        attention::cached(self, shape, qkv, (cache, past), (o, lse), rows);
    }

    fn attention_backward(
        &self,
        shape: &AttentionShape,
        layout: &TokenLayout,
        qkv: &Buffer<D>,
        o: &Buffer<D>,
        lse: &Buffer<D>,
        d_o: &Buffer<D>,
        dqkv: &mut Buffer<D>,
        work: &mut Buffer<D>,
    ) {
        attention::backward(self, shape, layout, (qkv, o, lse, d_o), dqkv, work);
    }

    fn mlp_forward(
        &self,
        activation: Activation,
        gate: Option<&Buffer<D>>,
        up: &Buffer<D>,
        out: &mut Buffer<D>,
        elements: usize,
    ) {
        elementwise::mlp_forward(self, activation, (gate, up), out, elements);
    }

    fn mlp_backward(
        &self,
        activation: Activation,
        gate: Option<&Buffer<D>>,
        up: &Buffer<D>,
        d_out: &mut Buffer<D>,
        d_up: &mut Buffer<D>,
        elements: usize,
    ) {
        elementwise::mlp_backward(self, activation, (gate, up), (d_out, d_up), elements);
    }

    fn fused_mlp_forward(
        &self,
        activation: Activation,
        gate_up: &Buffer<D>,
        out: &mut Buffer<D>,
        rows: usize,
        width: usize,
    ) {
        elementwise::fused_mlp_forward(self, activation, gate_up, out, (rows, width));
    }

    fn fused_mlp_backward(
        &self,
        activation: Activation,
        gate_up: &mut Buffer<D>,
        d_out: &Buffer<D>,
        rows: usize,
        width: usize,
    ) {
        elementwise::fused_mlp_backward(self, activation, gate_up, d_out, (rows, width));
    }

    fn cross_entropy(
        &self,
        logits: &mut Buffer<D>,
        targets: &[u32],
        shape: LogitShape,
        scale: Option<f32>,
        loss: &mut LossSum<D>,
    ) {
        loss::cross_entropy(self, logits, targets, shape, scale, loss);
    }

    fn head_loss(
        &self,
        head: &DeviceWeight<D>,
        x: &mut Buffer<D>,
        logits: &mut Buffer<D>,
        sum: Option<&mut Buffer<D>>,
        targets: &[u32],
        shape: LogitShape,
        scale: Option<f32>,
        loss: &mut LossSum<D>,
    ) {
        if !head.on_host {
            return loss_at_once(self, head, x, logits, targets, shape, scale, loss);
        }
        let (gradient, soft_cap) = (scale.zip(sum.as_deref()), shape.soft_cap);
        head::loss_in_tiles(self, head, x, logits, (targets, soft_cap), gradient, loss);
    }

    fn head_score(
        &self,
        head: &DeviceWeight<D>,
        x: &Buffer<D>,
        logits: &mut Buffer<D>,
        targets: &[u32],
        shape: LogitShape,
        loss: &mut LossSum<D>,
    ) -> Result<Vec<bool>> {
        head::score(self, head, x, logits, (targets, shape.soft_cap), loss)
    }

    fn gather_rows(&self, from: &Buffer<D>, rows: &[u32], to: &mut Buffer<D>, width: usize) {
        elementwise::gather_rows(self, from, rows, to, width);
    }

    fn scatter_rows(&self, from: &Buffer<D>, rows: &[u32], to: &mut Buffer<D>, width: usize) {
        elementwise::scatter_rows(self, from, rows, to, width);
    }

    fn copy(
        &self,
        from: (&Buffer<D>, usize),
        (to, start): (&mut Buffer<D>, usize),
        elements: usize,
    ) {
        elementwise::copy(self, from, (to, start), elements);
    }

    fn zero(&self, buffer: &mut Buffer<D>, elements: usize) {
        elementwise::zero(self, buffer, elements);
    }
}
