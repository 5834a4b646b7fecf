//! Bit-exactness with bitsandbytes 0.50.2: `tests/data/nf4.*` come from `gen_nf4.py`, the
//! `cuda_emul` vectors from `nf4_spec.py` (the rules of `csrc/kernels.cu` restated in numpy).

use bytes::Bytes;
use half::{bf16, f16};
use nibble_quant::{
    Absmax, BlockFormat, FloatType, Floats, PackedParts, PackedWeight, QuantType, quantize_absmax,
};
use safetensors::SafeTensors;

struct Golden<'a> {
    tensors: SafeTensors<'a>,
}

impl Golden<'_> {
    fn has(&self, name: &str) -> bool {
        self.tensors.tensor(name).is_ok()
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        self.tensors.tensor(name).unwrap_or_else(|_| panic!("{name}")).data().to_vec()
    }

    fn values<T: bytemuck::Pod>(&self, name: &str) -> Vec<T> {
        bytemuck::allocation::pod_collect_to_vec(&self.bytes(name))
    }
}

#[derive(serde::Deserialize)]
struct Case {
    key: String,
    shape: Vec<usize>,
    blocksize: usize,
    dtype: FloatType,
}

fn cases() -> Vec<Case> {
    let json: serde_json::Value =
        serde_json::from_str(include_str!("data/nf4.json")).expect("nf4.json parses");
    serde_json::from_value(json["cases"].clone()).expect("cases parse")
}

fn with_golden(test: impl Fn(&Golden)) {
    let data = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/nf4.safetensors"));
    let data = data.expect("golden file is there");
    test(&Golden { tensors: SafeTensors::deserialize(&data).expect("golden file parses") });
}

fn matrix_shape(case: &Case) -> [usize; 2] {
    let elements: usize = case.shape.iter().product();
    let columns = *case.shape.last().expect("a shape");
    [elements / columns, columns]
}

fn quantize(golden: &Golden, case: &Case, double_quant: bool) -> PackedWeight {
    let format =
        BlockFormat { quant_type: QuantType::Nf4, block_size: case.blocksize, double_quant };
    let name = format!("{}.input", case.key);
    let shape = matrix_shape(case);
    let packed = match case.dtype {
        FloatType::F32 => {
            PackedWeight::quantize(Floats::F32(&golden.values::<f32>(&name)), shape, &format)
        }
        FloatType::F16 => {
            PackedWeight::quantize(Floats::F16(&golden.values::<f16>(&name)), shape, &format)
        }
        FloatType::Bf16 => {
            PackedWeight::quantize(Floats::Bf16(&golden.values::<bf16>(&name)), shape, &format)
        }
    };
    packed.unwrap_or_else(|e| panic!("{}: {e}", case.key))
}

fn assert_bits(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!(
            g == e && g.is_sign_positive() == e.is_sign_positive(),
            "{what}[{i}]: {g:e}, {e:e}"
        );
    }
}

#[test]
fn codes_and_absmax_are_bit_exact_in_all_cases() {
    with_golden(|golden| {
        let cases = cases();
        assert_eq!(cases.len(), 39 + 24, "63 cases");
        for case in &cases {
            let packed = quantize(golden, case, false);
            let expected = golden.bytes(&format!("{}.packed", case.key));
            assert_eq!(&packed.codes()[..], expected, "{}: codes", case.key);
            let Absmax::Plain(absmax) = packed.absmax() else { panic!("plain scales") };
            assert_eq!(&absmax[..], golden.bytes(&format!("{}.absmax", case.key)), "{}", case.key);
        }
    });
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
fn stored_codes_dequantize_bit_exactly() {
    with_golden(|golden| {
        for case in cases() {
            let plain = quantize(golden, &case, false).dequantize();
            let name = format!("{}.dequant_f32", case.key);
            let name = if golden.has(&name) { name } else { format!("{}.dequant", case.key) };
            assert_bits(&plain, &golden.values::<f32>(&name), &name);
            let part = |name: &str| Bytes::from(golden.bytes(&format!("{}.{name}", case.key)));
            let nested = PackedWeight::from_parts(PackedParts {
                shape: matrix_shape(&case),
                dtype: case.dtype,
                quant_type: QuantType::Nf4,
                block_size: case.blocksize,
                codes: part("packed"),
                absmax: Absmax::Nested {
                    codes: part("nested.absmax_u8"),
                    absmax: part("nested.absmax"),
                    offset: golden.values::<f32>(&format!("{}.nested.offset", case.key))[0],
                },
            })
            .expect("golden parts fit");
            let name = format!("{}.nested.dequant", case.key);
            let got = nested.dequantize();
            let expected: Vec<f32> = match case.dtype {
                FloatType::F32 => golden.values::<f32>(&name),
                FloatType::F16 => {
                    golden.values::<f16>(&name).into_iter().map(f16::to_f32).collect()
                }
                FloatType::Bf16 => {
                    golden.values::<bf16>(&name).into_iter().map(bf16::to_f32).collect()
                }
            };
            let rounded: Vec<f32> = match case.dtype {
                FloatType::F32 => got,
                FloatType::F16 => got.iter().map(|&v| f16::from_f32(v).to_f32()).collect(),
                FloatType::Bf16 => got.iter().map(|&v| bf16::from_f32(v).to_f32()).collect(),
            };
            assert_bits(&rounded, &expected, &name);
        }
    });
}

#[test]
fn nested_codes_follow_the_cuda_tree() {
    with_golden(|golden| {
        for case in cases() {
            let key = &case.key;
            let absmax = golden.values::<f32>(&format!("{key}.absmax"));
            let offset = golden.values::<f32>(&format!("{key}.nested.offset"))[0];
            let (codes, nested) = quantize_absmax(&absmax, offset);
            let emulated = format!("{key}.cuda_emul.nested.absmax_u8");
            let plain = format!("{key}.nested.absmax_u8");
            let expected = golden.bytes(if golden.has(&emulated) { &emulated } else { &plain });
            assert_eq!(codes, expected, "{key}: nested codes");
            assert_bits(&nested, &golden.values::<f32>(&format!("{key}.nested.absmax")), key);
        }
        let probes = golden.values::<f32>("dyn8.input");
        for (block, expected) in
            probes.chunks(256).zip(golden.bytes("dyn8.cuda_emul.codes").chunks(256))
        {
            // The probes were one block of 2048 with maximum 1; a 1 in each block keeps the scale.
            let mut values = block.to_vec();
            values[0] = 1.0;
            assert_eq!(quantize_absmax(&values, 0.0).0[1..], expected[1..], "every boundary");
        }
    });
}

#[test]
fn every_threshold_is_probed_by_the_sweep() {
    with_golden(|golden| {
        let format =
            BlockFormat { quant_type: QuantType::Nf4, block_size: 4096, double_quant: false };
        let input = golden.values::<f32>("sweep.input");
        let packed = PackedWeight::quantize(Floats::F32(&input), [1, 4096], &format).unwrap();
        assert_eq!(&packed.codes()[..], golden.bytes("sweep.packed"));
    });
}
