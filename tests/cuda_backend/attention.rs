//! Attention alone: flash kernels and the exact path against the CPU backend, on ragged documents.

use nibble::kernels::cpu::Cpu;
use nibble::kernels::cuda::{AttnImplementation, cuda_layout};
use nibble::kernels::{
    AttentionInputs, AttentionShape, Cache, CachedScratch, Kernels, PlannedMemory, TokenLayout,
};
use nibble::model::spec::ModelSpec;
use nibble::plan::{MemoryPlan, Policy, RegionType, Settings};
use nibble::random::Stream;

use crate::device::{BLAS_WORKSPACE, Device};
use crate::golden::Case;
use crate::regions::{self, *};
use crate::{Gpu, error_in_norm, gpu, settings};

const BOUNDARIES: [u32; 4] = [0, 37, 38, 171];

/// f32 elements that a plan gives such attention on a GPU.
fn planned_work(
    shape: &AttentionShape,
    attention: AttnImplementation,
    layout: &TokenLayout,
) -> usize {
    let case = Case::open("llama_s0");
    let AttentionShape { num_heads, num_kv_heads, head_dim, .. } = *shape;
    let spec = ModelSpec { num_heads, num_kv_heads, head_dim, ..case.spec() };
    let settings = Settings {
        tokens: layout.tokens(),
        longest_document: layout.longest(),
        ..settings(&case, None, &[Policy::Keep], true)
    };
    let plan = cuda_layout(&spec, &settings, attention);
    plan.region(WORK).unwrap().elements
}

/// Regions for one layer's attention, activations in `dtype`, `work` f32 elements to work in.
fn plan(shape: &AttentionShape, tokens: usize, dtype: RegionType, work: usize) -> MemoryPlan {
    let (wide, qkv, o) = (RegionType::F32, tokens * shape.qkv_width(), tokens * shape.q_width());
    let of_a_gpu =
        [(WORKSPACE, wide, BLAS_WORKSPACE), (UPLOADS, wide, 1024), (DEQUANTIZED, dtype, 8)];
    let of_both = [
        (QKV, dtype, qkv),
        (O, dtype, o),
        (LSE, wide, tokens * shape.num_heads),
        (D_O, dtype, o),
        (DQKV, dtype, qkv),
        (CACHE, dtype, tokens * 2 * shape.kv_width()),
        (WORK, wide, work),
    ];
    match dtype {
        RegionType::Bf16 => regions::plan(&[&of_a_gpu[..], &of_both].concat()),
        RegionType::F32 => regions::plan(&of_both),
    }
}

/// f32 elements for the CPU's threads, as much for each as heads of 256 columns need here.
fn host_work() -> usize {
    rayon::current_num_threads() << 18
}

/// What bf16 holds of normal numbers: both backends see the same.
fn normal(name: &str, elements: usize, deviation: f32) -> Vec<f32> {
    let mut values = vec![0.0; elements];
    Stream::new(5, name).fill_normal(0, deviation, &mut values);
    values.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
    values
}

/// o, log-sum-exp, dqkv.
fn run<K: Kernels>(
    kernels: &K,
    shape: &AttentionShape,
    layout: &TokenLayout,
    dtype: RegionType,
    work: usize,
) -> [Vec<f32>; 3] {
    let tokens = layout.tokens();
    let mut memory = kernels.allocate(&plan(shape, tokens, dtype, work)).unwrap();
    let [mut qkv, mut o, mut lse, mut d_o, mut dqkv, mut work] =
        [QKV, O, LSE, D_O, DQKV, WORK].map(|id| memory.take(id));
    let fill = |name, elements, deviation, buffer: &mut K::Buffer| {
        kernels.set_values(&normal(name, elements, deviation), buffer, 0);
    };
    fill("qkv", tokens * shape.qkv_width(), 1.5, &mut qkv);
    fill("d_o", tokens * shape.q_width(), 1.0, &mut d_o);
    kernels.attention_forward(shape, layout, &qkv, &mut o, &mut lse, &mut work);
    let inputs = AttentionInputs { qkv: &qkv, o: &o, lse: &lse, d_o: &d_o };
    kernels.attention_backward(shape, layout, inputs, &mut dqkv, &mut work);
    let values = |buffer, elements| kernels.values(buffer, 0..elements).unwrap().into_owned();
    [
        values(&o, tokens * shape.q_width()),
        values(&lse, tokens * shape.num_heads),
        values(&dqkv, tokens * shape.qkv_width()),
    ]
}

fn assert_near(got: &[Vec<f32>; 3], expected: &[Vec<f32>; 3], tolerances: [f64; 3], what: &str) {
    let names = ["o", "log-sum-exp", "dqkv"];
    for ((got, expected), (name, tolerance)) in
        got.iter().zip(expected).zip(names.into_iter().zip(tolerances))
    {
        let error = error_in_norm(got, expected);
        assert!(error < tolerance, "{what}: {name} is off by {error:e}");
    }
}

/// In the memory that is planned for it.
fn on_gpu(
    gpu: &Gpu,
    shape: &AttentionShape,
    attention: AttnImplementation,
    layout: &TokenLayout,
) -> [Vec<f32>; 3] {
    let gpu = gpu.clone().with_attention(attention);
    run(&gpu, shape, layout, RegionType::Bf16, planned_work(shape, attention, layout))
}

/// On the device, and that against the CPU.
fn check(gpu: &Gpu, shape: &AttentionShape, attention: AttnImplementation) -> [Vec<f32>; 3] {
    let layout = TokenLayout::new(&BOUNDARIES);
    let device = on_gpu(gpu, shape, attention, &layout);
    let host = run(&Cpu::default(), shape, &layout, RegionType::F32, host_work());
    assert_near(&device, &host, [5e-3, 1e-4, 1e-2], &format!("{attention:?} {shape:?}"));
    device
}

fn shape(head_dim: usize, window: Option<usize>) -> AttentionShape {
    AttentionShape { window, ..AttentionShape::new(4, 2, head_dim) }
}

/// Each against the CPU and against the other, in the memory that is planned for it.
#[test]
fn flash_kernels_agree_with_the_exact_path() {
    use AttnImplementation::{Auto, Exact, Flash};
    let Some(gpu) = gpu() else { return };
    let plain = [(64, None), (64, Some(29)), (96, None), (128, None), (256, None)]
        .map(|(head_dim, window)| shape(head_dim, window));
    let capped = [(128, None), (256, Some(29))].map(|(head_dim, window)| AttentionShape {
        scale: 0.1,
        soft_cap: Some(3.0),
        ..shape(head_dim, window)
    });
    for shape in plain.into_iter().chain(capped) {
        let [auto, flash, exact] = [Auto, Flash, Exact].map(|path| check(&gpu, &shape, path));
        assert!(auto == flash && flash != exact, "auto is flash where it can be");
        assert_near(&flash, &exact, [5e-3, 1e-4, 1e-2], &format!("flash and exact {shape:?}"));
        let work = |path| planned_work(&shape, path, &TokenLayout::new(&BOUNDARIES));
        assert!(work(Exact) > work(Flash));
    }
}

/// As many tiles, launches and pieces of products as a step has, where a card can make them.
#[test]
fn flash_kernels_agree_with_the_exact_path_at_the_length_of_a_step() {
    use AttnImplementation::{Exact, Flash};
    let Some(gpu) = gpu() else { return };
    let (shape, boundaries) = match Device::is_a_card() {
        true => (AttentionShape::new(32, 8, 128), [0, 1000, 1001, 5097]),
        false => (AttentionShape::new(2, 1, 64), [0, 70, 71, 400]),
    };
    let layout = TokenLayout::new(&boundaries);
    let [flash, exact] = [Flash, Exact].map(|path| on_gpu(&gpu, &shape, path, &layout));
    assert_near(&flash, &exact, [1e-2, 1e-4, 1e-2], "flash and exact");
}

/// o of one document whose tokens come in pieces, behind those that are cached.
fn run_in_pieces<K: Kernels>(
    kernels: &K,
    shape: &AttentionShape,
    dtype: RegionType,
    pieces: &[usize],
) -> Vec<f32> {
    let tokens = pieces.iter().sum();
    let mut memory = kernels.allocate(&plan(shape, tokens, dtype, host_work())).unwrap();
    let [mut qkv, mut o, mut lse, mut cache, mut work] =
        [QKV, O, LSE, CACHE, WORK].map(|id| memory.take(id));
    let values = normal("qkv", tokens * shape.qkv_width(), 1.5);
    let (mut past, mut all) = (0, Vec::new());
    for &rows in pieces {
        let own = &values[past * shape.qkv_width()..][..rows * shape.qkv_width()];
        kernels.set_values(own, &mut qkv, 0);
        let cached = Cache { keys_values: &mut cache, past };
        let scratch = CachedScratch { lse: &mut lse, tiles: &mut work };
        kernels.attention_cached(shape, &qkv, cached, rows, &mut o, scratch);
        all.extend_from_slice(&kernels.values(&o, 0..rows * shape.q_width()).unwrap());
        past += rows;
    }
    all
}

/// By the flash kernels where a piece is long and they have the width, by the other one elsewhere.
#[test]
fn pieces_of_a_prompt_attend_to_what_is_cached() {
    let Some(gpu) = gpu() else { return };
    let pieces = [70, 1, 1, 9, 3, 64];
    for (head_dim, window) in [(64, None), (128, Some(29)), (256, None), (40, Some(29))] {
        let shape = shape(head_dim, window);
        let device = run_in_pieces(&gpu, &shape, RegionType::Bf16, &pieces);
        let host = run_in_pieces(&Cpu::default(), &shape, RegionType::F32, &pieces);
        let error = error_in_norm(&device, &host);
        assert!(error < 5e-3, "{head_dim} {window:?}: off by {error:e}");
    }
}

/// On a card that shows a desktop no launch may last for seconds.
#[test]
fn shorter_launches_give_the_same_bits() {
    let Some(gpu) = gpu() else { return };
    let gpus = [gpu.clone(), gpu.clone().with_launches_of(1), gpu.with_launches_of(3 << 20)];
    let shape = shape(64, None);
    let [once, by_tile, by_some] = gpus.map(|gpu| check(&gpu, &shape, AttnImplementation::Flash));
    assert!(once == by_tile && once == by_some);
}

/// A window wider than an `int` of the kernels, or so wide that positions and it do not fit one.
#[test]
fn a_window_of_all_keys_is_none() {
    let Some(gpu) = gpu() else { return };
    for attention in [AttnImplementation::Flash, AttnImplementation::Exact] {
        let [none, whole, int, huge] = [None, Some(133), Some(i32::MAX as usize), Some(usize::MAX)]
            .map(|window| check(&gpu, &shape(64, window), attention));
        assert!(none == whole && none == int && none == huge, "{attention:?}");
    }
}

#[test]
fn the_exact_path_takes_every_width_and_window() {
    let Some(gpu) = gpu() else { return };
    for (head_dim, window) in [(16, None), (40, Some(29)), (80, None)] {
        let shape = shape(head_dim, window);
        let auto = check(&gpu, &shape, AttnImplementation::Auto);
        assert!(auto == check(&gpu, &shape, AttnImplementation::Exact));
        assert!(AttnImplementation::Flash.check(head_dim).is_err());
    }
    // Text could not be generated.
    assert!(
        AttnImplementation::Auto.check(256).is_ok() && AttnImplementation::Auto.check(264).is_err()
    );
}
