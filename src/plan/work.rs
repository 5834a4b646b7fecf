//! What a step computes, and what it copies where weights are streamed to a GPU.

use serde::Serialize;

use super::rates::{GPU_FLOPS_PER_SECOND, PCIE_BYTES_PER_SECOND};
use super::settings::{Policy, Settings};
use super::weights::STREAMED_BLOCKS;
use crate::model::spec::{ModelSpec, TensorRole};

/// Multiply-adds for a token whose every successor is trained.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    forward: f64,
    /// Attention's part of the forward pass.
    attention: f64,
    backward: f64,
    /// The head's multiply-adds, forward and backward: they are never made again.
    head: f64,
}

impl Work {
    /// The work of a token in documents of `length`: products with frozen weights, and attention.
    pub fn of_token(spec: &ModelSpec, length: usize) -> Self {
        let linear = |role: TensorRole| matches!(role, TensorRole::Linear(_));
        let linears = spec.inventory().into_iter().filter(|tensor| linear(tensor.role));
        let blocks: usize = linears.map(|tensor| tensor.shape.iter().product::<usize>()).sum();
        // Scores and their product with v, half of them masked.
        let attention = spec.num_layers * spec.q_width() * length;
        Work {
            forward: (blocks + attention) as f64,
            attention: attention as f64,
            backward: blocks as f64 + 2.5 * attention as f64,
            head: 2.0 * (spec.vocab_size * spec.hidden_size) as f64,
        }
    }

    /// Multiply-adds for a token of a step with `settings`, what is recomputed included.
    pub fn of_step(&self, settings: &Settings) -> f64 {
        let layers = settings.policies.len().max(1) as f64;
        let share = |count: usize| count as f64 / layers;
        let recomputed = self.forward * (1.0 - share(settings.count(Policy::Keep)))
            - self.attention * share(settings.layers_skipping_attention_recompute());
        self.forward + recomputed + self.backward + self.head
    }
}

/// Copies against computation, in a step with streamed weights.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Transfer {
    /// Bytes to the GPU: all blocks forward and all but the last two backward, less the two that the
    /// step before has left there; and what is offloaded.
    pub bytes: u64,
    /// Floating-point operations of the step.
    pub flops: f64,
    /// Tokens of a step from which on it is bound by computation; `None` where what is offloaded of a token
    /// takes longer to copy than it takes to compute.
    pub tokens_to_hide_copies: Option<u64>,
}

impl Transfer {
    /// The copies of a step of `tokens`; `block` is the bytes of a block.
    pub fn new(layers: usize, block: u64, offloaded: u64, tokens: usize, work: f64) -> Self {
        let weights = 2 * layers.saturating_sub(STREAMED_BLOCKS) as u64 * block;
        let flops = 2.0 * work * tokens as f64;
        let seconds_per_token = 2.0 * work / GPU_FLOPS_PER_SECOND
            - offloaded as f64 / tokens as f64 / PCIE_BYTES_PER_SECOND;
        let to_hide = weights as f64 / PCIE_BYTES_PER_SECOND / seconds_per_token;
        let tokens_to_hide_copies = (seconds_per_token > 0.0).then_some(to_hide.ceil() as u64);
        Transfer { bytes: weights + offloaded, flops, tokens_to_hide_copies }
    }

    /// Seconds of copying and of computing at the assumed rates.
    pub fn seconds(&self) -> (f64, f64) {
        (self.bytes as f64 / PCIE_BYTES_PER_SECOND, self.flops / GPU_FLOPS_PER_SECOND)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::families::spec_from_config;

    #[test]
    fn a_70b_step_of_8k_tokens_hides_its_copies() {
        let text = include_str!("../../tests/data/configs/llama-3.3-70b.json");
        let spec = spec_from_config(&serde_json::from_str(text).unwrap()).unwrap();
        let weights =
            80.0 * (2.0 * 8192.0 * 8192.0 + 2.0 * 8192.0 * 1024.0 + 3.0 * 8192.0 * 28672.0);
        let (attention, head) = (80.0 * 8192.0 * 8192.0, 128_256.0 * 8192.0);
        let of_step = |policy| {
            let policies = vec![policy; 80];
            let settings = Settings { policies, threads: 1, ..Settings::of_pass(8192, 1) };
            Work::of_token(&spec, 8192).of_step(&settings)
        };
        let work = of_step(Policy::Checkpoint);
        assert_eq!(work, 3.0 * weights + 4.5 * attention + 2.0 * head);
        let kept = of_step(Policy::Attention);
        assert_eq!(kept, 3.0 * weights + 3.5 * attention + 2.0 * head);
        let block = (weights / 80.0 * 4.127 / 8.0) as u64;
        let transfer = Transfer::new(80, block, 0, 8192, work);
        assert_eq!(transfer.bytes, 156 * block);
        let (copies, computation) = transfer.seconds();
        assert!((2.7..2.9).contains(&copies) && (36.0..38.0).contains(&computation));
        assert!((500..700).contains(&transfer.tokens_to_hide_copies.unwrap()), "{transfer:?}");
        // Half the tokens for twice the copies of a token.
        let fewer = Transfer::new(80, block, 10 << 30, 8192, work);
        assert!(fewer.tokens_to_hide_copies > transfer.tokens_to_hide_copies);
        let inputs = Transfer::new(80, block, 4 << 40, 8192, work);
        assert_eq!(inputs.tokens_to_hide_copies, None, "{inputs:?}");
    }
}
