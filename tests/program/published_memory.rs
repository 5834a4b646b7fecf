//! docs/memory.md: its tables are what `nibble memory` says of bare configs, beside published figures.
//!
//! A table that is no longer true is printed as it should be.

use std::path::Path;

use serde_json::Value;

use crate::training::{json, nibble};

const GIB: f64 = (1u64 << 30) as f64;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// `nibble memory` of a config for a GPU, one row of `length` tokens.
fn memory(config: &str, length: u32, flags: &str) -> Value {
    let config = format!("{config}.json");
    let arguments = ["memory", "--json", "--device", "cuda", "--model", &config];
    let mut command = nibble(root().join("tests/data/configs"), &arguments);
    command.args(["--max-length", &length.to_string()]).args(flags.split_whitespace());
    json(&command.output().unwrap())
}

fn total_gib(config: &str, length: u32, flags: &str) -> f64 {
    memory(config, length, flags)["total_bytes"].as_u64().unwrap() as f64 / GIB
}

/// Tokens of the longest document that fits, with the inputs of all blocks on the card and off it.
fn longest(config: &str, budget_gib: u32) -> [u64; 2] {
    let flags = format!("--lora-r 32 --activations checkpoint --fit --budget {budget_gib}GiB");
    let fit = memory(config, 512, &flags);
    let ways = fit["fit"]["ways"].as_array().unwrap();
    ["checkpoint", "offload"].map(|policy| {
        let way = ways.iter().find(|way| way["others"] == policy && way["stream"] == false);
        way.unwrap()["longest_document"].as_u64().unwrap()
    })
}

fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().map(|part| str::from_utf8(part).unwrap()).collect();
    groups.join(",")
}

fn assert_in_docs(table: &[String]) {
    let table = table.join("\n");
    let text = std::fs::read_to_string(root().join("docs/memory.md")).unwrap();
    assert!(text.contains(&table), "docs/memory.md lacks this table:\n\n{table}\n");
}

#[test]
fn longest_contexts() {
    let mut table = vec![
        "| card | Unsloth | transformers + FlashAttention-2 | Nibble, recomputing | offloading |"
            .to_string(),
        "|---|---|---|---|---|".to_string(),
    ];
    for (model, title, rows) in [
        (
            "llama-3.1-8b",
            "8B",
            &[
                (8, "2,972", "out of memory"),
                (12, "21,848", "932"),
                (16, "40,724", "2,551"),
                (24, "78,475", "5,789"),
                (40, "153,977", "12,264"),
                (48, "191,728", "15,502"),
                (80, "342,733", "28,454"),
            ][..],
        ),
        ("llama-3.3-70b", "70B", &[(48, "12,106", "out of memory"), (80, "89,389", "6,916")][..]),
    ] {
        for (budget, unsloth, peer) in rows {
            let [ours, offloading] = longest(model, *budget).map(thousands);
            let row = format!("| {unsloth} | {peer} | {ours} | {offloading} |");
            table.push(format!("| {title}, {budget} GB {row}"));
        }
    }
    assert_in_docs(&table);
}

#[test]
fn llama_factory() {
    let mut table = vec![
        "| tokens | FlashAttention-2 | Unsloth | Nibble, recomputing | Nibble, all kept |"
            .to_string(),
        "|---|---|---|---|---|".to_string(),
    ];
    for (tokens, peer, unsloth) in [
        (1024, 6, 5),
        (2048, 7, 6),
        (4096, 9, 7),
        (8192, 12, 8),
        (16_384, 19, 10),
        (32_768, 32, 16),
    ] {
        let of =
            |policy| total_gib("llama-2-7b", tokens, &format!("--lora-r 8 --activations {policy}"));
        let (least, most) = (of("checkpoint"), of("keep"));
        let tokens = thousands(tokens.into());
        table.push(format!("| {tokens} | {peer} | {unsloth} | {least:.1} | {most:.1} |"));
    }
    assert_in_docs(&table);
}

/// The bars of QLoRA's figure, in MB, and its totals in GB.
#[test]
fn qlora_figure() {
    let mut table = vec![
        "| LLaMA | 4-bit model | Nibble | stored as theirs | optimizer | Nibble | total | Nibble | 8-bit moments |"
            .to_string(),
        "|---|---|---|---|---|---|---|---|---|".to_string(),
    ];
    for (config, name, d, layers, model, optimizer, total) in [
        ("llama-2-7b", "7B", 4096, 32, 5046, 1152u64, 6.9),
        ("llama-13b", "13B", 5120, 40, 8476, 1800, 11.3),
        ("llama-33b", "33B", 6656, 60, 19_302, 3510, 24.7),
        ("llama-65b", "65B", 8192, 80, 37_074, 5760, 45.0),
    ] {
        let flags = "--lora-r 64 --activations checkpoint";
        let plan = memory(config, 512, flags);
        let plain = memory(config, 512, &format!("{flags} --double-quant false"));
        let part = |plan: &Value, name: &str| plan["components"][name].as_u64().unwrap();
        let [ours, wide] = [&plan, &plain].map(|plan| plan["weight_bytes"].as_u64().unwrap());
        // Embeddings and head in 4 bytes instead of 2.
        let wide = wide + part(&plain, "embeddings and head");
        let (rest, moments) = (model - mb(wide), part(&plan, "AdamW moments (f32)"));
        assert!((300..600).contains(&rest), "{name}: {rest} MB of the figure are not explained");
        assert_eq!(8 * 64 * 18 * d * layers, optimizer << 20, "{name}: MB are MiB");
        let gib = plan["total_bytes"].as_u64().unwrap() as f64 / GIB;
        let packed = total_gib(config, 512, &format!("{flags} --optim adamw_8bit"));
        let [model, ours, wide, optimizer, moments] =
            [model, mb(ours), mb(wide), optimizer, mb(moments)].map(thousands);
        table.push(format!(
            "| {name} | {model} | {ours} | {wide} | {optimizer} | {moments} | {total:.1} | {gib:.1} | {packed:.1} |"
        ));
    }
    assert_in_docs(&table);
}

/// Megabytes as the QLoRA paper counts them: see its figure.
fn mb(bytes: u64) -> u64 {
    (bytes as f64 / (1 << 20) as f64).round() as u64
}

#[test]
fn single_figures() {
    let seven = memory("llama-2-7b", 512, "--lora-r 16 --activations checkpoint");
    let weights = thousands(mb(seven["weight_bytes"].as_u64().unwrap()));
    let gradients = mb(seven["components"]["block workspace"].as_u64().unwrap());
    let attention = "--target-modules q_proj,k_proj,v_proj,o_proj";
    let small = memory("llama-2-7b", 512, &format!("--lora-r 13 {attention}"));
    let lora = mb(small["components"]["LoRA weights (bf16)"].as_u64().unwrap());
    let tutorial = total_gib("llama-2-7b", 2048, "--lora-r 8 --activations checkpoint");
    assert_in_docs(&[
        "| source | what | published | Nibble's plan |".to_string(),
        "|---|---|---|---|".to_string(),
        format!(
            "| QLoRA paper, section 2 | 4-bit weights of a 7B model | 5,048 MB | {weights} MB |"
        ),
        format!("| | LoRA of 0.2 % of its weights | 26 MB | {lora} MB: r 13 on q, k, v and o |"),
        format!(
            "| | gradients of the adapters' inputs, a sequence of FLAN v2 | 567 MB, checkpointing 18 MB | {gradients} MB: 512 tokens, one block at a time |"
        ),
        format!(
            "| torchtune's tutorial | Llama-2-7B, r 8, 2,048 tokens | < 10 GB | {tutorial:.1} GiB |"
        ),
    ]);
}

/// What is trained, in all its copies.
fn part_of_lora(plan: &Value) -> u64 {
    let parts = plan["components"].as_object().unwrap().iter();
    let lora = parts.filter(|(name, _)| name.starts_with("LoRA ") || name.starts_with("AdamW "));
    lora.map(|(_, bytes)| bytes.as_u64().unwrap()).sum()
}

/// What offloading takes of the host, as docs/memory.md says below the longest contexts.
#[test]
fn offloaded_inputs_are_on_the_host() {
    let text = std::fs::read_to_string(root().join("docs/memory.md")).unwrap();
    for (config, layers, d, says) in [
        ("llama-3.1-8b", 32u64, 4096u64, "262 kB a token of 8B"),
        ("llama-3.3-70b", 80, 8192, "1.31 MB of 70B"),
    ] {
        let plan = memory(config, 1000, "--activations offload --embedding gpu");
        let bytes = plan["offloaded_bytes"].as_u64().unwrap();
        assert_eq!(bytes, 1000 * 2 * d * layers);
        let (kilo, mega) = (bytes as f64 / 1e6, bytes as f64 / 1e9);
        let token = if mega < 1.0 { format!("{kilo:.0} kB") } else { format!("{mega:.2} MB") };
        assert!(says.starts_with(&token) && text.contains(says), "{token}: {says}");
        assert!(plan["pinned_bytes"].as_u64().unwrap() >= bytes);
    }
}

#[test]
fn gpt_3() {
    let flags = "--quantization none --lora-r 4 --target-modules c_attn --activations checkpoint";
    let plan = memory("gpt-3-175b", 512, flags);
    let part = |name: &str| plan["components"][name].as_u64().unwrap();
    let (weights, file) = (plan["weight_bytes"].as_u64().unwrap(), part("LoRA weights (bf16)"));
    // What the command prints beside the plan: of the paper's two sizes the larger.
    let full = &plan["full_fine_tuning"];
    let parameters = full["parameters"].as_u64().unwrap();
    assert_eq!(full["bytes"].as_u64(), Some(8 * parameters));
    // Norms and biases are in f32.
    assert!((weights as f64 / (2 * parameters) as f64 - 1.0).abs() < 1e-3);
    assert_eq!(full["lora_bytes"].as_u64().unwrap() - weights, part_of_lora(&plan));
    let state =
        part("LoRA master (f32)") + part("LoRA gradients (f32)") + part("AdamW moments (f32)");
    let gb = |bytes: u64| format!("{:.0} GB", bytes as f64 / 1e9);
    let mb = |bytes: u64| format!("{:.1} MB", bytes as f64 / 1e6);
    assert_in_docs(&[
        "| | bytes | LoRA paper |".to_string(),
        "|---|---|---|".to_string(),
        format!("| weights, 2 B each | {} | 350 GB |", gb(weights)),
        format!(
            "| full fine-tuning: weights, gradient and two moments at 2 B | {} | |",
            gb(8 * parameters)
        ),
        format!(
            "| the same without the gradient, which can be used layer by layer | {} | 1.2 TB |",
            gb(6 * parameters)
        ),
        format!(
            "| LoRA: weights, and master, gradient and moments of A and B at 4 B | {} | 350 GB |",
            gb(weights + file + state)
        ),
        format!("| adapter file, r 4 on q and v | {} | 35 MB |", mb(file)),
    ]);
}
