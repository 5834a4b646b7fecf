//! What operations are told besides their buffers: shapes, layouts, masks and norms.

use std::iter::Sum;
use std::ops::AddAssign;

use crate::adapter::LoraShape;
use crate::error::Result;
use crate::model::spec::{ModelSpec, Norm, RotaryPairs};
use crate::random::Stream;

/// A band of columns in a wider row: where it starts, how wide it is, and how far rows are apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Columns {
    /// First column.
    pub offset: usize,
    /// Columns in the band.
    pub width: usize,
    /// Elements from one row to the next.
    pub stride: usize,
}

impl Columns {
    /// A whole matrix of `width` columns.
    pub fn all(width: usize) -> Self {
        Columns { offset: 0, width, stride: width }
    }

    /// `width` columns from `offset` on, in rows of `stride`.
    pub fn band(offset: usize, width: usize, stride: usize) -> Self {
        Columns { offset, width, stride }
    }
}

/// How an operation leaves its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// The result takes the place of what was there.
    Over,
    /// The result is added to what was there.
    Add,
}

impl Write {
    /// How a part of a sum is left: the first takes the place of what was there.
    pub fn of_part(position: usize) -> Self {
        if position == 0 { Write::Over } else { Write::Add }
    }

    /// Whether what was there stays in the result.
    pub fn adds(self) -> bool {
        self == Write::Add
    }

    /// The factor on what was there.
    pub fn beta(self) -> f32 {
        if self.adds() { 1.0 } else { 0.0 }
    }
}

/// Which way a pass goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the first block to the last.
    Forward,
    /// From the last block to the first, with gradients.
    Backward,
}

/// Which documents a forward pass is over: the tokens of all of them in one stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenLayout {
    /// `0, …, T`: where documents begin and end.
    pub boundaries: Vec<usize>,
    /// Position of every token in its document.
    pub positions: Vec<u32>,
}

impl TokenLayout {
    /// Positions restart at every boundary.
    ///
    /// # Panics
    /// When a document ends before it begins.
    pub fn new(cu_seqlens: &[u32]) -> Self {
        Self::continuing(cu_seqlens, 0)
    }

    /// The layout of one document (or several) whose first positions are `past`.
    ///
    /// # Panics
    /// When a document ends before it begins.
    pub fn continuing(cu_seqlens: &[u32], past: u32) -> Self {
        assert!(cu_seqlens.is_sorted(), "documents follow each other");
        let boundaries: Vec<usize> = cu_seqlens.iter().map(|&b| b as usize).collect();
        let positions =
            boundaries.windows(2).flat_map(|w| past..past + (w[1] - w[0]) as u32).collect();
        TokenLayout { boundaries, positions }
    }

    /// T.
    pub fn tokens(&self) -> usize {
        self.positions.len()
    }

    /// Tokens of the longest document.
    pub fn longest(&self) -> usize {
        self.boundaries.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0)
    }
}

/// What turns q and k: a row for each token.
#[derive(Debug)]
pub struct RotaryTables<'a, B> {
    /// `[T, rotary_dim / 2]`.
    pub cos: &'a B,
    /// `[T, rotary_dim / 2]`.
    pub sin: &'a B,
    /// `[T]`: q is multiplied by it besides.
    pub query_scale: Option<&'a B>,
}

/// Shape of attention; rows of the fused `qkv` buffer are `[q | k | v]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// H.
    pub num_heads: usize,
    /// K.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The first elements of a head, which rotary embedding turns.
    pub rotary_dim: usize,
    /// Which of these make a pair.
    pub rotary_pairs: RotaryPairs,
    /// Keys that a query sees, itself included; `None` is all before it.
    pub window: Option<usize>,
    /// Factor on the scores.
    pub scale: f32,
    /// c: scores become `c·tanh(score / c)`.
    pub soft_cap: Option<f32>,
}

impl AttentionShape {
    /// Full causal attention, scores divided by `sqrt(head_dim)`, whole heads rotated.
    pub fn new(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> Self {
        AttentionShape {
            num_heads,
            num_kv_heads,
            head_dim,
            rotary_dim: head_dim,
            rotary_pairs: RotaryPairs::Halves,
            window: None,
            scale: 1.0 / (head_dim as f32).sqrt(),
            soft_cap: None,
        }
    }

    /// Width of q and of the output.
    pub fn q_width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Width of k and of v.
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Width of a `qkv` row.
    pub fn qkv_width(&self) -> usize {
        self.q_width() + 2 * self.kv_width()
    }
}

/// Keys and values of the tokens that were decoded before, for one block.
pub struct Cache<'a, B> {
    /// Rotated keys and values `[capacity, 2·kv]`.
    pub keys_values: &'a mut B,
    /// Tokens in the cache.
    pub past: usize,
}

/// What attention to a [`Cache`] works in; what it leaves there is of no use.
pub struct CachedScratch<'a, B> {
    /// `[rows, H]`.
    pub lse: &'a mut B,
    /// Score tiles.
    pub tiles: &'a mut B,
}

/// What an adapter adds to a linear's product, in the same pass over the result.
pub struct LoraTerm<'a, B> {
    /// Dimensions and scale.
    pub shape: &'a LoraShape,
    /// A, then B.
    pub pair: &'a B,
    /// `x·Aᵀ` (forward) or `t` (backward), `[rows, R]`.
    pub inner: (&'a B, Columns),
}

/// Which elements of a linear's input dropout removes: a function of its fields and the index.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DropoutMask {
    /// Chance of being zeroed; the rest is divided by `1 − probability`.
    pub probability: f32,
    /// The linear's, in this micro-batch.
    pub stream: Stream,
    /// Index of the first element: where the input is a part of the linear's whole input.
    pub first: u64,
}

/// Losses of trained tokens, and how many of these greedy decoding would choose.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TokenLosses {
    /// Sum of their losses.
    pub sum: f64,
    /// Those of them that no other token was likelier than.
    pub hits: u64,
}

impl AddAssign for TokenLosses {
    fn add_assign(&mut self, other: Self) {
        self.sum += other.sum;
        self.hits += other.hits;
    }
}

impl Sum for TokenLosses {
    fn sum<I: Iterator<Item = Self>>(losses: I) -> Self {
        losses.fold(TokenLosses::default(), |mut all, losses| {
            all += losses;
            all
        })
    }
}

/// Noise that is uniform in `[−amplitude, amplitude)`: a function of its fields and the index.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UniformNoise {
    /// The most that it adds.
    pub amplitude: f32,
    /// What the noise is for, in this micro-batch.
    pub stream: Stream,
    /// Index of the first element.
    pub first: u64,
}

/// The RMS norms of q and k of a block: `[head_dim]` for every head of it, or as wide as all of it.
#[derive(Debug, Clone)]
pub struct HeadNorms<V> {
    /// The norm of q.
    pub q: NormParameters<V>,
    /// The norm of k.
    pub k: NormParameters<V>,
}

impl<V> HeadNorms<V> {
    /// The norms with their vectors elsewhere.
    ///
    /// # Errors
    /// Those of `upload`.
    pub fn try_map<U>(self, upload: impl Fn(V) -> Result<U>) -> Result<HeadNorms<U>> {
        Ok(HeadNorms { q: self.q.try_map(&upload)?, k: self.k.try_map(&upload)? })
    }
}

/// The norms of what a block's halves add to the residual stream, each `[D]`.
#[derive(Debug, Clone)]
pub struct PostNorms<V> {
    /// The norm of attention's output projection.
    pub attention: NormParameters<V>,
    /// The norm of the MLP's down projection.
    pub mlp: NormParameters<V>,
}

impl<V> PostNorms<V> {
    /// The norms with their vectors elsewhere.
    ///
    /// # Errors
    /// Those of `upload`.
    pub fn try_map<U>(self, upload: impl Fn(V) -> Result<U>) -> Result<PostNorms<U>> {
        let PostNorms { attention, mlp } = self;
        Ok(PostNorms { attention: attention.try_map(&upload)?, mlp: mlp.try_map(&upload)? })
    }
}

/// Logits of a vocabulary.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitShape {
    /// V.
    pub vocab_size: usize,
    /// c: logits become `c·tanh(logit / c)`.
    pub soft_cap: Option<f32>,
}

impl LogitShape {
    /// The logits of a model's head.
    pub fn of(spec: &ModelSpec) -> Self {
        LogitShape { vocab_size: spec.vocab_size, soft_cap: spec.logit_soft_cap }
    }
}

/// A norm's parameters.
#[derive(Debug, Clone)]
pub struct NormParameters<V> {
    /// RMS or layer norm.
    pub kind: Norm,
    /// Added to the variance.
    pub epsilon: f32,
    /// Weight `[D]`.
    pub weight: V,
    /// Bias `[D]` of a layer norm.
    pub bias: Option<V>,
}

impl<V> NormParameters<V> {
    /// The norm with its vectors elsewhere.
    ///
    /// # Errors
    /// Those of `upload`.
    pub fn try_map<U>(self, upload: impl Fn(V) -> Result<U>) -> Result<NormParameters<U>> {
        let NormParameters { kind, epsilon, weight, bias } = self;
        let bias = bias.map(&upload).transpose()?;
        Ok(NormParameters { kind, epsilon, weight: upload(weight)?, bias })
    }
}
