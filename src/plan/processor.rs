//! What a run computes on.

use serde::{Deserialize, Serialize};

/// What a run computes on, and in whose memory its weights and buffers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Processor {
    /// The CPU: frozen weights are in the program's memory, as they are stored.
    #[default]
    Cpu,
    /// A GPU: frozen matrices are in its memory, in bf16 if they are not packed.
    Gpu,
}
