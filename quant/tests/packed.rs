//! Properties of packed weights, and what they refuse.

use bytes::Bytes;
use half::{bf16, f16};
use nibble_quant::{
    Absmax, BlockFormat, FloatType, Floats, PackedParts, PackedWeight, QuantType, codebook,
};

/// Normally distributed (Box and Muller) with deviation 1, from a xorshift generator.
fn normal(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    let mut value = || (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
    (0..count).map(|_| value() as f32).collect()
}

fn format(quant_type: QuantType, block_size: usize, double_quant: bool) -> BlockFormat {
    BlockFormat { quant_type, block_size, double_quant }
}

fn pack(values: &[f32], shape: [usize; 2], format: &BlockFormat) -> PackedWeight {
    PackedWeight::quantize(Floats::F32(values), shape, format).expect("finite")
}

fn mean_error(values: &[f32], format: &BlockFormat) -> f64 {
    let restored = pack(values, [values.len() / 4096, 4096], format).dequantize();
    let errors = values.iter().zip(&restored).map(|(a, b)| f64::from((a - b).abs()));
    errors.sum::<f64>() / values.len() as f64
}

/// All formats, on a weight whose rows start inside of blocks.
fn samples() -> Vec<PackedWeight> {
    let values = normal(23 * 1009, 5);
    let mut samples = Vec::new();
    for quant_type in [QuantType::Nf4, QuantType::Fp4] {
        for block_size in [32, 64, 128, 256, 512, 1024, 2048, 4096] {
            for double_quant in [false, true] {
                let format = format(quant_type, block_size, double_quant);
                samples.push(pack(&values, [23, 1009], &format));
            }
        }
    }
    samples
}

#[test]
fn every_byte_decodes() {
    for (quant_type, table) in [(QuantType::Nf4, codebook::NF4), (QuantType::Fp4, codebook::FP4)] {
        let scales: Vec<f32> = (0..8).map(|block| 0.5 + block as f32).collect();
        let packed = PackedWeight::from_parts(PackedParts {
            shape: [8, 64],
            dtype: FloatType::F32,
            quant_type,
            block_size: 64,
            codes: (0..=255).collect::<Vec<u8>>().into(),
            absmax: Absmax::Plain(bytemuck::cast_slice(&scales).to_vec().into()),
        })
        .unwrap();
        for (byte, pair) in packed.dequantize().chunks(2).enumerate() {
            let scale = scales[byte / 32];
            let expected = [table[byte >> 4] * scale, table[byte & 15] * scale];
            assert_eq!(pair, expected, "{quant_type:?} byte {byte:#04x}");
        }
    }
}

/// bitsandbytes' mean errors for blocks of 64 on N(0, 1); the last bound is its mean + 7 deviations.
#[test]
fn errors_on_a_normal_distribution_are_those_of_bitsandbytes() {
    let values = normal(1 << 20, 11);
    let error =
        |quant_type, double_quant| mean_error(&values, &format(quant_type, 64, double_quant));
    for (error, mean, what) in [
        (error(QuantType::Nf4, false), 0.072_71, "nf4"),
        (error(QuantType::Nf4, true), 0.072_78, "nf4, nested"),
        (error(QuantType::Fp4, false), 0.096_46, "fp4"),
    ] {
        assert!((error / mean - 1.0).abs() < 0.003, "{what}: {error}, expected {mean}");
    }
    assert!(error(QuantType::Nf4, true) < 0.0733);
}

#[test]
fn larger_blocks_lose_more() {
    let values = normal(1 << 18, 12);
    let error = |block_size| mean_error(&values, &format(QuantType::Nf4, block_size, true));
    let errors: Vec<f64> = (5..=12).map(|log| error(1 << log)).collect();
    assert!(errors.windows(2).all(|pair| pair[0] < pair[1]), "{errors:?}");
    assert!(errors[7] < 0.13, "{errors:?}");
}

#[test]
fn bytes_are_arithmetic() {
    let values = vec![0.5; 4096 * 4096];
    let nested = pack(&values, [4096, 4096], &BlockFormat::default());
    assert_eq!(nested.bytes(), 8_388_608 + 262_144 + 4_096 + 4);
    assert_eq!(nested.format().packed_bytes(values.len()), nested.bytes());
    assert!((nested.format().bits_per_weight() - 4.127).abs() < 1e-3);
    for packed in samples() {
        let [rows, columns] = packed.shape();
        assert_eq!(packed.format().packed_bytes(rows * columns), packed.bytes());
    }
}

#[test]
fn any_part_equals_the_same_part_of_the_whole() {
    for packed in samples() {
        let whole = packed.dequantize();
        let [rows, columns] = packed.shape();
        for rows in [0..1, 3..7, 22..23, 0..rows, 9..9] {
            let mut part = vec![f32::NAN; rows.len() * columns];
            packed.dequantize_rows_into(rows.clone(), &mut part);
            assert_eq!(part, whole[rows.start * columns..rows.end * columns], "rows {rows:?}");
        }
        for (begin, count) in [(0, 1), (1, 1), (1, 2), (63, 66), (64, 64), (31, 4100), (17, 9000)] {
            let mut part = vec![f32::NAN; count];
            packed.dequantize_range(begin, &mut part);
            assert_eq!(part, whole[begin..begin + count], "{count} from {begin}");
        }
    }
}

/// A task of the parallel loops ends inside of this weight, as does a nested block.
#[test]
fn the_number_of_threads_changes_nothing() {
    let values = normal(301 * 999, 13);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let packed = pack(&values, [301, 999], &BlockFormat::default());
            let Absmax::Nested { codes, absmax, offset } = packed.absmax().clone() else {
                panic!("nested scales")
            };
            (packed.codes().clone(), codes, absmax, offset.to_bits(), packed.dequantize())
        })
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn reading_a_part_at_a_time_gives_the_same_bytes() -> candle_core::Result<()> {
    // More than one task's 1024 blocks of 64, the last block short.
    let shape = [301, 257];
    let weight: Vec<f32> = (0..301 * 257).map(|i| (i as f32 * 0.7).sin() * 0.02).collect();
    for quant_type in [QuantType::Nf4, QuantType::Fp4] {
        let format = BlockFormat { quant_type, ..BlockFormat::default() };
        let whole = PackedWeight::quantize(Floats::F32(&weight), shape, &format)?;
        let read =
            |first: usize, out: &mut [f32]| out.copy_from_slice(&weight[first..][..out.len()]);
        let parts = PackedWeight::quantize_from(read, FloatType::Bf16, shape, &format)?;
        assert_eq!(whole.codes(), parts.codes());
        assert_eq!(whole.dequantize(), parts.dequantize());
        assert_eq!(parts.dtype(), FloatType::Bf16);
    }
    let nan_at_5 = |first: usize, out: &mut [f32]| {
        out.fill(1.0);
        if let Some(index) = 70_005usize.checked_sub(first).filter(|index| *index < out.len()) {
            out[index] = f32::NAN;
        }
    };
    let format = BlockFormat::default();
    let error = PackedWeight::quantize_from(nan_at_5, FloatType::F32, [100, 1000], &format);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("element [70, 5] (flat index 70005) is not finite"), "{error}");
    Ok(())
}

#[test]
fn halves_are_quantized_as_their_f32_values() {
    let values = normal(5 * 333, 14);
    let bf16: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
    let f16: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
    let from_bf16: Vec<f32> = bf16.iter().map(|v| v.to_f32()).collect();
    let from_f16: Vec<f32> = f16.iter().map(|v| v.to_f32()).collect();
    let format = BlockFormat::default();
    for (floats, widened) in [(Floats::Bf16(&bf16), from_bf16), (Floats::F16(&f16), from_f16)] {
        let packed = PackedWeight::quantize(floats, [5, 333], &format).unwrap();
        assert_eq!(packed.dtype(), floats.dtype());
        let expected = pack(&widened, [5, 333], &format);
        assert_eq!(packed.codes(), expected.codes());
        assert_eq!(packed.dequantize(), expected.dequantize());
    }
}

#[test]
fn quantizing_again_changes_nothing() {
    let once = pack(&normal(64 * 64, 15), [64, 64], &format(QuantType::Nf4, 64, false));
    let twice = pack(&once.dequantize(), [64, 64], &once.format());
    assert_eq!(once.codes(), twice.codes());
    assert_eq!(once.dequantize(), twice.dequantize());
}

#[test]
fn the_first_value_that_is_not_finite_is_named() {
    for (bad, index) in [(f32::NAN, 0), (f32::INFINITY, 70_001), (f32::NEG_INFINITY, 99_999)] {
        let mut values = normal(100 * 1000, 16);
        values[99_999] = f32::NAN;
        values[index] = bad;
        let error =
            PackedWeight::quantize(Floats::F32(&values), [100, 1000], &BlockFormat::default())
                .unwrap_err()
                .to_string();
        let place = format!("[{}, {}] (flat index {index})", index / 1000, index % 1000);
        assert!(error.contains(&place), "{error}");
    }
    let halves = [f16::from_f32(1.0), f16::INFINITY];
    let format = BlockFormat::default();
    let error = PackedWeight::quantize(Floats::F16(&halves), [1, 2], &format).unwrap_err();
    assert!(error.to_string().contains("flat index 1"), "{error}");
}

#[test]
fn wrong_shapes_and_block_sizes_are_refused() {
    let values = vec![1.0; 128];
    let quantize = |shape, block_size| {
        let format = format(QuantType::Nf4, block_size, true);
        PackedWeight::quantize(Floats::F32(&values), shape, &format).unwrap_err().to_string()
    };
    assert!(quantize([2, 63], 64).contains("shape [2, 63] does not hold 128 elements"));
    assert!(quantize([usize::MAX, 2], 64).contains("does not hold"));
    for block_size in [0, 1, 16, 48, 63, 8192, usize::MAX] {
        let error = quantize([2, 64], block_size);
        assert!(error.contains(&format!("block size {block_size} is not a power")), "{error}");
    }
}

fn stored_parts(nested: bool) -> PackedParts {
    let packed = pack(&normal(7 * 2400, 17), [7, 2400], &format(QuantType::Nf4, 64, nested));
    PackedParts {
        shape: packed.shape(),
        dtype: packed.dtype(),
        quant_type: QuantType::Nf4,
        block_size: 64,
        codes: packed.codes().clone(),
        absmax: packed.absmax().clone(),
    }
}

/// The scales in f32, one of them another.
fn with_scale(absmax: &Absmax, index: usize, scale: f32) -> Bytes {
    let (Absmax::Plain(scales) | Absmax::Nested { absmax: scales, .. }) = absmax;
    let mut scales = scales.to_vec();
    scales[4 * index..][..4].copy_from_slice(&scale.to_le_bytes());
    scales.into()
}

#[test]
fn stored_parts_of_wrong_length_are_refused() {
    type Damage = fn(&mut PackedParts);
    let cut = |bytes: &mut Bytes| bytes.truncate(bytes.len() - 1);
    let damages: [(bool, Damage, &str); 9] = [
        (true, |p| p.shape = [7, 2401], "codes has 8400 bytes, expected 8404"),
        (true, |p| p.shape = [usize::MAX, 2], "overflows"),
        (true, |p| p.shape = [0, 0], "shape [0, 0] is empty"),
        (true, |p| p.block_size = 128, "absmax has 263 bytes, expected 132"),
        (true, |p| p.block_size = 65, "block size 65"),
        (true, |p| p.codes = Bytes::new(), "codes has 0 bytes, expected 8400"),
        (false, |p| p.absmax = Absmax::Plain(Bytes::from_static(&[0; 1051])), "expected 1052"),
        (
            true,
            |p| {
                if let Absmax::Nested { absmax, .. } = &mut p.absmax {
                    *absmax = absmax.slice(..4);
                }
            },
            "nested_absmax has 4 bytes, expected 8",
        ),
        (
            true,
            |p| {
                if let Absmax::Nested { offset, .. } = &mut p.absmax {
                    *offset = f32::NAN;
                }
            },
            "nested_offset is NaN",
        ),
    ];
    for (nested, damage, message) in damages {
        let mut parts = stored_parts(nested);
        damage(&mut parts);
        let error = PackedWeight::from_parts(parts).unwrap_err().to_string();
        assert!(error.contains(message), "{error}, expected {message}");
    }
    let mut parts = stored_parts(true);
    cut(&mut parts.codes);
    assert!(PackedWeight::from_parts(parts).is_err());
}

#[test]
fn scales_that_are_not_finite_are_found() {
    for (nested, index, scale, message) in [
        (false, 7, f32::NAN, "absmax[7] is NaN"),
        (true, 1, f32::INFINITY, "nested_absmax[1] is inf"),
    ] {
        let mut parts = stored_parts(nested);
        PackedWeight::from_parts(parts.clone()).unwrap().check_scales().unwrap();
        let damaged = with_scale(&parts.absmax, index, scale);
        let (Absmax::Plain(scales) | Absmax::Nested { absmax: scales, .. }) = &mut parts.absmax;
        *scales = damaged;
        let error = PackedWeight::from_parts(parts).unwrap().check_scales().unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
    }
}

/// Slices of a mapped file start anywhere.
#[test]
fn unaligned_parts_are_read() {
    let shifted = |bytes: &Bytes| {
        let mut copy = vec![0u8];
        copy.extend_from_slice(bytes);
        Bytes::from(copy).slice(1..)
    };
    for nested in [false, true] {
        let mut parts = stored_parts(nested);
        let expected = PackedWeight::from_parts(parts.clone()).unwrap().dequantize();
        parts.codes = shifted(&parts.codes);
        match &mut parts.absmax {
            Absmax::Plain(absmax) => *absmax = shifted(absmax),
            Absmax::Nested { codes, absmax, .. } => {
                (*codes, *absmax) = (shifted(codes), shifted(absmax));
            }
        }
        assert_eq!(PackedWeight::from_parts(parts).unwrap().dequantize(), expected);
    }
}

/// CUDA writes code 0 into blocks of zeros: −1 · 0.
#[test]
fn a_zero_block_decodes_to_zeros_whoever_wrote_it() {
    for byte in [0x77, 0x00] {
        let packed = PackedWeight::from_parts(PackedParts {
            shape: [1, 64],
            dtype: FloatType::Bf16,
            quant_type: QuantType::Nf4,
            block_size: 64,
            codes: vec![byte; 32].into(),
            absmax: Absmax::Plain(vec![0; 4].into()),
        })
        .unwrap();
        assert!(packed.dequantize().iter().all(|value| *value == 0.0));
    }
}
