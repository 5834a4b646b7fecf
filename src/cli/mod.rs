//! The command line as types: one struct per command, each default written once, here.

pub mod adapters;
pub mod arguments;
mod combinations;
pub mod complete;
pub mod completions;
pub mod data;
pub mod device;
pub mod doctor;
pub mod eval;
pub mod export;
pub mod generate;
pub mod intervals;
pub mod layers;
pub mod listed;
pub mod lora;
pub mod memory;
pub mod merge;
pub mod numbers;
pub mod quantize;
pub mod reader;
mod schedule;
pub mod settings_file;
pub mod synonyms;
pub mod train;

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::error::{Error, Result};
use crate::train::checkpoints;

/// QLoRA fine-tuning from one binary.
#[derive(Debug, Parser)]
#[command(name = "nibble", version, propagate_version = true, after_help = AFTER_HELP)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands, in the order in which one needs them.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Quantize a base model to 4 bits, as transformers and bitsandbytes load it
    Quantize(quantize::QuantizeArgs),
    /// Check a dataset with a model's tokenizer and chat template, without training
    Data(data::DataArgs),
    /// Show where every byte of a training run will go, before it starts
    Memory(Box<memory::MemoryArgs>),
    /// Train a LoRA adapter on a frozen base model
    Train(Box<train::TrainArgs>),
    /// Measure loss, perplexity, token accuracy and exact match, without and with adapters
    Eval(eval::EvalArgs),
    /// Answer a prompt
    Generate(generate::GenerateArgs),
    /// Chat with a model and switch adapters in the conversation; `/help` lists the commands
    Chat(generate::ChatArgs),
    /// Merge an adapter into its base model and write a dense Hugging Face folder
    Merge(merge::MergeArgs),
    /// Write a model, or an adapter, as a GGUF file for llama.cpp
    Export(export::ExportArgs),
    /// Check what this machine offers, and how to get what is missing
    Doctor(doctor::DoctorArgs),
    /// Print a shell completion script
    Completions(completions::CompletionsArgs),
}

const AFTER_HELP: &str = "From a published model to a fine-tuned one:
  nibble quantize --model SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2-nf4
  nibble train    --model smollm2-nf4 --data train.jsonl --out run
  nibble chat     --model smollm2-nf4 --adapter run

Results go to stdout, progress to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage,
130 interrupted: `train` has saved its last whole step, `eval --predictions` the answers
so far, and others have written nothing.";

/// The subcommand whose settings may come from a file, a run or a preset.
const TRAIN: &str = "train";
/// Those that take from such a file what they share with it.
const READERS: [&str; 3] = ["data", "eval", "memory"];

impl Cli {
    /// Whether `nibble NAME` is a command.
    pub fn has_command(name: &str) -> bool {
        Cli::command().find_subcommand(name).is_some()
    }

    /// Parses a command line; the settings of `train` are completed from its config file, the
    /// resumed run and the preset, those of `data`, `eval` and `memory` from such a file. Help and version are
    /// printed, and end the process.
    ///
    /// # Errors
    /// `Usage` for wrong flags or a wrong config file; `Io` when help cannot be printed.
    pub fn from_arguments(argv: Vec<OsString>) -> Result<Self> {
        let command = Cli::command();
        let mut argv = arguments::for_clap(&command, argv);
        let matches = partial_matches(&command, &argv)?;
        let train = command.find_subcommand(TRAIN);
        if let (Some(train), Some((name, matches))) = (train, matches.subcommand()) {
            let reader = READERS.contains(&name).then(|| command.find_subcommand(name));
            if name == TRAIN {
                argv.extend(complete::complete(train, matches, &checkpoints::saved_settings)?);
            } else if let Some(Some(reader)) = reader {
                argv.extend(reader::complete_reader(reader, train, matches)?);
            }
        }
        let usage = |error| usage(&command, &argv, error);
        let matches = command.clone().try_get_matches_from(&argv).map_err(usage)?;
        let mut cli = Cli::from_arg_matches(&matches).map_err(usage)?;
        if let (Command::Train(args), Some((_, matches))) = (&mut cli.command, matches.subcommand())
            && let Some(train) = train
        {
            args.settings = layers::echo(train, matches);
        }
        Ok(cli)
    }
}

/// What stands on the command line; required flags may still come from elsewhere.
fn partial_matches(command: &clap::Command, argv: &[OsString]) -> Result<ArgMatches> {
    let usage = |error| usage(command, argv, error);
    let partial = || {
        command.clone().mut_subcommands(|any| match any.get_name() {
            name if name == TRAIN || READERS.contains(&name) => layers::partial(&any),
            _ => any,
        })
    };
    match command.clone().try_get_matches_from(argv) {
        Err(error) if error.kind() == ErrorKind::MissingRequiredArgument => {
            partial().try_get_matches_from(argv).map_err(|_| usage(error))
        }
        result => result.map_err(usage),
    }
}

/// Wrong usage as our error; help and version end the process once they are printed.
fn usage(command: &clap::Command, argv: &[OsString], error: clap::Error) -> Error {
    let is_help = error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    if !error.use_stderr() || is_help {
        return end_with(&error);
    }
    let chosen = argv.get(1).and_then(|name| command.find_subcommand(name));
    layers::readable(chosen.unwrap_or(command), &error)
}

/// Prints help and ends the process, as clap's own `exit` does, which would not tell of a failure.
#[allow(clippy::exit)]
fn end_with(help: &clap::Error) -> Error {
    match help.print() {
        Ok(()) => std::process::exit(help.exit_code()),
        Err(e) => Error::io("write to", "standard output".as_ref(), e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_values_are_refused_in_words_of_ours() {
        for command in Cli::command().get_subcommands() {
            let flags = command.get_arguments().filter(|arg| arg.get_action().takes_values());
            for flag in flags.filter_map(clap::Arg::get_long) {
                for value in ["?", "-1", "0", "1e9", "99999999999999999999999", "a=b", ",", " "] {
                    let argv = [command.get_name(), &format!("--{flag}={value}")];
                    let result = layers::partial(command).try_get_matches_from(argv);
                    let Err(error) = result else { continue };
                    let text = layers::readable(command, &error).to_string();
                    for raw in ["invalid digit", "invalid float", "non-zero type", "number too"] {
                        assert!(!text.contains(raw), "{text}");
                    }
                }
            }
        }
    }
}
