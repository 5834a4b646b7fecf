//! What large models would take of a GPU, from their config.json alone: the plan against arithmetic
//! that is written out here, and against the figures that were estimated for these models before.
//!
//! `tests/data/configs` holds the published dimensions. No GPU is needed.

use std::process::Command;

use serde_json::Value;

use crate::memory_cli::region_bytes;

const GIB: f64 = (1u64 << 30) as f64;

/// Dimensions under the letters of docs/maths.md.
#[derive(Clone, Copy)]
struct Shape {
    config: &'static str,
    d: usize,
    layers: usize,
    heads: usize,
    f: usize,
    v: usize,
    /// Columns of q, and of k.
    q: usize,
    kv: usize,
    qkv_bias: bool,
    /// Weights of the norms of q and k.
    qk_norms: usize,
    /// Norms behind attention and the MLP.
    post_norms: bool,
    /// Norms of a block besides those of q and k.
    norms: usize,
    /// Pairs of rotary tables.
    rotaries: usize,
    tied: bool,
    /// q, k and v are one linear.
    fused_qkv: bool,
    /// Gate and up are one linear.
    fused_mlp: bool,
    /// Elements of a head that are rotated.
    turned: usize,
}

const LLAMA_8B: Shape = Shape {
    config: "llama-3.1-8b",
    d: 4096,
    layers: 32,
    heads: 32,
    f: 14_336,
    v: 128_256,
    q: 4096,
    kv: 1024,
    qkv_bias: false,
    qk_norms: 0,
    post_norms: false,
    norms: 2,
    rotaries: 1,
    tied: false,
    fused_qkv: false,
    fused_mlp: false,
    turned: 128,
};
const QWEN_32B: Shape = Shape {
    config: "qwen2.5-32b",
    d: 5120,
    layers: 64,
    heads: 40,
    f: 27_648,
    v: 152_064,
    q: 5120,
    qkv_bias: true,
    ..LLAMA_8B
};
const LLAMA_70B: Shape = Shape {
    config: "llama-3.3-70b",
    d: 8192,
    layers: 80,
    heads: 64,
    f: 28_672,
    q: 8192,
    ..LLAMA_8B
};
const QWEN3_8B: Shape =
    Shape { config: "qwen3-8b", layers: 36, f: 12_288, v: 151_936, qk_norms: 2 * 128, ..LLAMA_8B };
const GEMMA2_9B: Shape = Shape {
    config: "gemma-2-9b",
    d: 3584,
    layers: 42,
    heads: 16,
    v: 256_000,
    kv: 2048,
    turned: 256,
    post_norms: true,
    norms: 4,
    tied: true,
    ..LLAMA_8B
};
const GEMMA3_27B: Shape = Shape {
    config: "gemma-3-27b-text",
    d: 5376,
    layers: 62,
    f: 21_504,
    v: 262_208,
    kv: 2048,
    qk_norms: 2 * 128,
    post_norms: true,
    norms: 4,
    rotaries: 2,
    tied: true,
    ..LLAMA_8B
};
const PHI4: Shape = Shape {
    config: "phi-4",
    d: 5120,
    layers: 40,
    heads: 40,
    f: 17_920,
    v: 100_352,
    q: 5120,
    kv: 1280,
    fused_qkv: true,
    fused_mlp: true,
    ..LLAMA_8B
};
const OLMO3_7B: Shape = Shape {
    config: "olmo-3-7b",
    f: 11_008,
    v: 100_278,
    kv: 4096,
    qk_norms: 2 * 4096,
    post_norms: true,
    rotaries: 2,
    ..LLAMA_8B
};
const GLM4_9B: Shape = Shape {
    config: "glm-4-9b-0414",
    layers: 40,
    f: 13_696,
    v: 151_552,
    kv: 256,
    qkv_bias: true,
    post_norms: true,
    norms: 4,
    fused_mlp: true,
    turned: 64,
    ..LLAMA_8B
};

/// Adapters of rank 16 are on all linears.
const RANK: usize = 16;
/// Columns that they have behind a row: up to four of them fit into a line of the cache.
const ROOM: usize = 64;
const TILE: usize = 4096;

impl Shape {
    /// (in, out) of a block's linears.
    fn linears(&self) -> Vec<(usize, usize)> {
        let Shape { d, f, q, kv, .. } = *self;
        let projections =
            if self.fused_qkv { vec![(d, q + 2 * kv)] } else { vec![(d, q), (d, kv), (d, kv)] };
        let gate_up = if self.fused_mlp { vec![(d, 2 * f)] } else { vec![(d, f); 2] };
        [projections, vec![(q, d)], gate_up, vec![(f, d)]].concat()
    }

    /// Linears that make q, k and v.
    fn projections(&self) -> usize {
        if self.fused_qkv { 1 } else { 3 }
    }

    /// 4 bits a weight, a byte for 64 of them, 4 bytes for 256 such bytes, and an offset; embedding
    /// and head in bf16, norms and biases in f32.
    fn weights(&self) -> usize {
        let packed = |(input, output): (usize, usize)| {
            let (n, blocks) = (input * output, input * output / 64);
            n / 2 + blocks + 4 * blocks.div_ceil(256) + 4
        };
        let linears: usize = self.linears().into_iter().map(packed).sum();
        let biases = if self.qkv_bias { 4 * (self.q + 2 * self.kv) } else { 0 };
        let head_norms = 4 * self.qk_norms;
        let tables = if self.tied { 1 } else { 2 };
        self.layers * (linears + self.norms * 4 * self.d + biases + head_norms)
            + 4 * self.d
            + tables * 2 * self.v * self.d
    }

    /// Bytes of what is kept of a token by the first half of a block and by the MLP. Behind the rows of
    /// attention's output there is room for `x·Aᵀ`.
    fn saved(&self) -> (usize, usize) {
        let Shape { d, q, kv, .. } = *self;
        let projected = if self.post_norms { d } else { 0 };
        let ranks = (self.projections() + 1) * RANK;
        let first = 2 * ((q + 2 * kv) + q + ROOM + ranks + d + projected) + 4 * self.heads;
        // `x·Aᵀ` of gate, up and down; or of two, and room behind gate and up for t of both.
        let ranks = if self.fused_mlp { 2 * RANK + ROOM } else { 3 * RANK };
        (first, 2 * (2 * self.f + ranks + projected))
    }

    /// Those of them that attention makes.
    fn attended(&self) -> usize {
        2 * (self.q + ROOM) + 4 * self.heads
    }

    /// Bytes of a run on `tokens`.
    fn total(&self, tokens: usize, policy: &str) -> usize {
        let (Shape { d, q, kv, .. }, tile) = (*self, tokens.min(TILE));
        let qkv = q + 2 * kv;
        let parameters: usize = self.linears().iter().map(|(i, o)| RANK * (i + o)).sum();
        let adapter = 18 * self.layers * parameters;
        let (first, second) = self.saved();
        let (inputs, activations) = match policy {
            "keep" => (self.layers + 1, self.layers * tokens * (first + second)),
            "checkpoint" => (self.layers + 1, tokens * first + tile * second),
            "offload" => (3, tokens * first + tile * second),
            // Two slots in the place of one buffer that layers share.
            _ => (3, tokens * (first + self.attended()) + tile * second),
        };
        // Stream, norm, q k v, with room for t of the stream's (of what goes through a norm before it
        // is added, where there is one) and of q, k and v, and t of three side by side; cos and sin;
        // δ of attention.
        let projected = if self.post_norms { d } else { 0 };
        let tables = self.rotaries * 4 * self.turned;
        let projections = self.projections();
        let ranks = 2 * ROOM + projections * RANK;
        let gradients = 2 * (d + d.max(q) + qkv + projected + ranks) + tables + 4 * self.heads;
        let gradients = tokens * gradients;
        // q, k and v as attention reads them, where norms lie between.
        let normed = if self.qk_norms > 0 { tokens * 2 * qkv } else { 0 };
        // The output of a norm, with room for `x·Aᵀ` of q, k and v, and its statistics.
        let norm = tokens * (2 * (d + ROOM) + 4 * 2);
        // A of q, k and v one below the other, and its gradient.
        let stacked = if self.fused_qkv { 0 } else { (2 + 4) * 3 * RANK * d };
        let room = if self.post_norms { 0 } else { ROOM };
        let tiles = if tokens > TILE { 2 * tile * (2 * d + room) } else { 0 };
        // h, and the gradient of the gate where that is not made in place of gate and up.
        let mlp_rooms = if self.fused_mlp { 1 } else { 2 };
        let mlp = 2 * tile * (2 * self.f + mlp_rooms * ROOM) + tiles;
        let rows = ((128usize << 20).div_ceil(2 * self.v) / 256 * 256).min(tokens);
        let head = rows * (2 * (self.v + 3 * d) + 4 * 6);
        let widest = if self.fused_mlp { 2 * self.f } else { self.f };
        // q, k and v are one matrix, where they are three linears, too.
        let dequantized = 2 * 2 * (d + ROOM) * widest.max(qkv);
        let (cublas, context) = (32 << 20, 460 << 20);
        let run = adapter
            + inputs * tokens * 2 * d
            + activations
            + gradients
            + normed
            + norm
            + stacked
            + mlp
            + head;
        self.weights() + run + dequantized + cublas + context
    }

    fn planned(&self, tokens: usize, policy: &str) -> Value {
        self.planned_with(tokens, policy, &[])
    }

    fn planned_with(&self, tokens: usize, policy: &str, flags: &[&str]) -> Value {
        let root = env!("CARGO_MANIFEST_DIR");
        let config = format!("{root}/tests/data/configs/{}.json", self.config);
        let mut command = Command::new(env!("CARGO_BIN_EXE_nibble"));
        command.args(["memory", "--model", &config, "--device", "cuda", "--json"]);
        command.args(["--max-length", &tokens.to_string(), "--activations", policy]).args(flags);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

#[test]
fn a_plan_is_the_arithmetic_of_its_formulas() {
    let with_norms = [QWEN3_8B, GEMMA2_9B, GEMMA3_27B, OLMO3_7B, GLM4_9B];
    for shape in [LLAMA_8B, QWEN_32B, LLAMA_70B, PHI4].into_iter().chain(with_norms) {
        for (tokens, policy) in [
            (512, "keep"),
            (4096, "keep"),
            (4096, "checkpoint"),
            (4096, "offload"),
            (32_768, "checkpoint"),
            (32_768, "offload"),
            (32_768, "offload-attention"),
        ] {
            let plan = shape.planned(tokens, policy);
            let (got, expected) =
                (plan["total_bytes"].as_u64().unwrap(), shape.total(tokens, policy) as u64);
            // What the formulas leave out: padding, token ids, partial sums, widened adapters.
            let rest = got as i64 - expected as i64;
            let name = shape.config;
            assert!((0..16 << 20).contains(&rest), "{name} {tokens} {policy}: {got}, {expected}");
            let outside = plan["offloaded_bytes"].as_u64().unwrap();
            let waiting = match policy {
                "offload" => 2 * shape.d,
                "offload-attention" => 2 * shape.d + shape.attended(),
                _ => 0,
            };
            assert_eq!(outside, (shape.layers * tokens * waiting) as u64);
        }
    }
}

/// Embedding and head on the host: what they take less, and a head in tiles works in more.
#[test]
fn a_head_on_the_host_works_in_tiles() {
    for (shape, tokens) in [(LLAMA_8B, 512), (LLAMA_8B, 4096), (QWEN_32B, 4096), (LLAMA_70B, 4096)]
    {
        let total = |place: &str| {
            let plan = shape.planned_with(tokens, "checkpoint", &["--embedding", place]);
            plan["total_bytes"].as_u64().unwrap() as i64
        };
        let (d, v) = (shape.d, shape.v);
        let whole_rows = ((128 << 20) / (2 * v) / 256 * 256).min(tokens);
        let whole = whole_rows * (2 * (v + 3 * d) + 4 * 6);
        let rows = (4 * whole_rows).min(2048).min(tokens);
        // Logits of a tile, input, norm and gradient in bf16, its sum and six numbers in f32.
        let tiles = rows * (2 * (8192 + 3 * d) + 4 * d + 4 * 6);
        let moved = 2 * 2 * v * d;
        let rest = total("gpu") - total("host") - (moved + whole) as i64 + tiles as i64;
        assert!(rest.abs() < 1 << 20, "{} {tokens}: {rest}", shape.config);
    }
}

/// GiB that were estimated before there was a plan (r = 16, tiles of 4,096). The estimate also has a
/// final norm of all tokens, an f32 sum for dq and norm2 outside of the tiles, 4·D + 4·q + 2·D bytes
/// a token that no plan needs: it lies above where contexts are long. Where all is kept it has the
/// outputs of all norms, which are made again instead.
#[test]
fn plans_are_near_the_figures_that_were_estimated() {
    for (shape, tokens, policy, estimated) in [
        (LLAMA_8B, 512, "keep", 8.5),
        (LLAMA_8B, 4096, "keep", 20.8),
        (LLAMA_8B, 8192, "keep", 34.6),
        (LLAMA_8B, 512, "checkpoint", 7.0),
        (LLAMA_8B, 4096, "checkpoint", 8.7),
        (LLAMA_8B, 32_768, "checkpoint", 18.7),
        (QWEN_32B, 512, "checkpoint", 21.5),
        (QWEN_32B, 4096, "checkpoint", 24.8),
        (QWEN_32B, 32_768, "checkpoint", 46.1),
        (LLAMA_70B, 512, "checkpoint", 42.2),
        (LLAMA_70B, 4096, "checkpoint", 48.0),
        (LLAMA_70B, 32_768, "checkpoint", 88.9),
    ] {
        let planned = shape.planned(tokens, policy)["total_bytes"].as_u64().unwrap() as f64 / GIB;
        let norms = shape.layers * tokens * 2 * 2 * shape.d;
        let norms = if policy == "keep" { norms as f64 / GIB } else { 0.0 };
        let estimated = estimated - norms;
        let difference = planned / estimated - 1.0;
        let name = shape.config;
        assert!(difference.abs() < 0.07, "{name} {tokens} {policy}: {planned:.2} {estimated}");
        if std::env::var_os("SHOW").is_some() {
            println!("{name} {tokens} {policy} {planned:.2} {estimated} {difference:+.3}");
        }
    }
}

/// What `nibble memory --device cuda` says of a model.
fn says(config: &str, flags: &str) -> String {
    says_of("cuda", config, flags)
}

/// What `nibble memory` says of a model on a device.
fn says_of(device: &str, config: &str, flags: &str) -> String {
    let config = format!("{}/tests/data/configs/{config}.json", env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_nibble"));
    command.args(["memory", "--model", &config, "--device", device]);
    let output = command.args(flags.split(' ')).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    // A table of what would fit is printed in any case, and the status tells that this does not.
    let refused = flags.contains("--fit") && text.contains("does not fit: ");
    assert_eq!(output.status.code(), Some(i32::from(refused)), "{text}");
    text
}

/// 32B at 4,096 tokens on a card of 24 GiB: with streamed weights, or by offloading.
#[test]
fn the_fitter_shows_what_streaming_and_offloading_buy() {
    let fit = |flags: &str| says("qwen2.5-32b", &format!("--max-length 4096 --fit {flags}"));
    let checkpoint = "--weights resident --activations checkpoint";
    let text = fit(&format!("--budget 23.8GiB {checkpoint} --embedding gpu"));
    assert!(text.contains("does not fit: plan needs 24.0 GiB, budget is 23.8 GiB: "), "{text}");
    // The embedding on the host is the smallest change that is enough.
    assert!(text.contains("hint: `--embedding host-input` would need "), "{text}");
    let offload = text.lines().find(|line| line.starts_with("--activations offload ")).unwrap();
    assert!(offload.contains("21.6 GiB"), "{text}");
    let text = fit(&format!("--budget 24GiB {checkpoint}"));
    assert!(text.contains("fits with 23.5 GiB: 0 of 64 blocks"), "{text}");
    assert!(text.contains("keep their activations, the input embedding on the host"), "{text}");
    // Mixed: blocks that keep beside blocks that offload.
    let text = fit("--budget 24GiB --weights resident");
    let mixed = "fits with 23.5 GiB: 4 of 64 blocks keep their activations, ";
    let waits =
        " of inputs and attention offloaded to pinned memory, the input embedding on the host";
    assert!(text.contains(mixed) && text.contains(waits), "{text}");
    let text = fit("--budget 24GiB");
    assert!(text.contains("29 of 64 blocks keep their activations, "), "{text}");
    let waits = "offloaded to pinned memory, weights streamed from their file, the input embedding";
    assert!(text.contains(waits), "{text}");
}

/// 70B on a card of 24 GiB, 8,192 tokens a step; `src/plan/work.rs` checks the arithmetic.
#[test]
fn streamed_70b_fits_24_gib_and_is_bound_by_computation() {
    let flags = "--max-length 8192 --activations checkpoint --weights stream --budget 24GiB";
    let text = says("llama-3.3-70b", flags);
    assert!(text.contains("fits 24.0 GiB with 2.2 GiB to spare"), "{text}");
    assert!(text.contains("a step copies 64.1 GiB to the GPU"), "{text}");
    assert!(text.contains("It is bound by computation"), "{text}");
    let blocks =
        2 * LLAMA_70B.linears().iter().map(|(input, output)| input * output).sum::<usize>();
    let plan: serde_json::Value =
        serde_json::from_str(&says("llama-3.3-70b", &format!("{flags} --json"))).unwrap();
    let pinned = plan["pinned_bytes"].as_u64().unwrap() as f64;
    // Ids, rows, and tables of cos and sin are staged, too.
    let staged = 4.0 * (8192.0 * 128.0 + 5.0 * 8192.0);
    let on_their_way = 8.0 * (pinned - staged) / blocks as f64;
    assert!((on_their_way - 4.127).abs() < 0.003, "the next two blocks: {on_their_way}");
    let weights = plan["weight_bytes"].as_u64().unwrap() as usize;
    let tables = 2 * 2 * LLAMA_70B.v * LLAMA_70B.d + (2 * 80 + 1) * 4 * LLAMA_70B.d;
    let bits = 8.0 * (weights - tables) as f64 / blocks as f64;
    assert!((bits - 4.127).abs() < 0.001, "two blocks of {bits} bits a weight");
}

/// However long a pass, a kept MLP is a few regions, whose pieces are the tiles.
#[test]
fn a_long_plan_has_as_few_regions_as_a_short_one() {
    let Shape { layers, f, .. } = LLAMA_8B;
    for device in ["cpu", "cuda"] {
        let regions = |tokens: usize| -> Vec<Value> {
            let flags = format!("--activations keep --json --max-length {tokens}");
            let plan: Value =
                serde_json::from_str(&says_of(device, "llama-3.1-8b", &flags)).unwrap();
            let regions = plan["regions"].as_array().unwrap().clone();
            let bytes = regions.iter().map(region_bytes).sum();
            assert_eq!(Some(bytes), plan["arena_bytes"].as_u64());
            regions
        };
        let (short, long) = (regions(8192), regions(10_000_000));
        // The last tile is shorter: gate, up and x·Aᵀ once more.
        assert_eq!(long.len(), short.len() + 3 * layers, "{device}");
        let find = |name: &str| long.iter().find(|region| region["name"] == name).unwrap();
        let (whole, last) = (find("layer.31.gate"), find("layer.31.last_tile.gate"));
        assert_eq!((&whole["count"], &last["count"]), (&Value::from(2441), &Value::Null));
        let elements = |region: &Value| region["elements"].as_u64().unwrap() as usize;
        assert_eq!(elements(whole), 4096 * f);
        assert_eq!(2441 * elements(whole) + elements(last), 10_000_000 * f);
    }
}

/// The flags that `--fit` prints lead to the plan that it printed them for: with the micro-batch, the
/// mix, the places of weights and embedding, and the pieces.
#[test]
fn the_printed_flags_lead_to_the_printed_plan() {
    for (config, budget, flags) in [
        ("llama-3.1-8b", "24GiB", "--max-length 256 --gradient-accumulation-steps 24"),
        ("llama-3.1-8b", "16GiB", "--max-length 1024 --gradient-accumulation-steps 6"),
        ("qwen2.5-32b", "24GiB", "--max-length 256 --gradient-accumulation-steps 16"),
        // Weights that stay dequantized: not, of some blocks, beside a mix.
        (
            "qwen3-8b",
            "14455MiB",
            "--max-length 128 --gradient-accumulation-steps 1 --dequantized-blocks 0",
        ),
        ("llama-3.1-8b", "12GiB", "--max-length 64 --gradient-accumulation-steps 4"),
        (
            "gemma-2-9b",
            "24935MiB",
            "--max-length 8192 --mlp-tile-length 512 --gradient-accumulation-steps 1",
        ),
    ] {
        let length = &flags[..flags.find(" --grad").unwrap()];
        let fit = says(config, &format!("{flags} --fit --json --budget {budget}"));
        let fit: Value = serde_json::from_str(&fit).unwrap();
        let fastest = &fit["fit"]["fastest"];
        for plan in [&fit["fit"]["plan"], fastest] {
            if plan.is_null() {
                continue;
            }
            let flags = plan["flags"].as_str().unwrap();
            let again: Value =
                serde_json::from_str(&says(config, &format!("{length} {flags} --json"))).unwrap();
            assert_eq!(again["total_bytes"], plan["bytes"], "{config} {budget}: {flags}");
            assert_eq!(again["kept_blocks"], plan["kept"], "{flags}");
            assert_eq!(again["streamed"], plan["stream"], "{flags}");
            assert_eq!(again["mlp_tile_tokens"], plan["mlp_tile_tokens"], "{flags}");
            assert_eq!(again["pinned_bytes"], plan["pinned_bytes"], "{flags}");
        }
    }
}

/// A mix that `auto` finds has a row of its own beside the ways that treat all blocks alike.
#[test]
fn a_chosen_mix_has_a_row_of_its_own() {
    for (device, config, flags, others) in [
        (
            "cpu",
            "llama-3.1-8b",
            "--threads 64 --weights resident --budget 24GiB",
            "rest recomputed",
        ),
        ("cuda", "qwen2.5-32b", "--weights resident --budget 24GiB", "rest both offloaded"),
        ("cuda", "qwen2.5-32b", "--weights stream --budget 24GiB", "rest both offloaded"),
        ("cuda", "llama-3.1-8b", "--weights auto --budget 24GiB", "none"),
    ] {
        let flags = format!("--max-length 4096 --fit {flags}");
        let fit = says_of(device, config, &format!("{flags} --json"));
        let fit: Value = serde_json::from_str(&fit).unwrap();
        let (plan, text) = (&fit["fit"]["plan"], says_of(device, config, &flags));
        let mixed = |line: &&str| line.contains(" kept, ") && line.starts_with(char::is_numeric);
        let rows: Vec<&str> = text.lines().filter(mixed).collect();
        if others == "none" {
            assert!(rows.is_empty(), "{text}");
            continue;
        }
        let weights = if plan["stream"] == true { "streamed" } else { "resident" };
        let name = format!("{} kept, {others}, {weights} ", plan["kept"]);
        let size = format!(" {:.1} GiB ", plan["bytes"].as_f64().unwrap() / GIB);
        assert!(rows.len() == 1 && rows[0].starts_with(&name), "{name}: {text}");
        assert!(rows[0].contains(&size), "{size}: {text}");
    }
}

/// What `--fit` says of the host beside the limits of offloading: 2·D bytes a token and block, and of what
/// attention makes 2·(Q + R) + 4·H.
#[test]
fn limits_of_offloading_tell_what_they_pin() {
    let fit = says("llama-3.1-8b", "--fit --json --budget 80GiB --activations offload");
    let fit: Value = serde_json::from_str(&fit).unwrap();
    for way in fit["fit"]["ways"].as_array().unwrap() {
        let (tokens, pinned) =
            (way["longest_document"].as_u64().unwrap(), way["pinned_bytes"].as_u64().unwrap());
        let attended = LLAMA_8B.attended() as u64;
        let of_token = match way["others"].as_str().unwrap() {
            "offload" => 2 * 4096,
            "offload-attention" => 2 * 4096 + attended,
            _ => 0,
        };
        let inputs = of_token * 32 * tokens;
        let tables = 2 * 2 * 4096 * 128_256;
        let blocks = if way["stream"] == true { 2 * (112 << 20) } else { 0 };
        // Token ids and rows, cos and sin.
        let staged = tokens * 4 * (8 + 2 * 64) + (1 << 20);
        let rest = pinned - inputs;
        assert!(rest <= tables + blocks + staged && (blocks == 0 || rest > blocks / 2), "{way}");
    }
    let text = says("llama-3.1-8b", "--fit --budget 80GiB --activations offload");
    assert!(text.contains(" pins ") && text.contains("pinned host memory that"), "{text}");
}

/// Sums that wrapped around would make room of what no machine has.
#[test]
fn a_plan_of_more_than_can_be_counted_does_not_fit() {
    let place = crate::training::Workplace::new();
    let path = place.path("model/config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (key, value) in [
        ("num_hidden_layers", 1000u64),
        ("hidden_size", 1 << 22),
        ("num_attention_heads", 1 << 15),
        ("num_key_value_heads", 1 << 15),
        ("head_dim", 128),
    ] {
        config[key] = value.into();
    }
    std::fs::write(place.path("huge.json"), config.to_string()).unwrap();
    let flags = ["--model", "huge.json", "--max-length", "268435456", "--activations", "keep"];
    let command = place.nibble(&[&["memory", "--budget", "1000000TiB"][..], &flags].concat());
    let (code, text) = crate::training::fail(command);
    assert!(code == 1 && text.contains("plan needs 16777216.0 TiB"), "{text}");
}
