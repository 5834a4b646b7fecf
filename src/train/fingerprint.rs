//! What tells one base model from another of the same shapes.

use half::bf16;

use crate::kernels::cpu::FrozenMatrix;
use crate::model::weights::Weights;
use crate::random::Stream;

/// Sums of a fingerprint: bits of a random word.
const SUMS: usize = 16;
/// Weights of each matrix that go into it.
const SAMPLE: usize = 1024;
/// Fingerprints of one model differ by less, whoever packed it: a nested scale may have a neighbouring code.
const SAME: f32 = 2e-3;

/// For each of 16 patterns of signs, the sum over the first weights of each linear of the blocks, as products see
/// them, over the norm of all of these weights. Where they change by a share ε of their norm, each sum moves by
/// about ε: by 0.6 % where a small adapter was merged and the result packed again, without another code.
pub fn of(weights: &Weights) -> Vec<f32> {
    let (mut sums, mut squares) = ([0.0f64; SUMS], 0.0f64);
    for linear in weights.blocks.iter().flat_map(|block| &block.linears) {
        let signs = Stream::new(0, &linear.module);
        for (index, value) in (0..).zip(sample(&linear.weight)) {
            let (value, word) = (f64::from(value), signs.word(index));
            for (bit, sum) in sums.iter_mut().enumerate() {
                *sum += if word >> bit & 1 == 1 { value } else { -value };
            }
            squares += value * value;
        }
    }
    let norm = squares.sqrt().max(f64::MIN_POSITIVE);
    sums.map(|sum| (sum / norm) as f32).to_vec()
}

/// Whether two fingerprints may be those of one model; of what another version wrote nothing is known.
pub fn may_be_same(a: &[f32], b: &[f32]) -> bool {
    a.len() != b.len() || a.iter().zip(b).all(|(a, b)| (a - b).abs() <= SAME)
}

fn sample(matrix: &FrozenMatrix) -> Vec<f32> {
    let [rows, columns] = matrix.shape();
    let mut values = vec![0.0; SAMPLE.min(rows * columns)];
    match matrix {
        FrozenMatrix::Packed(packed) => packed.dequantize_range(0, &mut values),
        FrozenMatrix::F32(bytes, _) => {
            let stored = bytemuck::cast_slice::<u8, f32>(bytes);
            values.iter_mut().zip(stored).for_each(|(value, stored)| *value = *stored);
        }
        FrozenMatrix::Bf16(bytes, _) => {
            let stored = bytemuck::cast_slice::<u8, bf16>(bytes);
            values.iter_mut().zip(stored).for_each(|(value, stored)| *value = stored.to_f32());
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use nibble_quant::{BlockFormat, Floats, PackedWeight};

    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::model::families::spec_from_config;

    fn model(name: &str, format: Option<&BlockFormat>) -> Weights {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models").join(name);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let spec = spec_from_config(checkpoint.config()).unwrap();
        Weights::load(&checkpoint, &spec, format, None).unwrap()
    }

    #[test]
    fn another_model_of_the_same_shapes_has_another_fingerprint() {
        let format = BlockFormat::default();
        let plain = BlockFormat { double_quant: false, ..format };
        let [one, same, other, dense] = [
            ("llama_s0", Some(&format)),
            ("llama_s0", Some(&format)),
            ("llama_s1_qv", Some(&format)),
            ("llama_s0", None),
        ]
        .map(|(name, format)| of(&model(name, format)));
        assert!(one == same && one.iter().all(|sum| sum.abs() < 5.0));
        assert!(!may_be_same(&one, &other) && !may_be_same(&one, &dense));
        // Scales that were packed in another way are a far smaller change than another model.
        let distance =
            |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let nearly = of(&model("llama_s0", Some(&plain)));
        assert!(distance(&one, &nearly) < 0.05 * distance(&one, &other));
        assert!(may_be_same(&one, &[]), "what an older version wrote");
    }

    #[test]
    fn a_change_that_moves_no_code_shows() {
        let format = BlockFormat::default();
        let mut weights = model("llama_s0", Some(&format));
        let before = of(&weights);
        for (index, linear) in
            weights.blocks.iter_mut().flat_map(|block| &mut block.linears).enumerate()
        {
            let mut values = linear.weight.to_f32();
            for (block, values) in values.chunks_mut(format.block_size).enumerate() {
                let factor = if (block + index) % 2 == 0 { 1.01 } else { 0.99 };
                values.iter_mut().for_each(|value| *value *= factor);
            }
            let changed =
                PackedWeight::quantize(Floats::F32(&values), linear.weight.shape(), &format);
            let changed = changed.unwrap();
            let FrozenMatrix::Packed(packed) = &linear.weight else { panic!("it is packed") };
            assert_eq!(changed.codes(), packed.codes());
            linear.weight = FrozenMatrix::Packed(changed);
        }
        assert!(!may_be_same(&of(&weights), &before));
    }
}
