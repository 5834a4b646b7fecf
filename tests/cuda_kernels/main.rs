//! Every CUDA kernel on the CPU, from its source and from the committed PTX, against f64 references and
//! the CPU backend: odd sizes, three orders of threads, poisoned outputs.
//! Apart, since it is carried to a GPU and runs under AddressSanitizer.

#[allow(dead_code)] // a part of it is for other test binaries
#[path = "../emulator/mod.rs"]
mod emulator;
mod support;

mod adamw;
mod attention;
mod cross_entropy;
mod dequantize;
mod elementwise;
mod flash;
mod mlp_adapters;
mod mutants;
mod norm;
mod parts;
mod row;
mod sums;
mod traffic;
