//! One row times a weight, packed or in bf16.

use half::bf16;
use nibble_quant::{BlockFormat, Floats, PackedWeight, QuantType};

use crate::dequantize::weight_arguments;
use crate::emulator::{Argument, Device, NULL};
use crate::support::*;

/// What is added to x·Wᵀ.
#[derive(Debug, Clone, Copy, Default)]
struct Added {
    bias: bool,
    rank: usize,
    accumulate: bool,
}

/// How a weight is stored; what is multiplied is what it holds.
#[derive(Debug, Clone, Copy)]
enum Stored<'a> {
    Packed(&'a BlockFormat),
    Dense,
}

/// x on 16 bytes, or not.
#[track_caller]
fn check(device: &Device, shape: [usize; 2], stored: Stored, added: Added, offset: usize) {
    let ([rows, columns], Added { bias, rank, accumulate }) = (shape, added);
    let mut weight = normal(rows * columns, "weight");
    let dense: Vec<bf16> = weight.iter().map(|&w| bf16::from_f32(w)).collect();
    let packed = match stored {
        Stored::Packed(format) => {
            Some(PackedWeight::quantize(Floats::F32(&weight), shape, format).unwrap())
        }
        Stored::Dense => None,
    };
    let (kernel, mut arguments) = match &packed {
        Some(packed) => {
            weight = packed.dequantize();
            ("linear_row_4bit", weight_arguments(packed).to_vec())
        }
        None => {
            weight = dense.iter().map(|w| w.to_f32()).collect();
            ("linear_row_bf16", vec![Argument::from(&dense[..])])
        }
    };
    let x = normal_bf16(offset + columns, "x");
    let biases = normal(rows, "bias");
    let (ax, b) = (normal_bf16(rank, "ax"), normal_bf16(rows * rank, "b"));
    let before = normal_bf16(rows, "y");
    let scale = 0.75f32;
    let mut y = if accumulate { before.clone() } else { vec![POISON; rows] };
    let optional = |given: bool, argument: Argument| if given { argument } else { NULL };
    arguments.extend([
        Argument::from(rows as i64),
        (columns as i32).into(),
        x[offset..].into(),
        optional(bias, biases[..].into()),
        optional(rank > 0, ax[..].into()),
        optional(rank > 0, b[..].into()),
        (rank as i32).into(),
        scale.into(),
        (&mut y[..]).into(),
        i32::from(accumulate).into(),
    ]);
    device.launch(kernel, [rows.div_ceil(8) as u32, 1, 1], 256, 0, &mut arguments);
    for (row, got) in y.iter().enumerate() {
        let weights = weight[row * columns..][..columns].iter().map(|w| f64::from(*w));
        let terms = weights.zip(wide(&x[offset..])).map(|(w, x)| w * x);
        let low_rank = wide(&ax).into_iter().zip(wide(&b[row * rank..][..rank]));
        let low_rank = low_rank.map(|(a, b)| f64::from(scale) * a * b);
        let others = [
            if bias { f64::from(biases[row]) } else { 0.0 },
            if accumulate { before[row].to_f64() } else { 0.0 },
        ];
        let terms: Vec<f64> = terms.chain(low_rank).chain(others).collect();
        let (sum, size): (f64, f64) = (terms.iter().sum(), terms.iter().map(|x| x.abs()).sum());
        let allowed = 1e-6 * size + BF16_ROUNDING * sum.abs();
        let error = (got.to_f64() - sum).abs();
        assert!(error <= allowed, "{shape:?} {stored:?} {added:?} {row}: {got}, not {sum}");
    }
}

/// Whether a matrix in the default format is multiplied; panics if it is not.
pub fn is_right(device: &Device) -> bool {
    check(device, [11, 1184], Stored::Packed(&BlockFormat::default()), Added::default(), 0);
    true
}

/// A matrix of whole runs, and an adapter.
pub fn run_once(device: &Device) {
    let added = Added { rank: 16, ..Added::default() };
    for stored in [Stored::Packed(&BlockFormat::default()), Stored::Dense] {
        check(device, [16, 2048], stored, added, 0);
    }
}

#[test]
fn every_format_is_multiplied() {
    in_every_order(|device| {
        for quant_type in [QuantType::Nf4, QuantType::Fp4] {
            for double_quant in [false, true] {
                for block_size in [32, 64, 128, 256, 512, 1024, 2048, 4096] {
                    let format = BlockFormat { quant_type, block_size, double_quant };
                    check(device, [11, 1184], Stored::Packed(&format), Added::default(), 0);
                }
            }
        }
    });
}

const SHAPES: [[usize; 2]; 7] =
    [[1, 1], [3, 7], [9, 77], [17, 96], [8, 1056], [5, 1000], [7, 2080]];

/// Rows that end inside a block, a run or a load, and rows that words of codes do not divide.
#[test]
fn odd_shapes_are_multiplied() {
    in_every_order(|device| {
        for double_quant in [false, true] {
            let format = BlockFormat { double_quant, ..BlockFormat::default() };
            for shape in SHAPES {
                check(device, shape, Stored::Packed(&format), Added::default(), 0);
            }
        }
        for shape in SHAPES {
            check(device, shape, Stored::Dense, Added::default(), 0);
        }
        check(device, [9, 128], Stored::Dense, Added::default(), 3);
        check(device, [9, 128], Stored::Packed(&BlockFormat::default()), Added::default(), 3);
    });
}

#[test]
fn biases_adapters_and_what_was_there_are_added() {
    in_every_order(|device| {
        for rank in [0, 1, 16, 40] {
            for (bias, accumulate) in [(false, true), (true, false), (true, true)] {
                let added = Added { bias, rank, accumulate };
                for stored in [Stored::Packed(&BlockFormat::default()), Stored::Dense] {
                    check(device, [10, 160], stored, added, 0);
                }
            }
        }
    });
}
