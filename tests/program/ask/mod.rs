//! `nibble eval`, `generate` and `chat` as a user meets them: the real binary on the golden models,
//! whose tokenizer has one word for each id.

mod chat;
mod eval;
mod eval_adapters;
mod generate;
mod predictions;
mod scene;
mod template;
