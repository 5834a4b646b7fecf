//! Bad input, one test for each kind: the real binary says what, where, expected, got and a way
//! out, exits with the right code, and leaves every file as it was. The readers are fuzzed in `fuzz.rs`.
//! Apart from `program`, since the fuzzer limits the memory of its own process.

mod adapter;
mod config;
mod data;
mod fuzz;
mod gguf;
#[path = "../gguf_file/mod.rs"]
mod gguf_file;
mod index;
mod output;
mod safetensors;
mod scene;
#[path = "../training/mod.rs"]
mod training;
mod values;
