//! Attention alone: flash kernels and the exact path against the CPU backend, on ragged documents.

use nibble::kernels::cpu::Cpu;
use nibble::kernels::{AttentionShape, Kernels, PlannedMemory, TokenLayout};
use nibble::plan::{Component, MemoryPlan, Region, RegionType};
use nibble::random::Stream;

use crate::{Gpu, error_in_norm, gpu};

const BOUNDARIES: [u32; 4] = [0, 37, 38, 171];

/// Regions for one layer's attention, activations in `dtype`.
fn plan(shape: &AttentionShape, tokens: usize, dtype: RegionType) -> MemoryPlan {
    let region = |name: &str, dtype, elements| Region {
        name: name.to_string(),
        component: Component::AttentionWorkspace,
        dtype,
        elements,
        pitch: None,
    };
    let (wide, qkv, o) = (RegionType::F32, tokens * shape.qkv_width(), tokens * shape.q_width());
    let mut regions = vec![
        region("qkv", dtype, qkv),
        region("o", dtype, o),
        region("lse", wide, tokens * shape.num_heads),
        region("d_o", dtype, o),
        region("dqkv", dtype, qkv),
        region("work", wide, 1 << 22),
    ];
    if dtype == RegionType::Bf16 {
        regions.push(region("cuda.workspace", wide, 1024));
        regions.push(region("cuda.uploads", wide, 1024));
        regions.push(region("cuda.dequantized", dtype, 8));
    }
    MemoryPlan { regions, offloaded: Vec::new() }
}

/// o, log-sum-exp, dqkv.
fn run<K: Kernels>(kernels: &K, shape: &AttentionShape, dtype: RegionType) -> [Vec<f32>; 3] {
    let layout = TokenLayout::new(&BOUNDARIES);
    let tokens = layout.tokens();
    let mut memory = kernels.allocate(&plan(shape, tokens, dtype)).unwrap();
    let names = ["qkv", "o", "lse", "d_o", "dqkv", "work"];
    let [mut qkv, mut o, mut lse, mut d_o, mut dqkv, mut work] =
        names.map(|name| memory.take(name));
    let fill = |name: &str, elements, deviation, buffer: &mut K::Buffer| {
        let mut values = vec![0.0; elements];
        Stream::new(5, name).fill_normal(0, deviation, &mut values);
        // Both backends see what bf16 holds.
        values.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
        kernels.set_values(&values, buffer, 0);
    };
    fill("qkv", tokens * shape.qkv_width(), 1.5, &mut qkv);
    fill("d_o", tokens * shape.q_width(), 1.0, &mut d_o);
    kernels.attention_forward(shape, &layout, &qkv, &mut o, &mut lse, &mut work);
    kernels.attention_backward(shape, &layout, &qkv, &o, &lse, &d_o, &mut dqkv, &mut work);
    let values = |buffer, elements| kernels.values(buffer, 0..elements).unwrap().into_owned();
    [
        values(&o, tokens * shape.q_width()),
        values(&lse, tokens * shape.num_heads),
        values(&dqkv, tokens * shape.qkv_width()),
    ]
}

fn check(gpu: &Gpu, head_dim: usize, window: Option<usize>) {
    let shape = AttentionShape { num_heads: 4, num_kv_heads: 2, head_dim, window };
    let device = run(gpu, &shape, RegionType::Bf16);
    let host = run(&Cpu, &shape, RegionType::F32);
    let tolerances = [("o", 5e-3), ("log-sum-exp", 1e-4), ("dqkv", 1e-2)];
    for ((got, expected), (name, tolerance)) in device.iter().zip(&host).zip(tolerances) {
        let error = error_in_norm(got, expected);
        assert!(error < tolerance, "{head_dim} {window:?}: {name} is off by {error:e}");
    }
}

#[test]
fn flash_kernels_are_launched_as_they_are_declared() {
    let Some(gpu) = gpu() else { return };
    for head_dim in [64, 96, 128, 256] {
        check(&gpu, head_dim, None);
    }
    check(&gpu, 64, Some(29));
}

#[test]
fn the_exact_path_takes_every_width_and_window() {
    let Some(gpu) = gpu() else { return };
    for (head_dim, window) in [(16, None), (40, Some(29)), (80, None)] {
        check(&gpu, head_dim, window);
    }
}
