//! `nibble completions`: a shell's completion script.

use clap::CommandFactory;

use crate::cli::Cli;
use crate::cli::completions::CompletionsArgs;
use crate::error::Result;
use crate::printed;

/// Runs the command.
///
/// # Errors
/// `Io` when the script cannot be written.
pub fn run(args: &CompletionsArgs) -> Result<()> {
    let mut command = Cli::command();
    // In memory first: on a file that refuses, `generate` panics.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "nibble", &mut script);
    printed::at_once(&String::from_utf8_lossy(&script))
}
