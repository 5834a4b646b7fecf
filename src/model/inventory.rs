//! The tensors that a spec implies: what `quantize` packs, the loader expects, `memory` counts and
//! `merge` writes.

use std::collections::HashSet;
use std::fmt::Display;

use super::spec::{ModelSpec, Norm, QkNorm, TensorRole, TensorSpec};
use crate::error::{Error, Result};

impl ModelSpec {
    /// Module path of the token embedding.
    pub fn embedding_module(&self) -> &'static str {
        self.names.embedding
    }

    /// Module path of the output head (also when it is tied).
    pub fn head_module(&self) -> &'static str {
        self.names.head
    }

    /// Name of the learned position table.
    pub fn positions_name(&self) -> Option<&'static str> {
        self.learned_positions.and(self.names.positions)
    }

    /// Module path of the norm before the head.
    pub fn final_norm_module(&self) -> &'static str {
        self.names.final_norm
    }

    /// Module paths of block `layer`'s norms: before attention, before the MLP.
    pub fn layer_norm_modules(&self, layer: usize) -> Option<[String; 2]> {
        let (prefix, names) = (self.layer_prefix(layer), self.names);
        let names = [names.first_norm, names.second_norm];
        self.pre_norms.then(|| names.map(|name| format!("{prefix}.{name}")))
    }

    /// Module paths of the norms of what block `layer` adds to the stream: of attention, of the MLP.
    pub fn post_norm_modules(&self, layer: usize) -> Option<[String; 2]> {
        let prefix = self.layer_prefix(layer);
        self.post_norms.then(|| self.names.post_norms.map(|name| format!("{prefix}.{name}")))
    }

    /// Module paths of the norms of q and k in block `layer`.
    pub fn head_norm_modules(&self, layer: usize) -> Option<[String; 2]> {
        let prefix = self.layer_prefix(layer);
        self.qk_norm.map(|_| ["q", "k"].map(|what| format!("{prefix}.self_attn.{what}_norm")))
    }

    /// Widths of these norms.
    pub fn head_norm_widths(&self) -> Option<[usize; 2]> {
        self.qk_norm.map(|norm| match norm {
            QkNorm::Heads => [self.head_dim; 2],
            QkNorm::Whole => [self.q_width(), self.kv_width()],
        })
    }

    /// Every tensor of the model, in checkpoint order: embedding, blocks, final norm, head.
    pub fn inventory(&self) -> Vec<TensorSpec> {
        let d = self.hidden_size;
        let plain = |name: String, shape, role| TensorSpec { name, shape, role, transposed: false };
        let embedding = format!("{}.weight", self.embedding_module());
        let mut out = vec![plain(embedding, vec![self.vocab_size, d], TensorRole::Embedding)];
        if let (Some(name), Some(rows)) = (self.positions_name(), self.learned_positions) {
            out.push(plain(name.to_string(), vec![rows, d], TensorRole::Positions));
        }
        for layer in 0..self.num_layers {
            let [first, second] =
                self.layer_norm_modules(layer).map_or([None, None], |it| it.map(Some));
            self.push_norms(&mut out, first, d);
            for linear in self.linears(layer) {
                out.push(TensorSpec {
                    name: format!("{}.weight", linear.module),
                    shape: vec![linear.out_features, linear.in_features],
                    role: TensorRole::Linear(linear.role),
                    transposed: self.projections.are_transposed(),
                });
                if linear.bias {
                    let name = format!("{}.bias", linear.module);
                    out.push(plain(name, vec![linear.out_features], TensorRole::Bias));
                }
            }
            let heads = self.head_norm_modules(layer).into_iter().flatten();
            for (module, width) in heads.zip(self.head_norm_widths().into_iter().flatten()) {
                self.push_norms(&mut out, [module], width);
            }
            self.push_norms(&mut out, second, d);
            self.push_norms(&mut out, self.post_norm_modules(layer).into_iter().flatten(), d);
        }
        self.push_norms(&mut out, [self.final_norm_module()], d);
        if !self.tie_word_embeddings {
            out.push(self.head_tensor());
        }
        out
    }

    /// The head, which the inventory has where it is not the embedding.
    pub fn head_tensor(&self) -> TensorSpec {
        TensorSpec {
            name: format!("{}.weight", self.head_module()),
            shape: vec![self.vocab_size, self.hidden_size],
            role: TensorRole::Head,
            transposed: false,
        }
    }

    /// Those of `names` that are no tensors of the inventory.
    pub fn not_in_inventory<'n>(&self, names: impl Iterator<Item = &'n str>) -> Vec<&'n str> {
        let known: HashSet<String> = self.inventory().into_iter().map(|it| it.name).collect();
        names.filter(|name| !known.contains(*name)).collect()
    }

    /// Weights of more layers than there are here belong to another model.
    ///
    /// # Errors
    /// `Input` naming such a weight.
    pub fn check_no_further_layer(&self, contains: impl Fn(&str) -> bool) -> Result<()> {
        let layers = self.num_layers;
        let names = self.linears(layers).into_iter().map(|it| format!("{}.weight", it.module));
        let found = names.into_iter().find(|name| contains(name));
        found.map_or(Ok(()), |name| {
            let what = format!("there is a tensor {name}, config.json has {layers} layers");
            Err(Error::mismatched_weights(what))
        })
    }

    fn push_norms(
        &self,
        out: &mut Vec<TensorSpec>,
        modules: impl IntoIterator<Item = impl Display>,
        width: usize,
    ) {
        let suffixes: &[&str] =
            if self.norm == Norm::Layer { &["weight", "bias"] } else { &["weight"] };
        for module in modules {
            out.extend(suffixes.iter().map(|suffix| TensorSpec {
                name: format!("{module}.{suffix}"),
                shape: vec![width],
                role: TensorRole::Norm,
                transposed: false,
            }));
        }
    }
}
