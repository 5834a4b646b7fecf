//! Where a GPU's input embedding is: a pass reads a few rows of it, which can come over the bus.

use clap::ValueEnum;

use crate::error::{Error, Result};
use crate::model::spec::ModelSpec;

/// Where a GPU's embedding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum EmbeddingPlace {
    /// On the GPU, or on the host where that lets more blocks keep their activations
    #[default]
    Auto,
    /// In its memory
    Gpu,
    /// In pinned memory of the host, of which kernels read the rows of a pass: 2·D bytes a token
    Host,
}

impl EmbeddingPlace {
    /// Whether a model's embedding can be there.
    ///
    /// # Errors
    /// `Usage` on the host, where it is the head, too, which is read whole.
    pub fn check(self, spec: &ModelSpec) -> Result<()> {
        if self != EmbeddingPlace::Host || !spec.tie_word_embeddings {
            return Ok(());
        }
        Err(Error::usage("`--embedding host`: this model's embedding is its head, too")
            .hint("leave it on the GPU: each step reads all of it"))
    }
}
