//! How fast a card is at what Nibble wrote itself, for `scripts/gpu_check.sh`, which prints the figures
//! beside the card's own. On the emulator the same code runs on a few rows, and its times mean
//! nothing.

use std::time::Instant;

use nibble::kernels::cpu::FrozenMatrix;
use nibble::kernels::cuda::driver::Driver;
use nibble::kernels::{AttentionShape, Columns, Kernels, PlannedMemory, TokenLayout};
use nibble::plan::{Component, MemoryPlan, Region, RegionType};
use nibble_quant::{Floats, PackedWeight};

use crate::device::Device;
use crate::{Gpu, gpu, nf4};

fn plan(regions: &[(&str, RegionType, usize)]) -> MemoryPlan {
    let region = |&(name, dtype, elements): &(&str, RegionType, usize)| Region {
        name: name.to_string(),
        component: Component::BlockWorkspace,
        dtype,
        elements,
        pitch: None,
    };
    MemoryPlan { regions: regions.iter().map(region).collect(), offloaded: Vec::new() }
}

/// Seconds of a call, the best of some after one that warms up.
fn seconds(gpu: &Gpu, times: usize, mut call: impl FnMut()) -> f64 {
    call();
    gpu.driver().synchronize().unwrap();
    let once = |call: &mut dyn FnMut()| {
        let start = Instant::now();
        call();
        gpu.driver().synchronize().unwrap();
        start.elapsed().as_secs_f64()
    };
    (0..times).map(|_| once(&mut call)).fold(f64::INFINITY, f64::min)
}

/// Bytes a second that widening a 4-bit matrix reads and writes, and those of a copy of the same many
/// bytes. Widening is what a product with one row takes longer than with the dense matrix.
fn dequantize(gpu: &Gpu, [rows, columns]: [usize; 2], times: usize) -> [f64; 2] {
    use RegionType::{Bf16, F32};
    let elements = rows * columns;
    let mut memory = gpu
        .allocate(&plan(&[
            ("cuda.workspace", F32, 8 << 20),
            ("x", Bf16, columns),
            ("y", Bf16, rows),
            ("from", Bf16, elements),
            ("to", Bf16, elements),
            ("cuda.dequantized", Bf16, elements),
            ("cuda.uploads", F32, 1024),
        ]))
        .unwrap();
    let [mut x, mut y, mut from, mut to] = ["x", "y", "from", "to"].map(|name| memory.take(name));
    gpu.set_values(&vec![0.5; columns], &mut x, 0);
    gpu.zero(&mut from, elements);
    let values: Vec<f32> = (0..elements).map(|i| (i % 251) as f32 - 125.0).collect();
    let packed = PackedWeight::quantize(Floats::F32(&values), [rows, columns], &nf4(true)).unwrap();
    let read = packed.bytes();
    let dense = bytemuck::allocation::pod_collect_to_vec::<f32, u8>(&values);
    let dense = FrozenMatrix::from_f32(dense.into(), [rows, columns]);
    let weights = gpu.upload_weights(vec![FrozenMatrix::Packed(packed), dense]).unwrap();
    let [packed, dense] = [0, 1].map(|index| {
        seconds(gpu, times, || {
            let y = (&mut y, Columns::all(rows));
            gpu.linear_forward(&weights[index], None, None, &x, y, 1, false);
        })
    });
    let copy = seconds(gpu, times, || gpu.copy((&from, 0), (&mut to, 0), elements));
    let moved = (read + 2 * elements) as f64;
    [moved / (packed - dense).max(1e-9), 4.0 * elements as f64 / copy]
}

/// Seconds of attention's forward and backward pass over one document.
fn attention(gpu: &Gpu, tokens: usize, times: usize) -> f64 {
    use RegionType::{Bf16, F32};
    let shape = AttentionShape { num_heads: 32, num_kv_heads: 8, head_dim: 128, window: None };
    let layout = TokenLayout::new(&[0, tokens as u32]);
    let (qkv, o) = (tokens * shape.qkv_width(), tokens * shape.q_width());
    let regions = [
        ("cuda.workspace", F32, 1024),
        ("qkv", Bf16, qkv),
        ("o", Bf16, o),
        ("lse", F32, tokens * shape.num_heads),
        ("d_o", Bf16, o),
        ("dqkv", Bf16, qkv),
        ("work", F32, (tokens * shape.num_heads).next_multiple_of(64)),
        ("cuda.dequantized", Bf16, 8),
        ("cuda.uploads", F32, 1024),
    ];
    let mut memory = gpu.allocate(&plan(&regions)).unwrap();
    let names = ["qkv", "o", "lse", "d_o", "dqkv", "work"];
    let [mut qkv, mut o, mut lse, mut d_o, mut dqkv, mut work] =
        names.map(|name| memory.take(name));
    let wave = |count: usize| (0..count).map(|i| (i % 17) as f32 * 0.1 - 0.8).collect::<Vec<_>>();
    gpu.set_values(&wave(tokens * shape.qkv_width()), &mut qkv, 0);
    gpu.set_values(&wave(tokens * shape.q_width()), &mut d_o, 0);
    let time = seconds(gpu, times, || {
        gpu.attention_forward(&shape, &layout, &qkv, &mut o, &mut lse, &mut work);
        gpu.attention_backward(&shape, &layout, &qkv, &o, &lse, &d_o, &mut dqkv, &mut work);
    });
    let gradients = gpu.values(&dqkv, 0..shape.qkv_width()).unwrap();
    assert!(gradients.iter().all(|x| x.is_finite()) && gradients.iter().any(|x| *x != 0.0));
    time
}

#[test]
fn of_kernels() {
    let Some(gpu) = gpu() else { return };
    let card = Device::is_a_card();
    let (shape, tokens, times) = if card { ([14_336, 4096], 4096, 30) } else { ([96, 64], 24, 2) };
    let [widened, copied] = dequantize(&gpu, shape, times);
    let attention = attention(&gpu, tokens, times.min(10));
    assert!([widened, copied, attention].iter().all(|figure| figure.is_finite() && *figure > 0.0));
    println!(
        "SPEED {{\"dequantize_gb_per_s\": {:.1}, \"copy_gb_per_s\": {:.1}, \"attention_ms\": {:.3}, \
         \"attention_tokens\": {tokens}}}",
        widened / 1e9,
        copied / 1e9,
        attention * 1e3
    );
}
