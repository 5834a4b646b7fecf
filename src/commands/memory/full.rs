//! What training every weight would take, beside a plan's LoRA: the arithmetic of the LoRA paper
//! (arXiv 2106.09685, section 4.2), for any model.

use serde::Serialize;

use crate::byte_size::ByteSize;
use crate::figures::thousands;
use crate::ledger::rows::Account;
use crate::model::spec::ModelSpec;
use crate::plan::{Component, MemoryPlan};

/// A weight, its gradient and AdamW's two moments, in 16 bits each: the least that is usual. Masters
/// and moments in f32 would be 16 bytes.
const BYTES_A_PARAMETER: u64 = 4 * 2;

/// Both kinds of training, activations left out.
#[derive(Debug, Serialize)]
pub(super) struct FullFineTuning {
    parameters: u64,
    bytes_a_parameter: u64,
    bytes: u64,
    /// The plan's frozen weights, with weights, gradients and moments of A and B.
    lora_bytes: u64,
    /// Of these, what is trained.
    lora_state_bytes: u64,
}

impl FullFineTuning {
    /// Of a planned run.
    pub fn of(spec: &ModelSpec, account: &Account, plan: &MemoryPlan) -> Self {
        let elements = |shape: &[usize]| shape.iter().map(|&size| size as u64).product::<u64>();
        let parameters = spec.inventory().iter().map(|tensor| elements(&tensor.shape)).sum();
        let lora_state_bytes = plan
            .by_component()
            .into_iter()
            .filter(|(component, _)| {
                matches!(
                    component,
                    Component::AdapterWorking
                        | Component::AdapterMaster
                        | Component::AdapterGradients
                        | Component::OptimizerMoments
                        | Component::PackedMoments
                )
            })
            .map(|(_, bytes)| bytes as u64)
            .sum();
        FullFineTuning {
            parameters,
            bytes_a_parameter: BYTES_A_PARAMETER,
            bytes: BYTES_A_PARAMETER * parameters,
            lora_bytes: account.outside.weights.total() + lora_state_bytes,
            lora_state_bytes,
        }
    }

    /// One line and a half.
    pub fn in_words(&self) -> String {
        let [full, lora, state] =
            [self.bytes, self.lora_bytes, self.lora_state_bytes].map(ByteSize);
        format!(
            "weights, gradients and optimizer state: {lora}, {state} of it for LoRA; full fine-tuning \
             would take {full}\n(assuming {} B a parameter: weight, gradient and two moments in 16 \
             bits; {} parameters)",
            self.bytes_a_parameter,
            thousands(self.parameters),
        )
    }
}
