//! Flags of `nibble export`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;

use super::numbers;
use crate::checkpoint::FileType;

const EXAMPLES: &str = "\
Examples:
  nibble merge --model smollm2-nf4 --original SmolLM2-135M-Instruct --adapter run --out merged
  nibble export --model merged --out merged.gguf --outtype q4_k_m
  llama-cli --model merged.gguf
  nibble export --model SmolLM2-135M-Instruct --adapter run --out adapter.gguf
  llama-cli --model SmolLM2-135M-Instruct.gguf --lora adapter.gguf";

/// Write a model, or an adapter, as a GGUF file for llama.cpp
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct ExportArgs {
    /// Hugging Face folder, such as `merge` writes, or .gguf file
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,

    /// PEFT adapter folder: write only the adapter, for llama.cpp's `--lora`
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,

    /// File to write
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,

    /// Data type of the matrices, as llama.cpp names it
    ///
    /// Norms and biases are f32. Blocks of 256 need rows that are a multiple of it; others get blocks of
    /// 32.
    #[arg(long, value_name = "TYPE", value_enum, ignore_case = true, default_value_t = FileType::F16)]
    pub outtype: FileType,

    /// Replace `--out` if it exists
    #[arg(long)]
    pub overwrite: bool,

    /// Worker threads [default: one per core]
    #[arg(long, value_name = "THREADS", value_parser = numbers::threads)]
    pub threads: Option<NonZeroUsize>,
}
