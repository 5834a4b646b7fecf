//! Tests of the tests: with one line of a kernel broken, results must be wrong in some order.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::emulator::{Emulator, ORDERS, emulator, launch};

/// The kernels with `from` replaced by `to` in `file`, or `None` without g++.
fn mutant(name: &str, file: &str, from: &str, to: &str) -> Option<Emulator> {
    emulator()?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let copy = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("mutant-{name}"));
    for folder in ["src/kernels/cuda", "quant/src/cuda"] {
        fs::create_dir_all(copy.join(folder)).unwrap();
        for entry in fs::read_dir(root.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, copy.join(folder).join(path.file_name().unwrap())).unwrap();
        }
    }
    let source = fs::read_to_string(root.join(file)).unwrap();
    assert!(source.contains(from), "{file} has no `{from}`");
    fs::write(copy.join(file), source.replacen(from, to, 1)).unwrap();
    let library = copy.join("libmutant.so");
    let status = Command::new(root.join("tests/emulator/build.sh"))
        .arg(&library)
        .arg("-O1")
        .env("NIBBLE_SOURCES", &copy)
        .status()
        .unwrap();
    assert!(status.success());
    Some(Emulator::open(&library).unwrap())
}

/// Σ x of 4,000 ones in each order, over four warps.
fn sums_of_ones(emulator: &Emulator) -> Vec<f64> {
    let x = vec![1.0f32; 4000];
    ORDERS
        .iter()
        .map(|&order| {
            emulator.order(order);
            let mut sum = [f64::NAN];
            launch!(emulator, "sum_f32", [1, 1, 1], 128; &x[..], 4000i64, &mut sum[..]);
            sum[0]
        })
        .collect()
}

#[test]
fn a_missing_barrier_shows() {
    let Some(intact) = emulator() else { return };
    assert_eq!(sums_of_ones(intact), [4000.0; 3]);
    let barrier = "if (lane == 0) parts[warp] = x;\n    __syncthreads();";
    let broken = mutant(
        "barrier",
        "src/kernels/cuda/reduce.cuh",
        barrier,
        "if (lane == 0) parts[warp] = x;",
    );
    let sums = sums_of_ones(&broken.unwrap());
    assert!(sums.iter().any(|&sum| sum != 4000.0), "{sums:?}");
}
