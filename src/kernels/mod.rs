//! The operations of a training step, one forward/backward pair each, over planned buffers.
//!
//! [`block`](crate::model) is generic over [`Kernels`]; a backend is one implementation. Matrices
//! are row-major, rows are tokens; `rows` says how many rows of a (possibly longer) buffer count.
//! Every backward *adds* to the gradients that it is given unless it says that it overwrites.

pub mod cpu;
pub mod cuda;
mod head;
mod memory;
mod shapes;

use std::ops::Range;

use crate::error::Result;
use crate::model::block::{GatedMlp, Linear};
use crate::model::parameters::Parameters;
use crate::model::spec::{Activation, ModelSpec};
pub use memory::{PlannedMemory, Residency, Storage, StreamedWeights, Untaken};
pub use shapes::{
    AttentionShape, Columns, DropoutMask, HeadNorms, LogitShape, LoraShape, LoraTerm,
    NormParameters, PostNorms, RotaryTables, TokenLayout, UniformNoise,
};

/// A backend: the memory it plans in and the operations on it.
///
/// Operations may be asynchronous and then report nothing; what returns a `Result` waits for all
/// that was asked before and reports what went wrong since.
pub trait Kernels: Storage {
    /// Whether sums have another order, and so other bits, in products of another shape. Then the
    /// base model alone is computed in the shapes of the adapted one, its adapters scaled by 0.
    const BITS_DEPEND_ON_SHAPE: bool = false;
    /// Whether products read A and B in bf16. Working copies in bf16 (`--adapter-dtype bf16`) are read as
    /// they are; without them the f32 master is rounded before each product.
    const TAKES_BF16: bool = false;

    /// Whether it can compute this model as it was told to.
    ///
    /// # Errors
    /// `Usage` for a setting that the model does not allow.
    fn check(&self, spec: &ModelSpec) -> Result<()>;

    /// `x[t] = scale · table[ids[t]]`, or `+=`; x `[T, D]`, table `[V, D]`.
    fn embed(
        &self,
        ids: &[u32],
        table: &Self::Weight,
        scale: f32,
        x: &mut Self::Buffer,
        accumulate: bool,
    );

    /// y = norm(x), or `+=`, rows of D; `stats` keeps `(mean, 1/σ)` of each row for the backward pass.
    fn norm_forward(
        &self,
        norm: &NormParameters<Self::Vector>,
        x: &Self::Buffer,
        y: &mut Self::Buffer,
        stats: &mut Self::Buffer,
        rows: usize,
        accumulate: bool,
    );

    /// `dx += ∂norm/∂x · dy`; no gradient for the frozen weight and bias.
    fn norm_backward(
        &self,
        norm: &NormParameters<Self::Vector>,
        dy: &Self::Buffer,
        x: &Self::Buffer,
        stats: &Self::Buffer,
        dx: &mut Self::Buffer,
        rows: usize,
    );

    /// `y[:, band] = x · Wᵀ + bias + scale · ax · Bᵀ`, or `+=`; x `[rows, in]`, `lora` holds ax.
    #[allow(clippy::too_many_arguments)]
    fn linear_forward(
        &self,
        weight: &Self::Weight,
        bias: Option<&Self::Vector>,
        lora: Option<LoraTerm<Self::Buffer>>,
        x: &Self::Buffer,
        y: (&mut Self::Buffer, Columns),
        rows: usize,
        accumulate: bool,
    );

    /// [`linear_forward`](Kernels::linear_forward) of one row that text is generated from: its sums may
    /// have another order than those of several rows.
    fn linear_row(
        &self,
        weight: &Self::Weight,
        bias: Option<&Self::Vector>,
        lora: Option<LoraTerm<Self::Buffer>>,
        x: &Self::Buffer,
        y: (&mut Self::Buffer, Columns),
        accumulate: bool,
    ) {
        self.linear_forward(weight, bias, lora, x, y, 1, accumulate);
    }

    /// `dx = dy[:, band] · W + t · A`, or `+=`; `lora` holds t.
    fn linear_backward(
        &self,
        weight: &Self::Weight,
        lora: Option<LoraTerm<Self::Buffer>>,
        dy: (&Self::Buffer, Columns),
        dx: &mut Self::Buffer,
        rows: usize,
        accumulate: bool,
    );

    /// [`lora_project`](Kernels::lora_project) and [`linear_forward`](Kernels::linear_forward) of
    /// linears that read the same rows, with fewer reads and products than one after another. Their
    /// outputs are bands of one buffer, or a buffer for each; `scale` is a factor on the adapters'.
    /// `false`, and nothing done, where the backend has nothing better.
    #[allow(clippy::too_many_arguments)]
    fn linears_forward(
        &self,
        _parameters: &Parameters<Self>,
        _linears: &[&Linear<Self>],
        _x: &Self::Buffer,
        _ys: &mut [&mut Self::Buffer],
        _ax: &mut Self::Buffer,
        _pair: &mut Self::Buffer,
        _rows: usize,
        _scale: f32,
    ) -> bool {
        false
    }

    /// [`lora_backward`](Kernels::lora_backward) and [`linear_backward`](Kernels::linear_backward)
    /// of the same linears, of which dx is the sum; `inputs` are x and ax.
    #[allow(clippy::too_many_arguments)]
    fn linears_backward(
        &self,
        _parameters: &Parameters<Self>,
        _linears: &[&Linear<Self>],
        _dys: &[&Self::Buffer],
        _inputs: (&Self::Buffer, &Self::Buffer),
        _dx: Option<&mut Self::Buffer>,
        _t: &mut Self::Buffer,
        _gradients: &mut Self::Buffer,
        _pair: &mut Self::Buffer,
        _rows: usize,
    ) -> bool {
        false
    }

    /// [`mlp_forward`](Kernels::mlp_forward) of a gated MLP, to `h` if it is wanted, and
    /// [`lora_project`](Kernels::lora_project) of the down projection's adapter, into its columns of `ax`.
    /// `false`, and nothing done, where the backend has nothing better than one after the other.
    #[allow(clippy::too_many_arguments)]
    fn adapted_mlp_forward(
        &self,
        _parameters: &Parameters<Self>,
        _down: &Linear<Self>,
        _activation: Activation,
        (_gate, _up): (&Self::Buffer, &Self::Buffer),
        _h: Option<&mut Self::Buffer>,
        _ax: &mut Self::Buffer,
        _rows: usize,
    ) -> bool {
        false
    }

    /// Whether [`adapted_mlp_backward`](Kernels::adapted_mlp_backward) takes this MLP, so that its backward
    /// pass reads no h.
    fn adapts_mlp_backward(
        &self,
        _parameters: &Parameters<Self>,
        _mlp: &GatedMlp<Self>,
        _rows: usize,
    ) -> bool {
        false
    }

    /// The backward pass of a gated MLP whose linears all have adapters: adds to the gradients of those,
    /// and overwrites `dx`, that of x, which gate and up read, from `dy`, that of what down made. `d_gate`
    /// and `d_up` are left with the gradients of gate and up, `t` is to work in. `false`, and nothing
    /// done, where the backend has nothing better than one operation after another.
    #[allow(clippy::too_many_arguments)]
    fn adapted_mlp_backward(
        &self,
        _parameters: &Parameters<Self>,
        _mlp: &GatedMlp<Self>,
        (_dy, _x): (&Self::Buffer, &Self::Buffer),
        [_d_gate, _d_up]: [&mut Self::Buffer; 2],
        _dx: &mut Self::Buffer,
        _t: &mut Self::Buffer,
        _gradients: &mut Self::Buffer,
        _rows: usize,
    ) -> bool {
        false
    }

    /// Widens target `index`'s A, then B, into `pair`: what the products below compute with.
    fn load_pair(&self, parameters: &Parameters<Self>, index: usize, pair: &mut Self::Buffer);

    /// `ax[:, band] = x · Aᵀ`.
    fn lora_project(
        &self,
        shape: &LoraShape,
        pair: &Self::Buffer,
        x: &Self::Buffer,
        ax: (&mut Self::Buffer, Columns),
        rows: usize,
    );

    /// The same of one row that text is generated from: its sums may have another order than those of
    /// several rows.
    fn lora_project_row(
        &self,
        shape: &LoraShape,
        pair: &Self::Buffer,
        x: &Self::Buffer,
        ax: (&mut Self::Buffer, Columns),
    ) {
        self.lora_project(shape, pair, x, ax, 1);
    }

    /// With `t = scale · dy[:, band] · B`: `gA += tᵀ x`, `gB += scale · dyᵀ ax`; t is left for
    /// [`linear_backward`](Kernels::linear_backward). `gradients[offset..]` holds gA, gB.
    #[allow(clippy::too_many_arguments)]
    fn lora_backward(
        &self,
        shape: &LoraShape,
        pair: &Self::Buffer,
        dy: (&Self::Buffer, Columns),
        x: &Self::Buffer,
        ax: (&Self::Buffer, Columns),
        t: &mut Self::Buffer,
        gradients: (&mut Self::Buffer, usize),
        rows: usize,
    );

    /// `dx = t · A`: for the path through dropout, which the rest of dx does not take.
    fn lora_input_gradient(
        &self,
        shape: &LoraShape,
        pair: &Self::Buffer,
        t: &Self::Buffer,
        dx: &mut Self::Buffer,
        rows: usize,
    );

    /// `y = x ∘ mask / (1 − p)` over `[rows, width]`, or `+=`.
    fn dropout(
        &self,
        mask: &DropoutMask,
        x: &Self::Buffer,
        y: &mut Self::Buffer,
        elements: usize,
        accumulate: bool,
    );

    /// Adds noise to `rows` of x, which are `width` wide.
    fn add_noise(
        &self,
        noise: &UniformNoise,
        x: &mut Self::Buffer,
        rows: Range<usize>,
        width: usize,
    );

    /// `to = [norm(q) | norm(k) | v]` of the rows of `qkv`, each head of q and k by itself.
    fn head_norms(
        &self,
        norms: &HeadNorms<Self::Vector>,
        shape: &AttentionShape,
        qkv: &Self::Buffer,
        to: &mut Self::Buffer,
        rows: usize,
    );

    /// Overwrites the gradients of norm(q) and norm(k) in `dqkv` with those of q and k in `qkv`; no
    /// gradient for the frozen weights.
    fn head_norms_backward(
        &self,
        norms: &HeadNorms<Self::Vector>,
        shape: &AttentionShape,
        qkv: &Self::Buffer,
        dqkv: &mut Self::Buffer,
        rows: usize,
    );

    /// Rotates q and k in place; `backward` turns the other way. The scale of q is its own transpose.
    fn rotary(
        &self,
        shape: &AttentionShape,
        tables: RotaryTables<Self::Buffer>,
        qkv: &mut Self::Buffer,
        rows: usize,
        backward: bool,
    );

    /// Causal attention inside each document: `o [T, H·head_dim]` and the log-sum-exp `[T, H]`.
    fn attention_forward(
        &self,
        shape: &AttentionShape,
        layout: &TokenLayout,
        qkv: &Self::Buffer,
        o: &mut Self::Buffer,
        lse: &mut Self::Buffer,
        work: &mut Self::Buffer,
    );

    /// Attention of `rows` new tokens that follow `past` cached ones: appends their k and v to
    /// `cache` `[capacity, 2·kv]` and writes `o [rows, H·head_dim]`; `lse [rows, H]` is to work in.
    #[allow(clippy::too_many_arguments)]
    fn attention_cached(
        &self,
        shape: &AttentionShape,
        qkv: &Self::Buffer,
        cache: (&mut Self::Buffer, usize),
        rows: usize,
        o: &mut Self::Buffer,
        lse: &mut Self::Buffer,
        work: &mut Self::Buffer,
    );

    /// Overwrites `dqkv`; probabilities are recomputed from q, k and the log-sum-exp.
    #[allow(clippy::too_many_arguments)]
    fn attention_backward(
        &self,
        shape: &AttentionShape,
        layout: &TokenLayout,
        qkv: &Self::Buffer,
        o: &Self::Buffer,
        lse: &Self::Buffer,
        d_o: &Self::Buffer,
        dqkv: &mut Self::Buffer,
        work: &mut Self::Buffer,
    );

    /// `out = act(gate) ∘ up`, or `act(up)` without a gate.
    fn mlp_forward(
        &self,
        activation: Activation,
        gate: Option<&Self::Buffer>,
        up: &Self::Buffer,
        out: &mut Self::Buffer,
        elements: usize,
    );

    /// `d_out` becomes the gradient of gate (of up without a gate), `d_up` that of up.
    fn mlp_backward(
        &self,
        activation: Activation,
        gate: Option<&Self::Buffer>,
        up: &Self::Buffer,
        d_out: &mut Self::Buffer,
        d_up: &mut Self::Buffer,
        elements: usize,
    );

    /// `out = act(gate) ∘ up` of `[gate | up]`, rows of twice the width of `out`.
    fn fused_mlp_forward(
        &self,
        activation: Activation,
        gate_up: &Self::Buffer,
        out: &mut Self::Buffer,
        rows: usize,
        width: usize,
    );

    /// `gate_up` becomes its gradient, `d_out` that of what was made of it.
    fn fused_mlp_backward(
        &self,
        activation: Activation,
        gate_up: &mut Self::Buffer,
        d_out: &Self::Buffer,
        rows: usize,
        width: usize,
    );

    /// Adds the sum over rows of `−log softmax(logits)[target]` to `loss`; `logits [rows, V]`, as they
    /// are before they are capped, become `scale ·` their gradient if there is one to compute.
    fn cross_entropy(
        &self,
        logits: &mut Self::Buffer,
        targets: &[u32],
        shape: LogitShape,
        scale: Option<f32>,
        loss: &mut Self::LossSum,
    );

    /// Adds the sum over rows of `−log softmax(x · Wᵀ)[target]` to `loss`, W `[V, in]` the head; with
    /// `scale`, x `[rows, in]` becomes `scale ·` its gradient. `logits` and `sum` are buffers to
    /// work in, as the plan has them: for the logits of these rows, or of a tile of the head, and for the
    /// gradient of x where the head comes in tiles.
    #[allow(clippy::too_many_arguments)]
    fn head_loss(
        &self,
        head: &Self::Weight,
        x: &mut Self::Buffer,
        logits: &mut Self::Buffer,
        _sum: Option<&mut Self::Buffer>,
        targets: &[u32],
        shape: LogitShape,
        scale: Option<f32>,
        loss: &mut Self::LossSum,
    ) {
        head::loss_at_once(self, head, x, logits, targets, shape, scale, loss);
    }

    /// Adds the same losses, and tells of each row whether no logit is larger than its target's.
    ///
    /// # Errors
    /// What went wrong in the operations before.
    #[allow(clippy::too_many_arguments)]
    fn head_score(
        &self,
        head: &Self::Weight,
        x: &Self::Buffer,
        logits: &mut Self::Buffer,
        targets: &[u32],
        shape: LogitShape,
        loss: &mut Self::LossSum,
    ) -> Result<Vec<bool>> {
        head::score_at_once(self, head, x, logits, targets, shape, loss)
    }

    /// `to[i] = from[rows[i]]`, rows of `width`.
    fn gather_rows(&self, from: &Self::Buffer, rows: &[u32], to: &mut Self::Buffer, width: usize);

    /// `to[rows[i]] = from[i]`.
    fn scatter_rows(&self, from: &Self::Buffer, rows: &[u32], to: &mut Self::Buffer, width: usize);

    /// Copies `elements`, from and to the given offsets.
    fn copy(&self, from: (&Self::Buffer, usize), to: (&mut Self::Buffer, usize), elements: usize);

    /// Zeroes the first `elements`.
    fn zero(&self, buffer: &mut Self::Buffer, elements: usize);
}
