use clap::{CommandFactory, FromArgMatches, Parser};

use nibble_quant::BlockFormat;

use super::super::train::TrainArgs;
use super::*;
use crate::adapter::{ModuleNames, TargetModules};
use crate::byte_size::ByteSize;
use crate::train::adamw::AdamW;
use crate::train::schedule::{SchedulerType, Warmup};

#[derive(Debug, Parser)]
#[command(name = "train")]
struct Alone {
    #[command(flatten)]
    train: TrainArgs,
}

fn parse_saved(argv: &[&str], saved: &SavedSettings) -> Result<TrainArgs> {
    let command = Alone::command();
    let first = layers::partial(&command).try_get_matches_from(argv).unwrap();
    let argv = argv.iter().map(OsString::from).chain(complete(&command, &first, saved)?);
    let matches = command.clone().try_get_matches_from(argv).map_err(Error::usage)?;
    let mut args = Alone::from_arg_matches(&matches).unwrap().train;
    args.settings = layers::echo(&command, &matches);
    Ok(args)
}

fn parse(argv: &[&str]) -> Result<TrainArgs> {
    let base = ["train", "--model", "m", "--data", "d.jsonl", "--out", "o"];
    parse_saved(&[&base, argv].concat(), &|_| None)
}

fn with_file(text: &str, argv: &[&str]) -> Result<TrainArgs> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    std::fs::write(&path, text).unwrap();
    let replaced = |error: Error| {
        let text = error.to_string().replace(path.to_str().unwrap(), "run.toml");
        Error::usage(text)
    };
    parse(&[&["--config", path.to_str().unwrap()], argv].concat()).map_err(replaced)
}

#[test]
fn the_command_is_well_formed() {
    Alone::command().debug_assert();
}

#[test]
fn defaults_are_the_documented_ones() -> Result<()> {
    let args = parse(&[])?;
    let recipe = args.recipe(1);
    let config = args.lora.config()?;
    assert_eq!(config, crate::adapter::LoraConfig::default());
    assert_eq!(recipe.learning_rate, 2e-4);
    assert_eq!(recipe.scheduler_type, SchedulerType::Cosine);
    assert_eq!(recipe.warmup, Warmup::Ratio(0.03));
    assert_eq!(recipe.max_grad_norm, 0.3);
    let AdamW { beta1, beta2, epsilon, weight_decay } = recipe.optimizer;
    assert_eq!((beta1, beta2, epsilon, weight_decay), (0.9, 0.999, 1e-8, 0.0));
    assert_eq!((args.data.max_length, args.data.packing), (2048, true));
    assert_eq!(args.optimization.seed, 42);
    assert_eq!(args.model.block_format(), Some(BlockFormat::default()));
    Ok(())
}

#[test]
fn command_line_wins_over_file_over_preset_over_default() -> Result<()> {
    let text = "preset = \"qlora-paper\"\nlora_r = 8\nlearning-rate = 1e-5\nseed = 7\n";
    let args = with_file(text, &["--seed", "9"])?;
    assert_eq!(args.optimization.seed, 9, "command line over file");
    assert_eq!(args.lora.lora_r.get(), 8, "file over preset");
    assert_eq!(args.optimization.learning_rate, 1e-5, "file over default");
    assert_eq!(args.lora.lora_dropout, 0.1, "preset over default");
    assert_eq!(args.optimization.lr_scheduler_type, SchedulerType::Constant);
    Ok(())
}

#[test]
fn the_paper_preset_is_the_papers() -> Result<()> {
    let args = parse(&["--preset", "qlora-paper"])?;
    let config = args.lora.config()?;
    assert_eq!((config.r, config.lora_alpha, config.lora_dropout), (64, 16.0, 0.1));
    assert_eq!(args.recipe(1).scheduler_type, SchedulerType::Constant);
    Ok(())
}

#[test]
fn every_kind_of_value_can_stand_in_the_file() -> Result<()> {
    let text = r#"
        target-modules = ["q_proj", "v_proj"]
        exclude_modules = "q_proj,v_proj"
        layers_to_transform = [0, 2]
        use_rslora = true
        packing = false
        warmup_steps = 3
        memory-budget = "8GiB"
        sample-steps = 5
        sample_prompt = ["one, two", "three"]
        [rank_pattern]
        q_proj = 4
    "#;
    let args = with_file(text, &[])?;
    assert_eq!(args.lora.layers_to_transform, [0, 2]);
    let names: ModuleNames = "q_proj,v_proj".parse()?;
    assert_eq!(args.lora.target_modules, TargetModules::Names(names.clone()));
    assert_eq!(args.lora.exclude_modules, Some(names));
    assert!(args.lora.use_rslora && !args.data.packing);
    assert_eq!(args.recipe(1).warmup, Warmup::Steps(3));
    assert_eq!(args.resources.memory_budget, Some(ByteSize(8 << 30)));
    assert_eq!(args.evaluation.sample_prompt, ["one, two", "three"]);
    assert_eq!(args.lora.rank_pattern, [("q_proj".to_string(), 4)]);
    Ok(())
}

#[test]
fn mistakes_in_the_file_are_named_with_their_line() {
    for (text, message) in [
        (
            "seed = 1\nlearning_rat = 1e-4",
            "run.toml:2: unknown key `learning_rat`\nhint: did you mean `learning-rate`?",
        ),
        ("output_dir = 'x'", "run.toml:1: unknown key `output_dir`\nhint: here it is `out`"),
        ("zebra = 1", "run.toml:1: unknown key `zebra`\nhint: see `nibble train --help`"),
        (
            "learning-rate = -1",
            "run.toml:1: invalid value '-1' for '--learning-rate <RATE>': \
             expected a number above 0",
        ),
        (
            "lr_scheduler_type = \"cosin\"",
            "run.toml:1: invalid value 'cosin' for '--lr-scheduler-type <TYPE>'\nhint: \
             possible values: constant, constant_with_warmup, linear, cosine, \
             cosine_with_restarts, cosine_with_min_lr, cosine_warmup_with_min_lr, polynomial, \
             inverse_sqrt, warmup_stable_decay",
        ),
        (
            "seed = [1, 2]",
            "run.toml:1: invalid value '1,2' for '--seed <NUMBER>': expected a whole number, \
             0 or more",
        ),
        (
            "lora_r = 8\nseed = 1\nlora-r = 4",
            "run.toml:3: `lora-r` is set again, expected once; it is in run.toml:1, too\n\
             hint: `lora_r` and `lora-r` are one setting: keep one",
        ),
        ("model = 3", "run.toml:1: `model` is 3, expected a path in quotes\nhint: `model = \"3\"`"),
        (
            "\neval_data = ['a', 3]",
            "run.toml:2: `eval_data` is 3, expected a path in quotes\n\
             hint: `eval_data = \"3\"`",
        ),
        (
            "\nout = ['a', 'b']",
            "run.toml:2: `out` is no single value, expected a path in quotes\n\
             hint: `out = \"FOLDER\"`",
        ),
        (
            "warmup_ratio = 0.1\nseed = 1\nwarmup_steps = 5",
            "run.toml:3: `warmup-steps` excludes `warmup-ratio`, which is in run.toml:1\n\
             hint: keep one of them",
        ),
        (
            "memory_budget = 24",
            "run.toml:1: invalid value '24' for '--memory-budget <SIZE>': expected a number \
             with a unit\nhint: `24GiB`",
        ),
        (
            "warmup_steps = 0.1",
            "run.toml:1: invalid value '0.1' for '--warmup-steps <STEPS>': expected a whole number, \
             0 or more\nhint: a share of all steps is `--warmup-ratio 0.1`",
        ),
        (
            "model = \"C:\\temp\"",
            "run.toml:1: `model` is \"C:\\temp\" with an escape, expected a path\nhint: a path of \
             Windows stands in single quotes: `'C:\\models'`",
        ),
        (
            "optimizer = \"paged_adamw_8bit\"",
            "run.toml:1: unknown key `optimizer`\nhint: here it is `optim`: invalid value \
             'paged_adamw_8bit' for '--optim <NAME>': expected adamw_torch or adamw_8bit; take \
             adamw_8bit: all of a run's memory is planned, none paged",
        ),
        (
            "[lora]\nr = 4",
            "run.toml:1: unknown key `lora`\nhint: settings have no sections: remove `lora`",
        ),
        (
            "lr_scheduler = \"one_cycle\"",
            "run.toml:1: unknown key `lr_scheduler`\nhint: here it is `lr-scheduler-type`: invalid \
             value 'one_cycle' for '--lr-scheduler-type <TYPE>': not supported, `cosine` with \
             `--warmup-ratio 0.3` rises and falls much like it",
        ),
        (
            "lr_scheduler_kwargs = { num_cycle = 1 }",
            "run.toml:1: invalid value '{\"num_cycle\":1}' for '--lr-scheduler-kwargs <JSON>': no \
             schedule reads `num_cycle`\nhint: did you mean `num_cycles`?",
        ),
        (
            "lr_scheduler_kwargs = { num_cycles = nan }",
            "run.toml:1: invalid value '{\"num_cycles\":\"nan\"}' for '--lr-scheduler-kwargs <JSON>': \
             `num_cycles` is \"nan\", expected a number above 0",
        ),
        (
            "lr_scheduler_kwargs = { num_cycles = 2026-01-01 }",
            "run.toml:1: `lr_scheduler_kwargs` cannot be a date or nested\n\
             hint: write the value as on the command line",
        ),
        (
            "lora_alpha = 0",
            "run.toml:1: invalid value '0' for '--lora-alpha <ALPHA>': expected a number \
             above 0",
        ),
        (
            "resume = true",
            "run.toml:1: `resume` belongs on the command line\nhint: leave it out of the file",
        ),
        (
            "[tokenizer]\nseed = 1",
            "run.toml:1: unknown key `tokenizer`\nhint: settings have no sections: remove \
             `tokenizer`",
        ),
        (
            "seed = 2026-01-01",
            "run.toml:1: `seed` cannot be a date or nested\n\
             hint: write the value as on the command line",
        ),
    ] {
        let error = with_file(text, &[]).unwrap_err();
        assert_eq!(error.message().what, message, "{text}");
    }
    let error = with_file("seed = 1.5\nlearning_rat = 1\nlora_r = 4\nlora-r = 2", &[]).unwrap_err();
    let all = "run.toml: 3 settings cannot be used\n  \
               line 1: invalid value '1.5' for '--seed <NUMBER>': expected a whole number, 0 or more\n  \
               line 2: unknown key `learning_rat`; did you mean `learning-rate`?\n  \
               line 4: `lora-r` is set again, expected once; it is in run.toml:3, too; \
               `lora_r` and `lora-r` are one setting: keep one\n\
               hint: all settings are in `nibble train --help`, under the same names";
    assert_eq!(error.message().what, all);
    let error = with_file("seed = 1\nlearning-rate = ", &[]).unwrap_err();
    assert!(error.to_string().starts_with("run.toml:2: "), "{error}");
}

/// PEFT's LoRA+ has it for adapters on embeddings, which are not trained.
#[test]
fn a_setting_that_is_gone_is_passed_over_in_files() -> Result<()> {
    let args = with_file("loraplus_lr_embedding = 1e-6\nlora_r = 4", &[])?;
    assert_eq!(args.lora.lora_r.get(), 4);
    Ok(())
}

#[test]
fn a_json_object_may_be_a_table() -> Result<()> {
    let text = "lr_scheduler_type = \"warmup_stable_decay\"\n\
                [chat_template_kwargs]\nthink = true\ntools = [{ name = \"x\", size = 0x10 }]\n\
                [lr_scheduler_kwargs]\nnum_decay_steps = 1_0\nmin_lr_ratio = 0.125\n\
                decay_type = \"1-sqrt\"\n";
    let args = with_file(text, &[])?;
    let given = |name: &str| args.settings[name][0].clone();
    let kwargs = "{\"decay_type\":\"1-sqrt\",\"min_lr_ratio\":0.125,\"num_decay_steps\":10}";
    assert_eq!(given("lr_scheduler_kwargs"), kwargs);
    assert_eq!(args.recipe(1).scheduler_kwargs, kwargs.parse().map_err(Error::usage)?);
    let kwargs = "{\"think\":true,\"tools\":[{\"name\":\"x\",\"size\":16}]}";
    assert_eq!(given("chat_template_kwargs"), kwargs);
    Ok(())
}

#[test]
fn whole_numbers_may_be_written_with_a_fraction() -> Result<()> {
    let text = "lora_r = 8.0\nwarmup_steps = 10.0\nrank_pattern = { q_proj = 4.00 }\nnum_train_epochs = 2.50";
    let args = with_file(text, &[])?;
    assert_eq!((args.lora.lora_r.get(), args.recipe(1).warmup), (8, Warmup::Steps(10)));
    assert_eq!(args.lora.rank_pattern, [("q_proj".to_string(), 4)]);
    assert_eq!(args.optimization.num_train_epochs, 2.5);
    Ok(())
}

#[test]
fn what_asks_for_nothing_is_passed_over_in_files() -> Result<()> {
    let text = "load_in_8bit = false\nfsdp = []\nbf16 = \"auto\"\nresume_from_checkpoint = false\n\
                preprocessing_num_workers = 16\ngradient_checkpointing_kwargs = { use_reentrant = false }";
    assert_eq!(with_file(text, &[])?.settings, parse(&[])?.settings);
    Ok(())
}

#[test]
fn a_flag_displaces_the_one_that_excludes_it() -> Result<()> {
    let args = with_file("warmup_ratio = 0.1", &["--warmup-steps", "5"])?;
    assert_eq!(args.recipe(1).warmup, Warmup::Steps(5));
    let args = parse(&["--preset", "qlora-paper", "--init-adapter", "dir"])?;
    assert_eq!(args.lora.lora_r.get(), 16, "the adapter decides, not the preset");
    let both = "warmup_ratio = 0.03\nwarmup_steps = 5\nlora_r = 16";
    assert_eq!(with_file(both, &[])?.recipe(1).warmup, Warmup::Steps(5), "0.03 is the default");
    Ok(())
}

#[test]
fn resuming_needs_no_flags_again() -> Result<()> {
    let first = parse(&[
        "--warmup-steps",
        "5",
        "--lora-r",
        "4",
        "--sample-steps",
        "2",
        "--sample-prompt",
        "a",
        "--sample-prompt",
        "b",
    ])?;
    let saved = first.settings.clone();
    let again = ["train", "--out", "o", "--resume", "--max-steps", "9"];
    let second = parse_saved(&again, &move |_| Some(saved.clone()))?;
    let mut expected = first.settings;
    expected.insert("max_steps".into(), vec!["9".into()]);
    assert_eq!(second.settings, expected);
    assert_eq!(second.recipe(1).warmup, Warmup::Steps(5));
    Ok(())
}

/// A session that made a run longer and came to no checkpoint is not forgotten.
#[test]
fn what_the_last_session_was_asked_for_counts() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    let first = parse(&["--max-steps", "4", "--seed", "3", "--eval-data", "e"]);
    let saved = first?.settings;
    let mut last = saved.clone();
    last.insert("max_steps".into(), vec!["9".into()]);
    last.insert("seed".into(), vec!["4".into()]);
    last.remove("eval_data");
    let text = crate::train::settings::to_toml(&last);
    std::fs::write(folder.path().join(SETTINGS_FILE), text).unwrap();
    let from = saved.clone();
    let again = ["train", "--out", out, "--resume"];
    let args = parse_saved(&again, &move |_| Some(from.clone()))?;
    assert_eq!(args.optimization.max_steps, Some(9));
    assert_eq!((args.optimization.seed, args.data.eval_data.len()), (3, 0));
    // What cannot be read is no reason not to go on.
    let file = folder.path().join(SETTINGS_FILE);
    let last = std::fs::read(&file).unwrap();
    for text in ["unknown = 3", ""] {
        std::fs::write(&file, text).unwrap();
        let from = saved.clone();
        let args = parse_saved(&again, &move |_| Some(from.clone()))?;
        assert_eq!((args.optimization.max_steps, &*args.model.model), (Some(4), Path::new("m")));
    }
    std::fs::write(&file, last).unwrap();
    // A file of settings has the epochs of every run; the command line means this one.
    let config = folder.path().join("run.toml");
    std::fs::write(&config, "num_train_epochs = 1").unwrap();
    let config = config.to_str().unwrap();
    let args = parse_saved(&["train", "--out", out, "--resume", "--config", config], &|_| None)?;
    assert_eq!(args.optimization.max_steps, Some(9));
    let again = ["train", "--out", out, "--resume", "--num-train-epochs", "2"];
    let args = parse_saved(&again, &|_| None)?;
    assert_eq!(args.optimization.max_steps, None);
    assert_eq!(args.optimization.num_train_epochs, 2.0);
    Ok(())
}

/// Every run's file says how a dense base would be packed, also where the base is packed otherwise.
#[test]
fn a_file_with_the_usual_packing_asks_for_none() -> Result<()> {
    let usual = "quantization = 'nf4'\nblock_size = 64\ndouble_quant = true";
    let asked = |args: &TrainArgs| {
        let model = &args.model;
        [model.quantization.is_some(), model.block_size.is_some(), model.double_quant.is_some()]
    };
    let said = parse(&["--double-quant", "--block-size", "64"])?;
    assert_eq!(asked(&said), [false, true, true]);
    let read = with_file(usual, &["--block-size", "64"])?;
    assert_eq!(asked(&read), [false, true, false]);
    assert_eq!(
        (&said.settings["quantization"], &said.settings),
        (&vec!["nf4".into()], &read.settings)
    );
    let other = with_file(&usual.replace("64", "32"), &[])?;
    assert_eq!(other.model.block_size, Some(32));
    // It wins over what it stands above nevertheless.
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("run.toml");
    std::fs::write(&config, usual).unwrap();
    let config = config.to_str().unwrap();
    let again = ["train", "--out", "o", "--resume", "--config", config];
    let again = parse_saved(&again, &move |_| Some(other.settings.clone()))?;
    assert_eq!(again.model.block_format(), Some(BlockFormat::default()));
    Ok(())
}

#[test]
fn contradictions_are_refused() {
    for (argv, word) in [
        (&["--eval-steps", "5"][..], "--eval-data"),
        (&["--load-best-model-at-end"], "--eval-data"),
        (&["--sample-steps", "5"], "--sample-prompt"),
        (&["--eval-data", "e", "--early-stopping-patience", "2"], "--eval-steps"),
    ] {
        let error = parse(argv).and_then(|args| args.check_combinations()).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    }
}
