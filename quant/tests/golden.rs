//! Bit-exactness with bitsandbytes 0.50.2. Data by `scripts/golden/`: `nf4.*` by `gen_nf4.py`, its
//! `cuda_emul` vectors by `nf4_spec.py` (the rules of `csrc/kernels.cu` restated in numpy),
//! `blocks.safetensors` (FP4, more block sizes) by `gen_blocks.py`.

use bytemuck::allocation::pod_collect_to_vec;
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
        pod_collect_to_vec(&self.bytes(name))
    }

    fn widened(&self, name: &str, dtype: FloatType) -> Vec<f32> {
        let bytes = self.bytes(name);
        match dtype {
            FloatType::F32 => pod_collect_to_vec(&bytes),
            FloatType::F16 => {
                pod_collect_to_vec::<_, f16>(&bytes).iter().map(|v| v.to_f32()).collect()
            }
            FloatType::Bf16 => {
                pod_collect_to_vec::<_, bf16>(&bytes).iter().map(|v| v.to_f32()).collect()
            }
        }
    }
}

/// One tensor that bitsandbytes quantized.
struct Case {
    key: String,
    quant_type: QuantType,
    block_size: usize,
    dtype: FloatType,
    shape: [usize; 2],
}

impl Case {
    fn quantize(&self, golden: &Golden, double_quant: bool) -> PackedWeight {
        let (quant_type, block_size) = (self.quant_type, self.block_size);
        let format = BlockFormat { quant_type, block_size, double_quant };
        let input = golden.bytes(&format!("{}.input", self.key));
        let packed = match self.dtype {
            FloatType::F32 => PackedWeight::quantize(
                Floats::F32(&pod_collect_to_vec(&input)),
                self.shape,
                &format,
            ),
            FloatType::F16 => PackedWeight::quantize(
                Floats::F16(&pod_collect_to_vec(&input)),
                self.shape,
                &format,
            ),
            FloatType::Bf16 => PackedWeight::quantize(
                Floats::Bf16(&pod_collect_to_vec(&input)),
                self.shape,
                &format,
            ),
        };
        packed.unwrap_or_else(|error| panic!("{}: {error}", self.key))
    }

    /// What bitsandbytes stored, with or without double quantization.
    fn stored(&self, golden: &Golden, nested: bool) -> PackedWeight {
        let part = |name: &str| Bytes::from(golden.bytes(&format!("{}.{name}", self.key)));
        let absmax = if nested {
            Absmax::Nested {
                codes: part("nested.absmax_u8"),
                absmax: part("nested.absmax"),
                offset: golden.values(&format!("{}.nested.offset", self.key))[0],
            }
        } else {
            Absmax::Plain(part("absmax"))
        };
        PackedWeight::from_parts(PackedParts {
            shape: self.shape,
            dtype: self.dtype,
            quant_type: self.quant_type,
            block_size: self.block_size,
            codes: part("packed"),
            absmax,
        })
        .unwrap_or_else(|error| panic!("{}: {error}", self.key))
    }
}

/// The cases of `nf4.json`.
fn nf4_cases() -> Vec<Case> {
    #[derive(serde::Deserialize)]
    struct Entry {
        key: String,
        shape: Vec<usize>,
        blocksize: usize,
        dtype: FloatType,
    }
    let json: serde_json::Value =
        serde_json::from_str(include_str!("data/nf4.json")).expect("nf4.json parses");
    let entries: Vec<Entry> = serde_json::from_value(json["cases"].clone()).expect("cases parse");
    let case = |entry: Entry| {
        let columns = *entry.shape.last().expect("a shape");
        let shape = [entry.shape.iter().product::<usize>() / columns, columns];
        let (block_size, dtype) = (entry.blocksize, entry.dtype);
        Case { key: entry.key, quant_type: QuantType::Nf4, block_size, dtype, shape }
    };
    entries.into_iter().map(case).collect()
}

/// The cases of `blocks.safetensors`: a key reads `TYPE.NAME.bsBLOCK.DTYPE`.
fn block_cases(golden: &Golden) -> Vec<Case> {
    let mut cases = Vec::new();
    for name in golden.tensors.names() {
        let Some(key) = name.strip_suffix(".input") else { continue };
        let fields: Vec<&str> = key.split('.').collect();
        let shape = golden.tensors.tensor(name).expect("it is there").shape().to_vec();
        let columns = *shape.last().expect("a shape");
        cases.push(Case {
            key: key.to_owned(),
            quant_type: if fields[0] == "fp4" { QuantType::Fp4 } else { QuantType::Nf4 },
            block_size: fields[2][2..].parse().expect("a block size"),
            dtype: FloatType::from_name(fields[3]).expect("a type"),
            shape: [shape.iter().product::<usize>() / columns, columns],
        });
    }
    cases
}

fn with_golden(file: &str, test: impl Fn(&Golden)) {
    let path = format!("{}/tests/data/{file}", env!("CARGO_MANIFEST_DIR"));
    let data = std::fs::read(path).expect("golden file is there");
    test(&Golden { tensors: SafeTensors::deserialize(&data).expect("golden file parses") });
}

/// Equal to the bit; -0 is not 0.
fn assert_bits(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!(g.to_bits() == e.to_bits(), "{what}[{i}]: {g:e}, {e:e}");
    }
}

/// Rounded to nearest even, as bitsandbytes returns it.
fn round_to(dtype: FloatType, values: &[f32]) -> Vec<f32> {
    let round = |value: &f32| match dtype {
        FloatType::F32 => *value,
        FloatType::F16 => f16::from_f32(*value).to_f32(),
        FloatType::Bf16 => bf16::from_f32(*value).to_f32(),
    };
    values.iter().map(round).collect()
}

fn assert_same_blocks(golden: &Golden, case: &Case) {
    let packed = case.quantize(golden, false);
    let expected = golden.bytes(&format!("{}.packed", case.key));
    assert_eq!(&packed.codes()[..], expected, "{}: codes", case.key);
    let Absmax::Plain(absmax) = packed.absmax() else { panic!("plain scales") };
    assert_eq!(&absmax[..], golden.bytes(&format!("{}.absmax", case.key)), "{}", case.key);
}

#[test]
fn nf4_codes_and_absmax_are_bit_exact() {
    with_golden("nf4.safetensors", |golden| {
        let cases = nf4_cases();
        assert_eq!(cases.len(), 63);
        cases.iter().for_each(|case| assert_same_blocks(golden, case));
    });
}

#[test]
fn fp4_and_other_block_sizes_are_bit_exact() {
    with_golden("blocks.safetensors", |golden| {
        let cases = block_cases(golden);
        assert_eq!(cases.len(), 20);
        cases.iter().for_each(|case| assert_same_blocks(golden, case));
    });
}

#[test]
fn stored_nf4_dequantizes_bit_exactly() {
    with_golden("nf4.safetensors", |golden| {
        for case in nf4_cases() {
            let f32_name = format!("{}.dequant_f32", case.key);
            let name = format!("{}.dequant", case.key);
            let plain = case.stored(golden, false).dequantize();
            let expected = if golden.has(&f32_name) { &f32_name } else { &name };
            assert_bits(&plain, &golden.values::<f32>(expected), expected);
            let rounded = round_to(case.dtype, &plain);
            assert_bits(&rounded, &golden.widened(&name, case.dtype), &name);
            let name = format!("{}.nested.dequant", case.key);
            let rounded = round_to(case.dtype, &case.stored(golden, true).dequantize());
            assert_bits(&rounded, &golden.widened(&name, case.dtype), &name);
        }
    });
}

#[test]
fn stored_fp4_and_other_block_sizes_dequantize_bit_exactly() {
    with_golden("blocks.safetensors", |golden| {
        for case in block_cases(golden) {
            for (nested, name) in [(false, "dequant"), (true, "nested.dequant")] {
                let name = format!("{}.{name}", case.key);
                let restored = case.stored(golden, nested).dequantize();
                assert_bits(&restored, &golden.values::<f32>(&name), &name);
            }
        }
    });
}

#[test]
fn nested_scales_are_read_bit_exactly() {
    with_golden("nf4.safetensors", |golden| {
        for case in nf4_cases() {
            let expected = golden.values::<f32>(&format!("{}.nested.absmax_dequant", case.key));
            let nested = case.stored(golden, true);
            let got: Vec<f32> = (0..expected.len()).map(|i| nested.block_absmax(i)).collect();
            assert_bits(&got, &expected, &case.key);
        }
    });
}

#[test]
fn nested_codes_follow_the_cuda_tree() {
    with_golden("nf4.safetensors", |golden| {
        for case in nf4_cases() {
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
        let expected = golden.bytes("dyn8.cuda_emul.codes");
        for (block, expected) in probes.chunks(256).zip(expected.chunks(256)) {
            // The probes were one block of 2048 with maximum 1; a 1 in each block keeps the scale.
            let mut values = block.to_vec();
            values[0] = 1.0;
            assert_eq!(quantize_absmax(&values, 0.0).0[1..], expected[1..], "every boundary");
        }
    });
}

/// torch's f32 mean depends on its number of threads; ours is the exact mean, rounded once.
#[test]
fn the_offset_is_the_mean_within_an_ulp_of_torch() {
    with_golden("nf4.safetensors", |golden| {
        for case in nf4_cases() {
            let packed = case.quantize(golden, true);
            let Absmax::Nested { offset, .. } = packed.absmax() else { panic!("nested scales") };
            let torch = golden.values::<f32>(&format!("{}.nested.offset", case.key))[0];
            let ulps = offset.to_bits().abs_diff(torch.to_bits());
            assert!(ulps <= 1, "{}: {offset:e}, torch {torch:e}", case.key);
        }
    });
}

#[test]
fn every_threshold_is_probed_by_the_sweep() {
    with_golden("nf4.safetensors", |golden| {
        let format =
            BlockFormat { quant_type: QuantType::Nf4, block_size: 4096, double_quant: false };
        let input = golden.values::<f32>("sweep.input");
        let packed = PackedWeight::quantize(Floats::F32(&input), [1, 4096], &format).unwrap();
        assert_eq!(&packed.codes()[..], golden.bytes("sweep.packed"));
    });
}
