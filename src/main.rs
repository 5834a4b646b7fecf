//! Parse, run, print the error, exit.

use std::io::Write;
use std::process::ExitCode;

use nibble::checkpoint::atomic;
use nibble::cli::Cli;
use nibble::error::Error;
use nibble::kernels::cuda::devices;
use nibble::system::allocator;
use nibble::{commands, printed};

fn main() -> ExitCode {
    #[allow(unsafe_code)]
    // SAFETY: no other thread runs yet.
    unsafe {
        allocator::return_freed_memory();
        devices::load_kernels_when_used();
    }
    printed::end_with_reader();
    atomic::outlive_size_limits();
    let arguments: Vec<_> = std::env::args_os().collect();
    let command = arguments.get(1).map(|name| name.to_string_lossy().into_owned());
    let cli = Cli::from_arguments(arguments);
    let done = cli.and_then(|cli| commands::run(&cli.command));
    match done.and_then(|()| printed::flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = error.exit_code();
            // Where it cannot be told, the exit code is left.
            let error = with_way_out(error, command.as_deref());
            let _ = writeln!(std::io::stderr(), "error: {error}");
            ExitCode::from(code)
        }
    }
}

/// Wrong usage always points to the help.
fn with_way_out(error: Error, command: Option<&str>) -> Error {
    match (&error, command) {
        (Error::Usage(_), Some(command)) if Cli::has_command(command) => {
            error.or_hint(format_args!("see `nibble {command} --help`"))
        }
        (Error::Usage(_), _) => error.or_hint("see `nibble --help`"),
        _ => error,
    }
}
