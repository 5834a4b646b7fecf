//! One transformer block: forward, recomputation and backward over planned buffers.
//!
//! ```text
//! n1 = norm(x)      qkv = n1·Wqkvᵀ, rotated      o = attention(qkv)      m = x + o·Woᵀ
//! n2 = norm(m)      h = act(n2·Wgᵀ) ∘ (n2·Wuᵀ)   out = m + h·Wdᵀ
//! ```
//! Every linear is `x·Wᵀ + bias + s·(drop(x)·Aᵀ)·Bᵀ` with W frozen. The backward pass computes
//! gradients of x, A and B only. `h` is recomputed, never kept.

use super::parameters::Parameters;
use super::spec::{Activation, LinearRole};
use crate::kernels::{
    AttentionShape, Columns, DropoutMask, Kernels, LoraShape, LoraTerm, NormParameters, TokenLayout,
};

/// A linear's frozen weight and its adapter.
pub struct Linear<K: Kernels> {
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
    /// Index of the target in [`Parameters`].
    pub index: usize,
    /// Dimensions and scale.
    pub shape: LoraShape,
    /// Columns of the layer's `lora_x` buffer.
    pub columns: Columns,
}

/// A block's frozen parts.
pub struct Block<K: Kernels> {
    /// Before attention.
    pub norm1: NormParameters<K::Vector>,
    /// Before the MLP.
    pub norm2: NormParameters<K::Vector>,
    /// In forward order.
    pub linears: Vec<Linear<K>>,
    /// Heads and window.
    pub attention: AttentionShape,
    /// Nonlinearity of the MLP.
    pub activation: Activation,
    /// D.
    pub hidden_size: usize,
    /// F.
    pub intermediate_size: usize,
}

/// Activations that the backward pass reads.
pub struct Saved<B> {
    /// `(μ, 1/σ)` of norm1, `[T, 2]`.
    pub norm1_stats: B,
    /// `[T, D]`.
    pub norm1: B,
    /// Rotated q, k and v, `[T, q + 2·kv]`.
    pub qkv: B,
    /// Log-sum-exp of the scores, `[T, H]`.
    pub lse: B,
    /// Output of attention, `[T, H·head_dim]`.
    pub attention: B,
    /// Input of the second half, `[T, D]`.
    pub middle: B,
    /// `(μ, 1/σ)` of norm2, `[T, 2]`.
    pub norm2_stats: B,
    /// `[T, D]`.
    pub norm2: B,
    /// Before the nonlinearity, `[T, F]`; empty without a gate.
    pub gate: B,
    /// `[T, F]`.
    pub up: B,
    /// `x·Aᵀ` of every adapter, side by side, `[T, ΣR]`.
    pub lora_x: B,
}

/// Buffers that no layer owns.
pub struct Workspace<B> {
    /// h, later the gradient of up, `[T, F]`.
    pub mlp: B,
    /// A and B of the adapter at work, widened.
    pub lora_pair: B,
    /// Input of an adapter after dropout.
    pub dropped: Option<B>,
    /// Score tiles.
    pub attention: B,
    /// Tables of cos and sin, `[T, head_dim / 2]`.
    pub rotary: Option<(B, B)>,
    /// Gradients of activations; only where there is a backward pass.
    pub gradients: Option<GradientBuffers<B>>,
}

/// Gradients of one block's activations.
pub struct GradientBuffers<B> {
    /// Of h, later of the gate, `[T, F]`.
    pub mlp: B,
    /// Of the residual stream, `[T, D]`.
    pub stream: B,
    /// Of a norm's output or of attention's output, `[T, max(D, Q)]`.
    pub norm: B,
    /// Of q, k and v.
    pub qkv: B,
    /// `s·dy·B`, `[T, R]`.
    pub lora: B,
}

/// LoRA dropout of one micro-batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// `lora_dropout`.
    pub probability: f32,
    /// Seed of the run.
    pub seed: u64,
    /// Number of the micro-batch since the start of the run.
    pub step: u64,
}

/// What all layers of one pass share.
pub struct Pass<'a, K: Kernels> {
    /// The backend.
    pub kernels: &'a K,
    /// The adapters.
    pub parameters: &'a Parameters<K>,
    /// The documents.
    pub layout: &'a TokenLayout,
    /// Dropout, while training.
    pub dropout: Option<Dropout>,
    /// Whether the adapters take part; without them this is the base model.
    pub adapters: bool,
}

/// Keys and values of the tokens that were decoded before, for one block.
pub struct Cache<'a, B> {
    /// Rotated keys and values `[capacity, 2·kv]`.
    pub keys_values: &'a mut B,
    /// Tokens in it.
    pub past: usize,
}

/// Where a linear's gradients go.
struct GradientTarget<'a, B> {
    parameters: &'a mut B,
    work: &'a mut B,
}

impl<K: Kernels> Pass<'_, K> {
    fn rows(&self) -> usize {
        self.layout.tokens()
    }

    fn mask<'m>(&self, linear: &'m Linear<K>) -> Option<DropoutMask<'m>> {
        self.dropout.map(|dropout| DropoutMask {
            probability: dropout.probability,
            seed: dropout.seed,
            stream: &linear.module,
            step: dropout.step,
        })
    }

    /// `ax = drop(x)·Aᵀ`; leaves A and B in `pair`.
    fn project(
        &self,
        linear: &Linear<K>,
        adapter: &LinearAdapter,
        x: &K::Buffer,
        lora_x: &mut K::Buffer,
        (pair, dropped): (&mut K::Buffer, &mut Option<K::Buffer>),
    ) {
        let (kernels, rows) = (self.kernels, self.rows());
        kernels.load_pair(self.parameters, adapter.index, pair);
        let x = match (self.mask(linear), dropped) {
            (Some(mask), Some(dropped)) => {
                kernels.dropout(&mask, x, dropped, rows * adapter.shape.in_features, false);
                dropped
            }
            _ => x,
        };
        kernels.lora_project(&adapter.shape, pair, x, (lora_x, adapter.columns), rows);
    }

    fn forward(
        &self,
        linear: &Linear<K>,
        x: &K::Buffer,
        y: &mut K::Buffer,
        lora_x: &mut K::Buffer,
        work: (&mut K::Buffer, &mut Option<K::Buffer>),
        accumulate: bool,
    ) {
        let (kernels, rows) = (self.kernels, self.rows());
        let (pair, dropped) = work;
        let adapter = linear.adapter.as_ref().filter(|_| self.adapters);
        let lora = adapter.map(|adapter| {
            self.project(linear, adapter, x, lora_x, (&mut *pair, dropped));
            LoraTerm { shape: &adapter.shape, pair: &*pair, inner: (&*lora_x, adapter.columns) }
        });
        let bias = linear.bias.as_ref();
        kernels.linear_forward(&linear.weight, bias, lora, x, (y, linear.output), rows, accumulate);
    }

    /// Gradients of A and B, and `dx = …` or `dx += …` unless `dx` is absent.
    fn backward(
        &self,
        linear: &Linear<K>,
        dy: &K::Buffer,
        (x, lora_x): (&K::Buffer, &K::Buffer),
        dx: Option<(&mut K::Buffer, bool)>,
        to: &mut GradientTarget<K::Buffer>,
        (pair, dropped): (&mut K::Buffer, &mut Option<K::Buffer>),
    ) {
        let (kernels, rows) = (self.kernels, self.rows());
        let dy = (dy, linear.output);
        let Some(LinearAdapter { index, shape, columns }) = &linear.adapter else {
            if let Some((dx, accumulate)) = dx {
                kernels.linear_backward(&linear.weight, None, dy, dx, rows, accumulate);
            }
            return;
        };
        let elements = rows * shape.in_features;
        kernels.load_pair(self.parameters, *index, pair);
        let mask = self.mask(linear);
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

impl<K: Kernels> Block<K> {
    fn linear(&self, role: LinearRole) -> Option<&Linear<K>> {
        self.linears.iter().find(|linear| linear.role == role)
    }

    fn projections(&self) -> impl Iterator<Item = &Linear<K>> {
        use LinearRole::{K as Key, Q, Qkv, V};
        self.linears.iter().filter(|linear| matches!(linear.role, Q | Key | V | Qkv))
    }

    fn expect(&self, role: LinearRole) -> &Linear<K> {
        self.linear(role).expect("every block has an output, an up and a down projection")
    }

    /// Everything up to the MLP's nonlinearity: what `saved` holds. With a cache, the tokens follow
    /// those in it and are added to it.
    pub fn forward_saved(
        &self,
        pass: &Pass<K>,
        x: &K::Buffer,
        saved: &mut Saved<K::Buffer>,
        work: &mut Workspace<K::Buffer>,
        cache: Option<Cache<K::Buffer>>,
    ) {
        let (kernels, rows) = (pass.kernels, pass.rows());
        kernels.norm_forward(&self.norm1, x, &mut saved.norm1, &mut saved.norm1_stats, rows);
        for linear in self.projections() {
            let scratch = (&mut work.lora_pair, &mut work.dropped);
            let lora_x = &mut saved.lora_x;
            pass.forward(linear, &saved.norm1, &mut saved.qkv, lora_x, scratch, false);
        }
        if let Some((cos, sin)) = &work.rotary {
            kernels.rotary(&self.attention, (cos, sin), &mut saved.qkv, rows, false);
        }
        let (o, tiles) = (&mut saved.attention, &mut work.attention);
        match cache {
            None => {
                let (layout, lse) = (pass.layout, &mut saved.lse);
                kernels.attention_forward(&self.attention, layout, &saved.qkv, o, lse, tiles);
            }
            Some(Cache { keys_values, past }) => {
                let cache = (keys_values, past);
                kernels.attention_cached(&self.attention, &saved.qkv, cache, rows, o, tiles);
            }
        }
        kernels.copy(x, &mut saved.middle, rows * self.hidden_size);
        let scratch = (&mut work.lora_pair, &mut work.dropped);
        let output = self.expect(LinearRole::O);
        let lora_x = &mut saved.lora_x;
        pass.forward(output, &saved.attention, &mut saved.middle, lora_x, scratch, true);
        let stats = &mut saved.norm2_stats;
        kernels.norm_forward(&self.norm2, &saved.middle, &mut saved.norm2, stats, rows);
        if let Some(gate) = self.linear(LinearRole::Gate) {
            let scratch = (&mut work.lora_pair, &mut work.dropped);
            let lora_x = &mut saved.lora_x;
            pass.forward(gate, &saved.norm2, &mut saved.gate, lora_x, scratch, false);
        }
        let scratch = (&mut work.lora_pair, &mut work.dropped);
        let up = self.expect(LinearRole::Up);
        pass.forward(up, &saved.norm2, &mut saved.up, &mut saved.lora_x, scratch, false);
    }

    /// The rest: `out = middle + down(h)`.
    pub fn forward_output(
        &self,
        pass: &Pass<K>,
        saved: &mut Saved<K::Buffer>,
        out: &mut K::Buffer,
        work: &mut Workspace<K::Buffer>,
    ) {
        self.hidden(pass, saved, work);
        pass.kernels.copy(&saved.middle, out, pass.rows() * self.hidden_size);
        let scratch = (&mut work.lora_pair, &mut work.dropped);
        let down = self.expect(LinearRole::Down);
        pass.forward(down, &work.mlp, out, &mut saved.lora_x, scratch, true);
    }

    /// `h = act(gate) ∘ up` into the workspace.
    fn hidden(&self, pass: &Pass<K>, saved: &Saved<K::Buffer>, work: &mut Workspace<K::Buffer>) {
        let gate = self.linear(LinearRole::Gate).map(|_| &saved.gate);
        let elements = pass.rows() * self.intermediate_size;
        pass.kernels.mlp_forward(self.activation, gate, &saved.up, &mut work.mlp, elements);
    }

    /// Turns the gradient of the block's output in `work.gradients.stream` into that of its input,
    /// and adds to the adapters' `gradients`.
    ///
    /// `recomputed`: `saved` comes from [`forward_saved`](Block::forward_saved) alone.
    /// `input_gradient` false leaves the stream's gradient of the first half out: nothing below
    /// the first block is trained.
    pub fn backward(
        &self,
        pass: &Pass<K>,
        x: &K::Buffer,
        saved: &mut Saved<K::Buffer>,
        work: &mut Workspace<K::Buffer>,
        gradients: &mut K::Buffer,
        (recomputed, input_gradient): (bool, bool),
    ) {
        self.hidden(pass, saved, work);
        let Some(mut grads) = work.gradients.take() else { return };
        let down = self.expect(LinearRole::Down);
        if recomputed && let Some(adapter) = &down.adapter {
            let scratch = (&mut work.lora_pair, &mut work.dropped);
            pass.project(down, adapter, &work.mlp, &mut saved.lora_x, scratch);
        }
        self.backward_mlp(pass, saved, work, &mut grads, gradients);
        self.backward_attention(pass, saved, work, &mut grads, gradients, input_gradient);
        if input_gradient {
            let stats = &saved.norm1_stats;
            let rows = pass.rows();
            pass.kernels.norm_backward(&self.norm1, &grads.norm, x, stats, &mut grads.stream, rows);
        }
        work.gradients = Some(grads);
    }

    fn backward_mlp(
        &self,
        pass: &Pass<K>,
        saved: &Saved<K::Buffer>,
        work: &mut Workspace<K::Buffer>,
        grads: &mut GradientBuffers<K::Buffer>,
        parameters: &mut K::Buffer,
    ) {
        let (kernels, rows) = (pass.kernels, pass.rows());
        let elements = rows * self.intermediate_size;
        let to = &mut GradientTarget { parameters, work: &mut grads.lora };
        let down = self.expect(LinearRole::Down);
        let scratch = (&mut work.lora_pair, &mut work.dropped);
        let dx = Some((&mut grads.mlp, false));
        pass.backward(down, &grads.stream, (&work.mlp, &saved.lora_x), dx, to, scratch);
        let gate = self.linear(LinearRole::Gate);
        let gate_values = gate.map(|_| &saved.gate);
        let (d_out, d_up) = (&mut grads.mlp, &mut work.mlp);
        kernels.mlp_backward(self.activation, gate_values, &saved.up, d_out, d_up, elements);
        let inputs = (&saved.norm2, &saved.lora_x);
        if let Some(gate) = gate {
            let scratch = (&mut work.lora_pair, &mut work.dropped);
            pass.backward(gate, &grads.mlp, inputs, Some((&mut grads.norm, false)), to, scratch);
        }
        let up = self.expect(LinearRole::Up);
        let d_up = if gate.is_some() { &work.mlp } else { &grads.mlp };
        let scratch = (&mut work.lora_pair, &mut work.dropped);
        pass.backward(up, d_up, inputs, Some((&mut grads.norm, gate.is_some())), to, scratch);
        let stats = &saved.norm2_stats;
        let stream = &mut grads.stream;
        kernels.norm_backward(&self.norm2, &grads.norm, &saved.middle, stats, stream, rows);
    }

    fn backward_attention(
        &self,
        pass: &Pass<K>,
        saved: &Saved<K::Buffer>,
        work: &mut Workspace<K::Buffer>,
        grads: &mut GradientBuffers<K::Buffer>,
        parameters: &mut K::Buffer,
        input_gradient: bool,
    ) {
        let (kernels, rows) = (pass.kernels, pass.rows());
        let to = &mut GradientTarget { parameters, work: &mut grads.lora };
        let output = self.expect(LinearRole::O);
        let scratch = (&mut work.lora_pair, &mut work.dropped);
        let inputs = (&saved.attention, &saved.lora_x);
        let d_o = Some((&mut grads.norm, false));
        pass.backward(output, &grads.stream, inputs, d_o, to, scratch);
        kernels.attention_backward(
            &self.attention,
            pass.layout,
            &saved.qkv,
            &saved.attention,
            &saved.lse,
            &grads.norm,
            &mut grads.qkv,
            &mut work.attention,
        );
        if let Some((cos, sin)) = &work.rotary {
            kernels.rotary(&self.attention, (cos, sin), &mut grads.qkv, rows, true);
        }
        for (position, linear) in self.projections().enumerate() {
            let scratch = (&mut work.lora_pair, &mut work.dropped);
            let dx = input_gradient.then_some((&mut grads.norm, position > 0));
            let inputs = (&saved.norm1, &saved.lora_x);
            pass.backward(linear, &grads.qkv, inputs, dx, to, scratch);
        }
    }
}
