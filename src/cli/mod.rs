//! The command line as types: one struct per command, each default written once, here.

pub mod complete;
pub mod layers;
pub mod lora;
pub mod numbers;
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
pub enum Command {}
