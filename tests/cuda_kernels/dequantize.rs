//! Dequantization, bit for bit.

use half::bf16;
use nibble_quant::codebook::dynamic_map;
use nibble_quant::{Absmax, BlockFormat, Floats, PackedWeight, QuantType};

use crate::emulator::{Argument, Device, NULL, launch};
use crate::support::*;

/// The arguments that describe a packed weight.
pub fn weight_arguments(packed: &PackedWeight) -> [Argument; 8] {
    let format = packed.format();
    let (absmax, absmax_codes, nested, map, offset) = match packed.absmax() {
        Absmax::Plain(absmax) => (absmax[..].into(), NULL, NULL, NULL, 0.0),
        Absmax::Nested { codes, absmax, offset } => {
            (NULL, codes[..].into(), absmax[..].into(), dynamic_map()[..].into(), *offset)
        }
    };
    let values = format.quant_type.values()[..].into();
    let shift = format.block_size.ilog2() as i32;
    let codes = packed.codes()[..].into();
    [codes, values, absmax, absmax_codes, nested, map, offset.into(), shift.into()]
}

fn dequantize(
    device: &Device,
    packed: &PackedWeight,
    rows: std::ops::Range<usize>,
    stride: usize,
    blocks: u32,
) -> Vec<bf16> {
    let mut out = vec![POISON; rows.len() * stride];
    let mut arguments = weight_arguments(packed).to_vec();
    let rest: [Argument; 5] = [
        (rows.start as i64).into(),
        (rows.len() as i64).into(),
        (packed.shape()[1] as i32).into(),
        (&mut out[..]).into(),
        (stride as i32).into(),
    ];
    arguments.extend(rest);
    device.launch("dequantize_4bit", [blocks, 1, 1], 256, 0, &mut arguments);
    out
}

#[track_caller]
fn check(device: &Device, shape: [usize; 2], stride: usize, format: &BlockFormat) {
    let values = normal(shape[0] * shape[1], "weight");
    let packed = PackedWeight::quantize(Floats::F32(&values), shape, format).unwrap();
    let expected = packed.dequantize();
    let third = shape[0] / 3;
    for rows in [0..shape[0], third..shape[0] - third] {
        for blocks in [1, 3] {
            let got = dequantize(device, &packed, rows.clone(), stride, blocks);
            for (row, got) in rows.clone().zip(got.chunks_exact(stride)) {
                for (column, got) in got.iter().enumerate() {
                    let expected = match column < shape[1] {
                        true => bf16::from_f32(expected[row * shape[1] + column]),
                        false => POISON,
                    };
                    assert_eq!(
                        got.to_bits(),
                        expected.to_bits(),
                        "{shape:?} {format:?} {row} {column}"
                    );
                }
            }
        }
    }
}

/// A matrix of whole warps in the default format.
pub fn run_once(device: &Device) {
    let values = normal(64 * 4096, "weight");
    let format = BlockFormat::default();
    let packed = PackedWeight::quantize(Floats::F32(&values), [64, 4096], &format).unwrap();
    dequantize(device, &packed, 0..64, 4096 + 16, 32);
}

/// Whether a matrix in the default format, a whole turn and a rest, has the CPU's bits; panics if it has not.
pub fn is_right(device: &Device) -> bool {
    check(device, [41, 256], 272, &BlockFormat::default());
    true
}

#[test]
fn every_format_has_the_bits_of_the_cpu() {
    in_every_order(|device| {
        for quant_type in [QuantType::Nf4, QuantType::Fp4] {
            for double_quant in [false, true] {
                for block_size in [32, 64, 128, 256, 512, 1024, 2048, 4096] {
                    let format = BlockFormat { quant_type, block_size, double_quant };
                    check(device, [24, 200], 216, &format);
                }
            }
        }
    });
}

/// Columns that are no multiple of a vector, short last blocks, strides that break alignment, rows
/// that begin inside a block.
#[test]
fn odd_shapes_have_the_bits_of_the_cpu() {
    in_every_order(|device| {
        for double_quant in [false, true] {
            let format = BlockFormat { double_quant, ..BlockFormat::default() };
            for (shape, stride) in [
                ([1, 1], 1),
                ([3, 7], 9),
                ([9, 77], 77),
                ([37, 72], 80),
                ([5, 1000], 1001),
                ([12, 8], 8),
                ([6, 4104], 4112),
            ] {
                check(device, shape, stride, &format);
            }
        }
    });
}

/// What a block takes in one turn, all of it there, and a rest; rows from the narrowest that may have such
/// turns on, some of which begin inside a block.
#[test]
fn whole_turns_have_the_bits_of_the_cpu() {
    in_every_order(|device| {
        for (double_quant, block_size) in [(true, 32), (false, 64), (true, 1024), (true, 4096)] {
            let format = BlockFormat { double_quant, block_size, ..BlockFormat::default() };
            for (shape, stride) in [([41, 256], 256), ([33, 264], 272), ([27, 1056], 1064)] {
                check(device, shape, stride, &format);
            }
        }
    });
}

#[test]
fn packed_rows_are_gathered() {
    in_every_order(|device| {
        let (vocab, width, ids) = (19, 72, [3u32, 18, 0, 3]);
        let values = normal(vocab * width, "table");
        let packed =
            PackedWeight::quantize(Floats::F32(&values), [vocab, width], &BlockFormat::default())
                .unwrap();
        let before = normal_bf16(ids.len() * width, "x");
        for accumulate in [false, true] {
            let mut x = if accumulate { before.clone() } else { vec![POISON; before.len()] };
            let mut arguments = vec![Argument::from(&ids[..])];
            arguments.extend(weight_arguments(&packed));
            let scale = 1.5f32;
            let rest: [Argument; 5] = [
                (&mut x[..]).into(),
                (width as i32).into(),
                (width as i32).into(),
                scale.into(),
                i32::from(accumulate).into(),
            ];
            arguments.extend(rest);
            device.launch("embed_4bit", [ids.len() as u32, 1, 1], 32, 0, &mut arguments);
            let table = packed.dequantize();
            for (i, (got, &id)) in x.chunks_exact(width).zip(&ids).enumerate() {
                for (c, got) in got.iter().enumerate() {
                    let value = scale * table[id as usize * width + c];
                    let sum = before[i * width + c].to_f32() + value;
                    let expected = bf16::from_f32(if accumulate { sum } else { value });
                    assert_eq!(*got, expected, "{i} {c}");
                }
            }
        }
    });
}

#[test]
fn dense_rows_are_rounded_as_half_does() {
    in_every_order(|device| {
        for (rows, width, stride) in [(3, 40, 56), (2, 33, 35)] {
            let values = normal(rows * width, "dense");
            let scale = 0.37f32;
            let grid = [rows as u32, 1, 1];
            let mut to = vec![POISON; rows * stride];
            launch!(device, "scale_rows_f32_bf16", grid, 64; &values[..], width as i32,
                &mut to[..], stride as i32, width as i32, scale, 0);
            let expected: Vec<f64> =
                values.iter().map(|x| bf16::from_f32(scale * x).to_f64()).collect();
            assert_eq!(band(&to, width, stride), expected);
        }
    });
}
