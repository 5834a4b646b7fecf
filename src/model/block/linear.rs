//! A linear of a block: the frozen product, its adapter, and the gradients of A and B.

use super::Pass;
use crate::kernels::{Columns, DropoutMask, Kernels, LoraShape, LoraTerm, Storage};
use crate::model::spec::LinearRole;

/// A linear's frozen weight and its adapter.
pub struct Linear<K: Storage> {
    /// Its place in the block.
    pub role: LinearRole,
    /// Hugging Face module path: the stream of its dropout mask.
    pub module: String,
    /// `[out, in]`.
    pub weight: K::Weight,
    /// `[out]`.
    pub bias: Option<K::Vector>,
    /// Where its output lies in the buffer that it writes.
    pub output: Columns,
    /// Its adapter, if it has one.
    pub adapter: Option<LinearAdapter>,
}

/// Which adapter a linear has, and where `x·Aᵀ` is kept.
#[derive(Debug, Clone, Copy)]
pub struct LinearAdapter {
    /// Index of the target in [`Parameters`](crate::model::parameters::Parameters).
    pub index: usize,
    /// Dimensions and scale.
    pub shape: LoraShape,
    /// Columns of the `lora_x` buffer of its half of the block.
    pub columns: Columns,
}

/// Where a linear's gradients go.
pub(super) struct GradientTarget<'a, B> {
    pub(super) parameters: &'a mut B,
    pub(super) work: &'a mut B,
}

impl<K: Kernels> Pass<'_, K> {
    fn mask<'m>(&self, linear: &'m Linear<K>, shape: &LoraShape) -> Option<DropoutMask<'m>> {
        self.dropout.map(|dropout| DropoutMask {
            probability: dropout.probability,
            seed: dropout.seed,
            stream: &linear.module,
            step: dropout.step,
            first: (dropout.first_token + self.rows.start) as u64 * shape.in_features as u64,
        })
    }

    /// `ax = drop(x)·Aᵀ`; leaves A and B in `pair`.
    pub(super) fn project(
        &self,
        linear: &Linear<K>,
        adapter: &LinearAdapter,
        x: &K::Buffer,
        lora_x: &mut K::Buffer,
        (pair, dropped): (&mut K::Buffer, &mut Option<K::Buffer>),
    ) {
        let (kernels, rows) = (self.kernels, self.rows.len());
        kernels.load_pair(self.parameters, adapter.index, pair);
        let x = match (self.mask(linear, &adapter.shape), dropped) {
            (Some(mask), Some(dropped)) => {
                kernels.dropout(&mask, x, dropped, rows * adapter.shape.in_features, false);
                dropped
            }
            _ => x,
        };
        let to = (lora_x, adapter.columns);
        if self.single_row {
            kernels.lora_project_row(&adapter.shape, pair, x, to);
        } else {
            kernels.lora_project(&adapter.shape, pair, x, to, rows);
        }
    }

    /// `y = x·Wᵀ + bias + s·ax·Bᵀ`, or `+=`, with `ax = drop(x)·Aᵀ` in `lora_x`.
    pub(super) fn forward(
        &self,
        linear: &Linear<K>,
        x: &K::Buffer,
        y: &mut K::Buffer,
        lora_x: &mut K::Buffer,
        work: (&mut K::Buffer, &mut Option<K::Buffer>),
        accumulate: bool,
    ) {
        let (pair, dropped) = work;
        if let Some(adapter) = self.adapter_of(linear) {
            self.project(linear, &adapter, x, lora_x, (&mut *pair, dropped));
        }
        self.multiply(linear, x, y, lora_x, pair, accumulate);
    }

    /// The same where `x·Aᵀ` is in `lora_x` already.
    pub(super) fn forward_projected(
        &self,
        linear: &Linear<K>,
        x: &K::Buffer,
        y: &mut K::Buffer,
        lora_x: &K::Buffer,
        pair: &mut K::Buffer,
        accumulate: bool,
    ) {
        if let Some(adapter) = self.adapter_of(linear) {
            self.kernels.load_pair(self.parameters, adapter.index, pair);
        }
        self.multiply(linear, x, y, lora_x, pair, accumulate);
    }

    /// The adapter that takes part in a forward pass.
    fn adapter_of(&self, linear: &Linear<K>) -> Option<LinearAdapter> {
        linear.adapter.filter(|_| self.adapters || K::BITS_DEPEND_ON_SHAPE)
    }

    /// With A and B in `pair` and `x·Aᵀ` in `lora_x`.
    fn multiply(
        &self,
        linear: &Linear<K>,
        x: &K::Buffer,
        y: &mut K::Buffer,
        lora_x: &K::Buffer,
        pair: &K::Buffer,
        accumulate: bool,
    ) {
        let (kernels, rows, adapter) = (self.kernels, self.rows.len(), self.adapter_of(linear));
        let shape = adapter.map(|adapter| adapter.shape.scaled(self.adapter_scale()));
        let lora = adapter.zip(shape.as_ref()).map(|(adapter, shape)| LoraTerm {
            shape,
            pair,
            inner: (lora_x, adapter.columns),
        });
        let (weight, bias, y) = (&linear.weight, linear.bias.as_ref(), (y, linear.output));
        if self.single_row {
            kernels.linear_row(weight, bias, lora, x, y, accumulate);
        } else {
            kernels.linear_forward(weight, bias, lora, x, y, rows, accumulate);
        }
    }

    fn adapter_scale(&self) -> f32 {
        if self.adapters { 1.0 } else { 0.0 }
    }

    /// Of linears that read the same rows; into bands of one buffer, or into a buffer for each.
    pub(super) fn forward_all(
        &self,
        linears: &[&Linear<K>],
        x: &K::Buffer,
        ys: &mut [&mut K::Buffer],
        lora_x: &mut K::Buffer,
        (pair, dropped): (&mut K::Buffer, &mut Option<K::Buffer>),
    ) {
        let (kernels, parameters, rows) = (self.kernels, self.parameters, self.rows.len());
        let scale = self.adapter_scale();
        // `linear_row` has the adapter's part in it.
        let together = self.dropout.is_none()
            && !self.single_row
            && kernels.linears_forward(parameters, linears, x, ys, lora_x, pair, rows, scale);
        if together {
            return;
        }
        let last = ys.len() - 1;
        for (position, linear) in linears.iter().enumerate() {
            let y = &mut *ys[position.min(last)];
            self.forward(linear, x, y, lora_x, (&mut *pair, &mut *dropped), false);
        }
    }

    /// Of the same: dx is their sum.
    pub(super) fn backward_all(
        &self,
        linears: &[&Linear<K>],
        dys: &[&K::Buffer],
        inputs: (&K::Buffer, &K::Buffer),
        mut dx: Option<&mut K::Buffer>,
        to: &mut GradientTarget<K::Buffer>,
        (pair, dropped): (&mut K::Buffer, &mut Option<K::Buffer>),
    ) {
        let (kernels, parameters, rows) = (self.kernels, self.parameters, self.rows.len());
        let GradientTarget { parameters: gradients, work } = &mut *to;
        let together = self.dropout.is_none()
            && kernels.linears_backward(
                parameters,
                linears,
                dys,
                inputs,
                dx.as_deref_mut(),
                work,
                gradients,
                pair,
                rows,
            );
        if together {
            return;
        }
        for (position, linear) in linears.iter().enumerate() {
            let dy = dys[position.min(dys.len() - 1)];
            let dx = dx.as_deref_mut().map(|dx| (dx, position > 0));
            self.backward(linear, dy, inputs, dx, to, (&mut *pair, &mut *dropped));
        }
    }

    /// Gradients of A and B, and `dx = …` or `dx += …` unless `dx` is absent.
    pub(super) fn backward(
        &self,
        linear: &Linear<K>,
        dy: &K::Buffer,
        (x, lora_x): (&K::Buffer, &K::Buffer),
        dx: Option<(&mut K::Buffer, bool)>,
        to: &mut GradientTarget<K::Buffer>,
        (pair, dropped): (&mut K::Buffer, &mut Option<K::Buffer>),
    ) {
        let (kernels, rows) = (self.kernels, self.rows.len());
        let dy = (dy, linear.output);
        let Some(LinearAdapter { index, shape, columns }) = &linear.adapter else {
            if let Some((dx, accumulate)) = dx {
                kernels.linear_backward(&linear.weight, None, dy, dx, rows, accumulate);
            }
            return;
        };
        let elements = rows * shape.in_features;
        kernels.load_pair(self.parameters, *index, pair);
        let mask = self.mask(linear, shape);
        if let (Some(mask), Some(dropped)) = (&mask, &mut *dropped) {
            kernels.dropout(mask, x, dropped, elements, false);
        }
        let seen = if mask.is_some() { dropped.as_ref().unwrap_or(x) } else { x };
        let gradients = (&mut *to.parameters, self.parameters.pair_offset(*index));
        let ax = (lora_x, *columns);
        kernels.lora_backward(shape, pair, dy, seen, ax, to.work, gradients, rows);
        let Some((dx, accumulate)) = dx else { return };
        let inner = (&*to.work, Columns::all(shape.rank));
        let lora = mask.is_none().then_some(LoraTerm { shape, pair: &*pair, inner });
        kernels.linear_backward(&linear.weight, lora, dy, dx, rows, accumulate);
        if let (Some(mask), Some(dropped)) = (mask, dropped) {
            kernels.lora_input_gradient(shape, pair, to.work, dropped, rows);
            kernels.dropout(&mask, dropped, dx, elements, true);
        }
    }
}
