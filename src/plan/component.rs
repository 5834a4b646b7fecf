//! The parts of a run that buffers count to.

/// What a region is for: the rows of the memory report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Component {
    /// bf16 LoRA matrices that the forward pass reads.
    AdapterWorking,
    /// f32 LoRA matrices that the optimizer updates.
    AdapterMaster,
    /// f32 gradients of the LoRA matrices.
    AdapterGradients,
    /// AdamW's first and second moments in f32.
    OptimizerMoments,
    /// AdamW's first and second moments in 8 bits, with their scales.
    PackedMoments,
    /// Inputs of all blocks.
    BlockInputs,
    /// Activations that a layer keeps until its backward pass: all of them, or what attention made, also in
    /// the slots through which offloaded layers take turns.
    KeptActivations,
    /// Activations of the layer at work, which the next one overwrites: layers that recompute take turns
    /// there, and all layers where nothing is trained.
    RecomputeWorkspace,
    /// Gradients and temporaries of one block.
    BlockWorkspace,
    /// Score tiles of attention, for each thread.
    AttentionWorkspace,
    /// Logits of one chunk, their rows of hidden states and gradients.
    LogitsChunk,
    /// Tables of cos and sin.
    RotaryTables,
    /// Keys and values of generated text.
    KvCache,
    /// Frozen matrices in bf16 on a GPU: the one at work and the next, and those of blocks that stay
    /// dequantized.
    DequantizedWeight,
    /// The workspace of cuBLAS on a GPU.
    LibraryWorkspace,
    /// Token ids and rows that a GPU reads.
    Uploads,
}

impl Component {
    /// Label in tables.
    pub fn label(self) -> &'static str {
        match self {
            Component::AdapterWorking => "LoRA weights (bf16)",
            Component::AdapterMaster => "LoRA master (f32)",
            Component::AdapterGradients => "LoRA gradients (f32)",
            Component::OptimizerMoments => "AdamW moments (f32)",
            Component::PackedMoments => "AdamW moments (8-bit)",
            Component::BlockInputs => "block inputs",
            Component::KeptActivations => "kept activations",
            Component::RecomputeWorkspace => "recompute workspace",
            Component::BlockWorkspace => "block workspace",
            Component::AttentionWorkspace => "attention workspace",
            Component::LogitsChunk => "logits chunk",
            Component::RotaryTables => "rotary tables",
            Component::KvCache => "key/value cache",
            Component::DequantizedWeight => "dequantized matrices",
            Component::LibraryWorkspace => "cuBLAS workspace",
            Component::Uploads => "token ids and rows",
        }
    }
}
