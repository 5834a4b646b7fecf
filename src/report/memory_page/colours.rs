//! The colour of each part of memory, the same in every chart, table and page: hues by kind, with
//! frozen weights blue, activations orange, what is trained purple, libraries green, the rest grey.

/// Parts by the number of their colour in `figures.css`; those of one colour are never in one run.
const PARTS: [&[&str]; 24] = [
    &["program, tokenizer, data", "CUDA context"],
    &["4-bit codes"],
    &["scales of 4-bit blocks"],
    &["linear layers, not quantized", "linears that are not packed"],
    &["embeddings and head"],
    &["norms and biases"],
    &["streamed weights"],
    &["dequantized matrices"],
    &["kept activations"],
    &["block inputs"],
    &["recompute workspace"],
    &["block workspace"],
    &["attention workspace"],
    &["logits chunk"],
    &["key/value cache"],
    &["rotary tables"],
    &["LoRA weights (bf16)"],
    &["LoRA master (f32)"],
    &["LoRA gradients (f32)"],
    &["AdamW moments (f32)"],
    &["AdamW moments (8-bit)"],
    &["cuBLAS workspace"],
    &["token ids and rows"],
    &["heap fragmentation", "rounding of allocations"],
];

/// The number of the colour of the part `name`; that of what is lost for one that is not known, as
/// in the report of a run of another version.
pub(super) fn colour(name: &str) -> usize {
    PARTS.iter().position(|names| names.contains(&name)).unwrap_or(PARTS.len() - 1)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::ledger::rows::{CONTEXT, FREE_HEAP, PROCESS, ROUNDING};
    use crate::plan::{Component, WeightParts};

    #[test]
    fn every_part_has_a_colour_and_no_two_of_a_run_have_the_same() {
        use Component::{
            AdapterGradients, AdapterMaster, AdapterWorking, AttentionWorkspace, BlockInputs,
            BlockWorkspace, DequantizedWeight, KeptActivations, KvCache, LibraryWorkspace,
            LogitsChunk, OptimizerMoments, PackedMoments, RecomputeWorkspace, RotaryTables,
            Uploads,
        };
        let arena = [
            AdapterGradients,
            AdapterMaster,
            AdapterWorking,
            AttentionWorkspace,
            BlockInputs,
            BlockWorkspace,
            DequantizedWeight,
            KeptActivations,
            KvCache,
            LibraryWorkspace,
            LogitsChunk,
            OptimizerMoments,
            PackedMoments,
            RecomputeWorkspace,
            RotaryTables,
            Uploads,
        ];
        let weights = WeightParts::default().rows().map(|(name, _)| name);
        let parts = arena.map(Component::label).into_iter().chain(weights);
        for ends in [[PROCESS, FREE_HEAP], [CONTEXT, ROUNDING]] {
            let names: Vec<&str> = parts.clone().chain(ends).collect();
            let known = |name: &&str| PARTS.iter().any(|names| names.contains(name));
            assert!(names.iter().all(known), "{names:?}");
            let colours: BTreeSet<usize> = names.iter().map(|name| colour(name)).collect();
            assert_eq!(colours.len(), names.len());
        }
        assert_eq!(colour("free heap, in pieces"), PARTS.len() - 1, "its name in earlier runs");
    }

    #[test]
    fn the_style_has_all_colours_and_each_once() {
        let style = include_str!("figures.css");
        let rule = |index: usize| {
            let name = format!(".c{index} {{ --p: ");
            let start = style.find(&name).expect("each has a rule") + name.len();
            &style[start..start + 7]
        };
        let distinct: BTreeSet<&str> = (0..PARTS.len()).map(rule).collect();
        assert_eq!(distinct.len(), PARTS.len());
    }
}
