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
    /// Of all LoRA matrices together.
    Adapter(AdapterRegion),
    /// What a block reads or makes, by whose it is.
    Block(Owner, BlockRegion),
    /// What a block works in.
    Work(WorkRegion),
    /// What the head works in.
    Head(HeadRegion),
    /// A table of the rotary embedding, or of the second one of local layers.
    Rotary(RotaryKind, RotaryRegion),
    /// What q is multiplied by.
    QueryScale,
    /// Keys and values of a block's generated text.
    Cache(usize),
    /// On a GPU alone.
    Cuda(CudaRegion),
    /// There, too: matrices in bf16 of some blocks, a piece for each block; q, k and v are one where a product
    /// takes all three.
    DequantizedBlocks(LinearRole),
}

/// Whose a buffer of a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Owner {
    /// A layer's; the inputs are one more, the output of the last one.
    Layer(usize),
    /// Of the last tile of a layer's MLP, where it is shorter than the others.
    LastTile(usize),
    /// Of all that recompute, in turn.
    Recompute,
    /// Of every other layer, the first one included, where nothing is trained.
    Even,
    /// Of the others.
    Odd,
    /// Of layers that are offloaded, in turn.
    Slot(usize),
    /// Of a layer, outside of the arena.
    Offloaded(usize),
}

named! {
    /// Of all LoRA matrices.
    AdapterRegion {
        /// bf16 copies.
        Working = "working",
        /// Weights in f32.
        Master = "master",
        /// Their gradients.
        Gradients = "gradients",
        /// First moments in f32.
        FirstMoment = "first_moment",
        /// Second moments in f32.
        SecondMoment = "second_moment",
        /// Codes of first moments in 8 bits.
        FirstCodes = "first_codes",
        /// Their scales.
        FirstAbsmax = "first_absmax",
        /// Codes of second moments in 8 bits.
        SecondCodes = "second_codes",
        /// Their scales.
        SecondAbsmax = "second_absmax",
    }
}

named! {
    /// What a block reads and makes.
    BlockRegion {
        /// The residual stream before it.
        Input = "input",
        /// q, k and v.
        Qkv = "qkv",
        /// The log-sum-exp of attention.
        Lse = "lse",
        /// The output of attention.
        Attention = "attention",
        /// x·Aᵀ of the adapters of attention's linears.
        AttentionLoraX = "attention_lora_x",
        /// The output projection, where a norm follows.
        AttentionProjected = "attention_projected",
        /// The residual stream between attention and MLP.
        Middle = "middle",
        /// Of a gated MLP.
        Gate = "gate",
        /// Of the MLP; of a fused one gate and up.
        Up = "up",
        /// x·Aᵀ of the adapters of the MLP's linears.
        MlpLoraX = "mlp_lora_x",
        /// The down projection, where a norm follows.
        MlpProjected = "mlp_projected",
    }
}

named! {
    /// What a block works in.
    WorkRegion {
        /// A norm's output.
        Norm = "norm",
        /// Its statistics.
        NormStats = "norm_stats",
        /// q, k and v, where q and k have norms.
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
        /// That of the residual stream.
        Gradient = "gradient",
        /// That of a norm's output.
        NormGradient = "norm_gradient",
        /// That of a projection, where a norm follows.
        ProjectedGradient = "projected_gradient",
        /// That of q, k and v.
        QkvGradient = "qkv_gradient",
        /// That of x·Aᵀ.
        LoraGradient = "lora_gradient",
        /// What attention works in.
        Attention = "attention",
    }
}

named! {
    /// What the head works in.
    HeadRegion {
        /// Logits of a chunk of rows, and their gradient.
        Logits = "logits",
        /// These rows of the residual stream.
        Input = "input",
        /// The same after the norm, and the gradient.
        Norm = "norm",
        /// Statistics of the norm.
        NormStats = "norm_stats",
        /// The gradient of the rows.
        Gradient = "gradient",
        /// That of the norm's output while it is summed.
        Sum = "sum",
    }
}

named! {
    /// Which of a model's rotary embeddings.
    RotaryKind {
        /// That of all layers, or of those without a window.
        Global = "rotary",
        /// That of layers with a window.
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
    /// What a GPU has besides.
    CudaRegion {
        /// cuBLAS' workspace.
        Workspace = "workspace",
        /// A matrix in bf16.
        Dequantized = "dequantized",
        /// The next one.
        DequantizedAhead = "dequantized.ahead",
        /// A of linears that read the same rows.
        StackedA = "stacked_a",
        /// Its gradient.
        StackedGradient = "stacked_gradient",
        /// What the sums of an MLP with adapters take that is not among the buffers of the head.
        MlpSums = "mlp_sums",
        /// Losses and what they are added up from.
        Loss = "loss",
        /// Token ids and rows.
        Uploads = "uploads",
    }
}

impl RegionId {
    /// The row of the report that it counts to.
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

/// The name, such as `layer.3.qkv`.
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
