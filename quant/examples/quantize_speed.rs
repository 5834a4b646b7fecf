//! Speed of quantizing and dequantizing on one thread and on all, beside a plain copy.
//!
//!     cargo run --release -p nibble-quant --example quantize_speed
//!
//! Rates count bytes of the dense side: bf16 read when quantizing, f32 written when dequantizing.

use std::time::Instant;

use nibble_quant::{BlockFormat, Floats, PackedWeight};

const SHAPE: [usize; 2] = [4096, 4096];
const ROUNDS: usize = 9;

fn median_seconds(mut run: impl FnMut()) -> f64 {
    let mut seconds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let started = Instant::now();
            run();
            started.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[ROUNDS / 2]
}

fn measure(threads: usize) -> Result<(), Box<dyn std::error::Error>> {
    let elements = SHAPE[0] * SHAPE[1];
    let weight: Vec<half::bf16> =
        (0..elements).map(|i| half::bf16::from_f32((i as f32 * 0.37).sin() * 0.02)).collect();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let format = BlockFormat::default();
    let quantize = || PackedWeight::quantize(Floats::Bf16(&weight), SHAPE, &format);
    let packed = pool.install(quantize)?;
    let mut out = vec![0.0f32; elements];
    let source = vec![1.0f32; elements];
    let rate = |bytes: usize, seconds: f64| bytes as f64 / seconds / 1e9;
    let copy = median_seconds(|| {
        use rayon::prelude::*;
        pool.install(|| {
            let chunks = out.par_chunks_mut(1 << 16).zip(source.par_chunks(1 << 16));
            chunks.for_each(|(out, source)| out.copy_from_slice(source));
        });
    });
    let quantized = median_seconds(|| drop(pool.install(quantize)));
    let dequantized = median_seconds(|| pool.install(|| packed.dequantize_into(&mut out)));
    println!(
        "{threads} threads: copy {:6.2} GB/s   quantize {:6.2} GB/s of bf16   dequantize {:6.2} GB/s of f32",
        rate(4 * elements, copy),
        rate(2 * elements, quantized),
        rate(4 * elements, dequantized),
    );
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    measure(1)?;
    measure(rayon::current_num_threads())
}
