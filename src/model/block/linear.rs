//! A linear of a block: the frozen product, its adapter, and the gradients of A and B.

use super::{Dropout, Pass, Variant};
use crate::kernels::{
    Columns, DropoutMask, Kernels, LinearInputs, LinearTerms, LoraInputs, LoraShape, LoraTerm,
    Storage, Write,
};
use crate::model::parameters::Parameters;
use crate::model::spec::LinearRole;

/// A linear's frozen weight and its adapter.
pub struct Linear<K: Storage> {
    /// The linear's place in the block.
    pub role: LinearRole,
    /// Hugging Face module path: the stream of its dropout mask.
    pub module: String,
    /// `[out, in]`.
    pub weight: K::Weight,
    /// `[out]`.
    pub bias: Option<K::Vector>,
    /// Where the linear's output lies in the buffer that it writes.
    pub output: Columns,
    /// The linear's adapter, if it has one.
    pub adapter: Option<LinearAdapter>,
}

/// Which adapter a linear has, and where `x·Aᵀ` is kept.
#[derive(Debug, Clone, Copy)]
pub struct LinearAdapter {
    /// Index of the target in [`Parameters`].
    pub index: usize,
    /// Dimensions and scale.
    pub shape: LoraShape,
    /// Columns of the `lora_x` buffer of its half of the block.
    pub columns: Columns,
}

/// Linears that read the same rows, and the adapters in their pass.
pub struct LinearGroup<'a, K: Storage> {
    /// The linears, in the order of their outputs, and of their columns of `x·Aᵀ`.
    pub linears: &'a [&'a Linear<K>],
    /// The adapters.
    pub parameters: &'a Parameters<K>,
    /// Rows of x.
    pub rows: usize,
    /// A factor on what the adapters add to the outputs.
    pub scale: f32,
}

/// Buffers that adapters work in, one after another.
pub struct AdapterWork<B> {
    /// A and B of the adapter at work, as products read them.
    pub pair: B,
    /// The input of the adapter at work after dropout.
    pub dropped: Option<B>,
    /// t, `s·dy·B`, `[T, R]`; only where there is a backward pass.
    pub inner_gradient: Option<B>,
}

impl<B> AdapterWork<B> {
    /// The pair, and where t goes.
    ///
    /// # Panics
    /// Where no backward pass is planned.
    pub fn of_backward(&mut self) -> (&mut B, &mut B) {
        let inner = self.inner_gradient.as_mut().expect("planned for a backward pass");
        (&mut self.pair, inner)
    }
}

impl<K: Kernels> Pass<'_, K> {
    fn mask(&self, linear: &Linear<K>, shape: &LoraShape) -> Option<DropoutMask> {
        self.dropout.map(|Dropout { probability, draws }| DropoutMask {
            probability,
            stream: draws.stream(&linear.module),
            first: draws.index(self.rows.start, shape.in_features),
        })
    }

    /// `ax = drop(x)·Aᵀ`; leaves A and B in `work.pair`.
    pub(super) fn project(
        &self,
        linear: &Linear<K>,
        adapter: &LinearAdapter,
        x: &K::Buffer,
        lora_x: &mut K::Buffer,
        work: &mut AdapterWork<K::Buffer>,
    ) {
        let (kernels, rows) = (self.kernels, self.rows.len());
        let AdapterWork { pair, dropped, .. } = work;
        kernels.load_pair(self.parameters, adapter.index, pair);
        let x = match (self.mask(linear, &adapter.shape), dropped) {
            (Some(mask), Some(dropped)) => {
                kernels.dropout(&mask, x, dropped, rows * adapter.shape.in_features, Write::Over);
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
        work: &mut AdapterWork<K::Buffer>,
        write: Write,
    ) {
        if let Some(adapter) = self.adapter_of(linear) {
            self.project(linear, &adapter, x, lora_x, work);
        }
        self.multiply(linear, x, y, lora_x, &work.pair, write);
    }

    /// [`forward`](Pass::forward) where `x·Aᵀ` is in `lora_x` already.
    pub(super) fn forward_projected(
        &self,
        linear: &Linear<K>,
        x: &K::Buffer,
        y: &mut K::Buffer,
        lora_x: &K::Buffer,
        pair: &mut K::Buffer,
        write: Write,
    ) {
        if let Some(adapter) = self.adapter_of(linear) {
            self.kernels.load_pair(self.parameters, adapter.index, pair);
        }
        self.multiply(linear, x, y, lora_x, pair, write);
    }

    /// The adapter that takes part in a forward pass.
    fn adapter_of(&self, linear: &Linear<K>) -> Option<LinearAdapter> {
        linear.adapter.filter(|_| self.variant == Variant::Adapted || K::BITS_DEPEND_ON_SHAPE)
    }

    /// The product of a linear and its adapter, with A and B in `pair` and `x·Aᵀ` in `lora_x`.
    fn multiply(
        &self,
        linear: &Linear<K>,
        x: &K::Buffer,
        y: &mut K::Buffer,
        lora_x: &K::Buffer,
        pair: &K::Buffer,
        write: Write,
    ) {
        let (kernels, rows, adapter) = (self.kernels, self.rows.len(), self.adapter_of(linear));
        let shape = adapter.map(|adapter| adapter.shape.scaled(self.adapter_scale()));
        let lora = adapter.zip(shape.as_ref()).map(|(adapter, shape)| LoraTerm {
            shape,
            pair,
            inner: (lora_x, adapter.columns),
        });
        let terms = LinearTerms { weight: &linear.weight, bias: linear.bias.as_ref(), lora };
        let y = (y, linear.output);
        if self.single_row {
            kernels.linear_row(terms, x, y, write);
        } else {
            kernels.linear_forward(terms, x, y, rows, write);
        }
    }

    fn adapter_scale(&self) -> f32 {
        match self.variant {
            Variant::Adapted => 1.0,
            Variant::Base => 0.0,
        }
    }

    fn group<'b>(&'b self, linears: &'b [&'b Linear<K>]) -> LinearGroup<'b, K> {
        let (parameters, rows) = (self.parameters, self.rows.len());
        LinearGroup { linears, parameters, rows, scale: self.adapter_scale() }
    }

    /// [`forward`](Pass::forward) of linears that read the same rows, into bands of one buffer, or into a
    /// buffer for each.
    pub(super) fn forward_all(
        &self,
        linears: &[&Linear<K>],
        x: &K::Buffer,
        ys: &mut [&mut K::Buffer],
        lora_x: &mut K::Buffer,
        work: &mut AdapterWork<K::Buffer>,
    ) {
        // `linear_row` has the adapter's part in it.
        let together = self.dropout.is_none()
            && !self.single_row
            && self.kernels.linears_forward(&self.group(linears), x, ys, lora_x, work);
        if together {
            return;
        }
        let last = ys.len() - 1;
        for (position, linear) in linears.iter().enumerate() {
            let y = &mut *ys[position.min(last)];
            self.forward(linear, x, y, lora_x, work, Write::Over);
        }
    }

    /// [`backward`](Pass::backward) of linears that read the same rows: dx is the sum over them.
    pub(super) fn backward_all(
        &self,
        linears: &[&Linear<K>],
        dys: &[&K::Buffer],
        inputs: LinearInputs<K::Buffer>,
        mut dx: Option<&mut K::Buffer>,
        lora_gradients: &mut K::Buffer,
        work: &mut AdapterWork<K::Buffer>,
    ) {
        let (kernels, group, sum) = (self.kernels, self.group(linears), dx.as_deref_mut());
        let together = self.dropout.is_none()
            && kernels.linears_backward(&group, dys, inputs, sum, lora_gradients, work);
        if together {
            return;
        }
        for (position, linear) in linears.iter().enumerate() {
            let dy = dys[position.min(dys.len() - 1)];
            let dx = dx.as_deref_mut().map(|dx| (dx, Write::of_part(position)));
            self.backward(linear, dy, inputs, dx, lora_gradients, work);
        }
    }

    /// Gradients of A and B, and `dx = …` or `dx += …` unless `dx` is absent.
    pub(super) fn backward(
        &self,
        linear: &Linear<K>,
        dy: &K::Buffer,
        LinearInputs { x, lora_x }: LinearInputs<K::Buffer>,
        dx: Option<(&mut K::Buffer, Write)>,
        lora_gradients: &mut K::Buffer,
        work: &mut AdapterWork<K::Buffer>,
    ) {
        let (kernels, rows) = (self.kernels, self.rows.len());
        let dy = (dy, linear.output);
        let Some(LinearAdapter { index, shape, columns }) = &linear.adapter else {
            if let Some((dx, write)) = dx {
                kernels.linear_backward(&linear.weight, None, dy, dx, rows, write);
            }
            return;
        };
        let elements = rows * shape.in_features;
        let AdapterWork { pair, dropped, inner_gradient } = work;
        let t = inner_gradient.as_mut().expect("planned for a backward pass");
        kernels.load_pair(self.parameters, *index, pair);
        let mask = self.mask(linear, shape);
        if let (Some(mask), Some(dropped)) = (&mask, &mut *dropped) {
            kernels.dropout(mask, x, dropped, elements, Write::Over);
        }
        let seen = if mask.is_some() { dropped.as_ref().unwrap_or(x) } else { x };
        let inputs = LoraInputs { dy, x: seen, ax: (lora_x, *columns) };
        let gradients = (lora_gradients, self.parameters.pair_offset(*index));
        kernels.lora_backward(shape, pair, inputs, t, gradients, rows);
        let Some((dx, write)) = dx else { return };
        let inner = (&*t, Columns::all(shape.rank));
        let lora = mask.is_none().then_some(LoraTerm { shape, pair: &*pair, inner });
        kernels.linear_backward(&linear.weight, lora, dy, dx, rows, write);
        if let (Some(mask), Some(dropped)) = (mask, dropped) {
            kernels.lora_input_gradient(shape, pair, t, dropped, rows);
            kernels.dropout(&mask, dropped, dx, elements, Write::Add);
        }
    }
}
