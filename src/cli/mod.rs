//! The command line as types: one struct per command, each default written once, here.

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
