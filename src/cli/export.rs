//! Flags of `nibble export`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use candle_core::quantized::GgmlDType;
use clap::{Args, ValueEnum};

use super::numbers;

const EXAMPLES: &str = "\
Examples:
  nibble merge --model smollm2-nf4 --original SmolLM2-135M-Instruct --adapter run --out merged
  nibble export --model merged --out merged.gguf --outtype q8_0
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

    /// PEFT adapter folder: write it alone, for llama.cpp's `--lora`, and not the model
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,

    /// File to write
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,

    /// Type of the matrices; norms and biases are f32
    #[arg(long, value_name = "TYPE", value_enum, default_value_t = OutType::F16)]
    pub outtype: OutType,

    /// Replace `--out` if it is there
    #[arg(long)]
    pub overwrite: bool,

    /// Worker threads [default: one for each core]
    #[arg(long, value_name = "THREADS", value_parser = numbers::threads)]
    pub threads: Option<NonZeroUsize>,
}

/// `--outtype`, by the names of llama.cpp's converter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutType {
    /// 32 bits
    F32,
    /// IEEE half precision
    F16,
    /// bfloat16
    Bf16,
    /// Blocks of 32 codes of 8 bits: 8.5 bits a weight
    #[value(name = "q8_0")]
    Q8_0,
}

impl OutType {
    /// candle's name.
    pub fn dtype(self) -> GgmlDType {
        match self {
            OutType::F32 => GgmlDType::F32,
            OutType::F16 => GgmlDType::F16,
            OutType::Bf16 => GgmlDType::BF16,
            OutType::Q8_0 => GgmlDType::Q8_0,
        }
    }

    /// `general.file_type`: `enum llama_ftype`.
    pub fn file_type(self) -> u32 {
        match self {
            OutType::F32 => 0,
            OutType::F16 => 1,
            OutType::Q8_0 => 7,
            OutType::Bf16 => 32,
        }
    }
}
