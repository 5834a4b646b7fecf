//! The memory plan: every buffer of a run, named and sized before the first weight is read.
//!
//! [`layout()`] is arithmetic over a [`ModelSpec`] and [`Settings`]; `nibble memory` prints it and
//! the model allocates it verbatim, so the prediction *is* the allocation.
//!
//! [`ModelSpec`]: crate::model::spec::ModelSpec

mod activations;
pub mod budget;
mod component;
mod cost;
mod embedding;
pub mod fit;
pub mod layout;
mod leaner;
pub mod moments;
pub mod outside;
mod processor;
mod ranks;
pub mod rates;
pub mod region;
mod region_id;
pub mod settings;
mod strategy;
pub mod weights;
pub mod work;

pub use activations::Activations;
pub use budget::{Choice, Demand, Layout, Limit, Machine, Wishes};
pub use component::Component;
pub use embedding::{EmbeddingPlace, OnHost};
pub use layout::{layout, waiting};
pub use leaner::{leaner, shrinkage_in_words};
pub use moments::{MomentLayout, MomentPlace, Optim};
pub use outside::{Outside, WeightParts};
pub use processor::Processor;
pub use ranks::Ranks;
pub use region::{MemoryPlan, Pitch, REGION_ALIGNMENT_BYTES, Region, RegionType};
pub use region_id::{
    AdapterRegion, BlockRegion, CudaRegion, HeadRegion, Owner, RegionId, RotaryKind, RotaryRegion,
    WorkRegion,
};
pub use settings::{Policy, Settings, SumOrder, host_head_tile, logit_rows};
pub use strategy::Strategy;
pub use weights::{StreamedBytes, WeightBytes, WeightsMode};
