//! Products that have the adapter's share in them, beside the same step in separate products.

use nibble::adapter::{Adapter, LoraConfig, LoraTarget};
use nibble::checkpoint::Checkpoint;
use nibble::model::Model;
use nibble::model::parameters::Part;
use nibble::model::weights::Weights;
use nibble::plan::{Policy, Settings};

use super::golden::{CASES, Case};
use super::{Gpu, error_in_norm, gpu, model, nf4, settings};

/// An adapter on all linears with every rank that a layout could mistake: even, odd, above the
/// room of its neighbours. B is not zero.
fn adapter(case: &Case, r: usize) -> Adapter {
    let rank_pattern =
        vec![("0.mlp.(down_proj|c_proj)".into(), 11), ("1.+(k_proj|c_fc)".into(), 3)];
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
    let mut model = model(gpu, case, Some(nf4(true)), None, plan, None);
    model.parameters_mut().load(adapter);
    let loss = model.forward_backward(&batch, 1.0 / batch.num_targets as f32, 0).unwrap();
    (loss, model.parameters().values(Part::Gradients).unwrap().into_owned())
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
    let mut model = Model::new(case.spec(), weights, plan, None).unwrap();
    model.parameters_mut().load(adapter);
    let loss = model.forward_backward(&batch, 1.0 / batch.num_targets as f32, 0).unwrap();
    (loss, model.parameters().gradients().to_vec())
}

#[test]
fn one_product_for_base_and_adapter_is_as_exact_as_two() {
    let Some(gpu) = gpu() else { return };
    for (name, r) in CASES.into_iter().zip([16, 5, 8, 1, 16, 6]) {
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

#[test]
fn what_is_kept_does_not_change_a_bit_of_them() {
    let Some(gpu) = gpu() else { return };
    for name in ["qwen2_s0", "gpt2_s0"] {
        let case = Case::open(name);
        let adapter = adapter(&case, 6);
        let run =
            |policies: &[Policy]| step(&gpu, &case, &adapter, plan(&case, &adapter, policies));
        let kept = run(&[Policy::Keep]);
        for policy in [Policy::Checkpoint, Policy::Offload] {
            assert!(run(&[policy]) == kept, "{name}: {policy:?}");
        }
    }
}

/// How many products `y` and `dx` of a step have the adapter in them, and how many more there are
/// for its share in these.
fn products(gpu: &Gpu, case: &Case, adapter: &Adapter, plan: Settings) -> [usize; 2] {
    gpu.driver().forget_products();
    step(gpu, case, adapter, plan);
    let products = gpu.driver().products();
    let tokens = case.tensors("ref.safetensors").batch("input_ids", "labels").0.tokens();
    let count = |wanted: &[fn(&LoraTarget, usize) -> [usize; 3]]| {
        let all = wanted.iter().flat_map(|of| adapter.targets.iter().map(|t| of(t, tokens)));
        let mut left: Vec<[usize; 3]> = all.collect();
        let found = products.iter().filter(|&shape| {
            let at = left.iter().position(|wanted| wanted == shape);
            at.map(|at| left.swap_remove(at)).is_some()
        });
        found.count()
    };
    let together = count(&[
        |t, tokens| [tokens, t.out_features, t.in_features + t.r],
        |t, tokens| [tokens, t.in_features, t.out_features + t.r],
    ]);
    let alone = count(&[
        |t, tokens| [tokens, t.out_features, t.r],
        |t, tokens| [tokens, t.in_features, t.r],
    ]);
    [together, alone]
}

#[test]
fn the_adapter_has_no_product_of_its_own_where_there_is_room() {
    let Some(gpu) = gpu() else { return };
    // Ranks that no width of these models is a sum of.
    for (name, r) in [("llama_s0", 7), ("gpt2_s0", 7)] {
        let case = Case::open(name);
        let adapter = adapter(&case, r);
        let targets = adapter.targets.len();
        let together = plan(&case, &adapter, &[Policy::Keep]);
        let separately = products(&gpu, &case, &adapter, separate(together.clone()));
        // The first block's inputs need no gradient: the embedding is frozen.
        let first = adapter.targets.iter().filter(|t| t.layer == 0 && reads_norm1(&t.module));
        let first = first.count();
        assert_eq!(separately, [0, 2 * targets - first], "{name}");
        let together = products(&gpu, &case, &adapter, together);
        // Of q, k and v, of which the gradients are bands of one matrix, only the last has room.
        let bands = adapter.targets.iter().filter(|t| t.layer > 0);
        let bands = bands.filter(|t| t.module.ends_with("q_proj") || t.module.ends_with("k_proj"));
        let bands = bands.count();
        assert_eq!(together, [2 * targets - first - bands, bands], "{name}");
    }
}

fn reads_norm1(module: &str) -> bool {
    ["q_proj", "k_proj", "v_proj", "c_attn"].iter().any(|name| module.ends_with(name))
}
