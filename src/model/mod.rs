//! Models as data and as explicit forward and backward passes.
//!
//! Legend for every shape comment: B batch, T tokens, D model width, H query heads, K key/value
//! heads, F feed-forward width, V vocabulary, R LoRA rank. Matrices are row-major.

pub mod block;
mod causal_lm;
pub mod families;
pub mod inventory;
mod moment;
pub mod names;
pub mod parameters;
mod projections;
pub mod rotary;
pub mod shortage;
pub mod spec;
pub mod streaming;
mod upload;
pub mod weights;

pub use block::Variant;
pub use causal_lm::{Model, randomness::Draws, randomness::Randomness, score::Score};
