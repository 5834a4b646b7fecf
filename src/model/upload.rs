//! Frozen weights to where a backend works with them.

use super::block::{Block, Linear};
use super::streaming::StreamedPages;
use super::weights::Weights;
use crate::error::Result;
use crate::kernels::cpu::{Cpu, FrozenMatrix};
use crate::kernels::{Kernels, StreamedWeights};

impl Weights {
    /// Moves everything to where `kernels` works with it.
    ///
    /// # Errors
    /// `Budget` when it does not fit there.
    pub fn upload<K: Kernels>(self, kernels: &K) -> Result<Weights<K>> {
        let matrices = self.blocks.iter().flat_map(Block::matrices);
        let matrices = self.tables().into_iter().chain(matrices).collect();
        self.with_matrices(kernels, kernels.upload_weights(matrices)?)
    }

    /// [`upload`](Weights::upload), but of the blocks' matrices two blocks' at a time; `pages` are those of
    /// the file that they lie in.
    ///
    /// # Errors
    /// `Budget` when it does not fit there.
    pub fn upload_streamed<K: Kernels>(
        self,
        kernels: &K,
        pages: StreamedPages,
    ) -> Result<Weights<K>> {
        let mut matrices = kernels.upload_weights(self.tables())?;
        let blocks = self.blocks.iter().map(|block| block.matrices().collect()).collect();
        let StreamedWeights { blocks, stream } = kernels.stream_weights(blocks, pages)?;
        matrices.extend(blocks.into_iter().flatten());
        let mut weights = self.with_matrices(kernels, matrices)?;
        weights.streaming = Some(stream);
        Ok(weights)
    }

    /// The matrices outside of the blocks but for embedding and head, which are not copied.
    fn tables(&self) -> Vec<FrozenMatrix> {
        self.positions.iter().cloned().collect()
    }

    /// The weights with their matrices elsewhere: the tables, then those of the blocks.
    fn with_matrices<K: Kernels>(
        self,
        kernels: &K,
        matrices: Vec<K::Weight>,
    ) -> Result<Weights<K>> {
        let mut matrices = matrices.into_iter();
        let mut next = || matrices.next().expect("one for each that was given");
        let embedding = kernels.upload_embedding(self.embedding, self.untied_head.is_none())?;
        let positions = self.positions.map(|_| next());
        let untied_head = self.untied_head.map(|head| kernels.upload_head(head)).transpose()?;
        let blocks = self.blocks.into_iter().map(|block| block.moved(kernels, &mut next));
        Ok(Weights {
            embedding,
            positions,
            blocks: blocks.collect::<Result<_>>()?,
            final_norm: self.final_norm.try_map(|vector| kernels.upload_vector(vector))?,
            untied_head,
            streaming: None,
        })
    }
}

impl Block<Cpu> {
    /// The block's matrices, which are not copied.
    fn matrices(&self) -> impl Iterator<Item = FrozenMatrix> {
        self.linears.iter().map(|linear| linear.weight.clone())
    }

    /// The block with its matrices elsewhere.
    fn moved<K: Kernels>(
        self,
        kernels: &K,
        mut matrix: impl FnMut() -> K::Weight,
    ) -> Result<Block<K>> {
        let vector = |vector| kernels.upload_vector(vector);
        let linears = self.linears.into_iter().map(|linear| linear.moved(kernels, matrix()));
        Ok(Block {
            norm1: self.norm1.map(|norm| norm.try_map(vector)).transpose()?,
            norm2: self.norm2.map(|norm| norm.try_map(vector)).transpose()?,
            head_norms: self.head_norms.map(|norms| norms.try_map(vector)).transpose()?,
            post_norms: self.post_norms.map(|norms| norms.try_map(vector)).transpose()?,
            linears: linears.collect::<Result<_>>()?,
            rotary: self.rotary,
            attention: self.attention,
            activation: self.activation,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            mlp: self.mlp,
        })
    }
}

impl Linear<Cpu> {
    fn moved<K: Kernels>(self, kernels: &K, weight: K::Weight) -> Result<Linear<K>> {
        let bias = self.bias.map(|bias| kernels.upload_vector(bias)).transpose()?;
        let Linear { role, module, output, adapter, .. } = self;
        Ok(Linear { role, module, weight, bias, output, adapter })
    }
}
