//! Parse, run, print the error, exit.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use nibble::cli::Cli;
use nibble::commands;
use signal_hook::consts::SIGPIPE;

fn main() -> ExitCode {
    end_quietly_without_reader();
    let cli = Cli::from_arguments(std::env::args_os().collect());
    match cli.and_then(|cli| commands::run(&cli.command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// `nibble … | head` ends as other programs do: Rust ignores SIGPIPE, and printing would panic.
fn end_quietly_without_reader() {
    let always = Arc::new(AtomicBool::new(true));
    // Where it is refused, printing fails loudly: no reason to stop here.
    let _ = signal_hook::flag::register_conditional_default(SIGPIPE, always);
}
