//! Parse, run, print the error, exit.

use std::process::ExitCode;

use nibble::cli::Cli;
use nibble::commands;

fn main() -> ExitCode {
    let cli = Cli::from_arguments(std::env::args_os().collect());
    match cli.and_then(|cli| commands::run(&cli.command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
