//! Other implementations of the same models: a twin in candle's autograd for every gradient,
//! candle-transformers' Llama and transformers' rotary embeddings for logits.

mod gradients;
mod logits;
mod random_model;
mod rope;
mod twin;
