//! What the kernels that bound a step do to memory, counted over the warps of the committed PTX: lanes
//! never wait for each other's bank of shared memory, and write whole sectors of global memory.

use crate::emulator::{Device, NULL, PTX, Traffic, devices, launch};
use crate::support::*;
use crate::{dequantize, flash, mlp_adapters, row};

/// The entry that has a line of the PTX.
fn kernel_of(line: i32) -> &'static str {
    let entries = PTX.lines().take(line as usize);
    let name = entries.filter_map(|line| line.strip_prefix(".visible .entry ")).last().unwrap();
    name.trim_end_matches('(')
}

/// Checks all accesses of some kernels of `run` against the fewest banks and sectors that would do, times what writes and
/// reads of global memory may take. Twice for reads: the halves of 32 bytes of f32 are read one after the
/// other, the second one from the first cache.
#[track_caller]
fn check(kernels: &[&str], [writes, reads]: [u64; 2], run: impl FnOnce(&Device)) {
    let Some(device @ Device::Emulated(emulator)) = devices().last() else { return };
    let lines = emulator.traffic(|| run(device));
    if std::env::var_os("NIBBLE_EMULATED").is_some() {
        return; // sources, which have no lines of PTX
    }
    for kernel in kernels {
        assert!(lines.iter().any(|x| kernel_of(x.line) == *kernel), "{kernel} did not run");
    }
    for Traffic { line, shared, written, cost, fewest, .. } in lines {
        let allowed = match (shared, written) {
            (true, _) => fewest,
            (false, true) => writes * fewest,
            (false, false) => reads * fewest,
        };
        let what = if shared { "banks" } else { "sectors" };
        let kernel = kernel_of(line);
        if !kernels.contains(&kernel) {
            continue;
        }
        assert!(cost <= allowed, "{kernel}, kernels.ptx:{line}: {cost} {what}, {fewest} would do");
    }
}

/// Values of rows that begin at a multiple of a sector, with room behind them.
const ROWS: usize = 4;
const WIDTH: usize = 2048;
const STRIDE: usize = WIDTH + 16;

/// What it reads from all over is the map of nested scales: 1 KiB, which stays in the first cache.
#[test]
fn dequantize_writes_whole_sectors() {
    check(&["dequantize_4bit"], [1, 6], dequantize::run_once);
}

#[test]
fn a_row_is_multiplied_without_waiting_for_a_bank() {
    check(&["linear_row_4bit", "linear_row_bf16"], [1, 6], row::run_once);
}

/// A fragment of a tensor core has 16 bytes of a row: its writes are of half sectors.
#[test]
fn flash_attention_waits_for_no_bank() {
    for head_dim in [64, 96, 128, 256] {
        let kernels = ["forward", "backward_keys", "backward_queries"]
            .map(|pass| format!("flash_{pass}_{head_dim}"));
        check(&kernels.each_ref().map(String::as_str), [2, 2], |device| {
            flash::run_once(device, head_dim);
        });
    }
}

#[test]
fn adapters_of_an_mlp_wait_for_no_bank() {
    for most in [16, 32] {
        let [forward, backward] =
            ["forward", "backward"].map(|pass| format!("mlp_adapters_{pass}_{most}"));
        check(&[&forward, &backward], [1, 2], |device| mlp_adapters::run_once(device, most));
        // Rows of an adapter begin anywhere, and eight f32 of a thread are two halves of a sector.
        let sums = ["mlp_adapters_project", "mlp_adapters_inner", "mlp_adapters_gradients"];
        check(&sums, [2, 2], |device| mlp_adapters::run_once(device, most));
    }
}

#[test]
fn rows_are_written_in_whole_sectors() {
    let (grid, stride, width) = ([ROWS as u32, 1, 1], STRIDE as i32, WIDTH as i32);
    let x = normal_bf16(ROWS * STRIDE, "x");
    let weight = normal(WIDTH, "weight");
    let mut y = x.clone();
    let mut z = x.clone();
    let mut stats = [1.0f32; 2 * ROWS];
    let kernels = ["norm_forward", "norm_backward", "mlp_forward", "mlp_backward"];
    check(&kernels, [1, 2], |device| {
        launch!(device, "norm_forward", grid, 256; &x[..], stride, &weight[..], NULL, 1e-5f32,
            &mut y[..], stride, &mut stats[..], width, 0, 0);
        launch!(device, "norm_backward", grid, 256; &x[..], stride, &y[..], stride, &weight[..],
            &stats[..], &mut z[..], stride, width, 0);
        launch!(device, "mlp_forward", grid, 256; 0, &x[..], stride, &z[..], stride, &mut y[..],
            stride, width);
        let (d_gate, d_up) = (&mut y[..], &mut z[..]);
        launch!(device, "mlp_backward", grid, 256; 0, &x[..], stride, &x[..], stride, &x[..], stride,
            d_gate, stride, d_up, stride, width);
    });
    let targets = [0i32, 1, 2, 3];
    let (mut losses, mut hits) = ([0.0f32; ROWS], [0.0f32; ROWS]);
    check(&["cross_entropy_bf16"], [1, 2], |device| {
        launch!(device, "cross_entropy_bf16", grid, 512; &mut y[..], stride, &targets[..], width,
            1.0f32, 1, 0.0f32, &mut losses[..], &mut hits[..]);
    });
}

#[test]
fn heads_are_written_in_whole_sectors() {
    let (heads, kv_heads, head_dim) = (12, 2, 128);
    let grid = [ROWS as u32, 1, 1];
    let (cos, sin) = (normal(ROWS * head_dim / 2, "cos"), normal(ROWS * head_dim / 2, "sin"));
    let (weight, width) = (normal(head_dim, "weight"), head_dim as i32);
    let x = normal_bf16(ROWS * STRIDE, "qkv");
    let mut y = x.clone();
    check(&["rotary", "head_norms", "head_norms_backward"], [1, 2], |device| {
        launch!(device, "head_norms", grid, 128; &x[..], STRIDE as i32, &weight[..], &weight[..],
            1e-5f32, &mut y[..], STRIDE as i32, heads, kv_heads, width, width, kv_heads * width);
        launch!(device, "head_norms_backward", grid, 128; &x[..], STRIDE as i32, &weight[..],
            &weight[..], 1e-5f32, &mut y[..], STRIDE as i32, heads, kv_heads, width, width,
            kv_heads * width);
        launch!(device, "rotary", grid, 128; &mut y[..], STRIDE as i32, &cos[..], &sin[..],
            NULL, heads, heads + kv_heads, width, width, 0, 0);
    });
}

#[test]
fn what_adapters_put_beside_weights_is_written_in_whole_sectors() {
    let (rows, rank) = ([64, 32, 32], 16);
    let all: i32 = rows.iter().sum();
    let b = rows.map(|rows| normal_bf16((rows * rank) as usize, "b"));
    let stride = 256 + 3 * rank;
    let mut to = vec![POISON; (all * stride) as usize];
    check(&["diagonal_bf16"], [1, 2], |device| {
        launch!(device, "diagonal_bf16", [3, 1, 1], 128; &b[0][..], &b[1][..], &b[2][..], rows[0],
            rows[1], rows[2], rank, rank, rank, 1.0f32, 1.0f32, 1.0f32, &mut to[..], stride);
    });
}
