//! What other programs call the settings that Nibble has, and what it does about those that it has
//! not: a hint for those who try their names. In a file, what asks for nothing is passed over.

mod names;
mod values;
mod without_flag;

use clap::Command;

use names::NAMES;
use values::VALUES;
use without_flag::WITHOUT_FLAG;

/// When a setting of another program asks for something that Nibble does not do by itself.
#[derive(Debug, Clone, Copy)]
enum Asks {
    /// With every value, also with none.
    EvenEmpty,
    /// With every value.
    Always,
    /// Unless it is one of these, in lower case: what Nibble does anyway.
    Unless(&'static [&'static str]),
    /// With no value: neither weights nor files of a run depend on it.
    Never,
}

/// What is switched on.
const OFF: Asks = Asks::Unless(&["false"]);

/// Those without a flag that are about training alone: of other commands they may mean something else.
const OF_TRAINING: [&str; 9] = [
    "adapter",
    "bias",
    "debug",
    "dtype",
    "model-type",
    "special-tokens",
    "stage",
    "strict",
    "tokens",
];

impl Asks {
    /// Left empty, or `None`, a setting is as if it were left out.
    fn with(self, value: &str) -> bool {
        let value = value.to_lowercase();
        let is_empty = ["", "none", "null"].contains(&&*value);
        (!is_empty || matches!(self, Asks::EvenEmpty))
            && match self {
                Asks::EvenEmpty | Asks::Always => true,
                Asks::Unless(idle) => !idle.contains(&&*value),
                Asks::Never => false,
            }
    }

    /// With some of `values`; none for values that are nested.
    fn with_any(self, values: Option<&[String]>) -> bool {
        let all = |values: &[String]| values.iter().any(|value| self.with(value));
        values.map_or(!matches!(self, Asks::Never), all)
    }
}

/// Another program's name as the tables have it: with hyphens, in lower case.
fn normal(theirs: &str) -> String {
    theirs.trim_start_matches('-').replace('_', "-").to_lowercase()
}

/// What to do instead of setting `theirs` (kebab or snake case), as far as other programs' names
/// tell; flags of `command` are written behind `dashes`.
pub fn hint(command: &Command, theirs: &str, dashes: &str) -> Option<String> {
    let theirs = &normal(theirs);
    if let Some(ours) = ours(command, theirs) {
        return Some(format!("here it is `{dashes}{ours}`"));
    }
    match valued(command, theirs) {
        Some((_, _, ours, how)) => Some(format!("here it is `{dashes}{ours}`: {how}")),
        None => without_flag(command, theirs).map(|(_, _, what)| what.to_string()),
    }
}

/// Whether `theirs`, a setting of another program, asks for nothing that the run would not do by itself.
pub fn asks_for_nothing(command: &Command, theirs: &str, values: Option<&[String]>) -> bool {
    let theirs = &normal(theirs);
    let of_table = || match valued(command, theirs) {
        Some((_, asks, _, _)) => Some(asks),
        None => without_flag(command, theirs).map(|(_, asks, _)| asks),
    };
    let asks = ours(command, theirs).map(|_| Asks::Always).or_else(of_table);
    asks.is_some_and(|asks| !asks.with_any(values))
}

/// The flag of `command` that other programs call `theirs` and give the same values.
pub fn ours(command: &Command, theirs: &str) -> Option<&'static str> {
    let theirs = &normal(theirs);
    let mut meant = NAMES.into_iter().filter(|(name, _)| name == theirs);
    meant.find(|(_, ours)| has(command, ours)).map(|(_, ours)| ours)
}

fn valued(
    command: &Command,
    theirs: &str,
) -> Option<(&'static str, Asks, &'static str, &'static str)> {
    VALUES.into_iter().find(|(name, _, ours, _)| *name == theirs && has(command, ours))
}

fn without_flag(command: &Command, theirs: &str) -> Option<(&'static str, Asks, &'static str)> {
    let applies = has(command, "learning-rate") || !OF_TRAINING.contains(&theirs);
    let is_named = |name: &str| match name.strip_suffix('-') {
        Some(_) => theirs.starts_with(name),
        None => theirs == name,
    };
    WITHOUT_FLAG.into_iter().find(|(name, _, _)| applies && is_named(name))
}

fn has(command: &Command, flag: &str) -> bool {
    command.get_arguments().any(|arg| arg.get_long() == Some(flag))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn every_name_leads_to_a_flag_and_is_none_itself() {
        let cli = Cli::command();
        let train = cli.find_subcommand("train").unwrap();
        for (theirs, name) in NAMES {
            let leads = |command: &&Command| ours(command, theirs) == Some(name);
            assert!(cli.get_subcommands().any(|command| leads(&command)), "{theirs}");
        }
        let mut all: Vec<&str> = WITHOUT_FLAG.map(|(theirs, _, _)| theirs).to_vec();
        all.extend(VALUES.map(|(theirs, _, _, _)| theirs));
        for theirs in &all {
            assert!(hint(train, theirs, "").is_some(), "{theirs}");
            assert_eq!(ours(train, theirs), None, "{theirs} is in two tables");
            assert_eq!(all.iter().filter(|other| *other == theirs).count(), 1, "{theirs}");
        }
        for (_, _, ours, _) in VALUES {
            assert!(has(train, ours), "{ours}");
        }
        all.extend(NAMES.map(|(theirs, _)| theirs));
        for theirs in all {
            assert!(!has(train, theirs), "{theirs}");
            let behind = |flag: &str| theirs.ends_with('-') && flag.starts_with(theirs);
            let flags = train.get_arguments().filter_map(|arg| arg.get_long());
            assert!(!flags.into_iter().any(behind), "{theirs}");
        }
        let export = cli.find_subcommand("export").unwrap();
        assert_eq!(hint(export, "--dtype", "--"), None, "its nearest flag is `--outtype`");
        let data = cli.find_subcommand("data").unwrap();
        assert_eq!(hint(data, "--lr", "--"), None, "it has no such flag");
    }

    #[test]
    fn a_name_is_answered_by_what_the_command_has() {
        let cli = Cli::command();
        let answer = |name: &str, theirs| hint(cli.find_subcommand(name).unwrap(), theirs, "--");
        for (command, theirs, words) in [
            ("train", "--max-seq-length", "here it is `--max-length`"),
            ("generate", "--max_seq_len", "here it is `--context-length`"),
            ("chat", "--adapter-path", "here it is `--adapter`"),
            ("train", "adapter_path", "here it is `--init-adapter`"),
            ("train", "--label-smoothing-factor", "not supported"),
            ("train", "random_state", "here it is `--seed`"),
        ] {
            assert_eq!(answer(command, theirs).as_deref(), Some(words), "{command} {theirs}");
        }
        for theirs in ["--use-dora", "--modules-to-save", "--fp16", "--report-to"] {
            assert!(answer("train", theirs).is_some_and(|words| !words.contains("here it is")));
        }
    }

    #[test]
    fn what_a_run_does_by_itself_is_not_asked_for() {
        let cli = Cli::command();
        let train = cli.find_subcommand("train").unwrap();
        let idle = |theirs, values: &[&str]| {
            let values: Vec<String> = values.iter().map(ToString::to_string).collect();
            asks_for_nothing(train, theirs, Some(&values))
        };
        for (theirs, values) in [
            ("load_in_8bit", &["False"][..]),
            ("fsdp", &[]),
            ("fsdp_config", &[]),
            ("deepspeed", &[""]),
            ("wandb_watch", &[""]),
            ("lora_model_dir", &[""]),
            ("preprocessing_num_workers", &["16"]),
            ("dataloader_num_workers", &["4"]),
            ("adapter", &["qlora"]),
            ("stage", &["sft"]),
            ("roles_to_train", &["assistant"]),
            ("loftq_config", &["None"]),
            ("val_set_size", &["0.0"]),
        ] {
            assert!(idle(theirs, values), "{theirs}");
        }
        for (theirs, values) in [
            ("load_in_8bit", &["true"][..]),
            ("load_in_4bit", &["false"]),
            ("stage", &["dpo"]),
            ("fsdp", &["full_shard"]),
            ("dataloader_drop_last", &["true"]),
            ("wandb_project", &["mine"]),
            ("roles_to_train", &["assistant", "user"]),
            ("lora_rank", &["8"]),
            ("nobody_knows", &[""]),
            // Ours, whose values are checked.
            ("lora_r", &[""]),
        ] {
            assert!(!idle(theirs, values), "{theirs}");
        }
        assert!(asks_for_nothing(train, "gradient_checkpointing_kwargs", None));
        assert!(!asks_for_nothing(train, "datasets", None));
    }
}
