//! The linears of a block: what they are called, their sizes, and what follows from how a family puts them
//! into matrices.

use super::spec::ModelSpec;

/// Into which matrices the projections of a block are put: what the linears are called, which of them the
/// MLP has, and how dense checkpoints store them follow from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Projections {
    /// A matrix for each of q, k, v, o, gate, up and down: Llama's.
    Separate,
    /// q, k and v in one, gate and up in another: Phi-3's.
    Fused,
    /// Llama's, but gate and up in one: GLM-4's.
    FusedGateUp,
    /// The same under other names: Granite 4's.
    SharedMlp,
    /// q, k and v in one, no gate; stored `[in, out]`: GPT-2's `Conv1D`.
    Conv1d,
}

/// How the MLP comes by what its down projection reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlpKind {
    /// `down(act(up(x)))`.
    Plain,
    /// `down(act(gate(x)) · up(x))`.
    Gated,
    /// `down(act(gate(x)) · up(x))` where gate and up are one matrix, one below the other, which has the role
    /// of up.
    FusedGated,
}

/// What a linear does in its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinearRole {
    /// Fused q, k, v.
    Qkv,
    /// Query.
    Q,
    /// Key.
    K,
    /// Value.
    V,
    /// Attention output.
    O,
    /// MLP gate.
    Gate,
    /// MLP up (GPT-2: `c_fc`); gate and up where they are one matrix.
    Up,
    /// MLP down (GPT-2: `mlp.c_proj`).
    Down,
}

impl LinearRole {
    /// All roles, in the order in which they are declared.
    pub const ALL: [LinearRole; 8] = {
        use LinearRole::{Down, Gate, K, O, Q, Qkv, Up, V};
        [Qkv, Q, K, V, O, Gate, Up, Down]
    };

    /// Its name in tables and in names of regions.
    pub fn name(self) -> &'static str {
        match self {
            LinearRole::Qkv => "qkv",
            LinearRole::Q => "q",
            LinearRole::K => "k",
            LinearRole::V => "v",
            LinearRole::O => "o",
            LinearRole::Gate => "gate",
            LinearRole::Up => "up",
            LinearRole::Down => "down",
        }
    }
}

/// The halves of a block, which keep `x·Aᵀ` of their adapters apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockHalf {
    /// q, k, v and the output projection.
    Attention,
    /// Gate, up and down.
    Mlp,
}

impl BlockHalf {
    /// The half to which a linear belongs.
    pub fn of(role: LinearRole) -> Self {
        if BlockHalf::Mlp.roles().contains(&role) { BlockHalf::Mlp } else { BlockHalf::Attention }
    }

    /// The roles of a half's linears.
    pub fn roles(self) -> &'static [LinearRole] {
        use LinearRole::{Down, Gate, K, O, Q, Qkv, Up, V};
        match self {
            BlockHalf::Attention => &[Q, K, V, Qkv, O],
            BlockHalf::Mlp => &[Gate, Up, Down],
        }
    }
}

/// One linear of one block: `y [T, out] = x [T, in] · Wᵀ (+ bias)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearSpec {
    /// The linear's place in the block.
    pub role: LinearRole,
    /// Hugging Face module path, such as `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// Input width.
    pub in_features: usize,
    /// Output width.
    pub out_features: usize,
    /// Whether `{module}.bias` exists.
    pub bias: bool,
}

/// A linear before its sizes are known: role, name in its block, from which width to which.
type Projection = (LinearRole, &'static str, Width, Width);

/// A width of a block's linears.
#[derive(Debug, Clone, Copy)]
enum Width {
    /// D, of the stream.
    Stream,
    /// Width of q, and of attention's output.
    Query,
    /// Width of k, or of v.
    Key,
    /// Width of q, k and v together.
    Qkv,
    /// F, of the MLP.
    Mlp,
    /// Width of gate and up together.
    GateUp,
}

impl Projections {
    /// How the MLP comes by what its down projection reads.
    pub fn mlp(self) -> MlpKind {
        match self {
            Projections::Separate => MlpKind::Gated,
            Projections::Fused | Projections::FusedGateUp | Projections::SharedMlp => {
                MlpKind::FusedGated
            }
            Projections::Conv1d => MlpKind::Plain,
        }
    }

    /// Whether dense checkpoints store linears as `[in, out]`.
    pub fn are_transposed(self) -> bool {
        self == Projections::Conv1d
    }

    /// The matrices of a block's halves, in forward order.
    fn of_halves(self) -> [&'static [Projection]; 2] {
        use LinearRole::{Down, Gate, K, O, Q, Qkv, Up, V};
        const SEPARATE_QKV: &[Projection] = &[
            (Q, "self_attn.q_proj", Width::Stream, Width::Query),
            (K, "self_attn.k_proj", Width::Stream, Width::Key),
            (V, "self_attn.v_proj", Width::Stream, Width::Key),
            (O, "self_attn.o_proj", Width::Query, Width::Stream),
        ];
        const FUSED_GATE_UP: &[Projection] = &[
            (Up, "mlp.gate_up_proj", Width::Stream, Width::GateUp),
            (Down, "mlp.down_proj", Width::Mlp, Width::Stream),
        ];
        match self {
            Projections::Separate => [
                SEPARATE_QKV,
                &[
                    (Gate, "mlp.gate_proj", Width::Stream, Width::Mlp),
                    (Up, "mlp.up_proj", Width::Stream, Width::Mlp),
                    (Down, "mlp.down_proj", Width::Mlp, Width::Stream),
                ],
            ],
            Projections::Fused => [
                &[
                    (Qkv, "self_attn.qkv_proj", Width::Stream, Width::Qkv),
                    (O, "self_attn.o_proj", Width::Query, Width::Stream),
                ],
                FUSED_GATE_UP,
            ],
            Projections::FusedGateUp => [SEPARATE_QKV, FUSED_GATE_UP],
            Projections::SharedMlp => [
                SEPARATE_QKV,
                &[
                    (Up, "shared_mlp.input_linear", Width::Stream, Width::GateUp),
                    (Down, "shared_mlp.output_linear", Width::Mlp, Width::Stream),
                ],
            ],
            Projections::Conv1d => [
                &[
                    (Qkv, "attn.c_attn", Width::Stream, Width::Qkv),
                    (O, "attn.c_proj", Width::Query, Width::Stream),
                ],
                &[
                    (Up, "mlp.c_fc", Width::Stream, Width::Mlp),
                    (Down, "mlp.c_proj", Width::Mlp, Width::Stream),
                ],
            ],
        }
    }
}

impl ModelSpec {
    /// Columns of what the linear of role up makes: F, or those of gate and up.
    pub fn up_width(&self) -> usize {
        self.width(match self.projections.mlp() {
            MlpKind::FusedGated => Width::GateUp,
            MlpKind::Plain | MlpKind::Gated => Width::Mlp,
        })
    }

    /// The linears of block `layer`, in forward order.
    pub fn linears(&self, layer: usize) -> Vec<LinearSpec> {
        let prefix = self.layer_prefix(layer);
        let linear = |&(role, name, input, output): &Projection| LinearSpec {
            role,
            module: format!("{prefix}.{name}"),
            in_features: self.width(input),
            out_features: self.width(output),
            bias: self.has_bias(role),
        };
        self.projections.of_halves().into_iter().flatten().map(linear).collect()
    }

    fn has_bias(&self, role: LinearRole) -> bool {
        match role {
            LinearRole::Qkv | LinearRole::Q | LinearRole::K | LinearRole::V => self.qkv_bias,
            LinearRole::O => self.output_bias,
            LinearRole::Gate | LinearRole::Up | LinearRole::Down => self.mlp_bias,
        }
    }

    fn width(&self, width: Width) -> usize {
        match width {
            Width::Stream => self.hidden_size,
            Width::Query => self.q_width(),
            Width::Key => self.kv_width(),
            Width::Qkv => self.q_width() + 2 * self.kv_width(),
            Width::Mlp => self.intermediate_size,
            Width::GateUp => 2 * self.intermediate_size,
        }
    }
}
