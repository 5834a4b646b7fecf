//! How fast a card is at what Nibble wrote itself, for `scripts/gpu_check.sh`, which prints the figures
//! beside the card's own. On the emulator the same code runs on a few rows, and its times mean
//! nothing.

use std::time::Instant;

use nibble::kernels::cpu::FrozenMatrix;
use nibble::kernels::cuda::driver::Driver;
use nibble::kernels::{
    AttentionInputs, AttentionKernels, AttentionShape, Columns, LinearKernels, LinearTerms,
    PlannedMemory, RowKernels, Storage, TokenLayout, Write,
};
use nibble::model::Model;
use nibble::plan::{Policy, RegionType, Settings};
use nibble_quant::{Floats, PackedWeight};
use serde_json::json;

use crate::device::{BLAS_WORKSPACE, Device};
use crate::regions::*;
use crate::shaped::{self, Shape};
use crate::{Gpu, gpu, nf4};

/// The middle one.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Seconds of a call that is told its number: the median of some rounds of `calls` between two waits,
/// after one that warms up.
fn seconds(gpu: &Gpu, calls: usize, mut call: impl FnMut(usize)) -> f64 {
    const ROUNDS: usize = 7;
    let mut round = || {
        let start = Instant::now();
        (0..calls).for_each(&mut call);
        gpu.driver().synchronize().unwrap();
        start.elapsed().as_secs_f64() / calls as f64
    };
    round();
    median((0..ROUNDS).map(|_| round()).collect())
}

/// Matrices that take turns, so that none is in a cache: 120 MB of the 8B shape.
const MATRICES: usize = 4;

/// Bytes a second that dequantizing 4-bit matrices reads and writes, those of a copy, and those that a row is
/// multiplied by. The launches that dequantize are those that a product makes.
fn matrices(gpu: &Gpu, [rows, columns]: [usize; 2], calls: usize) -> [f64; 3] {
    use RegionType::{Bf16, F32};
    let elements = rows * columns;
    let mut memory = gpu
        .allocate(&plan(&[
            (WORKSPACE, F32, 8 << 20),
            (X, Bf16, columns),
            (Y, Bf16, rows),
            (FROM, Bf16, elements),
            (TO, Bf16, elements),
            (DEQUANTIZED, Bf16, elements),
            (UPLOADS, F32, 1024),
        ]))
        .unwrap();
    let [mut x, mut y, mut from, mut to] = [X, Y, FROM, TO].map(|id| memory.take(id));
    gpu.set_values(&vec![0.5; columns], &mut x, 0);
    gpu.zero(&mut from, elements);
    let values: Vec<f32> = (0..elements).map(|i| (i % 251) as f32 - 125.0).collect();
    let packed = PackedWeight::quantize(Floats::F32(&values), [rows, columns], &nf4(true)).unwrap();
    let read = packed.bytes() as f64;
    let moved = read + 2.0 * elements as f64;
    let weights = vec![packed; MATRICES].into_iter().map(FrozenMatrix::Packed).collect();
    let weights = gpu.upload_weights(weights).unwrap();
    let mut launches = gpu.driver().record(|| {
        for weight in &weights {
            let y = (&mut y, Columns::all(rows));
            gpu.linear_forward(LinearTerms::of(weight), &x, y, 1, Write::Over);
        }
    });
    launches.retain(|work| work.name() == "dequantize_4bit");
    assert_eq!(launches.len(), MATRICES, "a launch for each matrix");
    let dequantize = seconds(gpu, calls, |call| gpu.driver().replay(&launches[call % MATRICES]));
    let copy = seconds(gpu, calls, |_| gpu.copy((&from, 0), (&mut to, 0), elements));
    let row = seconds(gpu, calls, |call| {
        let y = (&mut y, Columns::all(rows));
        gpu.linear_row(LinearTerms::of(&weights[call % MATRICES]), &x, y, Write::Over);
    });
    [moved / dequantize, 4.0 * elements as f64 / copy, read / row]
}

/// Seconds of attention's forward and backward pass over one document.
fn attention(gpu: &Gpu, tokens: usize, calls: usize) -> f64 {
    use RegionType::{Bf16, F32};
    let shape = AttentionShape::new(32, 8, 128);
    let layout = TokenLayout::new(&[0, tokens as u32]);
    let (qkv, o) = (tokens * shape.qkv_width(), tokens * shape.q_width());
    let regions = [
        (WORKSPACE, F32, BLAS_WORKSPACE),
        (QKV, Bf16, qkv),
        (O, Bf16, o),
        (LSE, F32, tokens * shape.num_heads),
        (D_O, Bf16, o),
        (DQKV, Bf16, qkv),
        (WORK, F32, (tokens * shape.num_heads).next_multiple_of(64)),
        (DEQUANTIZED, Bf16, 8),
        (UPLOADS, F32, 1024),
    ];
    let mut memory = gpu.allocate(&plan(&regions)).unwrap();
    let [mut qkv, mut o, mut lse, mut d_o, mut dqkv, mut work] =
        [QKV, O, LSE, D_O, DQKV, WORK].map(|id| memory.take(id));
    let wave = |count: usize| (0..count).map(|i| (i % 17) as f32 * 0.1 - 0.8).collect::<Vec<_>>();
    gpu.set_values(&wave(tokens * shape.qkv_width()), &mut qkv, 0);
    gpu.set_values(&wave(tokens * shape.q_width()), &mut d_o, 0);
    let time = seconds(gpu, calls, |_| {
        gpu.attention_forward(&shape, &layout, &qkv, &mut o, &mut lse, &mut work);
        let inputs = AttentionInputs { qkv: &qkv, o: &o, lse: &lse, d_o: &d_o };
        gpu.attention_backward(&shape, &layout, inputs, &mut dqkv, &mut work);
    });
    let gradients = gpu.values(&dqkv, 0..shape.qkv_width()).unwrap();
    assert!(gradients.iter().all(|x| x.is_finite()) && gradients.iter().any(|x| *x != 0.0));
    time
}

#[test]
fn of_kernels() {
    let Some(gpu) = gpu() else { return };
    let card = Device::is_a_card();
    let (shape, launches) = if card { ([14_336, 4096], 200) } else { ([96, 64], 4) };
    let (tokens, calls) = if card { (4096, 5) } else { (70, 1) };
    let [dequantized, copied, row] = matrices(&gpu, shape, launches);
    let attention = attention(&gpu, tokens, calls);
    assert!(
        [dequantized, copied, row, attention]
            .iter()
            .all(|figure| figure.is_finite() && *figure > 0.0)
    );
    let result = json!({ "dequantize_gb_per_s": dequantized / 1e9, "copy_gb_per_s": copied / 1e9,
        "row_gb_per_s": row / 1e9, "attention_ms": attention * 1e3, "attention_tokens": tokens });
    println!("SPEED {result}");
}

/// What dequantizing and adapters add to the time of the passes of a step: a part of it runs beside other
/// work; and a step of weights that all stay dequantized. The head has the share that it has of all 32 blocks
/// of the 8B model.
#[test]
fn of_a_step_without_dequantizing_and_adapters() {
    let Some(gpu) = gpu() else { return };
    let (shape, tokens, rounds) = match Device::is_a_card() {
        true => (Shape::of_8b(4, 16_384), 4096, 7),
        false => (Shape::small(2), 70, 1),
    };
    let spec = shape.spec();
    let (adapter, batch) = (shaped::adapter(&spec), shaped::batch(&spec, &[tokens]));
    let plan = shaped::settings(&spec, &adapter, &batch, Policy::Checkpoint);
    let model = |dequantized_blocks| {
        let plan = Settings { dequantized_blocks, ..plan.clone() };
        let weights = shaped::weights(&spec).upload(&gpu).unwrap();
        let mut model = Model::with_kernels(gpu.clone(), spec.clone(), weights, plan).unwrap();
        model.parameters_mut().load(&adapter);
        model.parameters_mut().zero_gradients();
        model
    };
    let scale = 1.0 / batch.num_targets() as f32;
    let timed = |model: &mut Model<Gpu>, bare| {
        gpu.driver().set_bare(bare);
        let start = Instant::now();
        model.forward_backward(&batch, scale, 0).unwrap();
        start.elapsed().as_secs_f64()
    };
    let held = {
        let mut model = model(spec.num_layers);
        timed(&mut model, false);
        median((0..rounds).map(|_| timed(&mut model, false)).collect())
    };
    let mut model = model(0);
    let mut step = |bare| timed(&mut model, bare);
    // The first pass learns the order in which weights are dequantized, and leaves one in the buffers.
    for bare in [false, true] {
        step(bare);
    }
    // In turns: a card gets warm.
    let times: Vec<[f64; 2]> = (0..rounds).map(|_| [false, true].map(&mut step)).collect();
    let [all, bare] = [0, 1].map(|which| median(times.iter().map(|pair| pair[which]).collect()));
    let result = json!({ "step_ms": all * 1e3, "bare_ms": bare * 1e3, "exposed": 1.0 - bare / all,
        "held_ms": held * 1e3, "tokens": tokens });
    println!("EXPOSED {result}");
    gpu.driver().set_bare(false);
    let mut step = || _ = model.forward_backward(&batch, scale, 0).unwrap().sum;
    let profile = profile(&gpu, if Device::is_a_card() { 20 } else { 1 }, &mut step);
    println!("PROFILE {}", json!({ "step_ms": all * 1e3, "parts": profile }));
    assert!(bare < all, "{result}");
}

/// A part of a step: the kernel, how often it is launched, and milliseconds in all.
type Part = (&'static str, usize, f64);

/// Where the time of a step goes, by kernel, the largest part first: each launch and product of it is made
/// again by itself, `calls` times. What runs beside other work in the step does not here, a small operand
/// may be in a cache, small kernels take as long as a launch, and copies are not among it.
fn profile(gpu: &Gpu, calls: usize, step: &mut dyn FnMut()) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    for work in gpu.driver().record(step) {
        gpu.driver().replay(&work);
        gpu.driver().synchronize().unwrap();
        let start = Instant::now();
        (0..calls).for_each(|_| gpu.driver().replay(&work));
        gpu.driver().synchronize().unwrap();
        let time = start.elapsed().as_secs_f64() / calls as f64 * 1e3;
        let name = work.name();
        match parts.iter_mut().find(|part| part.0 == name) {
            Some((_, launches, all)) => (*launches, *all) = (*launches + 1, *all + time),
            None => parts.push((name, 1, time)),
        }
    }
    assert!(parts.iter().any(|part| part.0 == "products"));
    parts.sort_by(|a, b| b.2.total_cmp(&a.2));
    parts
}
