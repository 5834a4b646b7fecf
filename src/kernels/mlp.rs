//! What an MLP does between its linears, and a gated MLP with all of its adapters.

use super::Storage;
use crate::model::block::{GatedMlp, GatedMlpGradients, SavedMlp};
use crate::model::spec::Activation;

/// The nonlinearity of the MLP, by itself and with the adapters around it.
pub trait MlpKernels: Storage {
    /// `out = act(gate) ∘ up`, or `act(up)` without a gate.
    fn mlp_forward(
        &self,
        activation: Activation,
        gate: Option<&Self::Buffer>,
        up: &Self::Buffer,
        out: &mut Self::Buffer,
        elements: usize,
    );

    /// `d_out` becomes the gradient of gate (of up without a gate), `d_up` that of up.
    fn mlp_backward(
        &self,
        activation: Activation,
        gate: Option<&Self::Buffer>,
        up: &Self::Buffer,
        d_out: &mut Self::Buffer,
        d_up: &mut Self::Buffer,
        elements: usize,
    );

    /// `out = act(gate) ∘ up` of `[gate | up]`, rows of twice the width of `out`.
    fn fused_mlp_forward(
        &self,
        activation: Activation,
        gate_up: &Self::Buffer,
        out: &mut Self::Buffer,
        rows: usize,
        width: usize,
    );

    /// `gate_up` becomes its gradient, `d_out` that of what was made of it.
    fn fused_mlp_backward(
        &self,
        activation: Activation,
        gate_up: &mut Self::Buffer,
        d_out: &Self::Buffer,
        rows: usize,
        width: usize,
    );

    /// [`mlp_forward`](MlpKernels::mlp_forward) of a gated MLP, to `h` if it is wanted, and
    /// [`lora_project`](super::LoraKernels::lora_project) of the down projection's adapter, into its
    /// columns of `saved.lora_x`. `false`, and nothing done, where the backend has nothing better than one
    /// after the other.
    fn adapted_mlp_forward(
        &self,
        _mlp: &GatedMlp<Self>,
        _saved: &mut SavedMlp<Self::Buffer>,
        _h: Option<&mut Self::Buffer>,
    ) -> bool {
        false
    }

    /// Whether [`adapted_mlp_backward`](MlpKernels::adapted_mlp_backward) takes this MLP, so that its
    /// backward pass reads no h.
    fn adapts_mlp_backward(&self, _mlp: &GatedMlp<Self>) -> bool {
        false
    }

    /// The backward pass of a gated MLP whose linears all have adapters, from dy, the gradient of what down
    /// made: adds to the gradients of the adapters, and overwrites those of the activations. x is what gate
    /// and up read, `t` is to work in. `false`, and nothing done, where the backend has nothing better than
    /// one operation after another.
    fn adapted_mlp_backward(
        &self,
        _mlp: &GatedMlp<Self>,
        _saved: &SavedMlp<Self::Buffer>,
        (_dy, _x): (&Self::Buffer, &Self::Buffer),
        _to: GatedMlpGradients<Self::Buffer>,
        _lora_gradients: &mut Self::Buffer,
        _t: &mut Self::Buffer,
    ) -> bool {
        false
    }
}
