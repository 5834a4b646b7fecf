//! The innermost loop on ARM's `bfmmla`, which adds the product of 2 × 4 and 4 × 2 bf16 to 2 × 2 floats:
//! sixteen multiply-adds, where one of f32 registers makes four.
//!
//! Two steps of k, of pairs each, are a register's four; operands lie as for the other tiles. The
//! instruction rounds and flushes in its own way. There is no intrinsic for it, hence assembly.
#![allow(unsafe_code)]

use std::arch::aarch64::*;
use std::arch::asm;

use super::tile::{Segment, Tile, write_row};
use super::vector::Vector;

type Register = float32x4_t;
const LANES: usize = <Register as Vector>::LANES;

/// Most columns of a tile: with 6 rows 18 of the 32 registers are sums. With 16 columns some would be spilled.
pub(super) const COLUMNS: usize = 3 * LANES;

/// For pairs of rows and vectors of columns: the first two columns, then the other two, row after row.
type Sums<const PAIRS: usize, const VECTORS: usize> = [[[Register; 2]; VECTORS]; PAIRS];

/// Computes a tile.
///
/// # Safety
/// The processor has NEON and BF16; the tile's pointers reach all that its fields say.
#[target_feature(enable = "neon,bf16")]
pub(super) unsafe fn run(tile: &Tile) {
    // SAFETY: passed on.
    unsafe {
        match tile.rows.div_ceil(2) {
            1 => of_row_pairs::<1>(tile),
            2 => of_row_pairs::<2>(tile),
            _ => of_row_pairs::<3>(tile),
        }
    }
}

#[inline(always)]
unsafe fn of_row_pairs<const PAIRS: usize>(tile: &Tile) {
    // SAFETY: passed on.
    unsafe {
        match tile.columns.div_ceil(LANES) {
            1 => compute::<PAIRS, 1>(tile),
            2 => compute::<PAIRS, 2>(tile),
            _ => compute::<PAIRS, 3>(tile),
        }
    }
}

#[inline(always)]
unsafe fn compute<const PAIRS: usize, const VECTORS: usize>(tile: &Tile) {
    // SAFETY: the caller's promise covers every pointer below.
    unsafe {
        let zero = [[[Register::splat(0.0); 2]; VECTORS]; PAIRS];
        let mut sums = chain(zero, &tile.first, tile.rows);
        if let Some(second) = &tile.second {
            sums = chain(sums, second, tile.rows);
        }
        for (pair, sums) in sums.into_iter().enumerate() {
            let lines = sums.map(|blocks| lines(blocks));
            for (half, row) in (2 * pair..tile.rows).take(2).enumerate() {
                let line = lines.map(|line| line[half]);
                write_row(tile, &line, tile.c.add(row * tile.c_stride));
            }
        }
    }
}

/// The upper and the lower row of two blocks side by side.
#[inline(always)]
unsafe fn lines(blocks: [Register; 2]) -> [Register; 2] {
    // SAFETY: registers alone.
    unsafe {
        let [left, right] = blocks.map(|block| vreinterpretq_f64_f32(block));
        [vtrn1q_f64(left, right), vtrn2q_f64(left, right)].map(|line| vreinterpretq_f32_f64(line))
    }
}

/// Adds a stretch's products to the sums.
#[inline(always)]
unsafe fn chain<const PAIRS: usize, const VECTORS: usize>(
    sums: Sums<PAIRS, VECTORS>,
    segment: &Segment,
    rows: usize,
) -> Sums<PAIRS, VECTORS> {
    // SAFETY: the caller's promise covers every pointer; of neighbours in memory two are one load.
    unsafe {
        let stride = segment.a_step_stride;
        match stride {
            1 => steps(sums, segment, rows, |first| vld1_f32(first)),
            _ => steps(sums, segment, rows, |first| {
                vld1_f32([*first, *first.wrapping_add(stride)].as_ptr())
            }),
        }
    }
}

/// [`chain`], where `two` reads a row's step and the next one.
#[inline(always)]
unsafe fn steps<const PAIRS: usize, const VECTORS: usize>(
    mut sums: Sums<PAIRS, VECTORS>,
    segment: &Segment,
    rows: usize,
    two: impl Fn(*const f32) -> float32x2_t,
) -> Sums<PAIRS, VECTORS> {
    // SAFETY: the caller's promise covers every pointer below. Of an odd number of rows the last one is
    // taken twice, and its second sums are not written.
    unsafe {
        let row = |row: usize| segment.a.add(row.min(rows - 1) * segment.a_row_stride);
        let mut a: [[*const f32; 2]; PAIRS] =
            std::array::from_fn(|pair| [row(2 * pair), row(2 * pair + 1)]);
        let (mut b, next) = (segment.b, segment.b_stride);
        for _ in 0..segment.steps / 2 {
            let fours = a.map(|[upper, lower]| vcombine_f32(two(upper), two(lower)));
            sums = add(sums, fours, |v| {
                let b = b.add(v * LANES);
                [Register::load(b), Register::load(b.add(next))]
            });
            a = a.map(|rows| rows.map(|row| row.wrapping_add(2 * segment.a_step_stride)));
            b = b.wrapping_add(2 * next);
        }
        if !segment.steps.is_multiple_of(2) {
            let one = |row: *const f32| vset_lane_f32::<0>(*row, vdup_n_f32(0.0));
            let fours = a.map(|[upper, lower]| vcombine_f32(one(upper), one(lower)));
            sums = add(sums, fours, |v| [Register::load(b.add(v * LANES)), Register::splat(0.0)]);
        }
        sums
    }
}

/// Adds the products of two steps, of which `b` gives a vector's columns.
#[inline(always)]
unsafe fn add<const PAIRS: usize, const VECTORS: usize>(
    mut sums: Sums<PAIRS, VECTORS>,
    a: [Register; PAIRS],
    b: impl Fn(usize) -> [Register; 2],
) -> Sums<PAIRS, VECTORS> {
    for v in 0..VECTORS {
        let [first, second] = b(v);
        // SAFETY: registers alone.
        unsafe {
            let columns = [vzip1q_f32(first, second), vzip2q_f32(first, second)];
            for (sums, a) in sums.iter_mut().zip(a) {
                for (sum, columns) in sums[v].iter_mut().zip(columns) {
                    *sum = multiply_add(a, columns, *sum);
                }
            }
        }
    }
    sums
}

#[inline(always)]
unsafe fn multiply_add(a: Register, b: Register, mut sum: Register) -> Register {
    // SAFETY: the callers' processor has the instruction, which works on registers alone.
    unsafe {
        asm!(
            ".arch_extension bf16",
            "bfmmla {sum:v}.4s, {a:v}.8h, {b:v}.8h",
            sum = inout(vreg) sum,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}
