//! The operations of a training step, one forward/backward pair each, over planned buffers.
//!
//! [`block`](crate::model::block) is generic over [`Kernels`]: a trait for each topic, and the memory of
//! [`Storage`]. A backend implements each of them where its code is. Matrices are row-major, rows are
//! tokens; `rows` says how many rows of a (possibly longer) buffer count.
//! Every backward *adds* to the gradients that it is given unless it says that it overwrites.

mod attention;
pub mod cpu;
pub mod cuda;
mod head;
mod linears;
mod lora;
mod memory;
mod mlp;
mod rows;
mod shapes;

pub use crate::adapter::LoraShape;
use crate::error::Result;
use crate::model::spec::ModelSpec;
pub use attention::{AttentionInputs, AttentionKernels};
pub use head::{HeadChunk, HeadKernels};
pub use linears::{LinearInputs, LinearKernels, LinearTerms};
pub use lora::{LoraInputs, LoraKernels};
pub use memory::{PlannedMemory, Residency, Storage, StreamedWeights, Untaken};
pub use mlp::MlpKernels;
pub use rows::RowKernels;
pub use shapes::{
    AttentionShape, Cache, CachedScratch, Columns, Direction, DropoutMask, HeadNorms, LogitShape,
    LoraTerm, NormParameters, PostNorms, RotaryTables, TokenLayout, TokenLosses, UniformNoise,
    Write,
};

/// A backend: the memory it plans in and the operations on it.
///
/// Operations may be asynchronous and then report nothing; what returns a `Result` waits for all
/// that was asked before and reports what went wrong since.
pub trait Kernels:
    Storage + RowKernels + LinearKernels + LoraKernels + AttentionKernels + MlpKernels + HeadKernels
{
    /// Whether sums have another order, and so other bits, in products of another shape. Then the
    /// base model alone is computed in the shapes of the adapted one, its adapters scaled by 0.
    const BITS_DEPEND_ON_SHAPE: bool = false;
    /// Whether products read A and B in bf16. Working copies in bf16 (`--adapter-dtype bf16`) are read as
    /// they are; without them the f32 master is rounded before each product.
    const TAKES_BF16: bool = false;

    /// Checks that the backend can compute this model as it was told to.
    ///
    /// # Errors
    /// `Usage` for a setting that the model does not allow.
    fn check_model(&self, spec: &ModelSpec) -> Result<()>;
}
