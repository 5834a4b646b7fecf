//! Merging an adapter into dense weights.
//!
//! ```text
//! LoRA    W' = W + s · B A
//! DoRA    V = W + s · B A,  W' = (m / ‖V‖) · V       norm of each row over `in`
//! bias    b' = b + s · b_B
//! ```
//!
//! An embedding `[V, D]` is treated the same with A `[R, D]` and B `[V, R]`; its DoRA norm runs
//! over the vocabulary. Fully trained tensors and token rows replace. Sources: LoRA, arXiv
//! 2106.09685; DoRA, arXiv 2402.09353; PEFT 0.21.2's `merge_and_unload`.
//!
//! Where the base ties the head to the embedding and the adapter changes only one of them, the
//! merged model unties them: it computes what the adapter computes. (PEFT writes into the shared
//! matrix and so changes both.)

use nibble_quant::product::{Matrix, MatrixMut, Precision, gemm};
use rayon::prelude::*;

use super::peft::{LowRank, PeftAdapter, TokenRows};
use crate::error::{Error, Result};
use crate::model::spec::{ModelSpec, TensorRole};

/// Elements that one task looks through.
const CHUNK: usize = 1 << 14;

/// An adapter laid over the tensors of a model.
#[derive(Debug)]
pub struct Merge<'a> {
    adapter: &'a PeftAdapter,
    embedding: String,
    head: String,
    unties: bool,
}

impl PeftAdapter {
    /// Prepares merging into the weights of `spec`, the model that the adapter was opened for.
    ///
    /// # Errors
    /// `Input` when B has a bias and the base module has none to take it.
    pub fn merge(&self, spec: &ModelSpec) -> Result<Merge<'_>> {
        let inventory = spec.inventory();
        for LowRank { target, bias, .. } in &self.low_rank {
            let name = format!("{}.bias", target.module.path);
            if bias.is_some() && !inventory.iter().any(|tensor| tensor.name == name) {
                return Err(Error::input(format_args!(
                    "lora_bias on `{}`, which has no bias to merge it into",
                    target.module.path
                ))
                .hint("PEFT cannot merge this adapter either: use it unmerged there"));
            }
        }
        Ok(Merge {
            adapter: self,
            embedding: format!("{}.weight", spec.embedding_module()),
            head: format!("{}.weight", spec.head_module()),
            unties: spec.tie_word_embeddings && self.unties(spec),
        })
    }

    /// Whether embedding and head, tied in the base, differ with the adapter.
    fn unties(&self, spec: &ModelSpec) -> bool {
        let (embedding, head) = (spec.embedding_module(), spec.head_module());
        let rows_of = |path: &str| self.token_rows.iter().any(|rows| rows.path == path);
        let weights_of = |path: &str, role| {
            self.low_rank.iter().any(|part| part.target.module.path == path)
                || self.replaced.iter().any(|part| part.tensor.role == role)
        };
        let head_changes = weights_of(head, TensorRole::Head) || rows_of(head);
        // Token rows reach a tied head; other changes do so only when they were trained to.
        let embedding_alone =
            weights_of(embedding, TensorRole::Embedding) && !self.settings.ensure_weight_tying;
        head_changes || embedding_alone
    }
}

impl Merge<'_> {
    /// Whether the merged model has a head of its own although the base ties it: its
    /// configuration must say `tie_word_embeddings: false`, and the head's tensor must be written.
    pub fn unties_head(&self) -> bool {
        self.unties
    }

    /// The base tensor from which the merged tensor `name` is made: itself, but for an untied head
    /// the embedding.
    pub fn source<'n>(&'n self, name: &'n str) -> &'n str {
        if self.unties && name == self.head { &self.embedding } else { name }
    }

    /// Whether the adapter changes the tensor `name`, such as
    /// `model.layers.0.mlp.up_proj.weight`.
    pub fn changes(&self, name: &str) -> bool {
        let Some((path, leaf)) = name.rsplit_once('.') else { return false };
        let adapter = self.adapter;
        let low_rank = adapter.low_rank.iter().filter(|part| part.target.module.path == path);
        let changed = if leaf == "weight" {
            low_rank.count() > 0 || adapter.token_rows.iter().any(|rows| rows.path == path)
        } else {
            low_rank.filter(|part| part.bias.is_some()).count() > 0
        };
        changed || adapter.replaced.iter().any(|part| part.tensor.name == name)
    }

    /// The merged tensor `name`. `base` is the f32 value of [`Merge::source`]`(name)` in the
    /// inventory's layout (linears `[out, in]` for every family); unchanged tensors come back as
    /// they are.
    ///
    /// # Errors
    /// `Input` when `base` has the wrong size; `Numeric` when a result is not finite.
    pub fn merged_weight(&self, name: &str, base: Vec<f32>) -> Result<Vec<f32>> {
        if !self.changes(name) {
            return Ok(base);
        }
        let (path, leaf) = name.rsplit_once('.').unwrap_or((name, "weight"));
        let replaced = self.adapter.replaced.iter().find(|part| part.tensor.name == name);
        let mut weight = replaced.map_or(base, |part| part.values.clone());
        for part in self.adapter.low_rank.iter().filter(|part| part.target.module.path == path) {
            match &part.bias {
                _ if leaf == "weight" => part.add_to_weight(&mut weight)?,
                Some(bias) => part.add_to_bias(bias, &mut weight)?,
                None => {}
            }
        }
        for rows in self.adapter.token_rows.iter().filter(|rows| rows.path == path) {
            rows.replace(&mut weight);
        }
        let not_finite = |chunk: &[f32]| chunk.iter().copied().find(|x| !x.is_finite());
        match weight.par_chunks(CHUNK).find_map_first(not_finite) {
            Some(value) => {
                Err(Error::numeric(format_args!("merged `{name}` has an element {value}"))
                    .hint("the adapter may have diverged in training: try an earlier checkpoint"))
            }
            None => Ok(weight),
        }
    }
}

impl LowRank {
    /// Rows, inner size and columns of `B A` in the layout of the weight.
    fn shape(&self) -> [usize; 3] {
        let module = &self.target.module;
        match self.is_embedding() {
            true => [module.in_features, self.target.r, module.out_features],
            false => [module.out_features, self.target.r, module.in_features],
        }
    }

    fn add_to_weight(&self, weight: &mut [f32]) -> Result<()> {
        let [rows, r, columns] = self.shape();
        self.check_size(weight.len(), rows * columns)?;
        let a = Matrix::new(&self.tensors.a, (r, columns, columns));
        let b = Matrix::new(&self.tensors.b, (rows, r, r));
        let out = MatrixMut::new(weight, (rows, columns, columns));
        gemm(self.target.scale, b, a, 1.0, out, Precision::F32);
        if let Some(magnitude) = &self.magnitude {
            match self.is_embedding() {
                true => scale_columns(weight, magnitude),
                false => scale_rows(weight, columns, magnitude),
            }
        }
        Ok(())
    }

    fn add_to_bias(&self, bias: &[f32], out: &mut [f32]) -> Result<()> {
        self.check_size(out.len(), bias.len())?;
        out.iter_mut().zip(bias).for_each(|(out, b)| *out += self.target.scale * b);
        Ok(())
    }

    fn check_size(&self, got: usize, expected: usize) -> Result<()> {
        if got == expected {
            return Ok(());
        }
        Err(Error::input(format_args!(
            "`{}` has {got} elements, the adapter expects {expected}",
            self.target.module.path
        )))
    }
}

/// Gives each row of `weight` the length `magnitude`.
fn scale_rows(weight: &mut [f32], columns: usize, magnitude: &[f32]) {
    weight.par_chunks_mut(columns).zip(magnitude).for_each(|(row, magnitude)| {
        let square: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum();
        let factor = magnitude / square.sqrt() as f32;
        row.iter_mut().for_each(|x| *x *= factor);
    });
}

/// Gives each column of `weight` the length `magnitude`.
fn scale_columns(weight: &mut [f32], magnitude: &[f32]) {
    let columns = magnitude.len();
    let mut squares = vec![0.0_f64; columns];
    for row in weight.chunks_exact(columns) {
        squares.iter_mut().zip(row).for_each(|(square, &x)| *square += f64::from(x).powi(2));
    }
    let factors: Vec<f32> =
        magnitude.iter().zip(&squares).map(|(m, square)| m / square.sqrt() as f32).collect();
    weight.par_chunks_mut(columns).for_each(|row| {
        row.iter_mut().zip(&factors).for_each(|(x, factor)| *x *= factor);
    });
}

impl TokenRows {
    fn replace(&self, weight: &mut [f32]) {
        let width = self.values.len() / self.rows.len().max(1);
        for (row, values) in self.rows.iter().zip(self.values.chunks_exact(width.max(1))) {
            weight[row * width..][..width].copy_from_slice(values);
        }
    }
}
