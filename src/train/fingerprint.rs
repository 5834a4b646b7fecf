//! What tells one base model from another of the same shapes.

use half::bf16;
use nibble_quant::Absmax;
use sha2::{Digest, Sha256};

use super::digest::hex;
use crate::kernels::cpu::FrozenMatrix;
use crate::model::weights::Weights;

/// Bytes that each packed matrix gives, of the codes of its weights and of its scales.
const SAMPLE_BYTES: usize = 256;
/// Elements that a dense matrix gives.
const ELEMENTS: usize = 64;

/// SHA-256 over the first weights of each linear of the blocks, in hex. It is the same for a dense folder and
/// for one that was packed from it, and whatever type holds dense weights without rounding; two models that were
/// trained differently have different ones. The scales tell a merged adapter that is too small to change a code.
pub fn of(weights: &Weights) -> String {
    let mut hash = Sha256::new();
    let linears = weights.blocks.iter().flat_map(|block| &block.linears);
    for matrix in linears.map(|linear| &linear.weight) {
        match matrix {
            FrozenMatrix::Packed(packed) => {
                // Of nested scales not the floats behind them, whose last bits depend on who made them.
                let (Absmax::Plain(scales) | Absmax::Nested { codes: scales, .. }) =
                    packed.absmax();
                for bytes in [packed.codes(), scales] {
                    hash.update(&bytes[..bytes.len().min(SAMPLE_BYTES)]);
                }
            }
            FrozenMatrix::F32(bytes, _) => {
                let values = bytemuck::cast_slice::<u8, f32>(bytes).iter();
                values.take(ELEMENTS).for_each(|value| hash.update(value.to_le_bytes()));
            }
            FrozenMatrix::Bf16(bytes, _) => {
                let values = bytemuck::cast_slice::<u8, bf16>(bytes).iter();
                values.take(ELEMENTS).for_each(|value| hash.update(value.to_f32().to_le_bytes()));
            }
        }
    }
    hex(&hash.finalize())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use nibble_quant::{BlockFormat, Floats, PackedWeight};

    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::model::families::spec_from_config;

    #[test]
    fn another_model_of_the_same_shapes_has_another_fingerprint() {
        let fingerprint = |name: &str, format: Option<BlockFormat>| {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models").join(name);
            let checkpoint = Checkpoint::open(&folder).unwrap();
            let spec = spec_from_config(checkpoint.config()).unwrap();
            of(&Weights::load(&checkpoint, &spec, format.as_ref(), None).unwrap())
        };
        let packed = Some(BlockFormat::default());
        let all = [("llama_s0", packed), ("llama_s0", None), ("llama_s1_qv", packed)];
        let all = all.map(|(name, format)| fingerprint(name, format));
        assert_ne!(all[0], all[1]);
        assert_ne!(all[0], all[2]);
        assert_eq!(all[0], fingerprint("llama_s0", packed));
    }

    #[test]
    fn a_change_that_moves_no_code_shows_in_the_scales() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models/llama_s0");
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let spec = spec_from_config(checkpoint.config()).unwrap();
        let format = BlockFormat::default();
        let mut weights = Weights::load(&checkpoint, &spec, Some(&format), None).unwrap();
        let before = of(&weights);
        let matrix = &mut weights.blocks[0].linears[0].weight;
        let mut values = matrix.to_f32();
        values[..format.block_size].iter_mut().for_each(|value| *value *= 1.05);
        let changed =
            PackedWeight::quantize(Floats::F32(&values), matrix.shape(), &format).unwrap();
        let FrozenMatrix::Packed(packed) = &*matrix else { panic!("it is packed") };
        assert_eq!(changed.codes(), packed.codes());
        *matrix = FrozenMatrix::Packed(changed);
        assert_ne!(of(&weights), before);
    }
}
