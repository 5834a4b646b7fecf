//! Where a GPU's embedding and head are: a pass reads a few rows of one, which can come over the bus,
//! and all of the other, which can come a tile at a time.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::spec::ModelSpec;

/// Where a GPU's embedding and head may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum EmbeddingPlace {
    /// On the GPU, or on the host if that makes a faster plan fit
    #[default]
    Auto,
    /// In GPU memory
    Gpu,
    /// The input embedding in pinned host memory, read a row (2·D bytes) per token
    HostInput,
    /// Embedding and head in pinned host memory: the head is copied in tiles of the vocabulary, twice per
    /// 2,048 trained tokens or fewer
    Host,
}

/// What of embedding and head is in pinned memory of the host, beside a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum OnHost {
    /// Nothing: both are on the GPU.
    #[default]
    #[serde(rename = "gpu")]
    Nothing,
    /// The input embedding, where it is not the head, too.
    #[serde(rename = "host-input")]
    Input,
    /// Embedding and head.
    #[serde(rename = "host")]
    All,
}

impl OnHost {
    /// The value of `--embedding` that asks for it.
    pub(super) fn asked_by(self) -> EmbeddingPlace {
        match self {
            OnHost::Nothing => EmbeddingPlace::Gpu,
            OnHost::Input => EmbeddingPlace::HostInput,
            OnHost::All => EmbeddingPlace::Host,
        }
    }

    /// Checks that a model can have this on the host.
    ///
    /// # Errors
    /// `Usage` for the input embedding alone, where it is the head, too.
    pub fn check(self, spec: &ModelSpec) -> Result<()> {
        if self != OnHost::Input || !spec.tie_word_embeddings {
            return Ok(());
        }
        let what = "`--embedding host-input`: this model's embedding is its head, too";
        Err(Error::usage(what).hint("`--embedding host` moves both"))
    }

    /// What is on the host, for people; `None` where all is on the GPU.
    pub fn in_words(self) -> Option<&'static str> {
        match self {
            OnHost::Nothing => None,
            OnHost::Input => Some("the input embedding on the host"),
            OnHost::All => Some("embedding and head on the host"),
        }
    }
}

impl EmbeddingPlace {
    /// What is on the host where there is no plan to be made.
    pub fn on_host(self) -> OnHost {
        match self {
            EmbeddingPlace::Auto | EmbeddingPlace::Gpu => OnHost::Nothing,
            EmbeddingPlace::HostInput => OnHost::Input,
            EmbeddingPlace::Host => OnHost::All,
        }
    }
}
