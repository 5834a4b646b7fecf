//! The command line as types: one struct per command, each default written once, here.

pub mod complete;
pub mod layers;
pub mod lora;
pub mod merge;
pub mod numbers;
pub mod quantize;
pub mod size;
pub mod train;

use clap::{Parser, Subcommand};

/// QLoRA fine-tuning from one binary.
#[derive(Debug, Parser)]
#[command(name = "nibble", version, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Put an adapter into its base model's weights: a dense Hugging Face folder
    Merge(merge::MergeArgs),
    /// Pack a base model's linears in 4-bit blocks that transformers and bitsandbytes load
    Quantize(quantize::QuantizeArgs),
}
