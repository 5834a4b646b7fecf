//! Models as data and as explicit forward and backward passes.
//!
//! Legend for every shape comment: B batch, T tokens, D model width, H query heads, K key/value
//! heads, F feed-forward width, V vocabulary, R LoRA rank. Matrices are row-major.

pub mod inventory;
pub mod spec;
