//! From a checkpoint's tensors to the frozen weights of a model.
//!
//! Every tensor of the inventory must be there with the shape that the config implies; a dense
//! linear is quantized on the way when the run asks for it, a packed one is used as stored.

use nibble_quant::{BlockFormat, FloatType, PackedWeight, owned_bytes};

use super::block::{Block, Linear, LinearAdapter};
use super::spec::{BlockHalf, LinearRole, LinearSpec, ModelSpec, Norm};
use super::streaming::WeightStream;
use crate::adapter::{LoraTarget, Merge};
use crate::checkpoint::repack::quantize;
use crate::checkpoint::tensor_errors::{check_scales, check_shape};
use crate::checkpoint::{Checkpoint, CheckpointKind, DenseTensor, StoredType, Weight};
use crate::error::{Error, Result};
use crate::kernels::cpu::{Cpu, FrozenMatrix};
use crate::kernels::{AttentionShape, Columns, HeadNorms, Kernels, NormParameters, PostNorms};
use crate::plan::{Ranks, WeightParts};

/// The frozen parts of a model, where a backend works with them.
pub struct Weights<K: Kernels = Cpu> {
    /// `[V, D]`.
    pub embedding: K::Weight,
    /// GPT-2's position table.
    pub positions: Option<K::Weight>,
    /// The blocks.
    pub blocks: Vec<Block<K>>,
    /// Norm before the head.
    pub final_norm: NormParameters<K::Vector>,
    /// The head where it is not the embedding: `[V, D]`.
    pub untied_head: Option<K::Weight>,
    /// How the blocks come and go, where they are not all kept in memory.
    pub streaming: Option<Box<dyn WeightStream>>,
}

/// Where tensors come from.
pub trait TensorSource {
    /// Whether there is a tensor `name`.
    fn contains(&self, name: &str) -> bool;

    /// The tensor `name`.
    ///
    /// # Errors
    /// `Input` when there is none, or it is damaged.
    fn weight(&self, name: &str) -> Result<Weight>;

    /// How dense linears are packed, if `format` is asked for: see [`CheckpointKind::packing`].
    fn packing<'f>(&self, format: Option<&'f BlockFormat>) -> Option<&'f BlockFormat> {
        format
    }

    /// Tells that the values of a tensor have been read or copied, and are not wanted now.
    fn release(&self, _name: &str) {}

    /// Tells that all that is wanted of a tensor was read, and `packed` if it was not packed already.
    fn is_read(&self, _packed: bool) {}
}

impl TensorSource for Checkpoint {
    fn contains(&self, name: &str) -> bool {
        Checkpoint::contains(self, name)
    }

    fn weight(&self, name: &str) -> Result<Weight> {
        Checkpoint::weight(self, name)
    }

    fn packing<'f>(&self, format: Option<&'f BlockFormat>) -> Option<&'f BlockFormat> {
        self.kind().packing(format)
    }

    fn release(&self, name: &str) {
        Checkpoint::release(self, name);
    }

    fn is_read(&self, packed: bool) {
        let copied = match self.kind() {
            CheckpointKind::Gguf => true,
            CheckpointKind::Dense => packed,
            CheckpointKind::Bnb4bit => false,
        };
        if copied {
            self.release_all();
        }
    }
}

impl Weights {
    /// Reads and, with `quantization`, quantizes the weights of `spec`, unless they are packed already: in
    /// such a folder dense linears stay dense. With `merge`, the tensors that an adapter changes are dense:
    /// its change on top of what training saw.
    ///
    /// # Errors
    /// `Input` naming the tensor when one is missing, has another shape, or is not finite.
    pub fn load(
        source: &dyn TensorSource,
        spec: &ModelSpec,
        quantization: Option<&BlockFormat>,
        merge: Option<&Merge>,
    ) -> Result<Self> {
        let quantization = source.packing(quantization);
        let reader = Reader { source, spec, quantization, merge };
        spec.check_no_further_layer(|name| source.contains(name))?;
        let (v, d) = (spec.vocab_size, spec.hidden_size);
        let weight = |module: &str| format!("{module}.weight");
        let positions = match (spec.positions_name(), spec.learned_positions) {
            (Some(name), Some(rows)) => Some(reader.matrix(name, [rows, d])?),
            _ => None,
        };
        let unties = merge.is_some_and(Merge::unties_head);
        let head = if spec.tie_word_embeddings && !unties {
            None
        } else {
            Some(reader.matrix(&weight(spec.head_module()), [v, d])?)
        };
        let blocks = (0..spec.num_layers).map(|layer| reader.block(layer));
        let weights = Weights {
            embedding: reader.matrix(&weight(spec.embedding_module()), [v, d])?,
            positions,
            blocks: blocks.collect::<Result<_>>()?,
            final_norm: reader.final_norm()?,
            untied_head: head,
            streaming: None,
        };
        source.is_read(quantization.is_some());
        Ok(weights)
    }
}

/// Whether `checkpoint` has the tensors of `spec`, of types and shapes that are read: what
/// [`Weights::load`] would find later, and as it says it. The headers of the files tell; values are not read.
///
/// # Errors
/// `Input` naming the tensor that is missing, of another shape or of a type that is not read.
pub fn check_stored(checkpoint: &Checkpoint, spec: &ModelSpec) -> Result<()> {
    spec.check_no_further_layer(|name| checkpoint.contains(name))?;
    for tensor in spec.inventory() {
        let name = &tensor.name;
        let Some(info) = checkpoint.info(name) else {
            checkpoint.weight(name)?;
            continue;
        };
        let packed = info.stored == StoredType::Packed;
        check_shape(name, &info.shape, &tensor.shape_in_file(packed))?;
    }
    Ok(())
}

/// Stored tensors that speak for another model than that of `spec`, such as biases that its config denies. Two
/// kinds that the inventory lacks do not: tables that are made anew, and a head that is the embedding.
pub fn unexpected_tensors<'c>(checkpoint: &'c Checkpoint, spec: &ModelSpec) -> Vec<&'c str> {
    const TABLES: [&str; 3] = [".inv_freq", ".attn.bias", ".attn.masked_bias"];
    let head = spec.head_tensor().name;
    let mut names = spec.not_in_inventory(checkpoint.names());
    names.retain(|name| *name != head && !TABLES.iter().any(|table| name.ends_with(table)));
    names
}

impl<K: Kernels> Weights<K> {
    /// The matrix that makes logits.
    pub fn head(&self) -> &K::Weight {
        self.untied_head.as_ref().unwrap_or(&self.embedding)
    }

    /// What of the matrices is in memory. Where pages of tables come and go with those of the blocks,
    /// neither is counted.
    pub fn bytes_in_memory(&self, kernels: &K) -> WeightParts {
        let of_table = |table: &K::Weight| kernels.bytes_in_memory(table).total();
        let positions = self.positions.iter();
        let tables =
            positions.chain([&self.embedding]).chain(&self.untied_head).map(of_table).sum();
        let mut parts = WeightParts { tables, ..WeightParts::default() };
        let Some(stream) = &self.streaming else {
            let linears = self.blocks.iter().flat_map(|block| &block.linears);
            linears.for_each(|linear| parts += kernels.bytes_in_memory(&linear.weight));
            return parts;
        };
        match stream.bytes_in_memory() {
            Some(streamed) => WeightParts { streamed, ..parts },
            None => WeightParts { tables: self.positions.iter().map(of_table).sum(), ..parts },
        }
    }

    /// Says which linears are adapted by `targets`, in place of any earlier adapters.
    pub fn attach(&mut self, targets: &[LoraTarget]) {
        let ranks = Ranks::new(targets, self.blocks.len());
        for (layer, block) in self.blocks.iter_mut().enumerate() {
            let adapters = adapters_of(layer, targets, &ranks);
            for linear in &mut block.linears {
                let found = adapters.iter().find(|(module, _)| *module == linear.module);
                linear.adapter = found.map(|(_, adapter)| *adapter);
            }
        }
    }
}

struct Reader<'a> {
    source: &'a dyn TensorSource,
    spec: &'a ModelSpec,
    quantization: Option<&'a BlockFormat>,
    merge: Option<&'a Merge<'a>>,
}

impl Reader<'_> {
    /// The name under which the base of `name` is stored: an untied head starts as the embedding.
    fn base_name<'n>(&'n self, name: &'n str) -> &'n str {
        self.merge.map_or(name, |merge| merge.source(name))
    }

    /// The matrix `name` with the adapter merged in, if it changes it: then dense f32.
    fn merged(&self, name: &str, base: FrozenMatrix) -> Result<FrozenMatrix> {
        let Some(merge) = self.merge.filter(|merge| merge.changes(name)) else { return Ok(base) };
        let values = merge.merged_weight(name, base.to_f32())?;
        Ok(FrozenMatrix::from_f32(owned_bytes(values), base.shape()))
    }

    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<FrozenMatrix> {
        let base = match self.source.weight(self.base_name(name))? {
            Weight::Dense(dense) => {
                check_shape(name, &dense.shape, &shape)?;
                dense_matrix(name, dense, shape)?
            }
            Weight::Packed(packed) => self.packed(name, packed, shape)?,
        };
        self.merged(name, base)
    }

    /// Blocks are used where they lie in the file; their scales are looked at here.
    fn packed(&self, name: &str, packed: PackedWeight, shape: [usize; 2]) -> Result<FrozenMatrix> {
        check_shape(name, &packed.shape(), &shape)?;
        check_scales(name, &packed)?;
        self.source.release(name);
        Ok(FrozenMatrix::Packed(packed))
    }

    fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>> {
        let base = match self.source.weight(name)? {
            Weight::Dense(dense) => {
                check_shape(name, &dense.shape, &[length])?;
                dense.check_finite(name)?;
                dense.to_f32()
            }
            Weight::Packed(_) => {
                let what = format_args!("tensor {name} is packed, expected a dense vector");
                return Err(Error::input(what));
            }
        };
        match self.merge {
            Some(merge) => merge.merged_weight(name, base),
            None => Ok(base),
        }
    }

    fn norm(&self, module: &str, width: usize) -> Result<NormParameters<Vec<f32>>> {
        let bias = (self.spec.norm == Norm::Layer)
            .then(|| self.vector(&format!("{module}.bias"), width))
            .transpose()?;
        let mut weight = self.vector(&format!("{module}.weight"), width)?;
        if self.spec.norm_plus_one {
            weight.iter_mut().for_each(|value| *value += 1.0);
        }
        let (kind, epsilon) = (self.spec.norm, self.spec.norm_eps as f32);
        Ok(NormParameters { kind, epsilon, weight, bias })
    }

    /// A norm of the stream.
    fn stream_norm(&self, module: &str) -> Result<NormParameters<Vec<f32>>> {
        let norm = self.norm(module, self.spec.hidden_size)?;
        Ok(NormParameters { epsilon: self.spec.stream_norm_eps() as f32, ..norm })
    }

    /// The norm before the head, which divides the logits.
    fn final_norm(&self) -> Result<NormParameters<Vec<f32>>> {
        let mut norm = self.stream_norm(self.spec.final_norm_module())?;
        let divisor = self.spec.logit_divisor;
        let values = norm.weight.iter_mut().chain(norm.bias.iter_mut().flatten());
        values.for_each(|value| *value /= divisor);
        Ok(norm)
    }

    fn block(&self, layer: usize) -> Result<Block<Cpu>> {
        let spec = self.spec;
        let norms = spec.layer_norm_modules(layer);
        let [first, second] = norms.map_or([None, None], |modules| modules.map(Some));
        let stream_norm =
            |module: Option<String>| module.map(|it| self.stream_norm(&it)).transpose();
        let linears = spec.linears(layer).into_iter().map(|linear| self.linear(linear));
        Ok(Block {
            norm1: stream_norm(first)?,
            norm2: stream_norm(second)?,
            head_norms: self.head_norms(layer)?,
            post_norms: self.post_norms(layer)?,
            linears: linears.collect::<Result<_>>()?,
            attention: AttentionShape {
                num_heads: spec.num_heads,
                num_kv_heads: spec.num_kv_heads,
                head_dim: spec.head_dim,
                rotary_dim: spec.rotary_dim,
                rotary_pairs: spec.rotary_pairs,
                window: spec.windows[layer],
                scale: spec.attention_scale,
                soft_cap: spec.attention_soft_cap,
            },
            rotary: spec.rotary_of(layer),
            activation: spec.activation,
            hidden_size: spec.hidden_size,
            intermediate_size: spec.intermediate_size,
            mlp: spec.projections.mlp(),
        })
    }

    fn head_norms(&self, layer: usize) -> Result<Option<HeadNorms<Vec<f32>>>> {
        let (modules, widths) = (self.spec.head_norm_modules(layer), self.spec.head_norm_widths());
        let Some(([q, k], widths)) = modules.zip(widths) else { return Ok(None) };
        Ok(Some(HeadNorms { q: self.norm(&q, widths[0])?, k: self.norm(&k, widths[1])? }))
    }

    fn post_norms(&self, layer: usize) -> Result<Option<PostNorms<Vec<f32>>>> {
        let Some([attention, mlp]) = self.spec.post_norm_modules(layer) else { return Ok(None) };
        let d = self.spec.hidden_size;
        Ok(Some(PostNorms { attention: self.norm(&attention, d)?, mlp: self.norm(&mlp, d)? }))
    }

    fn linear(&self, linear: LinearSpec) -> Result<Linear<Cpu>> {
        let name = format!("{}.weight", linear.module);
        let bias = linear
            .bias
            .then(|| self.vector(&format!("{}.bias", linear.module), linear.out_features))
            .transpose()?;
        Ok(Linear {
            role: linear.role,
            weight: self.linear_weight(&name, [linear.out_features, linear.in_features])?,
            bias,
            output: output_columns(self.spec, &linear),
            module: linear.module,
            adapter: None,
        })
    }

    fn linear_weight(&self, name: &str, shape: [usize; 2]) -> Result<FrozenMatrix> {
        let dense = match self.source.weight(name)? {
            Weight::Packed(packed) => {
                return self.merged(name, self.packed(name, packed, shape)?);
            }
            Weight::Dense(dense) => dense,
        };
        let transposed = self.spec.projections.are_transposed();
        check_shape(name, &dense.shape, &if transposed { [shape[1], shape[0]] } else { shape })?;
        let dense = if transposed { dense.transposed() } else { dense };
        let base = match self.quantization {
            Some(format) => {
                let packed = quantize(name, &dense, format)?;
                self.source.release(name);
                FrozenMatrix::Packed(packed)
            }
            None => dense_matrix(name, dense, shape)?,
        };
        self.merged(name, base)
    }
}

/// The adapters of `layer`: module, and where its `x·Aᵀ` lies in the buffer of its half.
fn adapters_of<'a>(
    layer: usize,
    targets: &'a [LoraTarget],
    ranks: &Ranks,
) -> Vec<(&'a str, LinearAdapter)> {
    let mut offsets = [0, 0];
    let of_layer = targets.iter().enumerate().filter(|(_, target)| target.layer == layer);
    of_layer
        .map(|(index, target)| {
            let shape = target.shape;
            let half = BlockHalf::of(target.role);
            let stride = ranks.of(layer, half.roles());
            let offset = &mut offsets[half as usize];
            let columns = Columns::band(*offset, shape.rank, stride);
            *offset += shape.rank;
            (target.module.as_str(), LinearAdapter { index, shape, columns })
        })
        .collect()
}

/// q, k and v share one buffer; all others fill theirs.
fn output_columns(spec: &ModelSpec, linear: &LinearSpec) -> Columns {
    let (q, kv) = (spec.q_width(), spec.kv_width());
    let stride = q + 2 * kv;
    match linear.role {
        LinearRole::Q => Columns::band(0, q, stride),
        LinearRole::K => Columns::band(q, kv, stride),
        LinearRole::V => Columns::band(q + kv, kv, stride),
        _ => Columns::all(linear.out_features),
    }
}

fn dense_matrix(name: &str, dense: DenseTensor, shape: [usize; 2]) -> Result<FrozenMatrix> {
    let (bytes, got) = (shape[0] * shape[1] * dense.dtype.size(), dense.data.len());
    if got != bytes {
        return Err(Error::input(format_args!("tensor {name} has {got} bytes, expected {bytes}")));
    }
    dense.check_finite(name)?;
    Ok(match dense.dtype {
        FloatType::F32 => FrozenMatrix::from_f32(dense.data, shape),
        FloatType::Bf16 => FrozenMatrix::from_bf16(dense.data, shape),
        // Products read f32 and bf16; f16 widens without loss.
        FloatType::F16 => FrozenMatrix::from_f32(owned_bytes(dense.to_f32()), shape),
    })
}
