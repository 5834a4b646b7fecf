//! One module per command: `run(&Args)`, a short list of named steps.

use crate::cli::Command;
use crate::error::Result;

/// Runs one parsed command.
pub fn run(command: &Command) -> Result<()> {
    match *command {}
}
