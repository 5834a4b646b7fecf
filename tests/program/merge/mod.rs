//! `nibble merge` on PEFT's adapters: the merged folder computes what PEFT computes with the adapter.
//!
//! `tests/data/adapters` was made by `scripts/golden/gen_adapters.py` (torch 2.13, transformers 5.23,
//! PEFT 0.21.2, f32); the bases are the golden models.

mod choices;
mod golden;
mod refusals;
mod tools;
