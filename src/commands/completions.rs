//! `nibble completions`: a shell's completion script.

use clap::builder::ValueHint;
use clap::{Arg, Command, CommandFactory};

use crate::cli::Cli;
use crate::cli::completions::CompletionsArgs;
use crate::error::Result;
use crate::printed;

/// Runs the command.
///
/// # Errors
/// `Io` when the script cannot be written.
pub fn run(args: &CompletionsArgs) -> Result<()> {
    let mut command = Cli::command().mut_subcommands(without_files);
    // In memory first: on a file that refuses, `generate` panics.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "nibble", &mut script);
    printed::at_once(&String::from_utf8_lossy(&script))
}

/// Numbers and texts are not completed; shells would offer the files that there are.
fn without_files(command: Command) -> Command {
    let free = |arg: &Arg| {
        arg.get_action().takes_values()
            && arg.get_value_hint() == ValueHint::Unknown
            && arg.get_value_parser().possible_values().is_none()
    };
    command.mut_args(|arg| if free(&arg) { arg.value_hint(ValueHint::Other) } else { arg })
}
