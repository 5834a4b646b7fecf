//! `nibble memory` and the arena that a model really allocates.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Output};

use crate::golden::{CASES, Case};
use crate::training::{Workplace, fail, stderr, succeed};
use nibble::adapter::LoraConfig;
use nibble::checkpoint::Checkpoint;
use nibble::model::Model;
use nibble::model::weights::Weights;
use nibble::plan::{Optim, Policy, REGION_ALIGNMENT_BYTES, Settings, layout};
use serde_json::Value;

fn memory(arguments: &[&str]) -> Output {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/models/llama_s0");
    let mut command = Command::new(env!("CARGO_BIN_EXE_nibble"));
    command.arg("memory").args(arguments).current_dir(root);
    command.output().expect("the binary runs")
}

fn plan(arguments: &[&str]) -> Value {
    let output = memory(arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn number(plan: &Value, key: &str) -> u64 {
    plan[key].as_u64().unwrap_or_else(|| panic!("{key}"))
}

/// What a region of a plan takes: its pieces, each with what is behind it.
pub(crate) fn region_bytes(region: &Value) -> u64 {
    let size = if region["dtype"] == "f32" { 4 } else { 2 };
    let piece = region["elements"].as_u64().unwrap() * size;
    let count = region["count"].as_u64().unwrap_or(1);
    count * piece.next_multiple_of(REGION_ALIGNMENT_BYTES as u64)
}

/// Each family with every option that changes sizes, one after the other from the first.
#[test]
fn every_option_allocates_what_it_plans() {
    for name in CASES {
        let case = Case::open(name);
        let spec = case.spec();
        let lora = LoraConfig { r: 64, ..LoraConfig::default() };
        let policies = [Policy::Keep, Policy::Checkpoint, Policy::Offload];
        let plain = Settings {
            longest_document: 32,
            policies: policies.iter().copied().cycle().take(spec.num_layers).collect(),
            targets: lora.resolve(&spec).unwrap(),
            threads: 2,
            ..Settings::of_pass(64, 64)
        };
        let of = |change: &dyn Fn(&mut Settings)| {
            let mut settings = plain.clone();
            change(&mut settings);
            let weights =
                Weights::load(&Checkpoint::open(&case.path).unwrap(), &spec, None, None).unwrap();
            let model = Model::new(spec.clone(), weights, settings).unwrap();
            let planned = layout(&spec, model.settings()).arena_bytes();
            assert_eq!(model.arena_bytes(), planned, "{name} {:?}", model.settings());
            assert_eq!(model.region_bytes().len(), model.plan().regions.len());
            planned
        };
        let bytes = of(&|_| {});
        type Change<'a> = &'a dyn Fn(&mut Settings);
        let smaller: [(&str, Change); 5] = [
            ("adapter in f32", &|s| s.bf16_working = false),
            ("8-bit moments", &|s| s.optim = Optim::Adamw8bit),
            ("seven chunks of logits", &|s| s.logit_rows = 10),
            ("tiles", &|s| s.mlp_tile_length = Some(10)),
            ("offloaded", &|s| s.policies.fill(Policy::Offload)),
        ];
        for (what, change) in smaller {
            assert!(of(change) < bytes, "{name}: {what}");
        }
        let larger: [(&str, Change); 3] = [
            ("dropout", &|s| s.lora_dropout = true),
            ("threads", &|s| s.threads = 3),
            ("cache", &|s| s.cache_tokens = 40),
        ];
        for (what, change) in larger {
            assert!(of(change) > bytes, "{name}: {what}");
        }
        of(&|s| s.policies.fill(Policy::Keep));
        of(&|s| s.policies.fill(Policy::Attention));
        of(&|s| {
            (s.lora_dropout, s.bf16_working, s.optim) = (true, false, Optim::Adamw8bit);
            (s.logit_rows, s.mlp_tile_length, s.cache_tokens) = (10, Some(10), 40);
        });
    }
}

#[test]
fn the_allocated_arena_is_the_planned_one_to_the_byte() {
    for name in CASES {
        let case = Case::open(name);
        for policies in [
            &[][..],
            &[Policy::Keep],
            &[Policy::Checkpoint, Policy::Keep],
            &[Policy::Attention],
            &[Policy::Attention, Policy::Offload],
            &[Policy::AttentionOffloadInput],
            &[Policy::Offload, Policy::AttentionOffloadInput],
            &[Policy::OffloadAttention],
            &[Policy::OffloadAttention, Policy::Offload],
            &[Policy::Offload],
            &[Policy::Keep, Policy::Offload],
        ] {
            for adapter in [None, Some("adapter_init")] {
                for tile in [None, Some(10), Some(64)] {
                    let model = case.tiled_model(None, adapter, policies, tile);
                    let planned = model.plan().arena_bytes();
                    assert_eq!(model.arena_bytes(), planned, "{name} {policies:?} {tile:?}");
                    assert!(planned > 0);
                }
            }
        }
    }
}

#[test]
fn a_bare_config_has_a_plan_whose_parts_add_up() {
    let plan = plan(&["--model", "config.json", "--json", "--threads", "2", "--max-length", "64"]);
    let regions = plan["regions"].as_array().unwrap();
    assert_eq!(regions.iter().map(region_bytes).sum::<u64>(), number(&plan, "arena_bytes"));
    let parts = plan["components"].as_object().unwrap();
    let sum: u64 = parts.values().map(|bytes| bytes.as_u64().unwrap()).sum();
    assert_eq!(sum, number(&plan, "total_bytes"));
    // Two blocks' linears (64·64·2 + 32·64·2 + 160·64·3 weights each) at 4.127 bits, embedding and
    // head in f32 (the config's dtype), five norms in f32.
    let linears = [4096, 2048, 2048, 4096, 10240, 10240, 10240].map(|n| n / 2 + n / 64 + 4 + 4);
    let elements = 2 * (4096 + 2048 + 2048 + 4096 + 3 * 10240);
    let codes = elements / 2;
    let scales = 2 * linears.iter().sum::<u64>() - codes;
    let expected = [
        ("4-bit codes", codes),
        ("scales of 4-bit blocks", scales),
        ("embeddings and head", 2 * 128 * 64 * 4),
        ("norms and biases", 5 * 64 * 4),
    ];
    for (name, bytes) in expected {
        assert_eq!(parts[name].as_u64(), Some(bytes), "{name}");
    }
    let sum: u64 = expected.iter().map(|(_, bytes)| bytes).sum();
    assert_eq!(number(&plan, "weight_bytes"), sum);
}

#[test]
fn moments_in_8_bits_are_two_bytes_a_parameter_and_their_scales() {
    let base = ["--model", "config.json", "--json", "--lora-r", "64", "--optim"];
    let moments = |optim| {
        let plan = plan(&[&base[..], &[optim]].concat());
        let bytes = |name: &str| plan["components"][name].as_u64().unwrap_or(0);
        (bytes("AdamW moments (f32)"), bytes("AdamW moments (8-bit)"))
    };
    // A and B of each block: of q and o, k and v, gate and up, down. B of k and v is small.
    let (large, small) = (2 * (4 * 4096 + 2 * 4096 + 3 * (4096 + 64 * 160)), 2 * (2 * 64 * 32));
    assert_eq!(moments("adamw_torch"), (2 * 4 * (large + small), 0));
    let scales = u64::next_multiple_of(large / 256 * 4, REGION_ALIGNMENT_BYTES as u64);
    assert_eq!(moments("adamw_8bit"), (2 * 4 * small, 2 * (large + scales)));
}

#[test]
fn a_budget_decides_which_blocks_keep_and_a_refusal_shows_the_way() {
    let base = ["--model", "config.json", "--json", "--threads", "2", "--max-length", "4096"];
    let base = [&base[..], &["--weights", "resident"]].concat();
    let with = |more: &[&str]| plan(&[&base[..], more].concat());
    let (keep, least) = (with(&["--activations", "keep"]), with(&["--activations", "checkpoint"]));
    let (most, least) = (number(&keep, "total_bytes"), number(&least, "total_bytes"));
    assert!(least < most);
    // Smaller pieces take no time, recomputing does: it comes, block by block, when pieces do not
    // suffice.
    let small = with(&["--activations", "checkpoint", "--mlp-tile-length", "1024"]);
    let small = number(&small, "total_bytes");
    let cases = [(most, 2, true), (most - 1, 2, false), (least, 1, false), (small, 0, false)];
    for (budget, kept, whole) in cases {
        let fitting = with(&["--budget", &format!("{budget}B")]);
        assert!(number(&fitting, "total_bytes") <= budget && fitting["fits"] == true);
        assert_eq!(number(&fitting, "kept_blocks"), kept, "{budget} of {most}");
        let pieces = ["mlp_tile_tokens", "logit_rows"].map(|key| number(&fitting, key));
        assert_eq!(pieces == [4096, 4096], whole, "{budget} of {most}: {pieces:?}");
    }
    let refused = |budget: u64| {
        let refused = memory(&[&base[..], &["--budget", &format!("{budget}B")]].concat());
        assert_eq!(refused.status.code(), Some(1));
        let error = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(error.contains("plan needs"), "{error}");
        let said: Value = serde_json::from_slice(&refused.stdout).unwrap();
        assert_eq!(said["fits"], false);
        assert!(said["refusal"]["hint"].as_str().unwrap().contains(" would need "), "{said}");
        error
    };
    let offload = |pieces: [&str; 4]| {
        number(&with(&[&["--activations", "offload"], &pieces[..]].concat()), "total_bytes")
    };
    let usual = offload(["--mlp-tile-length", "1024", "--logits-chunk-length", "1024"]);
    let least = offload(["--mlp-tile-length", "256", "--logits-chunk-length", "64"]);
    let pieces = "hint: `--mlp-tile-length 256`, `--logits-chunk-length 64` would need";
    for budget in [usual - 1, least] {
        let error = refused(budget);
        assert!(error.contains(pieces), "{error}");
    }
    let error = refused(least - 1);
    assert!(error.contains("hint: `--weights stream`"), "{error}");
}

/// Rows add up to the peak; after the program come the weights' and the arena's parts: each is in
/// memory to the last page.
fn assert_rows_as_planned(plan: &Value) {
    let rows = plan["measured"]["rows"].as_array().unwrap();
    let bytes = |row: &Value, key: &str| row[key].as_u64().unwrap();
    let sum: u64 = rows.iter().map(|row| bytes(row, "measured_bytes")).sum();
    assert_eq!(sum, number(&plan["measured"], "peak_bytes"));
    for row in &rows[1..] {
        let (planned, measured) = (bytes(row, "planned_bytes"), bytes(row, "measured_bytes"));
        let least = match row["name"].as_str().unwrap() {
            // Pages of the file that lie around the blocks may come with them, or be gone.
            "streamed weights" => continue,
            // Part of what is left of the peak, as the first row is.
            "heap fragmentation" => continue,
            // Rows of tokens that the batch does not have.
            "embeddings and head" => planned / 2,
            // A thread that found no tile to compute has not touched its share.
            "attention workspace" => planned / 2,
            _ => planned,
        };
        let near = least.saturating_sub(2 * 4096)..=planned + 2 * 4096;
        assert!(near.contains(&measured), "{row}");
    }
}

/// What `auto` takes within smaller and smaller budgets is what the model then allocates.
#[test]
fn a_chosen_mix_fills_the_planned_arena() {
    let place = Workplace::new();
    succeed(place.nibble(&["quantize", "--model", "model", "--out", "packed"]));
    let measured = |budget: &str| {
        let sizes = ["--model", "packed", "--max-length", "4096", "--threads", "2"];
        let mut command = place.nibble(&["memory", "--measure", "1", "--json"]);
        command.args(sizes).args(["--budget", budget]).output().expect("the binary runs")
    };
    let (mut budget, mut seen) = ("1GiB".to_string(), BTreeSet::new());
    loop {
        let output = measured(&budget);
        if !output.status.success() {
            assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
            break;
        }
        let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_rows_as_planned(&plan);
        let total = number(&plan, "total_bytes");
        seen.insert((number(&plan, "kept_blocks"), number(&plan, "mlp_tile_tokens")));
        budget = format!("{}B", total - (64 << 10));
    }
    let any = |is: fn(&(u64, u64)) -> bool| seen.iter().any(is);
    assert!(any(|mix| *mix == (2, 4096)) && any(|mix| *mix == (2, 1024)), "{seen:?}");
    assert!(any(|mix| mix.0 == 0), "{seen:?}");
}

/// A page is written over a page, not over what somebody has.
#[test]
fn a_page_takes_no_other_file_s_place() {
    let place = Workplace::new();
    let before = place.read("model/config.json");
    let mut command = place.nibble(&["memory", "--model", "model", "--device", "cpu"]);
    command.args(["--html", "model/config.json"]);
    let (code, text) = fail(command);
    let says = "is there already, and no page of `nibble memory`";
    assert!(code == 2 && text.contains(says), "{text}");
    // Another page, such as a run's report.
    fs::write(place.path("report.html"), "<!doctype html>\n<html lang=\"en\">\n").unwrap();
    let mut command = place.nibble(&["memory", "--model", "model", "--device", "cpu"]);
    command.args(["--html", "report.html"]);
    assert!(fail(command).1.contains(says));
    assert_eq!(place.read("model/config.json"), before);
    for _ in 0..2 {
        let mut command = place.nibble(&["memory", "--model", "model", "--device", "cpu"]);
        command.args(["--html", "page.html"]);
        succeed(command);
    }
    let mut command = place.nibble(&["memory", "--model", "model", "--device", "cpu"]);
    succeed({
        command.args(["--html", "page.html", "--activations", "offload-attention"]);
        command
    });
    let page = String::from_utf8(place.read("page.html")).unwrap();
    assert!(page.contains(" of inputs and attention offloaded"), "what waits elsewhere is said");
}

#[test]
fn a_measured_run_fills_the_planned_arena() {
    let place = Workplace::new();
    succeed(place.nibble(&["quantize", "--model", "model", "--out", "packed"]));
    let flags = ["--max-length", "64", "--threads", "2", "--measure", "2", "--json"];
    let runs = [
        ("model", "resident", "adamw_torch"),
        ("packed", "resident", "adamw_8bit"),
        ("packed", "stream", "adamw_torch"),
    ];
    for (model, weights, optim) in runs {
        let mut command = place.nibble(&["memory", "--model", model, "--weights", weights]);
        command.args(["--optim", optim, "--lora-r", "64"]);
        command.args(flags).args(["--html", "page.html"]);
        let output = succeed(command);
        let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_rows_as_planned(&plan);
        let rows = plan["measured"]["rows"].as_array().unwrap();
        assert_eq!(rows.iter().any(|row| row["name"] == "4-bit codes"), weights == "resident");
        if cfg!(target_os = "linux") {
            let cache = &plan["measured"]["page_cache"];
            let (file, cached) = (number(cache, "file_bytes"), number(cache, "cached_bytes"));
            let size = std::fs::metadata(place.path(&format!("{model}/model.safetensors")));
            let size = size.unwrap().len();
            assert!(file == size && 0 < cached && cached <= file, "{model}: {cache} of {size}");
        }
        let seen = plan["measured"]["timeline"].as_array().unwrap();
        // However short: each is looked at where it ends.
        for row in plan["phases"].as_array().unwrap() {
            assert!(row["measured_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{row}");
        }
        assert!(!seen.is_empty());
        let page = String::from_utf8(place.read("page.html")).unwrap();
        assert!(page.contains("kept activations") && page.contains("measured"));
    }
    let planned = |model: &str| {
        let output = succeed(place.nibble(&["memory", "--model", model, "--threads", "2"]));
        String::from_utf8(output.stdout).unwrap()
    };
    let says = "program and tokenizer are assumed";
    assert!(!planned("model/config.json").contains(says), "a tokenizer is beside it");
    fs::copy(place.path("model/config.json"), place.path("config.json")).unwrap();
    assert!(planned("config.json").contains(says));
    let config = ["memory", "--model", "model/config.json", "--measure"];
    let (code, text) = fail(place.nibble(&config));
    assert_eq!(code, 2);
    assert!(text.contains("needs a model with weights"), "{text}");
}

/// On the CPU it is always known what is free; a plan may be for another machine, a trial is not.
#[test]
fn a_plan_tells_whether_it_fits_here_and_a_trial_that_does_not_is_refused() {
    let config = ["--model", "config.json", "--device", "cpu"];
    let text = |more: &[&str]| {
        let output = memory(&[&config[..], more].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(text(&[]).contains("\nfits the "), "{}", text(&[]));
    assert!(text(&[]).contains(" that are free here\n"));
    let said = plan(&[&config[..], &["--json"]].concat());
    let here = &said["here"];
    assert!(here["fits"] == true && here["free_bytes"].as_u64().unwrap() > 0, "{here}");
    assert_eq!(said["fits"], true);
    // Hundreds of gigabytes, however little is kept.
    let long = ["--max-length", "200000000"];
    let said = text(&long);
    assert!(
        said.contains("\ndoes not fit the ") && said.contains("lower `--max-length`"),
        "{said}"
    );
    let said = plan(&[&config[..], &["--json"], &long].concat());
    let here = &said["here"];
    assert!(here["fits"] == false && here["instead"].is_string(), "{here}");
    assert_eq!(said["fits"], false);
    let place = Workplace::new();
    let trial =
        [&["memory", "--model", "model", "--device", "cpu", "--measure"], &long[..]].concat();
    let (code, error) = fail(place.nibble(&trial));
    assert_eq!(code, 1);
    assert!(error.contains(" are free: ") && error.contains("hint: "), "{error}");
    // So is a run: the cache for its sample answer alone takes terabytes.
    let flags = ["--sample-prompt", "w5 w6", "--sample-max-new-tokens", "10000000000"];
    let (code, error) = fail(place.train("out", &[&["--device", "cpu"], &flags[..]].concat()));
    assert_eq!(code, 1);
    assert!(error.contains(" are free: ") && error.contains("hint: "), "{error}");
}

#[test]
fn what_does_not_fit_is_shown_and_fails() {
    let base =
        ["--model", "config.json", "--fit", "--activations", "keep", "--weights", "resident"];
    let fit = |more: &[&str]| memory(&[&base[..], more].concat());
    let fits = fit(&["--budget", "1GiB"]);
    assert_eq!(fits.status.code(), Some(0), "{}", stderr(&fits));
    let plan: Value = serde_json::from_slice(&fit(&["--budget", "1GiB", "--json"]).stdout).unwrap();
    assert!(plan["fits"] == true && plan["refusal"].is_null(), "{plan}");
    let words = "2 of 2 blocks keep their activations";
    assert_eq!(plan["fit"]["plan"]["words"], words, "{plan}");
    let flags = "--activations keep --weights resident --memory-budget 1GiB";
    assert_eq!(plan["fit"]["plan"]["flags"], flags);
    let refused = fit(&["--budget", "38MiB"]);
    assert_eq!(refused.status.code(), Some(1));
    let table = String::from_utf8_lossy(&refused.stdout);
    assert!(
        table.contains("does not fit: plan needs") && table.contains("recomputed, "),
        "{table}"
    );
    assert!(stderr(&refused).starts_with("error: plan needs"), "{}", stderr(&refused));
    let refused = fit(&["--budget", "38MiB", "--json"]);
    assert_eq!(refused.status.code(), Some(1));
    let plan: Value = serde_json::from_slice(&refused.stdout).unwrap();
    let hint = plan["refusal"]["hint"].as_str().unwrap();
    assert!(plan["fits"] == false && hint.contains(" would need "), "{plan}");
    for flag in ["--measure", "--html=page.html"] {
        let output = fit(&["--budget", "1GiB", flag]);
        assert_eq!(output.status.code(), Some(2), "{flag}");
        assert!(stderr(&output).contains("hint: leave out `--fit`"), "{}", stderr(&output));
    }
}

/// Whose weights are in 4 bits is assumed of a config: `train` streams none of a dense folder.
#[test]
fn streaming_a_config_s_weights_needs_a_4_bit_folder() {
    let place = Workplace::new();
    succeed(place.nibble(&["quantize", "--model", "model", "--out", "packed"]));
    let says = |model: &str, flags: &[&str]| {
        let base = ["memory", "--model", model, "--max-length", "64", "--device", "cpu"];
        let output = succeed(place.nibble(&[&base[..], flags].concat()));
        let text = String::from_utf8(output.stdout).unwrap();
        text.contains("streaming needs a 4-bit folder: `nibble quantize` makes one")
    };
    let stream = ["--weights", "stream"];
    assert!(says("model/config.json", &stream));
    assert!(says("model/config.json", &["--weights", "stream", "--fit"]));
    assert!(!says("model/config.json", &["--weights", "resident"]));
    let dense = ["--weights", "stream", "--quantization", "none"];
    assert!(!says("model/config.json", &dense), "as they are stored");
    for packed in ["packed", "packed/config.json"] {
        assert!(!says(packed, &stream), "{packed}");
    }
}

/// Llama 8B: 16 bits for 8.03 billion weights, their gradients and two moments.
#[test]
fn full_fine_tuning_stands_beside_the_plan() {
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/configs/llama-3.1-8b.json");
    let plan = plan(&["--model", config, "--json", "--device", "cpu"]);
    let full = &plan["full_fine_tuning"];
    let (d, f, v, kv) = (4096, 14_336, 128_256, 1024);
    let parameters = 32 * (2 * d * d + 2 * d * kv + 3 * d * f + 2 * d) + d + 2 * v * d;
    assert_eq!((number(full, "parameters"), number(full, "bytes")), (parameters, 8 * parameters));
    // r 16 on all linears: bf16 copy, master, gradient and two moments are 18 bytes.
    let state = 18 * 32 * 16 * (2 * 2 * d + 2 * (d + kv) + 3 * (d + f));
    assert_eq!(number(full, "lora_state_bytes"), state);
    assert_eq!(number(full, "lora_bytes"), state + number(&plan, "weight_bytes"));
    let output = memory(&["--model", config, "--device", "cpu"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("full fine-tuning would take 59.8 GiB\n(assuming 8 B a parameter"),
        "{text}"
    );
}

/// What a plan says of a run, without what was measured of this machine.
fn plan_in(place: &Workplace, arguments: &[&str]) -> Vec<Value> {
    let base = ["memory", "--device", "cpu", "--threads", "2", "--json"];
    let output = succeed(place.nibble(&[&base[..], arguments].concat()));
    let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
    ["tokens", "kept_blocks", "arena_bytes", "regions"].map(|key| plan[key].clone()).into()
}

/// A file for `train`, of which only a part matters here.
#[test]
fn the_settings_of_a_run_have_the_plan_of_their_flags() {
    let place = Workplace::new();
    let text = r#"
        model = "model"
        data = "no-such.jsonl"
        out = "run"
        preset = "qlora-paper"
        learning_rate = 1e-5
        max_length = 48
        per_device_train_batch_size = 2
        optim = "adamw_8bit"
        activations = "checkpoint"
        memory_budget = "1MiB"
    "#;
    std::fs::write(place.path("run.toml"), text).unwrap();
    let (code, error) = fail(place.nibble(&["memory", "--config", "run.toml"]));
    assert!(code == 1 && error.contains("1.0 MiB"), "{code}: {error}");
    // Flags win, also under another name.
    let config = ["--config", "run.toml", "--memory-budget", "3GiB"];
    let flags = [
        "--model=model",
        "--max-length=48",
        "--per-device-train-batch-size=2",
        "--optim=adamw_8bit",
        "--activations=checkpoint",
        "--lora-dropout=0.1",
    ];
    let with_rank = |rank| plan_in(&place, &[&flags[..], &[rank]].concat());
    assert!(plan_in(&place, &config) == with_rank("--lora-r=64"));
    let budget = ["--config", "run.toml", "--budget", "3GiB"];
    assert!(plan_in(&place, &budget) == with_rank("--lora-r=64"));
    let smaller = plan_in(&place, &[&config[..], &["--lora-r", "8"]].concat());
    assert!(smaller == with_rank("--lora-r=8") && smaller != with_rank("--lora-r=64"));

    std::fs::write(place.path("wrong.toml"), "model = \"model\"\nlerning_rate = 1").unwrap();
    let (code, error) = fail(place.nibble(&["memory", "--config", "wrong.toml"]));
    assert!(code == 2 && error.contains("wrong.toml:2: unknown key `lerning_rate`"), "{error}");
    let (code, error) = fail(place.nibble(&["memory", "--max-length", "48"]));
    assert!(code == 2 && error.contains("--model"), "{error}");
}

/// Whose rank and modules count, whatever a preset says.
#[test]
fn an_adapter_to_begin_with_has_its_own_plan() {
    let place = Workplace::new();
    let flags = ["--model", "model", "--max-length", "48"];
    let lora = ["--lora-r", "3", "--target-modules", "q_proj,v_proj"];
    let run = ["train", "--data", "train.jsonl", "--out", "first", "--max-steps", "1"];
    succeed(place.nibble(&[&run[..], &flags, &lora].concat()));
    let text = "model = \"model\"\nmax_length = 48\ninit_adapter = \"first\"\n\
                preset = \"qlora-paper\"\nlora_dropout = 0.0\n";
    std::fs::write(place.path("run.toml"), text).unwrap();
    let expected = plan_in(&place, &[&flags[..], &lora].concat());
    assert!(plan_in(&place, &["--config", "run.toml"]) == expected);
    assert!(plan_in(&place, &flags) != expected);
    let measured = ["memory", "--config", "run.toml", "--measure", "1", "--device", "cpu"];
    succeed(place.nibble(&measured));
    std::fs::remove_dir_all(place.path("first")).unwrap();
    let (code, error) = fail(place.nibble(&["memory", "--config", "run.toml"]));
    assert!(code == 1 && error.contains("first"), "{code}: {error}");
}

/// What a run writes of itself is such a file.
#[test]
fn a_run_that_was_made_can_be_asked_for() {
    let place = Workplace::new();
    let flags = ["--model", "model", "--max-length", "64", "--lora-r", "2"];
    let run = ["train", "--data", "train.jsonl", "--out", "run", "--max-steps", "1"];
    succeed(place.nibble(&[&run[..], &flags].concat()));
    assert!(plan_in(&place, &["--config", "run/settings.toml"]) == plan_in(&place, &flags));
}

#[test]
fn an_unsupported_model_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    std::fs::write(&path, r#"{"model_type": "bert"}"#).unwrap();
    let output = memory(&["--model", path.to_str().unwrap()]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("model_type `bert` is not supported"), "{error}");
}
