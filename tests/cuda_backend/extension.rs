//! Products that have the adapter's share in them, beside the same step in separate products.

use nibble::adapter::{Adapter, LoraConfig, LoraTarget};
use nibble::checkpoint::Checkpoint;
use nibble::model::weights::Weights;
use nibble::model::{Model, Variant};
use nibble::plan::{AdapterRegion, Policy, Settings};

use super::emulator::PTX;
use super::golden::{CASES, Case};
use super::{Gpu, error_in_norm, gpu, model, nf4, settings};

const KEEP: [Policy; 1] = [Policy::Keep];
/// Rows of a tile of the MLP that divides no batch.
const TILE: usize = 11;

/// An adapter on all linears with every rank that a layout could mistake: even, odd, above the
/// room of its neighbours. B is not zero.
fn adapter(case: &Case, r: usize) -> Adapter {
    with_ranks(
        case,
        r,
        &[("0.+(down_proj|mlp.c_proj|output_linear)", 11), ("1.+(k_proj|qkv_proj|c_fc)", 3)],
    )
}

fn with_ranks(case: &Case, r: usize, pattern: &[(&str, usize)]) -> Adapter {
    let rank_pattern = pattern.iter().map(|&(name, rank)| (name.into(), rank)).collect();
    let config = LoraConfig { r, rank_pattern, ..LoraConfig::default() };
    let mut adapter = Adapter::init(config, &case.spec(), 5).unwrap();
    for (index, tensors) in adapter.tensors.iter_mut().enumerate() {
        let value = |i: usize| ((i * 31 + index * 7) % 23) as f32 / 230.0 - 0.05;
        tensors.b.iter_mut().enumerate().for_each(|(i, b)| *b = value(i));
    }
    adapter
}

/// Loss and gradients of a step.
fn step(gpu: &Gpu, case: &Case, adapter: &Adapter, plan: Settings) -> (f64, Vec<f32>) {
    let (batch, _) = case.tensors("ref.safetensors").batch("input_ids", "labels");
    let mut model = model(gpu, case, Some(nf4(true)), None, plan);
    model.parameters_mut().load(adapter);
    let loss = model.forward_backward(&batch, 1.0 / batch.num_targets() as f32, 0).unwrap().sum;
    (loss, model.parameters().all_values(AdapterRegion::Gradients).unwrap().into_owned())
}

fn plan(case: &Case, adapter: &Adapter, policies: &[Policy]) -> Settings {
    Settings { targets: adapter.targets.clone(), ..settings(case, None, policies, true) }
}

/// A plan for dropout, which none is applied in, leaves the adapters to products of their own.
fn separate(plan: Settings) -> Settings {
    Settings { lora_dropout: true, ..plan }
}

/// The same step in f32.
fn reference(case: &Case, adapter: &Adapter, plan: Settings) -> (f64, Vec<f32>) {
    let (batch, _) = case.tensors("ref.safetensors").batch("input_ids", "labels");
    let checkpoint = Checkpoint::open(&case.path).unwrap();
    let weights = Weights::load(&checkpoint, &case.spec(), Some(&nf4(true)), None).unwrap();
    let plan = Settings { bf16_working: false, ..plan };
    let mut model = Model::new(case.spec(), weights, plan).unwrap();
    model.parameters_mut().load(adapter);
    let loss = model.forward_backward(&batch, 1.0 / batch.num_targets() as f32, 0).unwrap().sum;
    (loss, model.parameters().gradients().to_vec())
}

#[test]
fn one_product_for_base_and_adapter_is_as_exact_as_two() {
    let Some(gpu) = gpu() else { return };
    for (name, r) in CASES.into_iter().zip([16, 5, 8, 1, 16, 6, 8, 3, 12, 8, 4]) {
        let case = Case::open(name);
        let adapter = adapter(&case, r);
        let plan = plan(&case, &adapter, &[Policy::Keep]);
        let (expected_loss, expected) = reference(&case, &adapter, plan.clone());
        let error = |plan| {
            let (loss, gradients) = step(&gpu, &case, &adapter, plan);
            assert!((loss / expected_loss - 1.0).abs() < 5e-3, "{name}: {loss}, {expected_loss}");
            error_in_norm(&gradients, &expected)
        };
        let (one, two) = (error(plan.clone()), error(separate(plan)));
        assert!(one != two, "{name}: the same products");
        assert!(one < 1.2 * two, "{name}, rank {r}: off by {one:e}, separately by {two:e}");
    }
}

/// Ranks that MLPs have kernels for beside those that they have none for: forward alone where one adapter's
/// rank is 4, nowhere where it is 5 and `x·Aᵀ` of the down projection begins at an odd column.
#[test]
fn what_is_kept_does_not_change_a_bit_of_them() {
    let Some(gpu) = gpu() else { return };
    for (name, r, odd) in [
        ("qwen2_s0", 6, 5),
        ("gpt2_s0", 6, 5),
        ("phi3_s0", 16, 4),
        ("qwen2_s0", 16, 5),
        ("qwen2_s0", 16, 4),
        ("gemma2_s0", 8, 4),
    ] {
        let case = Case::open(name);
        let other = match name {
            "gpt2_s0" => "1.mlp.c_fc",
            "phi3_s0" => "1.mlp.gate_up_proj",
            _ => "1.mlp.gate_proj",
        };
        let adapter = with_ranks(&case, r, &[(other, odd), ("0.+(k_proj|c_attn|qkv_proj)", 3)]);
        for tile in [None, Some(TILE)] {
            let run = |policies: &[Policy]| {
                let plan = plan(&case, &adapter, policies);
                step(&gpu, &case, &adapter, Settings { mlp_tile_length: tile, ..plan })
            };
            let kept = run(&[Policy::Keep]);
            for policy in [Policy::Checkpoint, Policy::Attention, Policy::Offload] {
                assert!(run(&[policy]) == kept, "{name}, tiles of {tile:?}: {policy:?}");
            }
        }
    }
}

/// What every run checks before its first step. A product with the adapter in it has another shape
/// than one without, and so may have another order of its sums.
#[test]
fn a_fresh_adapter_does_not_change_a_bit() {
    let Some(gpu) = gpu() else { return };
    for (name, quantize) in CASES.into_iter().zip([true, false].into_iter().cycle()) {
        let case = Case::open(name);
        let trained = adapter(&case, if quantize { 7 } else { 16 });
        let mut fresh = trained.clone();
        fresh.tensors.iter_mut().for_each(|tensors| tensors.b.fill(0.0));
        let (batch, _) = case.tensors("ref.safetensors").batch("input_ids", "labels");
        let together = plan(&case, &fresh, &KEEP);
        for plan in [together.clone(), separate(together)] {
            let format = quantize.then(|| nf4(true));
            let mut model = model(&gpu, &case, format, None, plan);
            let losses = |model: &mut Model<Gpu>, adapter: &Adapter| {
                model.parameters_mut().load(adapter);
                [model.evaluate(&batch, Variant::Base), model.evaluate(&batch, Variant::Adapted)]
                    .map(|losses| losses.unwrap().sum)
            };
            let [base, adapted] = losses(&mut model, &fresh);
            assert_eq!(base.to_bits(), adapted.to_bits(), "{name}: {base}, {adapted}");
            let [again, adapted] = losses(&mut model, &trained);
            assert_eq!(base.to_bits(), again.to_bits(), "{name}: an adapter in the base");
            assert_ne!(base.to_bits(), adapted.to_bits(), "{name}");
        }
    }
}

/// `[m, n, k]` of the products of a step.
fn products(gpu: &Gpu, case: &Case, adapter: &Adapter, plan: Settings) -> Vec<[usize; 3]> {
    gpu.driver().forget_products();
    step(gpu, case, adapter, plan);
    gpu.driver().products()
}

/// How many of the wanted products there are, each counted once.
fn found(products: &[[usize; 3]], mut wanted: Vec<[usize; 3]>) -> usize {
    let found = products.iter().filter(|&shape| {
        let at = wanted.iter().position(|wanted| wanted == shape);
        at.map(|at| wanted.swap_remove(at)).is_some()
    });
    found.count()
}

/// A product's shape, from the widths of its linears' inputs and outputs, and ranks.
type Shape<'a> = &'a dyn Fn(usize, usize, usize) -> [usize; 3];

#[test]
fn the_adapter_has_no_product_of_its_own_where_there_is_room() {
    let Some(gpu) = gpu() else { return };
    // Ranks that no width of these models is a sum of.
    for (name, r) in [("llama_s0", 7), ("gpt2_s0", 7)] {
        let case = Case::open(name);
        let adapter = adapter(&case, r);
        let tokens = case.tensors("ref.safetensors").batch("input_ids", "labels").0.tokens();
        let y: Shape = &|inner, outer, ranks| [tokens, outer, inner + ranks];
        let dx: Shape = &|inner, outer, ranks| [tokens, inner, outer + ranks];
        let y_alone: Shape = &|_, outer, ranks| [tokens, outer, ranks];
        let dx_alone: Shape = &|inner, _, ranks| [tokens, inner, ranks];
        let separate = products(&gpu, &case, &adapter, separate(plan(&case, &adapter, &KEEP)));
        let together = products(&gpu, &case, &adapter, plan(&case, &adapter, &KEEP));
        let one_by_one = |shape: Shape| -> Vec<[usize; 3]> {
            let of =
                |t: &LoraTarget| shape(t.shape.in_features, t.shape.out_features, t.shape.rank);
            adapter.targets.iter().map(of).collect()
        };
        // The first block's inputs need no gradient: the embedding is frozen.
        let first = adapter.targets.iter().filter(|t| t.layer == 0 && reads_norm1(&t.module));
        let (targets, first) = (adapter.targets.len(), first.count());
        let alone = [one_by_one(y_alone), one_by_one(dx_alone)].concat();
        assert_eq!(found(&separate, alone.clone()), 2 * targets - first, "{name}");
        assert_eq!(found(&together, alone), 0, "{name}");
        // q, k and v are one product, and so is the gradient of what they read.
        let groups = groups(&adapter);
        let grouped = |shape: Shape, first: usize| -> Vec<[usize; 3]> {
            let of = |g: &&Group| shape(g.inner, g.outer, g.ranks);
            let backward = |g: &&Group| g.layer >= first || !g.reads_norm1;
            groups.iter().filter(backward).map(|g| of(&g)).collect()
        };
        for wanted in [grouped(y, 0), grouped(dx, 1)] {
            assert_eq!(found(&together, wanted.clone()), wanted.len(), "{name}: {wanted:?}");
        }
    }
}

/// x is read once for `x·Aᵀ` of q, k and v, once for gate and up; and once for the gradients of their A.
#[test]
fn linears_that_read_the_same_rows_read_them_once() {
    let Some(gpu) = gpu() else { return };
    let case = Case::open("llama_s0");
    let adapter = adapter(&case, 7);
    let tokens = case.tensors("ref.safetensors").batch("input_ids", "labels").0.tokens();
    let all = products(&gpu, &case, &adapter, plan(&case, &adapter, &KEEP));
    for layer in 0..case.spec().num_layers {
        for part in [["q_proj", "k_proj", "v_proj"].as_slice(), &["gate_proj", "up_proj"]] {
            let here = adapter.targets.iter().filter(|t| t.layer == layer);
            let here: Vec<_> =
                here.filter(|t| part.iter().any(|p| t.module.ends_with(p))).collect();
            let (ranks, inner) =
                (here.iter().map(|t| t.shape.rank).sum(), here[0].shape.in_features);
            let wanted = vec![[tokens, ranks, inner], [ranks, inner, tokens]];
            assert_eq!(found(&all, wanted), 2, "{part:?} of layer {layer}");
        }
    }
    // The third one is o's, whose input is as wide.
    let width = case.spec().hidden_size;
    let reads = all.iter().filter(|shape| shape[1..] == [width, tokens]).count();
    assert_eq!(reads, 3 * case.spec().num_layers);
}

/// Where one kernel has the adapters' share of a pass of the MLP, no product reads its width again;
/// and its gradients are as exact, in any mix of ranks, and where the MLP comes in tiles.
#[test]
fn the_widest_gradients_are_read_once() {
    let Some(gpu) = gpu() else { return };
    for (name, r) in [("llama_s0", 16), ("gemma_s0", 32), ("gemma2_s0", 8), ("qwen3_s0", 24)] {
        let case = Case::open(name);
        let adapter = with_ranks(&case, r, &[("1.+up_proj", 8)]);
        let (spec, rows) = (case.spec(), case.tensors("ref.safetensors"));
        let (width, tokens) =
            (spec.intermediate_size, rows.batch("input_ids", "labels").0.tokens());
        let together = plan(&case, &adapter, &KEEP);
        let in_f32 = Settings { bf16_working: false, ..together.clone() };
        let tiled = Settings { mlp_tile_length: Some(TILE), ..together.clone() };
        let of_the_width = |settings: &Settings| {
            let all = products(&gpu, &case, &adapter, settings.clone());
            let tile = settings.mlp_tile_length.unwrap_or(tokens);
            let is_a_tile = |rows: usize| rows == tile || rows == tokens % tile;
            let is_read_again = |[m, n, k]: &&[usize; 3]| {
                let gradient_of_a = *n == width && is_a_tile(*k);
                let gradient_of_b = *m == width && is_a_tile(*k);
                let inner = is_a_tile(*m) && *k == width && *n <= r;
                gradient_of_a || gradient_of_b || inner
            };
            all.iter().filter(is_read_again).count()
        };
        // With kernels that make one result each: x·Aᵀ and gA of the down projection, t and gB of gate and up.
        assert_eq!(of_the_width(&together), 0, "{name}");
        assert_eq!(of_the_width(&tiled), 0, "{name}");
        assert_eq!(of_the_width(&in_f32), 6 * spec.num_layers, "{name}");
        let (_, expected) = reference(&case, &adapter, together.clone());
        let error = |plan| error_in_norm(&step(&gpu, &case, &adapter, plan).1, &expected);
        let (one, several) = (error(together.clone()), error(in_f32));
        assert!(one != several, "{name}: the same operations");
        assert!(one < 1.1 * several, "{name}: off by {one:e}, one by one by {several:e}");
        let tiled = error(tiled);
        assert!(tiled < 1.1 * several, "{name}: in tiles off by {tiled:e}");
    }
}

#[test]
fn the_check_of_a_card_launches_every_kernel_of_an_mlp_with_adapters() {
    let Some(gpu) = gpu() else { return };
    let recorded = gpu.driver().record(|| nibble::train::agreement::check(&gpu).unwrap());
    let kernels = PTX.lines().filter_map(|line| line.strip_prefix(".visible .entry "));
    let kernels = kernels.map(|name| name.trim_end_matches('('));
    let mut found = 0;
    for kernel in kernels.filter(|name| name.starts_with("mlp_adapters")) {
        assert!(recorded.iter().any(|work| work.name() == kernel), "{kernel}");
        found += 1;
    }
    assert_eq!(found, 7);
}

/// Linears that are one product.
struct Group {
    layer: usize,
    inner: usize,
    outer: usize,
    ranks: usize,
    reads_norm1: bool,
}

fn groups(adapter: &Adapter) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for target in &adapter.targets {
        let (layer, reads_norm1) = (target.layer, reads_norm1(&target.module));
        let (inner, outer, ranks) =
            (target.shape.in_features, target.shape.out_features, target.shape.rank);
        match groups.last_mut() {
            Some(last) if reads_norm1 && last.reads_norm1 && last.layer == layer => {
                last.outer += outer;
                last.ranks += ranks;
            }
            _ => groups.push(Group { layer, inner, outer, ranks, reads_norm1 }),
        }
    }
    groups
}

fn reads_norm1(module: &str) -> bool {
    ["q_proj", "k_proj", "v_proj", "c_attn"].iter().any(|name| module.ends_with(name))
}
