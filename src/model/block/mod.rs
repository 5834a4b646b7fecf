//! One transformer block: forward, recomputation and backward over planned buffers.
//!
//! ```text
//! n1 = norm(x)      qkv = n1·Wqkvᵀ, rotated      o = attention(qkv)      m = x + o·Woᵀ
//! n2 = norm(m)      h = act(n2·Wgᵀ) ∘ (n2·Wuᵀ)   out = m + h·Wdᵀ
//! ```
//! Where there are post-norms, what is added to x and m is `norm(o·Woᵀ)` and `norm(h·Wdᵀ)`; where there are
//! none before the halves, n1 is x and n2 is m.
//! Every linear is `x·Wᵀ + bias + s·(drop(x)·Aᵀ)·Bᵀ` with W frozen. The backward pass computes
//! gradients of x, A and B only. `n1`, `n2`, `h` and norms of heads are made again, never kept: a pass
//! over memory is all that they cost.
//!
//! The two lines are two halves: attention mixes tokens, the MLP takes every token by
//! itself and so runs over tiles of them, which bounds its wide buffers.

mod attention;
mod linear;
mod mlp;

use std::ops::Range;

pub use linear::{AdapterWork, Linear, LinearAdapter, LinearGroup};
pub use mlp::{GatedMlp, GatedMlpGradients};

use super::Draws;
use super::parameters::Parameters;
use super::spec::{Activation, LinearRole, MlpKind};
use crate::kernels::{
    AttentionShape, Cache, HeadNorms, Kernels, NormParameters, PostNorms, RotaryTables,
    TokenLayout, Write,
};

/// A block's frozen parts.
pub struct Block<K: Kernels> {
    /// Before attention.
    pub norm1: Option<NormParameters<K::Vector>>,
    /// Before the MLP.
    pub norm2: Option<NormParameters<K::Vector>>,
    /// Norms of q and k before they are rotated.
    pub head_norms: Option<HeadNorms<K::Vector>>,
    /// Norms of what both halves add to the stream.
    pub post_norms: Option<PostNorms<K::Vector>>,
    /// Which of the rotary tables turns q and k.
    pub rotary: Option<usize>,
    /// All linears, in forward order.
    pub linears: Vec<Linear<K>>,
    /// Heads and window.
    pub attention: AttentionShape,
    /// Nonlinearity of the MLP.
    pub activation: Activation,
    /// D.
    pub hidden_size: usize,
    /// F.
    pub intermediate_size: usize,
    /// Linears of the MLP.
    pub mlp: MlpKind,
}

/// Activations that the backward pass reads, but for what attention makes.
pub struct Saved<B> {
    /// q, k and v, `[T, q + 2·kv]`: rotated, or as they are before the norms of heads.
    pub qkv: B,
    /// `x·Aᵀ` of every adapter of this half, side by side, `[T, ΣR]`.
    pub lora_x: B,
    /// `o·Woᵀ`, `[T, D]`, where it goes through a norm.
    pub projected: Option<B>,
    /// Input of the second half, `[T, D]`.
    pub middle: B,
    /// The second half: tile after tile, or one for all tiles in turn.
    pub mlp: Vec<SavedMlp<B>>,
}

/// What attention makes, which a layer may keep though it recomputes all the rest.
pub struct AttentionOutput<B> {
    /// Log-sum-exp of the scores, `[T, H]`.
    pub lse: B,
    /// `[T, H·head_dim]`.
    pub output: B,
}

/// All activations of a block at work.
pub struct BlockActivations<'a, B> {
    /// What attention makes.
    pub attention: &'a mut AttentionOutput<B>,
    /// All activations but what attention makes.
    pub saved: &'a mut Saved<B>,
    /// What a backward pass does not find in the other two.
    pub missing: Missing,
}

/// What of a block's activations its backward pass has to make again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// Nothing: all activations were kept.
    Nothing,
    /// All but the output of attention.
    AllButAttention,
    /// All but the input.
    Everything,
}

/// Activations of the MLP for one tile of t tokens.
pub struct SavedMlp<B> {
    /// Before the nonlinearity, `[t, F]`; empty without a gate of its own.
    pub gate: B,
    /// `[t, F]`; or gate and up side by side, `[t, 2·F]`, which the backward pass turns into their
    /// gradients.
    pub up: B,
    /// `x·Aᵀ` of every adapter of this half, side by side, `[t, ΣR]`.
    pub lora_x: B,
    /// `h·Wdᵀ`, `[t, D]`, where it goes through a norm.
    pub projected: Option<B>,
}

/// Buffers that no layer owns.
pub struct Workspace<B> {
    /// Output of the norm at work, `[T, D]`.
    pub norm: B,
    /// `(μ, 1/σ)` of the norm at work, `[T, 2]`.
    pub norm_stats: B,
    /// h, later the gradient of up, `[t, F]`.
    pub mlp: B,
    /// What adapters work in.
    pub adapter: AdapterWork<B>,
    /// q and k behind the norms of their heads, rotated, and v, `[T, q + 2·kv]`; only where heads
    /// have norms.
    pub normed_qkv: Option<B>,
    /// Score tiles.
    pub attention: B,
    /// What turns q and k.
    pub rotary: RotaryBuffers<B>,
    /// Rows that the MLP works on, where it works in tiles.
    pub tile: Option<TileBuffers<B>>,
    /// Gradients of activations; only where there is a backward pass.
    pub gradients: Option<GradientBuffers<B>>,
}

/// Tables of every rotary embedding.
pub struct RotaryBuffers<B> {
    /// cos and sin, `[T, rotary_dim / 2]`, of each.
    pub tables: Vec<[B; 2]>,
    /// Factors of q, `[T]`.
    pub query_scale: Option<B>,
}

impl<B> RotaryBuffers<B> {
    /// The tables of the rotary embedding `index`.
    pub fn of(&self, index: usize) -> RotaryTables<'_, B> {
        let [cos, sin] = &self.tables[index];
        RotaryTables { cos, sin, query_scale: self.query_scale.as_ref() }
    }
}

/// Rows of one tile of the MLP, copied in and out.
pub struct TileBuffers<B> {
    /// Tokens t of a tile.
    pub tokens: usize,
    /// Input of the second half, `[t, D]`.
    pub middle: B,
    /// Gradient of the residual stream, `[t, D]`; only where there is a backward pass.
    pub gradient: Option<B>,
}

/// Gradients of one block's activations.
pub struct GradientBuffers<B> {
    /// The gradient of h, later of the gate, `[t, F]`.
    pub mlp: B,
    /// The gradient of the residual stream, `[T, D]`.
    pub stream: B,
    /// The gradient of a norm's output or of attention's output, `[T, max(D, Q)]`.
    pub norm: B,
    /// The gradient of what goes through a post-norm, `[T, D]`.
    pub projected: Option<B>,
    /// The gradients of q, k and v, `[T, q + 2·kv]`.
    pub qkv: B,
}

/// Where a backward pass writes.
struct Gradients<'a, B> {
    /// The gradients of the activations of the block at work.
    activations: GradientBuffers<B>,
    /// The gradients of all adapters, which are added to.
    lora: &'a mut B,
}

/// LoRA dropout of one micro-batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// `lora_dropout`.
    pub probability: f32,
    /// What the masks are drawn from.
    pub draws: Draws,
}

/// Which model a pass computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Variant {
    /// The base model with its adapters.
    #[default]
    Adapted,
    /// The base model alone.
    Base,
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
    /// Whether the adapters take part.
    pub variant: Variant,
    /// Whether this is one token behind those in the cache.
    pub single_row: bool,
    /// Tokens of the stream that the first rows of the buffers hold: all, or a tile.
    pub rows: Range<usize>,
}

impl<'a, K: Kernels> Pass<'a, K> {
    /// The same pass over some of its rows.
    fn over(&self, rows: Range<usize>) -> Pass<'a, K> {
        Pass { rows, ..*self }
    }

    /// What a half of a block reads, n1 or n2: the norm of the `width` columns of x, or these.
    fn normalize(
        &self,
        norm: Option<&NormParameters<K::Vector>>,
        x: &K::Buffer,
        to: (&mut K::Buffer, &mut K::Buffer),
        width: usize,
    ) {
        let (rows, (to, stats)) = (self.rows.len(), to);
        match norm {
            Some(norm) => self.kernels.norm_forward(norm, x, to, stats, rows, Write::Over),
            None => self.kernels.copy_rows(x, to, rows, width, Write::Over),
        }
    }

    /// `dx += ` the gradient of x from that of what [`normalize`](Self::normalize) made, `dy`.
    fn normalize_backward(
        &self,
        norm: Option<&NormParameters<K::Vector>>,
        dy: &K::Buffer,
        (x, stats): (&K::Buffer, &K::Buffer),
        dx: &mut K::Buffer,
        width: usize,
    ) {
        let rows = self.rows.len();
        match norm {
            Some(norm) => self.kernels.norm_backward(norm, dy, x, stats, dx, rows),
            None => self.kernels.copy_rows(dy, dx, rows, width, Write::Add),
        }
    }
}

impl<K: Kernels> Block<K> {
    fn linear(&self, role: LinearRole) -> Option<&Linear<K>> {
        self.linears.iter().find(|linear| linear.role == role)
    }

    fn expect(&self, role: LinearRole) -> &Linear<K> {
        self.linear(role).expect("every block has an output, an up and a down projection")
    }

    /// `out` from `x`, with what the backward pass reads in `activations`. With a cache, the tokens follow
    /// those in it and are added to it.
    pub fn forward(
        &self,
        pass: &Pass<K>,
        x: &K::Buffer,
        out: &mut K::Buffer,
        mut activations: BlockActivations<K::Buffer>,
        work: &mut Workspace<K::Buffer>,
        cache: Option<Cache<K::Buffer>>,
    ) {
        self.forward_attention(pass, x, &mut activations, work, cache);
        self.forward_mlp(pass, activations.saved, out, work);
    }

    /// Turns the gradient of the block's output in `work.gradients.stream` into that of its input,
    /// and adds to the `lora_gradients`.
    ///
    /// `input_gradient` false leaves the stream's gradient of the first half out: nothing below
    /// the first block is trained.
    pub fn backward(
        &self,
        pass: &Pass<K>,
        x: &K::Buffer,
        mut activations: BlockActivations<K::Buffer>,
        work: &mut Workspace<K::Buffer>,
        lora_gradients: &mut K::Buffer,
        input_gradient: bool,
    ) {
        let recompute = activations.missing != Missing::Nothing;
        if recompute {
            self.forward_attention(pass, x, &mut activations, work, None);
        }
        let of_activations = work.gradients.take().expect("planned for a backward pass");
        let mut grads = Gradients { activations: of_activations, lora: lora_gradients };
        self.backward_mlp(pass, activations.saved, work, &mut grads, recompute);
        if !recompute {
            self.norm_heads(pass, activations.saved, work);
        }
        self.backward_attention(pass, x, &activations, work, &mut grads, input_gradient);
        work.gradients = Some(grads.activations);
    }

    /// The gradient of what went through a post-norm, into `grads.projected`, from that of the stream.
    fn post_norm_backward(
        &self,
        pass: &Pass<K>,
        norm: &NormParameters<K::Vector>,
        projected: &Option<K::Buffer>,
        work: &mut Workspace<K::Buffer>,
        grads: &mut GradientBuffers<K::Buffer>,
    ) {
        let (kernels, rows) = (pass.kernels, pass.rows.len());
        let buffers = projected.as_ref().zip(grads.projected.as_mut());
        let (x, dx) = buffers.expect("planned where there are post-norms");
        let stats = &mut work.norm_stats;
        kernels.norm_forward(norm, x, &mut work.norm, stats, rows, Write::Over);
        kernels.zero(dx, rows * self.hidden_size);
        kernels.norm_backward(norm, &grads.stream, x, stats, dx, rows);
    }
}
