//! Where AdamW's moments lie: f32 for every element, or 8 bits in blocks.
//!
//! As in bitsandbytes' `AdamW8bit`, blocks begin anew with each tensor, and a tensor of fewer than
//! 4096 elements (its `min_8bit_size`) keeps f32 moments. Source: arXiv 2110.02861, section 2.1.

use std::ops::Range;
use std::str::FromStr;

/// Elements of 8-bit moments that share a scale.
pub const MOMENT_BLOCK: usize = 256;
/// Elements of the smallest tensor whose moments are in 8 bits; smaller ones keep theirs in f32.
const LEAST_PACKED_ELEMENTS: usize = 4096;

/// `--optim`: how AdamW keeps its moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Optim {
    /// In f32, 8 bytes a parameter.
    #[default]
    AdamwTorch,
    /// In 8 bits with a scale for each 256, about 2 bytes a parameter.
    Adamw8bit,
}

impl Optim {
    /// Values that `--optim` takes.
    pub const NAMES: [&str; 2] = ["adamw_torch", "adamw_8bit"];
}

impl FromStr for Optim {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let expected = "expected adamw_torch or adamw_8bit";
        match name {
            "adamw_torch" => Ok(Optim::AdamwTorch),
            "adamw_8bit" => Ok(Optim::Adamw8bit),
            "adamw_bnb_8bit" => Err(format!("{expected}; it is adamw_8bit under its other name")),
            "adamw" | "adamw_hf" | "adamw_torch_fused" | "adamw_apex_fused" => {
                Err(format!("{expected}; adamw_torch is fused already"))
            }
            _ if name.starts_with("paged_adamw") => {
                let same = if name.ends_with("8bit") { "adamw_8bit" } else { "adamw_torch" };
                Err(format!(
                    "{expected}; take {same}: all of a run's memory is planned, none paged"
                ))
            }
            _ => Err(expected.to_string()),
        }
    }
}

/// Where a tensor's moments are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MomentPlace {
    /// In f32: these elements of the f32 moments.
    Floats(Range<usize>),
    /// In 8 bits: these blocks of the 8-bit moments, of which the last one may be shorter.
    Blocks(Range<usize>),
}

/// The places of all tensors' moments, the same for first and second.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MomentLayout {
    /// Where each tensor's moments are.
    pub places: Vec<MomentPlace>,
    /// Elements of a moment that are in f32.
    pub float_elements: usize,
    /// Blocks of a moment that are in 8 bits.
    pub blocks: usize,
}

impl MomentLayout {
    /// The layout for tensors of `sizes` elements.
    pub fn new(optim: Optim, sizes: impl IntoIterator<Item = usize>) -> Self {
        let (mut float_elements, mut blocks) = (0, 0);
        let extend = |end: &mut usize, by: usize| {
            *end += by;
            *end - by..*end
        };
        let places = sizes.into_iter().map(|size| {
            if optim == Optim::Adamw8bit && size >= LEAST_PACKED_ELEMENTS {
                MomentPlace::Blocks(extend(&mut blocks, size.div_ceil(MOMENT_BLOCK)))
            } else {
                MomentPlace::Floats(extend(&mut float_elements, size))
            }
        });
        MomentLayout { places: places.collect(), float_elements, blocks }
    }

    /// f32 words that hold the codes of one moment: whole blocks of bytes.
    pub fn code_words(&self) -> usize {
        self.blocks * MOMENT_BLOCK / size_of::<f32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_begin_anew_and_small_tensors_stay_in_f32() {
        let sizes = [4096, 100, 4095, 4097, 5000];
        let packed = MomentLayout::new(Optim::Adamw8bit, sizes);
        use MomentPlace::{Blocks, Floats};
        let places =
            [Blocks(0..16), Floats(0..100), Floats(100..4195), Blocks(16..33), Blocks(33..53)];
        assert_eq!(packed.places, places);
        let MomentLayout { float_elements, blocks, .. } = packed;
        assert_eq!((float_elements, blocks, packed.code_words()), (4195, 53, 53 * 64));
        let plain = MomentLayout::new(Optim::AdamwTorch, sizes);
        assert_eq!((plain.float_elements, plain.blocks), (sizes.iter().sum(), 0));
        assert_eq!(plain.places[1], Floats(4096..4196));
    }

    #[test]
    fn other_trainers_names_are_answered() {
        let answer = |name: &str| Optim::from_str(name).unwrap_err();
        assert!(answer("adamw_bnb_8bit").ends_with("it is adamw_8bit under its other name"));
        assert!(answer("paged_adamw_8bit").contains("take adamw_8bit: "));
        assert!(answer("paged_adamw_32bit").contains("take adamw_torch: "));
        assert_eq!(answer("sgd"), "expected adamw_torch or adamw_8bit");
    }
}
