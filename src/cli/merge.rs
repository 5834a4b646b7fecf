//! Flags of `nibble merge`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::numbers;
use super::quantize::{DtypeArg, MAX_SHARD_SIZE};
use super::train::BaseModelArgs;
use crate::adapter::MergeOnto;
use crate::byte_size::ByteSize;

/// Which weights the adapter goes into.
const BASES: &str = "\
Give --model, --quantization and so on as in training. A dense model is merged as it is, as is \
usual with PEFT; `--onto dequantized` merges into the 4-bit weights that the adapter was trained on. \
A 4-bit model is dequantized and merged, unless --original gives the weights it was made from.

Examples:
  nibble merge --model smollm2-nf4 --adapter run --out merged
  nibble merge --model smollm2-nf4 --original SmolLM2-135M-Instruct --adapter run --out merged";

/// Merge an adapter into its base model and write a dense Hugging Face folder
#[derive(Debug, Args)]
#[command(after_long_help = BASES)]
pub struct MergeArgs {
    /// PEFT adapter folder
    #[arg(long, value_name = "DIR")]
    pub adapter: PathBuf,

    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// Weights to merge into [default: the original, if there is one]
    #[arg(long, value_name = "WEIGHTS", value_enum)]
    pub onto: Option<OntoArg>,

    /// Dense original of a 4-bit `--model`
    #[arg(long, value_name = "PATH")]
    pub original: Option<PathBuf>,

    /// Data type of the tensors [default: that of the base, bfloat16 from GGUF]
    #[arg(long, value_name = "TYPE", value_enum)]
    pub dtype: Option<DtypeArg>,

    /// Maximum size of a shard
    #[arg(long, value_name = "SIZE", default_value = MAX_SHARD_SIZE, value_parser = numbers::some_bytes)]
    pub max_shard_size: ByteSize,

    /// Replace `--out` if it is not empty
    #[arg(long)]
    pub overwrite: bool,

    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,

    /// Worker threads [default: one per core]
    #[arg(long, value_name = "THREADS", value_parser = numbers::threads)]
    pub threads: Option<NonZeroUsize>,

    /// The model that the adapter was trained on.
    #[command(flatten)]
    pub base: BaseModelArgs,
}

/// `--onto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OntoArg {
    /// The dense original: full precision, but not what the adapter was trained on
    Original,
    /// The dequantized 4-bit weights: exactly the model that was trained
    Dequantized,
}

impl From<OntoArg> for MergeOnto {
    fn from(arg: OntoArg) -> Self {
        match arg {
            OntoArg::Original => MergeOnto::Original,
            OntoArg::Dequantized => MergeOnto::Dequantized,
        }
    }
}
