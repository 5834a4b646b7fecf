//! The memory plan: every buffer of a run, named and sized before the first weight is read.
//!
//! [`layout()`] is arithmetic over a [`ModelSpec`] and [`Settings`]; `nibble memory` prints it and
//! the model allocates it verbatim, so the prediction *is* the allocation.
//!
//! [`ModelSpec`]: crate::model::spec::ModelSpec

pub mod budget;
pub mod layout;

pub use budget::{Activations, Demand, Limit, config_weight_bytes, weight_bytes};
pub use layout::{Component, MemoryPlan, Policy, Region, RegionType, Settings, layout, logit_rows};
