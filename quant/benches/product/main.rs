//! Speed of a training step's products beside the machine's FMA peak and the `gemm` crate.
//!
//! ```text
//! cargo bench -p nibble-quant --bench product -- [THREADS] [TOKENS]
//! ```
//!
//! Everything is measured in turn, round after round, the peak in every round: figures are the
//! median over the rounds of the share of the peak, so that a shared machine's changes of speed
//! cancel out. `nf4/f32` compares our product with 4-bit and with f32 weights in the same way. The
//! last columns are `+lora` in products of bf16: its share of the peak of f32, and how many times
//! as fast it is.
#![allow(unsafe_code)]

mod peak;

use std::hint::black_box;
use std::time::{Duration, Instant};

use half::bf16;
use nibble_quant::product::{
    LowRank, Matrix, MatrixMut, Precision, WeightRef, gemm, product_forward, product_input_gradient,
};
use nibble_quant::{BlockFormat, Floats, PackedWeight};

/// Fewest rounds, and how long they go on.
const ROUNDS: usize = 9;
const TIME_PER_SHAPE: Duration = Duration::from_millis(1500);
/// Steps of a burst of multiply-adds: about a millisecond.
const PEAK_STEPS: usize = 300_000;

type Work<'a> = Box<dyn FnMut() + 'a>;

/// Rates of some works in some rounds.
struct Race {
    /// GFLOP/s of the peak, then of each work, by round.
    rounds: Vec<Vec<f64>>,
}

impl Race {
    fn run(flops: f64, works: &mut [Work]) -> Self {
        works.iter_mut().for_each(|work| work());
        let (begin, mut rounds) = (Instant::now(), Vec::new());
        while rounds.len() < ROUNDS || begin.elapsed() < TIME_PER_SHAPE {
            let mut round = vec![peak()];
            for work in works.iter_mut() {
                let start = Instant::now();
                work();
                round.push(flops / start.elapsed().as_secs_f64() / 1e9);
            }
            rounds.push(round);
        }
        Race { rounds }
    }

    /// Median over rounds of the quotient of two rates; 0 is the peak.
    fn ratio(&self, work: usize, over: usize) -> f64 {
        median(self.rounds.iter().map(|round| round[work] / round[over]).collect())
    }

    fn median_peak(&self) -> f64 {
        median(self.rounds.iter().map(|round| round[0]).collect())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// GFLOP/s of multiply-adds on registers, on all threads.
fn peak() -> f64 {
    let start = Instant::now();
    let operations: usize = rayon::broadcast(|_| {
        let burst = peak::Burst { seed: black_box(0.75), steps: PEAK_STEPS };
        let (sum, operations) = pulp::Arch::new().dispatch(burst);
        black_box(sum);
        operations
    })
    .into_iter()
    .sum();
    operations as f64 / start.elapsed().as_secs_f64() / 1e9
}

/// `c = a·b` by the `gemm` crate; all row-major, `turned` transposes b.
fn peer([m, n, k]: [usize; 3], a: &[f32], b: &[f32], turned: bool, c: &mut [f32]) {
    let (row, column) = if turned { (1, k as isize) } else { (n as isize, 1) };
    let threads = match rayon::current_num_threads() {
        1 => gemm::Parallelism::None,
        threads => gemm::Parallelism::Rayon(threads),
    };
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

/// The product with a frozen weight, stored in three ways, and with a low-rank addition.
fn frozen(tokens: usize, input: usize, output: usize, backward: bool) {
    const RANK: usize = 16;
    let (x, dense) = (fill(tokens * input.max(output)), fill(input * output));
    let (ax, lora) = (fill(tokens * RANK), fill(input.max(output) * RANK));
    let half: Vec<bf16> = dense.iter().map(|&v| bf16::from_f32(v)).collect();
    let shape = [output, input];
    let format = BlockFormat::default();
    let packed = PackedWeight::quantize(Floats::F32(&dense), shape, &format).expect("finite");
    let [m, n, k] = if backward { [tokens, input, output] } else { [tokens, output, input] };
    let mut results = vec![vec![0.0f32; m * n]; 6];
    let (first, rest) = results.split_first_mut().expect("six");
    let (a, b) = (&x[..m * k], &dense);
    let mut works: Vec<Work> = vec![Box::new(|| peer([m, n, k], a, b, !backward, first))];
    let low_rank = LowRank {
        scale: 2.0,
        a: Matrix::new(&ax, (m, RANK, RANK)),
        b: if backward {
            Matrix::new(&lora, (RANK, n, n))
        } else {
            Matrix::new(&lora, (n, RANK, RANK)).transposed()
        },
    };
    let packed = WeightRef::Packed(&packed);
    let cases = [
        (WeightRef::F32(&dense, shape), None, Precision::F32),
        (WeightRef::Bf16(&half, shape), None, Precision::F32),
        (packed, None, Precision::F32),
        (packed, Some(low_rank), Precision::F32),
        (packed, Some(low_rank), Precision::Bf16),
    ];
    for ((weight, addition, precision), c) in cases.into_iter().zip(rest) {
        works.push(Box::new(move || {
            let (a, c) = (Matrix::new(a, (m, k, k)), MatrixMut::new(c, (m, n, n)));
            if backward {
                product_input_gradient(a, weight, addition, 0.0, c, precision);
            } else {
                product_forward(a, weight, addition, 0.0, c, precision);
            }
        }));
    }
    let race = Race::run(2.0 * (m * n * k) as f64, &mut works);
    let direction = if backward { "dy·W " } else { "x·Wᵀ" };
    let share = |work| 100.0 * race.ratio(work, 0);
    println!(
        "{direction} {m:>5}×{n:<5} k {k:<5} {:6.0} {:7.1} {:7.1} {:7.1} {:7.1} {:7.1}   {:6.3}  {:7.1} \
         {:6.2}",
        race.median_peak(),
        share(1),
        share(2),
        share(3),
        share(4),
        share(5),
        race.ratio(4, 2),
        share(6),
        race.ratio(6, 5),
    );
}

/// A product of activations, `c += a·b`, with transposed operands where a letter is `t`.
fn dense(name: &str, [m, n, k]: [usize; 3], layout: &str) {
    let (a, b) = (fill(m * k), fill(k * n));
    let view = |data, rows, columns, letter: u8| {
        if letter == b't' {
            Matrix::new(data, (columns, rows, rows)).transposed()
        } else {
            Matrix::new(data, (rows, columns, columns))
        }
    };
    let layout = layout.as_bytes();
    let (a, b) = (view(&a, m, k, layout[0]), view(&b, k, n, layout[1]));
    let mut c = vec![0.0; m * n];
    let mut half = c.clone();
    let shape = (m, n, n);
    let mut works: [Work; 2] = [
        Box::new(|| gemm(1.0, a, b, 1.0, MatrixMut::new(&mut c, shape), Precision::F32)),
        Box::new(|| gemm(1.0, a, b, 1.0, MatrixMut::new(&mut half, shape), Precision::Bf16)),
    ];
    let race = Race::run(2.0 * (m * n * k) as f64, &mut works);
    let (peak, share) = (race.median_peak(), |work| 100.0 * race.ratio(work, 0));
    let times = race.ratio(2, 1);
    println!(
        "{name:6} {m:>5}×{n:<5} k {k:<5} {peak:5.0} {:15.1} {:41.1} {times:6.2}",
        share(1),
        share(2)
    );
}

fn main() {
    let mut numbers = std::env::args().filter_map(|argument| argument.parse().ok());
    let (threads, tokens) = (numbers.next().unwrap_or(2), numbers.next().unwrap_or(2048));
    let pool =
        rayon::ThreadPoolBuilder::new().num_threads(threads).use_current_thread().build_global();
    pool.expect("the pool is not built yet");
    println!("{threads} threads, {tokens} tokens; peak in GFLOP/s, the others in % of it");
    println!(
        "product {:22}peak    gemm     f32    bf16     nf4   +lora  nf4/f32     bf16  times",
        ""
    );
    for (input, output) in [(576, 576), (576, 192), (576, 1536), (1536, 576)] {
        frozen(tokens, input, output, false);
        frozen(tokens, input, output, true);
    }
    frozen(256, 576, 49152, false);
    frozen(256, 576, 49152, true);
    frozen(512, 4096, 4096, false);
    frozen(512, 4096, 11008, true);
    dense("x·Aᵀ", [tokens, 16, 576], "nt");
    dense("ax·Bᵀ", [tokens, 576, 16], "nt");
    dense("dy·B", [tokens, 16, 1536], "nn");
    dense("tᵀ·x", [16, 576, tokens], "tn");
    dense("dyᵀ·ax", [1536, 16, tokens], "tn");
    dense("q·kᵀ", [96, 512, 64], "nt");
    dense("p·v", [96, 64, 512], "nn");
    dense("pᵀ·do", [512, 64, 96], "tn");
}
