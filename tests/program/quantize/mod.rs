//! `nibble quantize`, with the real binary: what it reads, what it writes, what it leaves.

mod bitsandbytes;
mod gguf_types;
mod gpt2;
mod heads;
mod large;
mod output;
mod tensors;
mod text_part;
