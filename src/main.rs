//! Parse, run, print the error, exit.

#![allow(unreachable_code, unused_variables)] // until the first command lands

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = nibble::cli::Cli::parse();
    match nibble::commands::run(&cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
