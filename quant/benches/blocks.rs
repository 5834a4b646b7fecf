//! Speed of quantizing and dequantizing beside a plain copy, measured in turns.
//!
//! `cargo bench -p nibble-quant --bench blocks -- [THREADS] [ROWS COLUMNS]`: best of several
//! rounds; the last line is the same figures as JSON. A copy counts the bytes that it reads and
//! writes, and so does a decode: codes and scales in, f32 out; a product with one row, codes and
//! scales. `scripts/bench_quant.sh` adds bitsandbytes.

use std::time::Instant;

use half::bf16;
use nibble_quant::product::{WeightRef, product_row};
use nibble_quant::{BlockFormat, Floats, PackedWeight, QuantType};
use rayon::prelude::*;

const ROUNDS: usize = 15;

/// Rows of a panel that stays in the second-level cache: 64 KiB to 512 KiB of f32.
const PANEL_ROWS: usize = 16;

type Work<'a> = (&'static str, f64, Box<dyn FnMut() + 'a>);

/// Best GB/s of each work, measured in turns.
fn race(works: &mut [Work]) -> Vec<f64> {
    let mut best = vec![f64::INFINITY; works.len()];
    for _ in 0..ROUNDS {
        for (best, (_, _, work)) in best.iter_mut().zip(works.iter_mut()) {
            let start = Instant::now();
            work();
            *best = best.min(start.elapsed().as_secs_f64());
        }
    }
    works.iter().zip(best).map(|((_, bytes, _), seconds)| bytes / seconds / 1e9).collect()
}

/// Normally distributed by Irwin and Hall: a sum of twelve uniform values.
fn weights(count: usize) -> Vec<bf16> {
    let uniform = |n: u64| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f32 / (1 << 24) as f32;
    let normal = |i: u64| (0..12).map(|k| uniform(12 * i + k)).sum::<f32>() - 6.0;
    (0..count as u64).into_par_iter().map(|i| bf16::from_f32(0.02 * normal(i))).collect()
}

fn copy(from: &[f32], to: &mut [f32], chunk: usize) {
    to.par_chunks_mut(chunk).zip(from.par_chunks(chunk)).for_each(|(to, from)| {
        to.copy_from_slice(from);
    });
}

fn main() {
    let numbers: Vec<usize> = std::env::args().filter_map(|arg| arg.parse().ok()).collect();
    let threads = numbers.first().copied().unwrap_or(2);
    let shape = [numbers.get(1).copied().unwrap_or(4096), numbers.get(2).copied().unwrap_or(11008)];
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    pool.expect("the pool is not built yet");

    let elements = shape[0] * shape[1];
    let source = weights(elements);
    let widened: Vec<f32> = source.par_iter().map(|value| value.to_f32()).collect();
    let pack = |quant_type, double_quant| {
        let format = BlockFormat { quant_type, double_quant, ..BlockFormat::default() };
        PackedWeight::quantize(Floats::Bf16(&source), shape, &format).expect("finite")
    };
    let nested = pack(QuantType::Nf4, true);
    let plain = pack(QuantType::Nf4, false);
    let mut outs = vec![vec![0.0f32; elements]; 4];
    let [first, second, third, fourth] = &mut outs[..] else { unreachable!("four") };
    let mut panel = vec![0.0f32; PANEL_ROWS * shape[1]];
    let written = 4.0 * elements as f64;
    let traffic = |packed: &PackedWeight| packed.bytes() as f64 + written;
    let quantize = |values, quant_type| {
        let format = BlockFormat { quant_type, ..BlockFormat::default() };
        std::hint::black_box(PackedWeight::quantize(values, shape, &format).expect("finite"));
    };
    let (x, mut y) = (&widened[..shape[1]], vec![0.0; shape[0]]);
    let serial = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    let mut works: Vec<Work> = vec![
        ("copy", 2.0 * written, Box::new(|| copy(&widened, first, elements.div_ceil(threads)))),
        ("copy in tasks", 2.0 * written, Box::new(|| copy(&widened, second, 65_536))),
        ("dequantize", traffic(&plain), Box::new(|| plain.dequantize_into(third))),
        ("dequantize nested", traffic(&nested), Box::new(|| nested.dequantize_into(fourth))),
        (
            "panels, one thread",
            traffic(&nested),
            Box::new(|| {
                for row in (0..shape[0] / PANEL_ROWS * PANEL_ROWS).step_by(PANEL_ROWS) {
                    nested.dequantize_rows_into(row..row + PANEL_ROWS, &mut panel);
                }
            }),
        ),
        (
            "product with a row",
            nested.bytes() as f64,
            Box::new(|| product_row(x, WeightRef::Packed(&nested), None, 0.0, &mut y)),
        ),
        (
            "quantize bf16",
            2.0 * elements as f64,
            Box::new(|| quantize(Floats::Bf16(&source), QuantType::Nf4)),
        ),
        (
            "quantize bf16, one thread",
            2.0 * elements as f64,
            Box::new(|| serial.install(|| quantize(Floats::Bf16(&source), QuantType::Nf4))),
        ),
        (
            "quantize f32",
            4.0 * elements as f64,
            Box::new(|| quantize(Floats::F32(&widened), QuantType::Nf4)),
        ),
        (
            "quantize bf16 to fp4",
            2.0 * elements as f64,
            Box::new(|| quantize(Floats::Bf16(&source), QuantType::Fp4)),
        ),
    ];
    let speeds = race(&mut works);
    let best_copy = speeds[0].max(speeds[1]);
    println!("{shape:?}, {threads} threads, GB/s (and over the better copy)");
    for ((name, _, _), speed) in works.iter().zip(&speeds) {
        println!("{name:26} {speed:7.2}  {:5.2}", speed / best_copy);
    }
    let fields: Vec<String> = works
        .iter()
        .zip(&speeds)
        .map(|((name, _, _), speed)| format!("\"{name}\": {speed:.3}"))
        .collect();
    println!(
        "{{\"shape\": {shape:?}, \"threads\": {threads}, \"gb_per_s\": {{{}}}}}",
        fields.join(", ")
    );
}
