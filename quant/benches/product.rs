//! Speed of a training step's products with frozen weights beside the `gemm` crate, interleaved.
//!
//! `cargo bench -p nibble-quant --bench product -- THREADS`: GFLOP/s, best of several rounds.
//! `ratio` is ours over the crate's on dense f32. The machine's peak: `--example fma_peak`.
#![allow(unsafe_code)]

use std::time::Instant;

use half::bf16;
use nibble_quant::product::{
    Matrix, MatrixMut, WeightRef, gemm, product_forward, product_input_gradient,
};
use nibble_quant::{BlockFormat, Floats, PackedWeight};

const ROUNDS: usize = 7;

type Work<'a> = Box<dyn FnMut() + 'a>;

/// Best GFLOP/s of each work, measured in turn.
fn race(flops: f64, works: &mut [Work]) -> Vec<f64> {
    let mut best = vec![f64::INFINITY; works.len()];
    for _ in 0..ROUNDS {
        for (best, work) in best.iter_mut().zip(works.iter_mut()) {
            let start = Instant::now();
            work();
            *best = best.min(start.elapsed().as_secs_f64());
        }
    }
    best.into_iter().map(|time| flops / time / 1e9).collect()
}

/// `c = a·b` by the `gemm` crate; all row-major, `turned` transposes b.
fn peer([m, n, k]: [usize; 3], a: &[f32], b: &[f32], turned: bool, c: &mut [f32]) {
    let (row, column) = if turned { (1, k as isize) } else { (n as isize, 1) };
    let threads = gemm::Parallelism::Rayon(rayon::current_num_threads());
    let (lda, ldc) = (k as isize, n as isize);
    let (a, b, c) = (a.as_ptr(), b.as_ptr(), c.as_mut_ptr());
    // SAFETY: the slices have m·k, k·n and m·n elements.
    unsafe {
        gemm::gemm(
            m, n, k, c, 1, ldc, false, a, 1, lda, b, column, row, 0.0, 1.0, false, false, false,
            threads,
        );
    }
}

fn fill(count: usize) -> Vec<f32> {
    (0..count).map(|i| (i as f32 * 0.37).sin()).collect()
}

fn frozen(tokens: usize, input: usize, output: usize, backward: bool) {
    let (x, dense) = (fill(tokens * input.max(output)), fill(input * output));
    let half: Vec<bf16> = dense.iter().map(|&v| bf16::from_f32(v)).collect();
    let shape = [output, input];
    let format = BlockFormat::default();
    let packed = PackedWeight::quantize(Floats::F32(&dense), shape, &format).expect("finite");
    let [m, n, k] = if backward { [tokens, input, output] } else { [tokens, output, input] };
    let mut results = vec![vec![0.0f32; m * n]; 4];
    let (first, rest) = results.split_first_mut().expect("four");
    let a = &x[..m * k];
    let b = &dense;
    let mut works: Vec<Work> = vec![Box::new(|| peer([m, n, k], a, b, !backward, first))];
    let weights =
        [WeightRef::F32(&dense, shape), WeightRef::Bf16(&half, shape), WeightRef::Packed(&packed)];
    for (weight, c) in weights.into_iter().zip(rest) {
        works.push(Box::new(move || {
            let (a, c) = (Matrix::new(a, (m, k, k)), MatrixMut::new(c, (m, n, n)));
            if backward {
                product_input_gradient(a, weight, None, 0.0, c);
            } else {
                product_forward(a, weight, None, 0.0, c);
            }
        }));
    }
    let speed = race(2.0 * (m * n * k) as f64, &mut works);
    let direction = if backward { "dy·W " } else { "x·Wᵀ" };
    let (ratio, overhead) = (speed[1] / speed[0], speed[3] / speed[1]);
    println!(
        "{direction} {m:>5}×{n:<5} k {k:<5}  gemm {:6.1}  f32 {:6.1}  bf16 {:6.1}  nf4 {:6.1}  \
         ratio {ratio:.2}  nf4/f32 {overhead:.3}",
        speed[0], speed[1], speed[2], speed[3]
    );
}

fn dense([m, n, k]: [usize; 3], turned_a: bool, turned_b: bool) {
    let (a, b) = (fill(m * k), fill(k * n));
    let view = |data, rows, columns, turned: bool| {
        if turned {
            Matrix::new(data, (columns, rows, rows)).transposed()
        } else {
            Matrix::new(data, (rows, columns, columns))
        }
    };
    let (a, b) = (view(&a, m, k, turned_a), view(&b, k, n, turned_b));
    let mut c = vec![0.0; m * n];
    let work: Work = Box::new(|| gemm(1.0, a, b, 1.0, MatrixMut::new(&mut c, (m, n, n))));
    let speed = race(2.0 * (m * n * k) as f64, &mut [work]);
    let letter = |turned: bool| if turned { 't' } else { 'n' };
    let layout = [letter(turned_a), letter(turned_b)].iter().collect::<String>();
    println!("{layout}    {m:>5}×{n:<5} k {k:<5}  {:6.1}", speed[0]);
}

fn main() {
    let threads = std::env::args().filter_map(|arg| arg.parse().ok()).next().unwrap_or(2);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    pool.expect("the pool is not built yet");
    for (tokens, input, output) in [
        (2048, 576, 576),
        (2048, 576, 192),
        (2048, 576, 1536),
        (2048, 1536, 576),
        (320, 576, 49152),
        (512, 4096, 4096),
        (512, 4096, 11008),
    ] {
        frozen(tokens, input, output, false);
        frozen(tokens, input, output, true);
    }
    for (sizes, turned_a, turned_b) in [
        ([2048, 16, 576], false, true),
        ([2048, 576, 16], false, true),
        ([2048, 16, 1536], false, false),
        ([16, 576, 2048], true, false),
        ([1536, 16, 2048], true, false),
        ([96, 512, 64], false, true),
        ([96, 64, 512], false, false),
        ([512, 64, 96], true, false),
    ] {
        dense(sizes, turned_a, turned_b);
    }
}
