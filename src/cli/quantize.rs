//! Flags of `nibble quantize`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use nibble_quant::{FloatType, QuantType};

use super::numbers;
use crate::byte_size::ByteSize;

/// `--max-shard-size` by default.
pub const MAX_SHARD_SIZE: &str = "5GB";

const EXAMPLES: &str = "Examples:
  nibble quantize --model SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2-nf4 --check
  nibble quantize --model Llama-3.2-1B --out llama-fp4 --quant-type fp4 --block-size 32";

/// Quantize a base model to 4 bits, as transformers and bitsandbytes load it
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct QuantizeArgs {
    /// Hugging Face folder (dense or 4-bit) or GGUF file
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,

    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// 4-bit type [default: nf4]
    #[arg(long, value_name = "TYPE", value_enum)]
    pub quant_type: Option<QuantTypeArg>,

    /// Weights per scale: a power of two from 32 to 4096 [default: 64]
    #[arg(long, value_name = "WEIGHTS", value_parser = numbers::block_size)]
    pub block_size: Option<usize>,

    /// Also quantize the scales, to 8 bits [default: true]
    #[arg(long, value_name = "BOOL", action = clap::ArgAction::Set, num_args = 0..=1,
          default_missing_value = "true")]
    pub double_quant: Option<bool>,

    /// Do not quantize tensors whose name matches this regular expression; may be repeated
    #[arg(long, value_name = "REGEX")]
    pub skip: Vec<String>,

    /// Data type of the tensors that stay dense [default: as stored, bfloat16 from GGUF]
    #[arg(long, value_name = "TYPE", value_enum)]
    pub dtype: Option<DtypeArg>,

    /// Maximum size of a shard
    #[arg(long, value_name = "SIZE", default_value = MAX_SHARD_SIZE, value_parser = numbers::some_bytes)]
    pub max_shard_size: ByteSize,

    /// Requantize linear layers that are already 4-bit
    #[arg(long)]
    pub force: bool,

    /// Replace `--out` if it is not empty
    #[arg(long)]
    pub overwrite: bool,

    /// Read the result back and compare it with the source
    #[arg(long)]
    pub check: bool,

    /// Print the table as JSON
    #[arg(long)]
    pub json: bool,

    /// Worker threads [default: one per core]
    #[arg(long, value_name = "THREADS", value_parser = numbers::threads)]
    pub threads: Option<NonZeroUsize>,
}

/// `--quant-type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum QuantTypeArg {
    /// 4-bit NormalFloat
    Nf4,
    /// 4-bit float
    Fp4,
}

impl From<QuantTypeArg> for QuantType {
    fn from(arg: QuantTypeArg) -> Self {
        match arg {
            QuantTypeArg::Nf4 => QuantType::Nf4,
            QuantTypeArg::Fp4 => QuantType::Fp4,
        }
    }
}

/// Type of dense tensors, PyTorch's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DtypeArg {
    /// 32 bits
    #[value(alias = "f32")]
    Float32,
    /// bfloat16
    #[value(alias = "bf16")]
    Bfloat16,
    /// IEEE half precision
    #[value(alias = "f16")]
    Float16,
}

impl From<DtypeArg> for FloatType {
    fn from(arg: DtypeArg) -> Self {
        match arg {
            DtypeArg::Float32 => FloatType::F32,
            DtypeArg::Bfloat16 => FloatType::Bf16,
            DtypeArg::Float16 => FloatType::F16,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use nibble_quant::BlockFormat;

    use crate::cli::Cli;
    use crate::train::settings::usual_packing;

    /// These flags have no default of clap's: a base that is packed already is left as it is.
    #[test]
    fn help_and_settings_name_the_default_format() {
        let BlockFormat { quant_type, block_size, double_quant } = BlockFormat::default();
        let expected = [
            ("quantization", quant_type.as_str().to_string()),
            ("block-size", block_size.to_string()),
            ("double-quant", double_quant.to_string()),
        ];
        let cli = Cli::command();
        for (setting, expected) in &expected {
            let usual = usual_packing(&setting.replace('-', "_"));
            assert_eq!(usual, Some(expected.as_str()), "{setting}");
            for command in ["quantize", "train", "memory"] {
                let flag = match (command, *setting) {
                    ("quantize", "quantization") => "quant-type",
                    (_, setting) => setting,
                };
                let command = cli.find_subcommand(command).unwrap();
                let arg = command.get_arguments().find(|arg| arg.get_long() == Some(flag));
                let help = arg.and_then(|arg| arg.get_help()).unwrap().to_string();
                assert!(help.ends_with(&format!("[default: {expected}]")), "{help}");
            }
        }
    }
}
