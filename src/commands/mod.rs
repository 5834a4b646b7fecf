//! One module per command: `run(&Args)`, a short list of named steps.

pub mod chat;
pub mod completions;
pub mod data;
mod device;
pub mod doctor;
pub mod eval;
pub mod export;
pub mod generate;
pub mod memory;
pub mod merge;
mod model_folder;
mod notes;
mod packing;
mod progress_bar;
pub mod quantize;
mod reading;
mod threads;
pub mod train;

use crate::cli::Command;
use crate::error::Result;

/// Runs one parsed command.
///
/// # Errors
/// Whatever the command reports.
pub fn run(command: &Command) -> Result<()> {
    match command {
        Command::Quantize(args) => quantize::run(args),
        Command::Data(args) => data::run(args),
        Command::Memory(args) => memory::run(args),
        Command::Train(args) => train::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Merge(args) => merge::run(args),
        Command::Export(args) => export::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Completions(args) => completions::run(args),
    }
}
