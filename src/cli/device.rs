//! `--device` and what goes with it.

use std::fmt;
use std::str::FromStr;

use clap::Args;

use super::listed::listed;
use crate::kernels::cuda::AttnImplementation;
use crate::plan::EmbeddingPlace;

/// Where a model works.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Device")]
pub struct DeviceArgs {
    /// `cpu`, `cuda` or `cuda:N`; `auto` takes a GPU if a test at the start gives the CPU's results
    #[arg(long, value_name = "DEVICE", default_value_t = Device::Auto,
          value_parser = listed::<Device>(&["auto", "cpu", "cuda"]), hide_possible_values = true)]
    pub device: Device,

    /// Matrix products in bf16, accumulated in f32: 1.7 times as fast on a CPU with AVX-512 BF16, the
    /// only way on a GPU [default: true on a GPU, false on a CPU]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub bf16: Option<bool>,

    /// Attention kernels on a GPU
    #[arg(long, value_name = "IMPLEMENTATION", value_enum, default_value_t = AttnImplementation::Auto)]
    pub attn_implementation: AttnImplementation,

    /// Where a run on a GPU keeps the embedding and the LM head; without training, `auto` is `gpu`
    #[arg(long, value_name = "PLACE", value_enum, default_value_t = EmbeddingPlace::Auto)]
    pub embedding: EmbeddingPlace,
}

/// A device by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// Nibble's choice.
    Auto,
    /// The processor.
    Cpu,
    /// A GPU by its number.
    Cuda(usize),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Auto => f.write_str("auto"),
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(0) => f.write_str("cuda"),
            Device::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Device::Auto),
            "cpu" => Ok(Device::Cpu),
            "cuda" => Ok(Device::Cuda(0)),
            _ => {
                let index = text.strip_prefix("cuda:").and_then(|index| index.parse().ok());
                index.map(Device::Cuda).ok_or_else(|| "expected auto, cpu, cuda or cuda:N".into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_read_as_it_is_written() {
        for text in ["auto", "cpu", "cuda", "cuda:3"] {
            assert_eq!(text.parse::<Device>().unwrap().to_string(), text);
        }
        assert_eq!("cuda:0".parse(), Ok(Device::Cuda(0)));
        for text in ["gpu", "cuda:", "cuda:-1", "CUDA:x", ""] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
    }
}
