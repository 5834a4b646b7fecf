//! LoRA: which linears get an adapter, its initial weights, and PEFT's files.
//!
//! A LoRA adapter of rank R on a linear `W [out, in]` computes
//!
//! ```text
//! y = x Wᵀ + s · dropout(x) Aᵀ Bᵀ        A [R, in], B [out, R]
//! ```
//!
//! with `s = alpha / R`, or `alpha / √R` for rank-stabilised LoRA. Only A and B are trained.
//! Sources: LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732. The settings, the rules by which
//! names match and the files are PEFT's (checked against version 0.21.2).

mod config;
#[cfg(test)]
mod fixtures;
mod gguf;
#[cfg(test)]
mod golden_tests;
mod lora;
mod merge;
mod merge_base;
mod merge_cost;
mod merged_model;
mod pattern;
pub mod peft;
mod targets;

pub use config::{InitLoraWeights, LoraConfig, LoraPlus, ModuleNames, TargetModules};
pub use lora::{Adapter, LoraShape, LoraTarget, LoraTensors};
pub use merge::Merge;
pub use merge_base::{MergeBase, MergeOnto};
pub use merge_cost::MergeCost;
pub use merged_model::MergedModel;
pub use peft::{AdapterFiles, PeftAdapter, TENSORS_FILE};
