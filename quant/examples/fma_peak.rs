//! The machine's f32 peak at this moment: fused multiply-adds on registers alone, on N threads.
//!
//! Benchmarks print it beside their figures, because shared machines change speed by the minute.
//!
//! ```text
//! cargo run --release -p nibble-quant --example fma_peak -- [THREADS] [SECONDS]
//! ```
//!
//! Prints one number, GFLOP/s: the median over windows of 20 ms, each the sum over the threads.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use pulp::Arch;

#[path = "../benches/product/peak.rs"]
mod peak;

const STEPS_PER_BURST: usize = 4096;
const WINDOW: Duration = Duration::from_millis(20);

/// GFLOP/s of this thread in each of `windows` windows.
fn measure(windows: usize, start: &Barrier) -> Vec<f64> {
    let arch = Arch::new();
    start.wait();
    let mut rates = Vec::with_capacity(windows);
    for _ in 0..windows {
        let begun = Instant::now();
        let mut operations = 0;
        while begun.elapsed() < WINDOW {
            let (sum, count) =
                arch.dispatch(peak::Burst { seed: black_box(0.75), steps: STEPS_PER_BURST });
            black_box(sum);
            operations += count;
        }
        rates.push(operations as f64 / begun.elapsed().as_secs_f64() / 1e9);
    }
    rates
}

fn main() -> Result<(), String> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |name: &str, default: f64| match arguments.next() {
        Some(text) => text.parse().map_err(|_| format!("{name}: not a number: `{text}`")),
        None => Ok(default),
    };
    let threads = number("THREADS", 1.0)? as usize;
    let windows = (number("SECONDS", 1.0)? / WINDOW.as_secs_f64()).ceil() as usize;

    let start = Barrier::new(threads);
    let rates: Vec<Vec<f64>> = std::thread::scope(|scope| {
        let workers: Vec<_> =
            (0..threads).map(|_| scope.spawn(|| measure(windows, &start))).collect();
        workers.into_iter().map(|w| w.join().expect("a worker only multiplies")).collect()
    });
    let mut sums: Vec<f64> =
        (0..windows).map(|window| rates.iter().map(|thread| thread[window]).sum()).collect();
    sums.sort_by(f64::total_cmp);
    println!("{:.1}", sums.get(windows / 2).copied().unwrap_or(0.0));
    Ok(())
}
