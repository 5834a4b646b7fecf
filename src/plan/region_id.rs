//! Which buffer a region is: its name, and the row of the report that it counts to.

use std::fmt;

use super::component::Component;
use crate::model::spec::LinearRole;

/// An enum whose variants have names.
macro_rules! named {
    ($(#[$enum_doc:meta])* $enum:ident { $($(#[$doc:meta])* $variant:ident = $name:literal,)* }) => {
        $(#[$enum_doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $enum { $($(#[$doc])* $variant,)* }

        impl $enum {
            fn name(self) -> &'static str {
                match self { $($enum::$variant => $name,)* }
            }
        }
    };
}

/// A buffer of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RegionId {
    /// A buffer of all LoRA matrices together.
    Adapter(AdapterRegion),
    /// A buffer of what a block reads or makes, by whose it is.
    Block(Owner, BlockRegion),
    /// A buffer that blocks work in, in turn.
    Work(WorkRegion),
    /// A buffer that the head works in.
    Head(HeadRegion),
    /// A table of the rotary embedding, or of the second one of local layers.
    Rotary(RotaryKind, RotaryRegion),
    /// What q is multiplied by, a factor for each token.
    QueryScale,
    /// Keys and values of a block's generated text.
    Cache(usize),
    /// A buffer that a GPU alone has.
    Cuda(CudaRegion),
    /// A matrix in bf16 of the blocks whose weights stay dequantized on a GPU, a piece for each block; q, k
    /// and v are one where a product takes all three.
    DequantizedBlocks(LinearRole),
}

/// Whose a buffer of a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Owner {
    /// A layer; the inputs are one more, the output of the last layer.
    Layer(usize),
    /// The last tile of a layer's MLP, where it is shorter than the others.
    LastTile(usize),
    /// All layers that recompute, in turn.
    Recompute,
    /// Every other layer, the first one included, where nothing is trained.
    Even,
    /// The layers between those of `Even`, where nothing is trained.
    Odd,
    /// A slot of layers that are offloaded, in turn.
    Slot(usize),
    /// A layer that is offloaded; the buffer is outside of the arena.
    Offloaded(usize),
}

named! {
    /// A buffer of all LoRA matrices.
    AdapterRegion {
        /// Copies in bf16.
        Working = "working",
        /// Weights in f32.
        Master = "master",
        /// Gradients in f32.
        Gradients = "gradients",
        /// First moments in f32.
        FirstMoment = "first_moment",
        /// Second moments in f32.
        SecondMoment = "second_moment",
        /// Codes of first moments in 8 bits.
        FirstCodes = "first_codes",
        /// Scales of first moments in 8 bits.
        FirstAbsmax = "first_absmax",
        /// Codes of second moments in 8 bits.
        SecondCodes = "second_codes",
        /// Scales of second moments in 8 bits.
        SecondAbsmax = "second_absmax",
    }
}

named! {
    /// A buffer of what a block reads and makes.
    BlockRegion {
        /// The residual stream before the block.
        Input = "input",
        /// q, k and v.
        Qkv = "qkv",
        /// The log-sum-exp of attention.
        Lse = "lse",
        /// The output of attention.
        Attention = "attention",
        /// x·Aᵀ of the adapters of attention's linears.
        AttentionLoraX = "attention_lora_x",
        /// The output of attention's projection, where a norm follows.
        AttentionProjected = "attention_projected",
        /// The residual stream between attention and MLP.
        Middle = "middle",
        /// The output of a gated MLP's gate.
        Gate = "gate",
        /// The output of the MLP's up; of a fused one gate and up.
        Up = "up",
        /// x·Aᵀ of the adapters of the MLP's linears.
        MlpLoraX = "mlp_lora_x",
        /// The output of the down projection, where a norm follows.
        MlpProjected = "mlp_projected",
    }
}

named! {
    /// A buffer that blocks work in.
    WorkRegion {
        /// A norm's output.
        Norm = "norm",
        /// A norm's statistics.
        NormStats = "norm_stats",
        /// q, k and v after the norms of q and k.
        NormedQkv = "normed_qkv",
        /// The input of the down projection.
        Mlp = "mlp",
        /// A and B of a linear.
        LoraPair = "lora_pair",
        /// A linear's input after dropout.
        Dropped = "dropped",
        /// The rows of a tile between attention and MLP.
        TileMiddle = "tile_middle",
        /// The gradient of what a tile of the MLP made.
        TileGradient = "tile_gradient",
        /// The gradient of the input of the down projection.
        MlpGradient = "mlp_gradient",
        /// The gradient of the residual stream.
        Gradient = "gradient",
        /// The gradient of a norm's output.
        NormGradient = "norm_gradient",
        /// The gradient of a projection's output, where a norm follows.
        ProjectedGradient = "projected_gradient",
        /// The gradient of q, k and v.
        QkvGradient = "qkv_gradient",
        /// The gradient of x·Aᵀ.
        LoraGradient = "lora_gradient",
        /// Scores and other tiles that attention works in.
        Attention = "attention",
    }
}

named! {
    /// A buffer that the head works in.
    HeadRegion {
        /// Logits of a chunk of rows, and their gradient.
        Logits = "logits",
        /// A chunk of rows of the residual stream.
        Input = "input",
        /// The rows after the norm, and their gradient.
        Norm = "norm",
        /// Statistics of the last norm.
        NormStats = "norm_stats",
        /// The gradient of the rows.
        Gradient = "gradient",
        /// The gradient of the norm's output while it is summed.
        Sum = "sum",
    }
}

named! {
    /// Which of a model's rotary embeddings.
    RotaryKind {
        /// The embedding of all layers, or of those without a window.
        Global = "rotary",
        /// The embedding of layers with a window.
        Local = "rotary.local",
    }
}

named! {
    /// A table of a rotary embedding.
    RotaryRegion {
        /// Cosines.
        Cos = "cos",
        /// Sines.
        Sin = "sin",
    }
}

named! {
    /// A buffer that a GPU alone has.
    CudaRegion {
        /// cuBLAS' workspace.
        Workspace = "workspace",
        /// A dequantized matrix, in bf16.
        Dequantized = "dequantized",
        /// The dequantized matrix that comes next.
        DequantizedAhead = "dequantized.ahead",
        /// The matrices A of linears that read the same rows.
        StackedA = "stacked_a",
        /// The gradient of stacked A.
        StackedGradient = "stacked_gradient",
        /// Room for the sums of an MLP with adapters that is not among the buffers of the head.
        MlpSums = "mlp_sums",
        /// Losses and what they are added up from.
        Loss = "loss",
        /// Token ids and rows.
        Uploads = "uploads",
    }
}

impl RegionId {
    /// The row of the report that the buffer counts to.
    pub fn component(self) -> Component {
        match self {
            RegionId::Adapter(region) => region.component(),
            RegionId::Block(Owner::Recompute, _) => Component::RecomputeWorkspace,
            RegionId::Block(_, BlockRegion::Input) => Component::BlockInputs,
            RegionId::Block(..) => Component::KeptActivations,
            RegionId::Work(WorkRegion::Attention) => Component::AttentionWorkspace,
            RegionId::Work(_) => Component::BlockWorkspace,
            RegionId::Head(_) => Component::LogitsChunk,
            RegionId::Rotary(..) | RegionId::QueryScale => Component::RotaryTables,
            RegionId::Cache(_) => Component::KvCache,
            RegionId::Cuda(region) => region.component(),
            RegionId::DequantizedBlocks(_) => Component::DequantizedWeight,
        }
    }
}

impl AdapterRegion {
    fn component(self) -> Component {
        use AdapterRegion::*;
        match self {
            Working => Component::AdapterWorking,
            Master => Component::AdapterMaster,
            Gradients => Component::AdapterGradients,
            FirstMoment | SecondMoment => Component::OptimizerMoments,
            FirstCodes | FirstAbsmax | SecondCodes | SecondAbsmax => Component::PackedMoments,
        }
    }
}

impl CudaRegion {
    fn component(self) -> Component {
        use CudaRegion::*;
        match self {
            Workspace => Component::LibraryWorkspace,
            Dequantized | DequantizedAhead => Component::DequantizedWeight,
            StackedA | StackedGradient => Component::BlockWorkspace,
            MlpSums | Loss => Component::LogitsChunk,
            Uploads => Component::Uploads,
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Owner::Layer(layer) => write!(f, "layer.{layer}"),
            Owner::LastTile(layer) => write!(f, "layer.{layer}.last_tile"),
            Owner::Recompute => f.write_str("recompute"),
            Owner::Even => f.write_str("layer.even"),
            Owner::Odd => f.write_str("layer.odd"),
            Owner::Slot(slot) => write!(f, "offload.slot.{slot}"),
            Owner::Offloaded(layer) => write!(f, "offloaded.{layer}"),
        }
    }
}

/// A region's name, such as `layer.3.qkv`.
impl fmt::Display for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            RegionId::Adapter(region) => write!(f, "adapter.{}", region.name()),
            RegionId::Block(owner, region) => write!(f, "{owner}.{}", region.name()),
            RegionId::Work(region) => write!(f, "work.{}", region.name()),
            RegionId::Head(region) => write!(f, "head.{}", region.name()),
            RegionId::Rotary(which, region) => write!(f, "{}.{}", which.name(), region.name()),
            RegionId::QueryScale => f.write_str("rotary.query_scale"),
            RegionId::Cache(layer) => write!(f, "cache.{layer}"),
            RegionId::Cuda(region) => write!(f, "cuda.{}", region.name()),
            RegionId::DequantizedBlocks(role) => {
                write!(f, "cuda.dequantized.blocks.{}", role.name())
            }
        }
    }
}
