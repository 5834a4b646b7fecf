//! Where the memory of a plan cannot be had after all: the next smaller plan of the same results.
//!
//! In this order, each where the one before is used up: no weights stay dequantized; passes of half as
//! many tokens, down to the longest document; half of the blocks that keep their activations recompute;
//! attention is made again, too; the MLP, the logits and dequantized weights take smaller pieces;
//! inputs of blocks wait elsewhere, alone.
//! Losses and gradients are the same sums in all of them, up to the order of summation.

use super::settings::{Pieces, Policy, Settings};

/// The next smaller plan; `None` after the smallest one.
pub fn leaner(settings: &Settings) -> Option<Settings> {
    dequantizing_again(settings)
        .or_else(|| shorter(settings))
        .or_else(|| keeping_fewer(settings))
        .or_else(|| recomputing_attention(settings))
        .or_else(|| {
            Some(settings.clone().in_pieces(Pieces::ALL)).filter(|pieces| differ(settings, pieces))
        })
        .or_else(|| offloading(settings))
}

fn dequantizing_again(settings: &Settings) -> Option<Settings> {
    let without = || Settings { dequantized_blocks: 0, ..settings.clone() };
    (settings.dequantized_blocks > 0).then(without)
}

/// Passes of half as many tokens, but no shorter than the longest document, which is not cut.
fn shorter(settings: &Settings) -> Option<Settings> {
    if settings.tokens <= settings.longest_document {
        return None;
    }
    Some(settings.shorter((settings.tokens / 2).max(settings.longest_document)))
}

/// Half as many blocks that keep their activations: the last ones, which the backward pass meets first.
fn keeping_fewer(settings: &Settings) -> Option<Settings> {
    let kept = settings.count(Policy::Keep);
    // What waits takes of the host's memory, too: no more of it than has to.
    let instead = match settings.offloaded().is_empty() {
        false => Policy::Offload,
        true if settings.count(Policy::Attention) > 0 => Policy::Attention,
        true => Policy::Checkpoint,
    };
    let mut policies = settings.policies.clone();
    let first_ones = policies.iter_mut().filter(|policy| **policy == Policy::Keep);
    first_ones.take(kept.div_ceil(2)).for_each(|policy| *policy = instead);
    (kept > 0).then(|| Settings { policies, ..settings.clone() })
}

fn recomputing_attention(settings: &Settings) -> Option<Settings> {
    let again = |policy: &Policy| match policy {
        Policy::Attention => Policy::Checkpoint,
        Policy::AttentionOffloadInput => Policy::Offload,
        policy => *policy,
    };
    let policies = settings.policies.iter().map(again).collect();
    // Of one block alone the shared buffers would be as large.
    (settings.layers_keeping_attention_in_memory() > 1)
        .then(|| Settings { policies, ..settings.clone() })
}

fn offloading(settings: &Settings) -> Option<Settings> {
    let policies = vec![Policy::Offload; settings.policies.len()];
    (settings.policies != policies).then(|| Settings { policies, ..settings.clone() })
}

fn pieces(settings: &Settings) -> (usize, usize, bool) {
    (settings.mlp_tile(), settings.logit_rows, settings.dequantize_ahead)
}

fn differ(one: &Settings, other: &Settings) -> bool {
    pieces(one) != pieces(other)
}

/// What a smaller plan does, for people.
pub fn shrinkage_in_words(from: &Settings, to: &Settings) -> String {
    let layers = to.policies.len();
    let (kept, offloaded) = (to.count(Policy::Keep), to.offloaded().len());
    let again = (to.dequantized_blocks < from.dequantized_blocks)
        .then(|| "no weights that stay dequantized".to_string());
    let shorter = (to.tokens < from.tokens)
        .then(|| format!("{} tokens in a forward pass instead of {}", to.tokens, from.tokens));
    let recomputing = (kept < from.count(Policy::Keep))
        .then(|| format!("{} of {layers} blocks recomputed", layers - kept));
    let attending = (to.layers_skipping_attention_recompute()
        < from.layers_skipping_attention_recompute())
    .then(|| "attention recomputed".to_string());
    let smaller = to.tokens == from.tokens && differ(from, to);
    let smaller = smaller.then(|| "smaller pieces of the MLP and the logits".to_string());
    let offloading = (offloaded > from.offloaded().len())
        .then(|| format!("inputs of {offloaded} of {layers} blocks offloaded"));
    let changes = [again, shorter, recomputing, attending, smaller, offloading];
    changes.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(tokens: usize, longest_document: usize, policies: Vec<Policy>) -> Settings {
        Settings { longest_document, policies, threads: 1, ..Settings::of_pass(tokens, 512) }
    }

    #[test]
    fn a_plan_shrinks_step_by_step() {
        let mut plan = settings(4096, 2000, vec![Policy::Keep; 5]);
        plan.dequantized_blocks = 2;
        let mut told = Vec::new();
        while let Some(next) = leaner(&plan) {
            told.push(shrinkage_in_words(&plan, &next));
            plan = next;
        }
        assert_eq!(
            told,
            [
                "no weights that stay dequantized",
                "2048 tokens in a forward pass instead of 4096",
                "2000 tokens in a forward pass instead of 2048",
                "3 of 5 blocks recomputed",
                "4 of 5 blocks recomputed",
                "5 of 5 blocks recomputed",
                "smaller pieces of the MLP and the logits",
                "smaller pieces of the MLP and the logits",
                "inputs of 5 of 5 blocks offloaded",
            ]
        );
        assert_eq!(pieces(&plan), (1024, 64, false));
    }

    #[test]
    fn attention_is_kept_longer_than_all_activations() {
        use Policy::{Attention, Checkpoint, Keep};
        let plan = settings(64, 64, vec![Attention, Keep]);
        let fewer = leaner(&plan).unwrap();
        assert_eq!(fewer.policies, [Attention; 2]);
        let again = leaner(&fewer).unwrap();
        assert_eq!(again.policies, [Checkpoint; 2]);
        assert_eq!(shrinkage_in_words(&fewer, &again), "attention recomputed");
        let kept = settings(64, 64, vec![Policy::AttentionOffloadInput; 2]);
        assert_eq!(leaner(&kept).unwrap().policies, [Policy::Offload; 2]);
        // What waits takes no memory but its slots, which go last.
        let waits = settings(64, 64, vec![Policy::OffloadAttention, Policy::Keep]);
        let fewer = leaner(&waits).unwrap();
        assert_eq!(fewer.policies, [Policy::OffloadAttention, Policy::Offload]);
        let small = leaner(&leaner(&fewer).unwrap()).unwrap();
        assert_eq!(small.policies, fewer.policies);
        let last = leaner(&small).unwrap();
        assert_eq!(last.policies, [Policy::Offload; 2]);
        assert_eq!(shrinkage_in_words(&small, &last), "attention recomputed");
    }

    #[test]
    fn the_last_blocks_keep_longest_and_the_others_stay_as_they_are() {
        use Policy::{Keep, Offload};
        let plan = settings(64, 64, vec![Offload, Keep, Keep, Keep]);
        assert_eq!(leaner(&plan).unwrap().policies, [Offload, Offload, Offload, Keep]);
    }

    #[test]
    fn nothing_is_left_without_a_backward_pass_and_pieces() {
        let plan = settings(64, 64, Vec::new());
        let small = leaner(&plan).unwrap();
        assert_eq!(pieces(&small), (64, 128, false));
        assert!(leaner(&small).is_some_and(|next| next.logit_rows == 64));
        let least = Settings { logit_rows: 64, ..small };
        assert!(leaner(&least).is_none());
    }
}
