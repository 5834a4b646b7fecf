//! `nibble completions`: a shell's completion script.

use clap::CommandFactory;

use crate::cli::Cli;
use crate::cli::completions::CompletionsArgs;
use crate::error::Result;

/// Runs the command.
///
/// # Errors
/// None.
pub fn run(args: &CompletionsArgs) -> Result<()> {
    let mut command = Cli::command();
    clap_complete::generate(args.shell, &mut command, "nibble", &mut std::io::stdout());
    Ok(())
}
