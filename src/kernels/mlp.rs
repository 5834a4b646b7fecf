//! What an MLP does between its linears, and a gated MLP with all of its adapters.

use super::Storage;
use crate::model::block::{GatedMlp, Linear};
use crate::model::parameters::Parameters;
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
    /// [`lora_project`](super::LoraKernels::lora_project) of the down projection's adapter, into its columns
    /// of `ax`.
    /// `false`, and nothing done, where the backend has nothing better than one after the other.
    #[allow(clippy::too_many_arguments)]
    fn adapted_mlp_forward(
        &self,
        _parameters: &Parameters<Self>,
        _down: &Linear<Self>,
        _activation: Activation,
        (_gate, _up): (&Self::Buffer, &Self::Buffer),
        _h: Option<&mut Self::Buffer>,
        _ax: &mut Self::Buffer,
        _rows: usize,
    ) -> bool {
        false
    }

    /// Whether [`adapted_mlp_backward`](MlpKernels::adapted_mlp_backward) takes this MLP, so that its
    /// backward pass reads no h.
    fn adapts_mlp_backward(
        &self,
        _parameters: &Parameters<Self>,
        _mlp: &GatedMlp<Self>,
        _rows: usize,
    ) -> bool {
        false
    }

    /// The backward pass of a gated MLP whose linears all have adapters: adds to the gradients of those,
    /// and overwrites `dx`, that of x, which gate and up read, from `dy`, that of what down made. `d_gate`
    /// and `d_up` are left with the gradients of gate and up, `t` is to work in. `false`, and nothing
    /// done, where the backend has nothing better than one operation after another.
    #[allow(clippy::too_many_arguments)]
    fn adapted_mlp_backward(
        &self,
        _parameters: &Parameters<Self>,
        _mlp: &GatedMlp<Self>,
        (_dy, _x): (&Self::Buffer, &Self::Buffer),
        [_d_gate, _d_up]: [&mut Self::Buffer; 2],
        _dx: &mut Self::Buffer,
        _t: &mut Self::Buffer,
        _gradients: &mut Self::Buffer,
        _rows: usize,
    ) -> bool {
        false
    }
}
