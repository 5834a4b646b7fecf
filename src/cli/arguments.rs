//! Arguments as clap should see them.
//!
//! `--lora_r` is `--lora-r`: so the scripts of other trainers write it. A value that begins with a
//! dash and a digit, as in `--learning-rate -1e-4`, is tied to its flag, whose parser then says what
//! is wrong with it; clap would call it an unknown flag. (clap's `allow_hyphen_values` would also
//! take the next flag for the value of one whose value was forgotten. Flags for texts have it: a
//! prompt may begin with anything.)

use std::any::TypeId;
use std::ffi::OsString;

use clap::{Arg, Command};

/// The command line `argv` of `cli`, with dashes in the names of its flags, negative numbers tied to
/// theirs, and switches in lower case. Values of flags for texts, and what stands behind `--`, are left alone.
pub fn for_clap(cli: &Command, argv: Vec<OsString>) -> Vec<OsString> {
    let chosen = argv.get(1).and_then(|name| cli.find_subcommand(name));
    let Some(command) = chosen else { return argv };
    let mut rest = argv.into_iter();
    let mut done: Vec<OsString> = rest.by_ref().take(2).collect();
    // The flag whose value comes next.
    let mut waiting: Option<&Arg> = None;
    for argument in rest.by_ref() {
        let flag = waiting.take();
        match (flag, argument.to_str()) {
            (Some(flag), _) if flag.is_allow_hyphen_values_set() => done.push(argument),
            (Some(_), Some(number)) if is_negative_number(number) => tie(&mut done, number),
            (Some(flag), Some(value)) if is_switch(flag, value) => {
                done.push(value.to_lowercase().into());
            }
            (_, Some("--")) => {
                done.push(argument);
                break;
            }
            (_, Some(text)) => {
                let (argument, flag) = with_dashes(command, text);
                done.push(argument);
                waiting = flag;
            }
            (_, None) => done.push(argument),
        }
    }
    done.extend(rest);
    done
}

/// Whether no flag begins like this, but a number may.
fn is_negative_number(text: &str) -> bool {
    let digits = text.strip_prefix('-').map(|rest| rest.strip_prefix('.').unwrap_or(rest));
    digits.is_some_and(|digits| digits.starts_with(|c: char| c.is_ascii_digit()))
}

/// Whether `value` is what a switch is set to, perhaps as Python writes it.
fn is_switch(flag: &Arg, value: &str) -> bool {
    let is_bool = flag.get_value_parser().type_id() == TypeId::of::<bool>();
    is_bool && ["true", "false"].iter().any(|word| value.eq_ignore_ascii_case(word))
}

fn tie(done: &mut [OsString], value: &str) {
    if let Some(flag) = done.last_mut() {
        flag.push("=");
        flag.push(value);
    }
}

/// A flag of `command` under its own name, and itself where its value is the next argument; all else
/// as it is.
fn with_dashes<'a>(command: &'a Command, text: &str) -> (OsString, Option<&'a Arg>) {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (text, None),
    };
    let dashed = name.replace('_', "-");
    let found = dashed.strip_prefix("--").and_then(|name| find(command, name));
    match (found, value) {
        (Some(flag), Some(value)) => {
            let value = if is_switch(flag, value) { &value.to_lowercase() } else { value };
            (format!("{dashed}={value}").into(), None)
        }
        (Some(flag), None) => (dashed.into(), flag.get_action().takes_values().then_some(flag)),
        (None, _) => (text.into(), None),
    }
}

fn find<'a>(command: &'a Command, name: &str) -> Option<&'a Arg> {
    let called = |arg: &&Arg| {
        arg.get_long() == Some(name)
            || arg.get_all_aliases().is_some_and(|aliases| aliases.contains(&name))
    };
    command.get_arguments().find(called)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::super::Cli;
    use super::*;

    fn assert_seen(given: &str, seen: &str) {
        let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        assert_eq!(for_clap(&Cli::command(), words(given)), words(seen));
    }

    #[test]
    fn names_of_flags_have_dashes() {
        for (given, seen) in [
            ("n train --lora_r 4 --use_rslora", "n train --lora-r 4 --use-rslora"),
            ("n train --init_adapter=a_b=c_d", "n train --init-adapter=a_b=c_d"),
            ("n memory --memory_budget 1GiB", "n memory --memory-budget 1GiB"),
            ("n train --lora_rank 4", "n train --lora_rank 4"),
            // As Python writes them.
            ("n train --bf16 True --packing=False", "n train --bf16 true --packing=false"),
            (
                "n train --out True --sample-prompt False",
                "n train --out True --sample-prompt False",
            ),
            ("n train --out --lora_r 4", "n train --out --lora-r 4"),
            ("n data --show 1 -- --max_length", "n data --show 1 -- --max_length"),
            ("n --max_length", "n --max_length"),
        ] {
            assert_seen(given, seen);
        }
    }

    #[test]
    fn texts_are_left_alone() {
        for same in [
            "n generate --prompt --max_new_tokens --raw",
            "n generate --system -- --prompt -5",
            "n chat --system -1",
            "n train --sample-prompt -5",
        ] {
            assert_seen(same, same);
        }
        let given = "n generate --prompt --max_new_tokens --max_new_tokens 3";
        assert_seen(given, "n generate --prompt --max_new_tokens --max-new-tokens 3");
    }

    #[test]
    fn negative_numbers_are_values() {
        for (given, seen) in [
            ("n train --learning-rate -1e-4 --seed -1", "n train --learning-rate=-1e-4 --seed=-1"),
            ("n train --layers_to_transform -1,2", "n train --layers-to-transform=-1,2"),
            ("n memory --measure -1", "n memory --measure=-1"),
            ("n memory --budget -.5GiB --fit", "n memory --budget=-.5GiB --fit"),
            ("n memory --fit -1", "n memory --fit -1"),
            ("n memory --budget=1GiB -1", "n memory --budget=1GiB -1"),
        ] {
            assert_seen(given, seen);
        }
    }
}
